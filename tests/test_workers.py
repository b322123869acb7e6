import hashlib
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import toy

from eggroll_rl import EGGROLL
from eggroll_rl.errors import EggrollError, EpisodeError, WorkerDiedError


def digest(model):
    """Hash everything that training changes: parameters, normalizer, optimizer."""
    h = hashlib.sha256()
    for name, tensor in sorted(model.policy.state_dict().items()):
        h.update(name.encode() + tensor.numpy().tobytes())
    for index, entry in sorted(model.policy.optimizer.state_dict()["state"].items()):
        for name, value in sorted(entry.items()):
            h.update(f"{index}{name}".encode() + np.asarray(value).tobytes())
    return h.hexdigest()


def trained(n_workers, env=toy.make_target, seed=0, steps=1500, **settings):
    settings = {"population_size": 12, "slice_size": 4, "policy_kwargs": {"net_arch": [8]}, **settings}
    model = EGGROLL("MlpPolicy", env, seed=seed, n_workers=n_workers, **settings)
    return model.learn(steps, log_interval=None)


@pytest.mark.promise("R11")
def test_the_result_is_the_same_to_the_bit_for_any_number_of_workers():
    digests = {n: digest(trained(n)) for n in (0, 1, 2, 3)}
    assert len(set(digests.values())) == 1
    assert digest(trained(0)) == digests[0]
    assert digest(trained(0, seed=1)) != digests[0]


@pytest.mark.promise("R11")
def test_half_cheetah_too():
    settings = {"max_episode_steps": 60, "steps": 2000, "population_size": 16, "slice_size": 8}
    digests = {digest(trained(n, "HalfCheetah-v5", **settings)) for n in (0, 2)}
    assert len(digests) == 1


@pytest.mark.promise("R11")
def test_envs_that_draw_from_global_generators_too():
    assert digest(trained(0, toy.make_sloppy)) == digest(trained(2, toy.make_sloppy))


@pytest.mark.parametrize(
    ("fault", "what", "n_workers"),
    [
        ("raise", "ZeroDivisionError: broken step", 0),
        ("raise", "ZeroDivisionError: broken step", 2),
        ("nan_reward", "reward is not finite", 1),
        ("nan_obs", "observation", 0),
    ],
)
def test_an_error_in_an_env_comes_home_and_changes_nothing(n_workers, fault, what):
    model = EGGROLL("MlpPolicy", toy.make_fault(fault), seed=0, n_workers=n_workers, population_size=8, slice_size=4)
    before = digest(model)
    with pytest.raises(EpisodeError, match=f"generation 0, member .*{what}"):
        model.learn(1000)
    assert digest(model) == before


def test_an_env_that_cannot_be_made_in_a_worker_comes_home():
    made = []

    def only_once():
        import os

        # The pid of the process that trains: elsewhere the constructor fails.
        if made and os.getpid() != made[0]:
            raise ValueError("no env here")
        made.append(os.getpid())
        return toy.make_target()

    with pytest.raises(EggrollError, match="no env here"):
        trained(2, only_once)


@pytest.mark.promise("R2")
@pytest.mark.reliability
def test_a_killed_worker_is_named_by_its_signal():
    with pytest.raises(WorkerDiedError, match=r"generation 0, member \d+: the worker process ended \(signal SIGKILL\)"):
        trained(2, toy.make_fault("kill"))


@pytest.mark.promise("R26")
def test_an_env_function_that_cannot_be_sent_says_so():
    lock = __import__("threading").Lock()

    def holds_a_lock():
        return toy.make_target() if lock else None

    with pytest.raises(EggrollError, match="n_workers=0"):
        trained(2, holds_a_lock)


def test_workers_import_nothing_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "copy.py").write_text("raise SystemExit('a file that happens to lie here was run')")
    monkeypatch.chdir(tmp_path)
    trained(1, steps=100)


def test_threads_are_put_back():
    torch.set_num_threads(2)
    trained(0, steps=100)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


SCRIPT = """
    import gymnasium as gym
    print("script starts")
    from eggroll_rl import EGGROLL

    class Mine(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))
        action_space = gym.spaces.Box(-1, 1, (1,))
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.t = 0
            return self.observation_space.low, {}
        def step(self, action):
            self.t += 1
            return self.observation_space.low, float(action[0]), False, False, {}

    gym.register("Mine-v0", Mine, max_episode_steps=10)
    EGGROLL("MlpPolicy", "Mine-v0", seed=0, n_workers=2, population_size=8, slice_size=4).learn(200, log_interval=None)
    EGGROLL("MlpPolicy", lambda: gym.make("Mine-v0"), n_workers=1).learn(200, log_interval=None)
    print("script ends")
"""


@pytest.mark.promise("R26")
def test_a_script_needs_no_main_guard_and_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["script starts", "script ends"]


@pytest.mark.promise("R7")
def test_workers_leave_when_their_parent_is_killed(tmp_path):
    code = "import toy, test_workers; test_workers.trained(2, steps=10**9)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    try:
        deadline = time.monotonic() + 60
        while len(workers := psutil.Process(parent.pid).children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(workers) == 2
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]  # whom nobody has reaped yet
