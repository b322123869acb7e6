"""Envs for the probes of peers.py and for the soak. Worker processes import this module by name."""

import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit


def first(folder):
    """Whether nobody was here before, in any process: it makes FOLDER/fault."""
    try:
        os.close(os.open(Path(folder) / "fault", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


class ProbeEnv(gym.Env):
    """Reward -|action - target|, eight steps long; has its fault once, at step ``at`` of the env's life.

    :param fault: "kill", "raise", "nan_reward", "nan_obs", "hang", or "none", which only says that it got there
    :param folder: where it says so
    :param at: the default is in the middle of the sixth episode
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, fault, folder, at=44):
        self.fault, self.folder, self.at = fault, folder, at
        self.n_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        self.n_steps += 1
        reward = -float(np.abs(action - self.target[:2]).sum())
        obs = self._obs()
        if self.n_steps >= self.at and first(self.folder):
            if self.fault == "kill":
                os.kill(os.getpid(), 9)
            if self.fault == "raise":
                raise ZeroDivisionError("broken step")
            if self.fault == "nan_reward":
                reward = float("nan")
            if self.fault == "nan_obs":
                obs = np.full(3, np.nan, np.float32)
            while self.fault == "hang":
                time.sleep(1)
        return obs, reward, self.t >= 8, False, {}

    def _obs(self):
        self.target = self.np_random.uniform(-1, 1, 3)
        return self.target.astype(np.float32)


class DivergingCheetah(gym.Wrapper):
    """HalfCheetah-v5 whose velocities become absurd once, at step ``at`` of the env's life."""

    def __init__(self, folder, at=40):
        super().__init__(gym.make("HalfCheetah-v5", max_episode_steps=30))
        self.folder, self.at, self.n_steps = folder, at, 0

    def step(self, action):
        self.n_steps += 1
        if self.n_steps >= self.at and first(self.folder):
            self.unwrapped.data.qvel[:] = 1e12
        return self.env.step(action)


class OffsetEnv(gym.Env):
    """Observations offset + 1 and offset - 1 in turn: mean ``offset``, deviation 1, however they are counted."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, offset):
        self.offset, self.sign = offset, 1.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        return self._obs(), -abs(float(action[0])), self.t >= 8, False, {}

    def _obs(self):
        self.sign = -self.sign
        return np.array([self.offset + self.sign])


class LeakyEnv(ProbeEnv):
    """Keeps ``leak`` bytes of every episode, for good."""

    kept: list[bytes] = []  # noqa: RUF012 (that it belongs to the class is the leak)

    def __init__(self, leak, folder="."):
        super().__init__("none", folder, at=float("inf"))
        self.leak = leak

    def reset(self, *, seed=None, options=None):
        if self.leak:
            self.kept.append(os.urandom(self.leak))
        return super().reset(seed=seed, options=options)


class make:
    """A function that makes an env of ``kind`` with a time limit; it travels by pickle to any worker."""

    def __init__(self, kind, *args, **kwargs):
        self.kind, self.args, self.kwargs = kind, args, kwargs

    def __call__(self):
        return TimeLimit(self.kind(*self.args, **self.kwargs), 50)


gym.register("Probe-v0", ProbeEnv, max_episode_steps=50)
gym.register("Leaky-v0", LeakyEnv, max_episode_steps=50)
