import random

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch

from eggroll_rl import cli

pytest_plugins = ["scoreboard"]

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_left():
    """Every test must end the processes that it started."""
    yield
    children = psutil.Process().children(recursive=True)
    _gone, alive = psutil.wait_procs(children, timeout=5)
    for process in alive:
        process.kill()
    assert not alive, f"left behind: {alive}"


@pytest.fixture
def rng_state():
    """Return a function that compares the global generators with their state at the start of the test."""

    def state():
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()

    before = state()
    return lambda: state() == before


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process; return status, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["eggroll-rl", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def half_cheetah():
    env = gym.make("HalfCheetah-v5")
    yield env
    env.close()
