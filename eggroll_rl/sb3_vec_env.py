"""``Sb3VecEnv``: a Gymnasium vector env as a Stable-Baselines3 ``VecEnv``, so that its algorithms run on ours."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from eggroll_rl.errors import ConfigError

_ONE_OBJECT = "the sub-envs are one object, so it goes for all of them at once: leave indices away"
_SINGLE = {"observation_space": "single_observation_space", "action_space": "single_action_space"}


class Sb3VecEnv(VecEnv):
    """Step a Gymnasium vector env under SB3's contract, as ``DummyVecEnv`` would step the same envs.

    >>> envs = gym.make_vec("eggroll_rl:eggroll_rl/HalfCheetah-v5", num_envs=8, autoreset_mode="SameStep")
    >>> PPO("MlpPolicy", VecMonitor(Sb3VecEnv(envs))).learn(1_000_000)

    :param envs: a vector env in ``AutoresetMode.SAME_STEP``, which is how SB3 resets
    :raises ConfigError: another autoreset mode
    """

    def __init__(self, envs: VectorEnv):
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ConfigError(f"envs must be made with autoreset_mode='SameStep', as SB3 resets; it is {mode}")
        self.envs = envs
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self._actions = np.empty(0)

    def reset(self) -> np.ndarray:
        """Reset all sub-envs, with the seeds and options given to :meth:`seed` and :meth:`set_options`, once.

        :raises ConfigError: the sub-envs were given different options
        """
        if any(options != self._options[0] for options in self._options):
            raise ConfigError(f"set_options: {_ONE_OBJECT}")
        seeds: Any = None if self._seeds[0] is None else self._seeds
        obs, infos = self.envs.reset(seed=seeds, options=self._options[0] or None)
        self.reset_infos = _rows(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return obs

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step; a finished sub-env is reset, and its last observation is in ``terminal_observation``."""
        obs, rewards, terminations, truncations, infos = self.envs.step(self._actions)
        final_obs, final_infos = infos.pop("final_obs", None), infos.pop("final_info", {})
        infos.pop("_final_obs", None), infos.pop("_final_info", None)
        rows = _rows(infos, self.num_envs)
        dones = terminations | truncations
        finals = _rows(final_infos, self.num_envs) if dones.any() else []
        for i, timeout in enumerate((truncations & ~terminations).tolist()):
            if dones[i]:
                self.reset_infos[i], rows[i] = rows[i], {**finals[i], "terminal_observation": final_obs[i]}
                if "episode" in self.reset_infos[i]:  # Gymnasium's RecordEpisodeStatistics adds it to the new episode's
                    rows[i]["episode"] = self.reset_infos[i].pop("episode")
            rows[i]["TimeLimit.truncated"] = timeout
        return obs, rewards.astype(np.float32), dones, rows

    def close(self) -> None:
        """Close the vector env."""
        self.envs.close()

    def get_images(self) -> list[Any]:
        """Return one picture per sub-env, None without ``render_mode``."""
        return list(self.envs.render() or [None] * self.num_envs)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of the vector env, once per sub-env; the spaces are those of one sub-env."""
        return [getattr(self.envs, _SINGLE.get(attr_name, attr_name)) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector env.

        :raises ConfigError: ``indices`` leaves some sub-envs out
        """
        if len(list(self._get_indices(indices))) < self.num_envs:
            raise ConfigError(f"set_attr({attr_name!r}): {_ONE_OBJECT}")
        setattr(self.envs, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the vector env and return its result, once per sub-env.

        :raises ConfigError: ``indices`` leaves some sub-envs out
        """
        if len(list(self._get_indices(indices))) < self.num_envs:
            raise ConfigError(f"env_method({method_name!r}): {_ONE_OBJECT}")
        return [getattr(self.envs, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """Say that no sub-env is wrapped: a vector env has no wrappers of single envs."""
        return [False for _ in self._get_indices(indices)]


def _rows(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Turn vector infos into one dict per sub-env."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_"):
            continue
        if isinstance(values, dict):
            values = _rows(values, num_envs)
        # RecordEpisodeStatistics masks its dict only as a whole.
        for row, value, known in zip(rows, values, infos.get("_" + name, [True] * num_envs), strict=True):
            if known:
                row[name] = value
    return rows
