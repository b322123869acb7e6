"""Small environments with known properties. Worker processes import this module by name."""

import os
import random
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit


class TargetEnv(gym.Env):
    """Reward -|action - target| with a target in the observation; lengths 4 to 10 follow from the seed."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,))
    action_space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))

    def __init__(self, offset=0.0):
        self.offset = offset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(4, 11))
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        reward = -float(np.abs(action - self.target[:2]).sum()) + 3.0
        terminated = self.t >= self.length
        return self._obs(), reward, terminated, False, {"is_success": terminated}

    def _obs(self):
        self.target = self.np_random.uniform(-1, 1, 3)
        return (self.target + self.offset).astype(np.float32)


def make_target(offset=0.0):
    return TimeLimit(TargetEnv(offset), 50)


class GoalEnv(TargetEnv):
    """The target in a Dict: a picture with a bright column for its first entry, a Box, and a Discrete."""

    observation_space = spaces.Dict(
        [
            ("seen", spaces.Box(0, 255, (4, 6, 3), np.uint8)),
            ("goal", spaces.Box(-np.inf, np.inf, (1,), np.float64)),
            ("side", spaces.Discrete(2, start=3)),
        ]
    )

    def _obs(self):
        x, y, z = super()._obs()
        picture = np.zeros((4, 6, 3), np.uint8)
        picture[:, int((x + 1) * 3) % 6, 1] = 200
        return {"goal": np.array([y], np.float64), "seen": picture, "side": 3 + int(z > 0)}


class PictureEnv(GoalEnv):
    """The picture alone."""

    observation_space = GoalEnv.observation_space["seen"]

    def _obs(self):
        return super()._obs()["seen"]


class LargePictureEnv(PictureEnv):
    """The picture's column in 36 x 36, the least that SB3's NatureCNN takes."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def _obs(self):
        return np.kron(super()._obs()[..., 1:2], np.ones((9, 6, 1), np.uint8))


def make_goal():
    return TimeLimit(GoalEnv(), 50)


def make_picture():
    return TimeLimit(PictureEnv(), 50)


def make_large_picture():
    return TimeLimit(LargePictureEnv(), 50)


class FaultEnv(TargetEnv):
    """Does ``fault`` at step ``at`` of an episode whose seed is ``seed`` (any seed by default)."""

    def __init__(self, fault, at=3, seed=None):
        super().__init__()
        self.fault, self.at, self.fault_seed = fault, at, seed
        if fault == "init":
            raise ValueError("broken constructor")

    def reset(self, *, seed=None, options=None):
        self.armed = self.fault_seed in (None, seed)
        if self.fault == "reset":
            raise ValueError("broken reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.armed and self.t == self.at:
            if self.fault == "raise":
                raise ZeroDivisionError("broken step")
            if self.fault == "kill":
                os.kill(os.getpid(), 9)
            if self.fault == "nan_reward":
                reward = float("nan")
            if self.fault == "nan_obs":
                obs = np.full(3, np.nan, np.float32)
            if self.fault == "old_api":
                return obs, reward, terminated, info
        return obs, reward, terminated, truncated, info


class SloppyEnv(TargetEnv):
    """Draws from the global generators."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + random.random() + np.random.uniform(), terminated, truncated, info


class make_fault:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __call__(self):
        return TimeLimit(FaultEnv(*self.args, **self.kwargs), 50)


def make_sloppy():
    return TimeLimit(SloppyEnv(), 50)


class SlowEnv(TargetEnv):
    """Takes 5 ms per step."""

    def step(self, action):
        time.sleep(0.005)
        return super().step(action)


def make_slow_target():
    return TimeLimit(SlowEnv(), 50)


class make_only_here:
    """Makes envs in the process in which it was called into being, and nowhere else."""

    def __init__(self):
        self.pid = os.getpid()

    def __call__(self):
        if os.getpid() != self.pid:
            raise ZeroDivisionError("broken elsewhere")
        return make_target()
