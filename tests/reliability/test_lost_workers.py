"""Workers that are killed, crash or hang: the result is that of a run in which nothing happened."""

import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from chain import Chain, chain, make_model, seed_of, state_hash
from faulty import SlowEnv, WithHelper, make_faulty
from gymnasium.wrappers import TimeLimit

from eggroll_rl.dispatch import RETRIES, dispatch
from eggroll_rl.errors import EggrollError, EpisodeError, TooManyFailuresError, WorkerDiedError

HERE = Path(__file__).parent
N_GENERATIONS = 4


@pytest.fixture(scope="module")
def clean():
    return chain(n_workers=0, n_generations=N_GENERATIONS)


def workers():
    return psutil.Process().children()


def kill(n, seed=0):
    for process in random.Random(seed).sample(workers(), n):
        process.kill()


@pytest.mark.promise("R1")
@pytest.mark.parametrize("fault", ["kill", "segv", "exit"])
def test_a_worker_that_ends_once_in_the_middle_changes_nothing(fault, clean, tmp_path):
    env = make_faulty(fault, seed=seed_of(5, generation=1), times=1, folder=tmp_path)
    assert chain(env, n_generations=N_GENERATIONS) == clean
    assert list(tmp_path.iterdir())  # the fault did happen


@pytest.mark.promise("R1")
@pytest.mark.reliability
@pytest.mark.parametrize("place", ["init", "reset", "step", "last step"])
@pytest.mark.parametrize(("times", "n_workers"), [(1, 1), (3, 2)])
def test_wherever_and_however_often_a_worker_ends_nothing_changes(place, times, n_workers, clean, tmp_path):
    at = -1 if place == "last step" else 2
    env = not_here(make_faulty("kill", place=place.split()[-1], at=at, times=times, folder=tmp_path))
    assert chain(env, n_workers=n_workers, n_generations=N_GENERATIONS) == clean


class not_here:
    """Make envs without faults in the process that trains."""

    def __init__(self, make):
        self.make, self.pid = make, os.getpid()

    def __call__(self):
        if os.getpid() != self.pid:
            return self.make()
        return make_faulty("nothing")()


@pytest.mark.promise("R1")
@pytest.mark.reliability
@pytest.mark.parametrize("n_killed", [1, 3])
def test_workers_killed_while_they_wait_for_the_next_generation(n_killed, clean):
    assert chain(n_workers=3, n_generations=N_GENERATIONS, meanwhile=lambda g: g < 3 and kill(n_killed, g)) == clean


@pytest.mark.promise("R1")
@pytest.mark.reliability
def test_without_another_try_a_killed_worker_ends_the_run(cells, tmp_path, monkeypatch, clean):
    monkeypatch.setattr("eggroll_rl.workers.dispatch", lambda *args: dispatch(*args, retries=0))
    with cells.control("no retries"):
        env = make_faulty("kill", seed=seed_of(5, generation=1), times=1, folder=tmp_path)
        try:
            found = chain(env, n_generations=N_GENERATIONS)
        except WorkerDiedError:
            found = None
        assert found == clean


def kills(cells, n_kills, seed):
    """Kill workers at random times while a model trains; every kill is a cell."""
    generator = random.Random(seed)
    happened, ended = [], threading.Event()

    class UntilKilled(Chain):
        def on_generation_end(self):
            super().on_generation_end()
            return len(happened) < n_kills

    callback = UntilKilled(math.inf)

    def killer():
        while len(happened) < n_kills and not ended.wait(generator.uniform(0.0, 2.0)):
            generation, alive = len(callback.hashes), workers()
            if alive and generation:
                generator.choice(alive).kill()
                at = time.perf_counter()
                while len(callback.hashes) < generation + 3 and not ended.is_set():
                    time.sleep(0.01)
                happened.append((generation, time.perf_counter() - at))

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        make_model().learn(10**9, callback, log_interval=None)
    finally:
        ended.set()
        thread.join()
    expected = chain(n_workers=0, n_generations=len(callback.hashes))
    for number, (generation, seconds) in enumerate(happened):
        same = callback.hashes[generation : generation + 3] == expected[generation : generation + 3]
        cells.record(f"kill {number}, generation {generation}", None if same else "another hash", seconds)
    cells.record("final hash", None if callback.hashes == expected else "another hash", 0.0)


@pytest.mark.promise("R1")
@pytest.mark.reliability
def test_forty_random_kills(cells):
    kills(cells, 40, seed=0)


@pytest.mark.promise("R1")
@pytest.mark.soak
def test_two_hundred_random_kills(cells):
    kills(cells, 200, seed=1)


# The same worker again and again -----------------------------------------------------------------------


@pytest.mark.promise("R2")
@pytest.mark.parametrize("fault", ["segv", *(pytest.param(f, marks=pytest.mark.reliability) for f in ("kill", "exit"))])
def test_a_member_that_ends_every_worker_is_named_after_bounded_tries(fault, tmp_path):
    what = {"segv": "signal SIGSEGV", "kill": "signal SIGKILL", "exit": "exit status 9"}[fault]
    env = make_faulty(fault, seed=seed_of(6), times=99, folder=tmp_path)
    model = make_model(env)
    before = state_hash(model)
    with pytest.raises(WorkerDiedError) as caught:
        model.learn(1000, log_interval=None)
    assert f"generation 0, member 6: the worker process ended ({what}), {RETRIES + 1} times" in str(caught.value)
    assert ("faulty.py" in str(caught.value)) == (fault == "segv")  # the stack, where there is somebody to write it
    assert len(list(tmp_path.iterdir())) == RETRIES + 1
    assert state_hash(model) == before


@pytest.mark.promise("R2")
@pytest.mark.reliability
def test_a_member_that_ends_every_worker_is_ranked_worst(clean):
    seed = seed_of(6)
    model = make_model(make_faulty("kill", seed=seed), on_bad_member="worst")
    model.learn(1, log_interval=None)
    assert model.bad_members == {"died": 2}  # both of the pair
    other = make_model(make_faulty("nan", at=1, seed=seed), on_bad_member="worst")
    other.learn(1, log_interval=None)
    same = [
        {name: t for name, t in m.policy.state_dict().items() if name.startswith("network")} for m in (model, other)
    ]
    assert all((same[0][name] == same[1][name]).all() for name in same[0])


@pytest.mark.promise("R2")
@pytest.mark.reliability
def test_when_all_members_end_their_worker_it_is_said_and_no_more_is_tried():
    model = make_model(make_faulty("kill"), on_bad_member="worst", max_bad_fraction=0.2)
    before = state_hash(model)
    with pytest.raises(TooManyFailuresError, match="3 members ended their process"):
        model.learn(1, log_interval=None)
    assert state_hash(model) == before


@pytest.mark.promise("R2")
@pytest.mark.reliability
def test_workers_that_cannot_be_started_are_given_up():
    with pytest.raises(WorkerDiedError, match=rf"ended {RETRIES + 1} times making its envs: .*SIGKILL"):
        chain(not_here(make_faulty("kill", place="init")))


# Workers that hang --------------------------------------------------------------------------------------


@pytest.mark.promise("R20")
@pytest.mark.parametrize(
    "fault", ["hang_in_c", *(pytest.param(f, marks=pytest.mark.reliability) for f in ("hang", "stop"))]
)
def test_a_worker_that_is_stuck_once_is_replaced(fault, clean, tmp_path):
    env = make_faulty(fault, seed=seed_of(5, generation=1), times=1, folder=tmp_path)
    assert chain(env, n_generations=N_GENERATIONS, step_timeout=2.0) == clean


@pytest.mark.promise("R20")
@pytest.mark.reliability
@pytest.mark.parametrize("place", ["init", "reset", "step"])
def test_a_member_that_is_always_stuck_is_named_with_the_stack(place, monkeypatch):
    monkeypatch.setattr("eggroll_rl.processes._IMPORT_SECONDS", 10.0)
    what = "making its envs" if place == "init" else "generation 0, member 6: its env made no step for 1 s, 4 times"
    seed = None if place == "init" else seed_of(6)
    with pytest.raises(WorkerDiedError, match=what) as caught:
        chain(not_here(make_faulty("hang", place=place, seed=seed)), step_timeout=1.0, n_workers=1)
    assert "faulty.py" in str(caught.value)


@pytest.mark.promise("R20")
@pytest.mark.reliability
def test_without_a_limit_a_stuck_worker_is_waited_for(cells, tmp_path):
    code = f"""
        from chain import chain, seed_of
        from faulty import make_faulty
        import math
        chain(make_faulty("hang", seed=seed_of(5), times=1, folder={str(tmp_path)!r}), step_timeout=math.inf)
    """
    with cells.control("no time limit"):
        process = child(code)
        try:
            assert process.wait(15) == 0
        except subprocess.TimeoutExpired:
            raise AssertionError("it still waits") from None
        finally:
            process.kill()
            process.wait()


def child(code, **kwargs):
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, **kwargs)


@pytest.mark.promise("R20")
@pytest.mark.reliability
def test_envs_that_are_slow_are_not_stuck(caplog):
    with caplog.at_level("WARNING", logger="eggroll_rl"):
        chain(lambda: TimeLimit(SlowEnv(0.3), 3), n_workers=3, n_generations=1, step_timeout=1.0)
    assert not caplog.records  # a step of a slice takes 1.2 s


@pytest.mark.promise("R20")
@pytest.mark.reliability
def test_a_large_policy_needs_no_longer_limit(caplog):
    with caplog.at_level("WARNING", logger="eggroll_rl"):
        chain(n_generations=2, step_timeout=1.0, policy_kwargs={"net_arch": [512, 512]})
    assert not caplog.records


# The parent ---------------------------------------------------------------------------------------------


@pytest.mark.promise("R7")
@pytest.mark.reliability
@pytest.mark.parametrize(
    ("fault", "signum"),
    [("nothing", signal.SIGTERM), *((f, signal.SIGKILL) for f in ("nothing", "hang", "hang_in_c", "stop"))],
)
def test_workers_leave_when_their_parent_is_gone(cells, fault, signum, tmp_path):
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        env = f"make_faulty({fault!r}, times=9, folder={str(folder)!r})"
        process = child(f"from chain import chain; from faulty import make_faulty; chain({env}, n_generations=10**9)")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            started = psutil.Process(process.pid).children()
            ready = fault == "nothing" or any(folder.iterdir())
            if len(started) == 2 and ready and all(w.cpu_times().user > 0.5 for w in started):
                break
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signum)
        process.wait()
        began = time.monotonic()
        while alive := [w for w in started if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]:
            if time.monotonic() > began + 5:
                break
            time.sleep(0.01)
        for worker in alive:
            worker.kill()
        cells.record(f"{fault}, {signum.name}, {i}", f"left: {alive}" if alive else None, time.monotonic() - began)


@pytest.mark.promise("R7")
@pytest.mark.reliability
def test_workers_leave_when_their_parent_is_gone_though_a_fork_of_it_lives():
    code = """
        import os, time
        from chain import chain
        def fork(generation):
            if generation == 2 and os.fork() == 0:
                print(os.getpid(), flush=True)
                time.sleep(60)
                os._exit(0)
        chain(n_generations=10**9, meanwhile=fork)
    """
    process = child(code, stdout=subprocess.PIPE, text=True)
    fork = int(process.stdout.readline())
    started = [c for c in psutil.Process(process.pid).children() if c.pid != fork]
    process.kill()
    process.wait()
    process.stdout.close()
    try:
        _, alive = psutil.wait_procs(started, timeout=5)
        assert len(started) == 2
        assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]
    finally:
        psutil.Process(fork).kill()


@pytest.mark.promise("R7")
@pytest.mark.reliability
@pytest.mark.parametrize("how", ["finished", "killed"])
def test_what_an_env_has_started_ends_with_its_worker(how, tmp_path):
    seed = seed_of(5, generation=1) if how == "killed" else -1
    fault = {"fault": "kill", "seed": seed, "times": 1, "folder": tmp_path, "closes": how == "finished"}
    chain(not_here(lambda: TimeLimit(WithHelper(**fault), 50)))
    pids = [int(path.name.split("-")[1]) for path in tmp_path.glob("helper-*")]
    assert len(pids) >= 8
    deadline = time.monotonic() + 5
    while left := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert len(list(tmp_path.glob("closed-*"))) == (8 if how == "finished" else 0)


# Env functions that cannot be sent ----------------------------------------------------------------------


class Explosive:
    """Does something while it is pickled or unpickled."""

    def __init__(self, fault, when):
        self.fault, self.when = fault, when

    def __call__(self):
        return make_faulty("nothing")()

    def __reduce__(self):
        from faulty import CALLS

        if self.when == "pickling":
            CALLS[self.fault]()
        return (explode, (self.fault,))


def explode(fault):
    from faulty import CALLS

    CALLS[fault]()


@pytest.mark.promise("R26")
@pytest.mark.reliability
@pytest.mark.parametrize(
    ("fault", "when"),
    [("ValueError", "pickling"), *((f, "unpickling") for f in ("ValueError", "SystemExit", "kill", "segv", "exit"))],
)
def test_an_env_function_that_fails_on_its_way_to_the_worker_is_named(fault, when):
    what = "use n_workers=0" if when == "pickling" else "it broke" if fault[0].isupper() else "making its envs"
    started = time.monotonic()
    with pytest.raises(EggrollError, match=what):
        chain(Explosive(fault, when))
    assert time.monotonic() - started < 60


@pytest.mark.promise("R26")
@pytest.mark.reliability
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_training_in_a_process_of_multiprocessing_is_the_same(method, clean):
    # A script by -c: without a file, without a __main__ guard.
    code = f"""
        import multiprocessing
        from chain import chain
        if __name__ == "__main__":
            import chain as module
            context = multiprocessing.get_context({method!r})
            ours, theirs = context.Pipe()
            process = context.Process(target=module.send_chain, args=(theirs, {N_GENERATIONS}))
            process.start()
            print(*ours.recv(), sep="\\n")
            process.join()
    """
    process = child(code, stdout=subprocess.PIPE, text=True)
    printed, _ = process.communicate(timeout=120)
    assert printed.split() == clean


@pytest.mark.promise("R3")
@pytest.mark.reliability
def test_an_error_does_not_wait_for_other_workers(tmp_path):
    env = make_faulty("ValueError", seed=seed_of(0))
    started = time.monotonic()
    with pytest.raises(EpisodeError):
        chain(env)
    assert time.monotonic() - started < 60


@pytest.mark.promise("R2")
@pytest.mark.reliability
def test_workers_that_cannot_be_started_again_are_done_without(tmp_path, clean, caplog):
    """All are made once; from then on only the process whose worker was killed fails, again and again."""
    make = make_faulty("kill", place="init", times=8, folder=tmp_path)

    def later():
        if (tmp_path / "later").exists():
            make()
        return make_faulty("nothing")()

    def meanwhile(generation):
        if generation == 1:
            (tmp_path / "later").touch()
            kill(1)

    assert chain(not_here(later), n_generations=N_GENERATIONS, meanwhile=meanwhile) == clean
    (tmp_path / "later").unlink()
