"""An environment that fails where it is told to. Worker processes import this module by name."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from gymnasium.wrappers import TimeLimit
from toy import TargetEnv


class UnpicklableError(Exception):
    """Cannot be sent to another process."""

    def __init__(self, text):
        super().__init__(text)
        self.held = open(os.devnull)  # noqa: SIM115

    def __del__(self):
        self.held.close()


def _stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise(error):
    raise error


CALLS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segv": faulthandler._sigsegv,
    "exit": lambda: os._exit(9),
    "stop": _stop,
    "hang": lambda: time.sleep(10**6),
    "hang_in_c": lambda: ctypes.PyDLL(None).sleep(10**6),  # PyDLL keeps Python's lock
    "ValueError": lambda: _raise(ValueError("it broke")),
    "UnpicklableError": lambda: _raise(UnpicklableError("it broke")),
    "SystemExit": lambda: sys.exit("it broke"),
}
REWARDS = {
    "nan": np.nan, "inf": np.inf, "-inf": -np.inf, "none": None, "text": "1.0", "complex": 1j,
    "array": np.array([1.0, 2.0]),
}  # fmt: skip
OBSERVATIONS = {
    "nan_obs": np.full(3, np.nan, np.float32),
    "inf_obs": np.array([0, np.inf, 0], np.float32),
    "short_obs": np.zeros(2, np.float32),
    "scalar_obs": np.float32(0),
}
FLAGS = {"done_none": None, "done_text": "no"}


class FaultyEnv(TargetEnv):
    """Does ``fault`` in ``place``, in the episodes that the reset seed ``seed`` begins (or in all).

    :param seed: of the episodes; "of training" leaves out those of whoever tries the env before
    :param place: ``"init"``, ``"reset"``, ``"step"`` or ``"close"``
    :param at: the step, from 1; -1 is the last one of the episode
    :param times: how often in all, over all processes; None: always
    :param folder: where these are counted
    """

    def __init__(self, fault, place="step", at=2, seed=None, times=None, folder=None):
        super().__init__()
        self.fault, self.place, self.at, self.fault_seed = fault, place, at, seed
        self.times, self.folder = times, folder
        self.armed = seed is None
        if place == "init":
            self._call()

    def _is_due(self):
        if not self.armed:
            return False
        for i in range(self.times or 0):
            try:
                os.close(os.open(Path(self.folder) / str(i), os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return self.times is None

    def _call(self):
        if self.fault in CALLS and self._is_due():
            CALLS[self.fault]()

    def reset(self, *, seed=None, options=None):
        self.armed = self.fault_seed in (None, seed) or (self.fault_seed == "of training" and (seed or 0) > 1000)
        obs, info = super().reset(seed=seed, options=options)
        if self.place == "reset":
            self._call()
            if self.fault in OBSERVATIONS and self._is_due():
                obs = OBSERVATIONS[self.fault]
        return obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.place == "step" and self.t == (self.length if self.at == -1 else self.at):
            self._call()
            if self.fault in REWARDS and self._is_due():
                reward = REWARDS[self.fault]
            if self.fault in OBSERVATIONS and self._is_due():
                obs = OBSERVATIONS[self.fault]
            if self.fault in FLAGS and self._is_due():
                terminated = FLAGS[self.fault]
        return obs, reward, terminated, truncated, info

    def close(self):
        if self.place == "close":
            self._call()


class make_faulty:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __call__(self):
        return TimeLimit(FaultyEnv(*self.args, **self.kwargs), 50)


class WithHelper(FaultyEnv):
    """Starts a process of its own, as envs around simulators do, and writes down its pid."""

    def __init__(self, folder, closes=False, **kwargs):
        super().__init__(folder=folder, **kwargs)
        self.closes = closes
        self.helper = subprocess.Popen(["sleep", "1000"])
        (Path(folder) / f"helper-{self.helper.pid}").touch()

    def close(self):
        if self.closes:
            self.helper.terminate()
            self.helper.wait()
            (Path(self.folder) / f"closed-{self.helper.pid}").touch()


class SlowEnv(TargetEnv):
    """Takes a while for each call."""

    def __init__(self, seconds):
        time.sleep(seconds)
        super().__init__()
        self.seconds = seconds

    def step(self, action):
        time.sleep(self.seconds)
        return super().step(action)
