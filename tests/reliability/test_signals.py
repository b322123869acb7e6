"""A signal saves, stops and leaves nothing behind; a command ends what it started, however it ends itself."""

import os
import random
import re
import signal
import threading
import time

import psutil
import pytest
from tiny_runs import EPISODES, command_line, fork, session_of, state_of, tiny, wait

from eggroll_rl import compare, signals, training
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.config import RunConfig
from eggroll_rl.envs import read_toml
from eggroll_rl.errors import RunFolderError
from eggroll_rl.training import Interrupted, load_run_config, train

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
KINDS = [(signum, group) for signum in STATUS for group in (False, True)]
# What is said of the way so far, and not of the end.
_ON_THE_WAY = re.compile(r" +[\d,]+ steps .*(return|ep_rew_mean) ")


def send(pid, signum, group):
    os.killpg(pid, signum) if group else os.kill(pid, signum)


class Output:
    """A pipe for what a copy of this process writes."""

    def __enter__(self):
        self.read, self.write = os.pipe()
        return self

    def __exit__(self, *error):
        os.close(self.read)

    def lines(self):
        """Return what was written; to be called once, when all who write are gone."""
        os.close(self.write)
        with os.fdopen(os.dup(self.read), errors="replace") as file:
            return file.read().splitlines()


def nobody_left(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while session_of(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not session_of(pid)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Return a preset of a run that takes a second or two, and its folder."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "preset.toml").write_text(tiny(EPISODES, 4000, eval_freq=400).to_toml())
    train(load_run_config_of(folder), folder / "whole", progress_bar=False)
    return folder / "preset.toml", folder / "whole"


def load_run_config_of(folder):
    return RunConfig.from_dict(read_toml(folder / "preset.toml"), "preset.toml")


def started(folder):
    """Wait until there is something to resume: before that a signal ends the command, with nothing to keep."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (folder / "checkpoints").is_dir() and list((folder / "checkpoints").glob("generation-*")):
            return
        time.sleep(0.001)
    raise AssertionError("the run did not start")


def interrupt(preset, folder, signum, group, seconds, n_workers):
    """Send a signal at a random time of a run, and return the exit status and what was said at the end."""
    with Output() as output:
        words = ("train", preset, "--output", folder, "--n-workers", n_workers)
        pid = fork(command_line, *words, output=output.write)
        started(folder)
        time.sleep(seconds)
        sent = time.monotonic()
        send(pid, signum, group)
        status = wait(pid)
        took = time.monotonic() - sent
        assert nobody_left(pid), session_of(pid)
        return status, [line for line in output.lines() if not _ON_THE_WAY.match(line)], took


def check_interrupted(preset, whole, folder, kind, seconds, n_workers=0, resume=False):
    shared = sorted(os.listdir("/dev/shm"))
    status, said, took = interrupt(preset, folder, *kind, seconds, n_workers)
    assert status == STATUS[kind[0]], (status, said)
    assert len(said) == 1 and said[0].startswith("stopped and saved; continue with: eggroll-rl train "), said
    assert sorted(os.listdir("/dev/shm")) == shared
    assert not list(folder.rglob("*.tmp"))
    assert took < 5
    assert newest_checkpoint(folder)[3] == []
    if resume:
        train(load_run_config(folder), folder, resume=True, progress_bar=False)
        assert state_of(folder) == state_of(whole)


@pytest.mark.promise("R6")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{'group' if kind[1] else 'process'}")
def test_in_the_middle_of_a_run(kind, long_run, tmp_path, cells):
    with cells.cell(f"{kind[0].name} to the {'group' if kind[1] else 'process'}"):
        check_interrupted(*long_run, tmp_path / "run", kind, 0.05, resume=kind == KINDS[0])


@pytest.mark.promise("R6")
@pytest.mark.reliability
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{'group' if kind[1] else 'process'}")
def test_forty_signals_at_random_times(kind, long_run, tmp_path, cells):
    """Five of them with two workers, every eighth resumed to its end."""
    rng = random.Random(KINDS.index(kind))
    for number in range(40):
        n_workers = 2 if number % 8 == 7 else 0
        with cells.cell(f"signal {number}, {n_workers} workers"):
            seconds = rng.uniform(0, 0.4)
            folder = tmp_path / f"run{number}"
            check_interrupted(*long_run, folder, kind, seconds, n_workers, resume=number % 8 in (0, 7))


@pytest.mark.promise("R6")
def test_a_run_that_does_not_save_at_a_signal_is_noticed(long_run, tmp_path, cells, monkeypatch):
    def without_saving(self):
        raise SystemExit(1)

    monkeypatch.setattr(training.RunRecorder, "_stop_if_asked", lambda self: self._pending and without_saving(self))
    with cells.control("SIGTERM"):
        check_interrupted(*long_run, tmp_path / "run", (signal.SIGTERM, False), 0.1)


@pytest.mark.promise("R6")
@pytest.mark.parametrize("signum", STATUS)
def test_before_anything_was_saved(signum, long_run, tmp_path, cells, monkeypatch):
    """While the model is made: the status is the same, and nothing is there to be resumed."""
    monkeypatch.setattr(training, "_model", lambda *args: time.sleep(60))
    with cells.cell(signum.name), Output() as output:
        pid = fork(command_line, "train", long_run[0], "--output", tmp_path / "run", output=output.write)
        time.sleep(0.5)
        send(pid, signum, False)
        assert wait(pid) == STATUS[signum]
        assert not (tmp_path / "run").exists()
        assert "".join(output.lines()).strip() == ""


@pytest.mark.promise("R6")
@pytest.mark.reliability
@pytest.mark.parametrize("signum", STATUS)
def test_while_the_final_policy_is_evaluated(signum, long_run, tmp_path, cells, monkeypatch):
    """Everything is saved by then: a resume evaluates again."""
    preset, whole = long_run
    marker, made = tmp_path / "evaluating", training.RunRecorder._evaluate

    def slow(self, policy, seed, n_episodes):
        if seed == training.REPORT_SEED:
            marker.touch()
            time.sleep(60)
        return made(self, policy, seed, n_episodes)

    monkeypatch.setattr(training.RunRecorder, "_evaluate", slow)
    with cells.cell(signum.name), Output() as output:
        pid = fork(command_line, "train", preset, "--output", tmp_path / "run", output=output.write)
        while not marker.exists():
            time.sleep(0.01)
        send(pid, signum, False)
        assert wait(pid) == STATUS[signum]
        assert output.lines()[-1].startswith("stopped and saved")
        monkeypatch.undo()
        train(load_run_config(tmp_path / "run"), tmp_path / "run", resume=True, progress_bar=False)
        assert state_of(tmp_path / "run") == state_of(whole)


@pytest.mark.promise("R6")
@pytest.mark.parametrize("signum", STATUS)
def test_the_second_signal_ends_at_once(signum, long_run, tmp_path, cells, monkeypatch):
    """The first waits for the end of an evaluation in training, of a minute here."""
    marker = tmp_path / "evaluating"
    monkeypatch.setattr(training.RunRecorder, "evaluate", lambda self: [marker.touch(), time.sleep(60)])
    with cells.cell(signum.name), Output() as output:
        pid = fork(command_line, "train", long_run[0], "--output", tmp_path / "run", output=output.write)
        while not marker.exists():
            time.sleep(0.01)
        send(pid, signum, False)
        time.sleep(0.3)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the first did not wait for a safe point"
        sent = time.monotonic()
        send(pid, signum, False)
        assert wait(pid) == STATUS[signum] and time.monotonic() - sent < 1
        assert newest_checkpoint(tmp_path / "run")[3] == [] and nobody_left(pid)
        assert "Traceback" not in "".join(output.lines())


@pytest.mark.promise("R6")
@pytest.mark.parametrize("n_workers", [0, pytest.param(1, marks=pytest.mark.reliability)])
@pytest.mark.parametrize("signum", STATUS)
def test_in_a_process_that_goes_on(signum, n_workers, tmp_path, cells):
    """As in a notebook: handlers are put back, and no descriptor, process or thread stays."""
    process, threads = psutil.Process(), threading.active_count()
    mine = {number: signal.signal(number, lambda *args: None) for number in STATUS}
    before = {number: signal.getsignal(number) for number in STATUS}
    try:
        n_descriptors = process.num_fds()

        def strike():
            started(tmp_path / "run")
            time.sleep(0.1 if n_workers == 0 else 5.0)
            os.kill(os.getpid(), signum)

        thread = threading.Thread(target=strike)
        thread.start()
        with cells.cell(f"{signum.name}, {n_workers} workers"):
            with pytest.raises(Interrupted) as caught:
                train(tiny(steps=10**9, n_workers=n_workers), tmp_path / "run", progress_bar=False)
            thread.join()
            assert caught.value.signum == signum
            assert {number: signal.getsignal(number) for number in STATUS} == before
            assert process.num_fds() == n_descriptors and threading.active_count() == threads
            assert not process.children(recursive=True)
            assert newest_checkpoint(tmp_path / "run")[2]["generation"] >= 0
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)


@pytest.mark.promise("R6")
def test_from_another_thread_no_handler_is_touched(tmp_path, cells):
    before = {number: signal.getsignal(number) for number in STATUS}
    seen = []

    def run():
        train(tiny(steps=100), tmp_path / "run", progress_bar=False)
        with signals.sigterm_raised():
            seen.append({number: signal.getsignal(number) for number in STATUS})

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with cells.cell("learn in a thread"):
        assert seen == [before] and (tmp_path / "run" / "results.json").exists()


@pytest.mark.promise("R6")
def test_what_cannot_be_saved_is_not_said_to_be(long_run, tmp_path, cells, monkeypatch):
    made = training.save_checkpoint

    def full(folder, tensors, about, keep):
        if about["generation"] > 2:
            raise RunFolderError(f"cannot write {folder}: No space left on device")
        return made(folder, tensors, about, keep)

    config = load_run_config_of(long_run[0].parent)
    config.checkpoint_every = 1000
    (tmp_path / "preset.toml").write_text(config.to_toml())
    monkeypatch.setattr(training, "save_checkpoint", full)
    with cells.cell("a full disk"), Output() as output:
        pid = fork(command_line, "train", tmp_path / "preset.toml", "--output", tmp_path / "run", output=output.write)
        started(tmp_path / "run")
        while not (tmp_path / "run" / "progress.csv").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        send(pid, signal.SIGTERM, False)
        assert wait(pid) == 2
        assert output.lines()[-1] == f"error: cannot write {tmp_path / 'run'}: No space left on device"


# ---------------------------------------------------------------------------------------------------------
# compare and tune

COMPARED = ("--algos", "eggroll", "--seeds", 1, "--seconds", 600, "--evaluations", 2, "--n-cores", 1)


def workers_of(pid):
    return [p for p in psutil.Process(pid).children(recursive=True) if "eggroll_rl.processes" in " ".join(p.cmdline())]


@pytest.fixture
def comparison(tmp_path):
    """Return a command that compares, in a copy of this process, its run and everybody whom that started."""
    pytest.importorskip("sb3_contrib")
    config = RunConfig("CartPole-v1", eggroll={**EPISODES})
    (tmp_path / "preset.toml").write_text(config.to_toml())
    words = ("compare", tmp_path / "preset.toml", *COMPARED, "--output", tmp_path / "out")
    with Output() as output:
        pid = fork(command_line, *words, output=output.write)
        deadline = time.monotonic() + 90
        while not workers_of(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert workers_of(pid), "the comparison did not start"
        time.sleep(0.5)
        (run,) = psutil.Process(pid).children()
        yield pid, [run, *run.children(recursive=True)], output


def gone(processes, seconds=5.0):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.promise("R6")
@pytest.mark.reliability
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_takes_its_run_with_it(signum, comparison, tmp_path, cells):
    pid, theirs, output = comparison
    with cells.cell(signum.name):
        assert len(theirs) >= 2
        send(pid, signum, False)
        assert wait(pid) == STATUS.get(signum, -signal.SIGKILL)
        assert gone(theirs)
        said = [line for line in output.lines() if line.startswith("stopped") or "Traceback" in line]
        assert said == ([] if signum == signal.SIGKILL else ["stopped; the same command goes on with what is left"])
        assert not list((tmp_path / "out").rglob("results.json"))


@pytest.fixture
def alone(monkeypatch):
    """Let runs of a comparison not watch their parent."""
    monkeypatch.setattr(compare, "WITH_PARENT", "--alone")


@pytest.mark.promise("R6")
@pytest.mark.reliability
def test_a_run_that_does_not_watch_its_parent_is_noticed(alone, comparison, cells):
    pid, theirs, output = comparison
    send(pid, signal.SIGKILL, False)
    assert wait(pid) == -signal.SIGKILL
    with cells.control("SIGKILL"):
        assert gone(theirs)
    theirs[0].kill()
    assert gone(theirs)
    output.lines()


@pytest.mark.promise("R6")
@pytest.mark.reliability
@pytest.mark.parametrize("signum", STATUS)
def test_a_search_stops_with_one_line(signum, tmp_path, cells):
    pytest.importorskip("optuna")
    (tmp_path / "preset.toml").write_text(RunConfig("CartPole-v1", eggroll={**EPISODES}).to_toml())
    words = ("tune", tmp_path / "preset.toml", "--fitness", "episode", "--seeds", 1, "--evaluations", 1,
             "--eval-episodes", 1, "--n-cores", 1, "--output", tmp_path / "study")  # fmt: skip
    with cells.cell(signum.name), Output() as output:
        pid = fork(command_line, *words, "--trials", 1000, "--timesteps", 100_000, output=output.write)
        while not workers_of(pid):  # the first trial's
            time.sleep(0.02)
        theirs = psutil.Process(pid).children(recursive=True)
        send(pid, signum, False)
        assert wait(pid) == STATUS[signum] and gone(theirs)
        said = output.lines()
        assert said[-1] == "stopped; the same command goes on" and "Traceback" not in "".join(said)
