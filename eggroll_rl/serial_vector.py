"""``SerialVectorEnv``: any Gymnasium env as a vector env that leaves finished sub-envs alone."""

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, create_empty_array

from eggroll_rl.errors import ConfigError
from eggroll_rl.mujoco_vector import DIVERGENCE_WARNINGS
from eggroll_rl.observations import Observations, map_arrays, put_row

DIVERGED = "the physics diverged: MuJoCo met a NaN or a huge number, and put the simulation back to its start"


class SubEnvError(Exception):
    """A sub-env raised. ``index`` says which one, ``call`` what it was doing, ``text`` holds its traceback."""

    def __init__(self, index: int, call: str, error: BaseException):
        self.index = index
        self.call = call
        self.summary = f"{type(error).__name__}: {error}"
        self.text = "".join(traceback.format_exception(error))
        super().__init__(f"sub-env {index} raised in {call}: {self.summary}")


class SerialVectorEnv(VectorEnv):
    """Step sub-envs one after the other, in ``AutoresetMode.DISABLED``.

    As Gymnasium's ``SyncVectorEnv`` but for two things that evaluation needs. A finished sub-env is left
    untouched, at no cost, until it is reset by mask: its observation stays, its reward is 0, its flags are
    False. And of all infos only ``is_success`` is kept, where an episode ended, because gathering a dict per
    env and step would cost as much as the physics. ``diverged`` is as in
    :class:`~eggroll_rl.mujoco_vector.MujocoVectorEnv`.

    :param env_fns: one function per sub-env, each returning a new env
    :ivar keep_going: leave a sub-env that failed alone instead of raising; ``infos["failures"]`` then holds its
        :class:`SubEnvError` by its number
    :ivar running_row: (1,) int64, which sub-env is being called, or -1: for whoever finds the process dead
    :raises ConfigError: the functions return one and the same env
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]]):
        self.envs = [make() for make in env_fns]
        if len({id(env.unwrapped) for env in self.envs}) < len(self.envs):
            raise ConfigError("the env function returned the same env twice; it must make a new one at every call")
        self.num_envs = len(self.envs)
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.spec = self.envs[0].spec
        self._obs: Any = create_empty_array(self.single_observation_space, self.num_envs)
        self._done = np.ones(self.num_envs, dtype=bool)
        self.keep_going = False
        self.running_row = np.full(1, -1)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        """Reset the sub-envs of ``options["reset_mask"]`` (all by default).

        :param seed: one seed per sub-env; or one number s, for s, s + 1, ...
        :return: observations (num_envs, ...), and infos
        :raises SubEnvError: a sub-env raised
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, dtype=bool))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        infos: dict[str, Any] = {}
        for i in np.flatnonzero(mask).tolist():
            self.running_row[0] = i
            self._done[i] = False
            try:
                obs, _ = self.envs[i].reset(seed=seeds[i], options=options or None)
                put_row(self._obs, i, obs)
            except (Exception, SystemExit) as error:
                self._failed(infos, i, "reset()", error)
        self.running_row[0] = -1
        return map_arrays(np.copy, self._obs), infos

    def step(self, actions: np.ndarray) -> tuple[Observations, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the sub-envs whose episode is still running.

        :param actions: (num_envs, ...); those of finished sub-envs are ignored
        :return: observations, rewards, terminations, truncations (num_envs, ...) and infos, which hold
            ``is_success`` (num_envs,) and its mask if episodes that ended in this step have it, and ``diverged``
            if the physics of a MuJoCo env did
        :raises SubEnvError: a sub-env raised
        """
        rewards = np.zeros(self.num_envs)
        terminations = np.zeros(self.num_envs, dtype=bool)
        truncations = np.zeros(self.num_envs, dtype=bool)
        infos: dict[str, Any] = {}
        for i in np.flatnonzero(~self._done).tolist():
            self.running_row[0] = i
            try:
                obs, reward, terminated, truncated, info = self.envs[i].step(actions[i])
                put_row(self._obs, i, obs)
                # The types are looked at here: a call takes as long as a look.
                reward = reward if type(reward) is float else _number(reward)
                ended = terminated if type(terminated) is bool else _flag("terminated", terminated)
                cut = truncated if type(truncated) is bool else _flag("truncated", truncated)
            except (Exception, SystemExit) as error:
                self._failed(infos, i, "step()", error)
                continue
            rewards[i] = reward
            if self._has_diverged(self.envs[i]):
                infos = self._add_info(infos, {"diverged": True}, i)
            if ended or cut:
                terminations[i], truncations[i] = ended, cut
                self._done[i] = True
                if "is_success" in info:
                    infos = self._add_info(infos, {"is_success": bool(info["is_success"])}, i)
        self.running_row[0] = -1
        return map_arrays(np.copy, self._obs), rewards, terminations, truncations, infos

    def leave_alone(self, mask: np.ndarray) -> None:
        """Treat the masked sub-envs (num_envs,) as finished, until they are reset."""
        self._done[mask] = True

    def _failed(self, infos: dict[str, Any], row: int, call: str, error: BaseException) -> None:
        failure = SubEnvError(row, call, error)
        if not self.keep_going:
            raise failure from error
        infos.setdefault("failures", {})[row] = failure
        self._done[row] = True

    @staticmethod
    def _has_diverged(env: gym.Env) -> bool:
        data = getattr(env.unwrapped, "data", None)
        if not isinstance(data, mujoco.MjData) or not data.warning.number.any():
            return False
        diverged = bool(data.warning.number[DIVERGENCE_WARNINGS].any())
        data.warning.number[:] = 0  # they count up
        return diverged

    def close_extras(self, **kwargs: Any) -> None:
        """Close all sub-envs."""
        for env in self.envs:
            env.close()


def _number(reward: Any) -> float:
    plain = isinstance(reward, float | int | np.floating | np.integer)
    if not plain and (np.ndim(reward) > 0 or np.asarray(reward).dtype.kind not in "fiub"):
        raise TypeError(f"the env's reward must be a number, got {reward!r}")
    return float(reward)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_) and not (isinstance(value, int | np.integer) and value in (0, 1)):
        raise TypeError(f"the env's {name} must be true or false, got {value!r}")
    return bool(value)
