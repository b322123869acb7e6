"""Gymnasium's MuJoCo tasks on ``mujoco.batch``: bit-identical to ``gym.make``, without Python per env.

``Batch`` steps many simulations of one model from C++ and hands out live arrays, so that rewards and
observations are computed for all sub-envs at once. It needs mujoco 3.17; :func:`vector_task` says whether a task
is here, and everything else goes through :class:`eggroll_rl.serial_vector.SerialVectorEnv`.

Shapes: N sub-envs.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class MujocoVectorEnv(VectorEnv):
    """N simulations of a Gymnasium MuJoCo task on one thread, in ``AutoresetMode.DISABLED``.

    As in :class:`eggroll_rl.serial_vector.SerialVectorEnv`, a finished sub-env is left untouched, at no cost,
    until it is reset by mask. Infos are empty.

    :param env: one env of the task, which lends its model and settings
    :param num_envs: number of simulations
    :param max_episode_steps: time limit
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.DISABLED}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, env: gym.Env, num_envs: int, max_episode_steps: int):
        import mujoco
        from mujoco.batch import Batch

        self.num_envs = num_envs
        self.spec = env.spec
        self.single_observation_space = env.observation_space
        self.single_action_space = env.action_space
        self.observation_space = batch_space(env.observation_space, num_envs)
        self.action_space = batch_space(env.action_space, num_envs)
        task: Any = env.unwrapped
        self.task = task
        self.dt = task.dt
        self.max_episode_steps = max_episode_steps
        self.batch = Batch(task.model, num_envs, nthread=1)
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._no_stage = mujoco.mjtStage.mjSTAGE_NONE.value
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._active = np.zeros(num_envs, dtype=bool)

    # What a task is -------------------------------------------------------------------------------------

    def initial_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw qpos and qvel of one new episode, in Gymnasium's order of draws."""
        raise NotImplementedError

    def observations(self) -> np.ndarray:
        """Return a new array (N, ...) of observations."""
        raise NotImplementedError

    def outcome(self, qpos_before: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rewards (N,) and terminations (N,) of the step just made."""
        raise NotImplementedError

    # What all tasks share -------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset the sub-envs of ``options["reset_mask"]`` (all by default).

        :param seed: one seed per sub-env; or one number s, for s, s + 1, ...; None goes on with a sub-env's generator
        """
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        self.batch.reset(mask, stage=self._no_stage)
        for i in np.flatnonzero(mask).tolist():
            generator = self._generators[i]
            if generator is None or seeds[i] is not None:
                generator = self._generators[i] = seeding.np_random(seeds[i])[0]
            self.qpos[i], self.qvel[i] = self.initial_state(generator)
        self.batch.forward(mask)
        self._elapsed[mask] = 0
        self._active[mask] = True
        return self.observations(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the sub-envs whose episode is still running; the others keep their observation and get 0 and False."""
        active = self._active
        qpos_before = self.qpos.copy()
        self.ctrl[:] = actions
        self.batch.step(active, nstep=self.task.frame_skip)
        rewards, terminations = self.outcome(qpos_before, actions)
        self._elapsed += active
        truncations = self._elapsed >= self.max_episode_steps
        if not active.all():
            rewards, terminations, truncations = rewards * active, terminations & active, truncations & active
        self._active = active & ~(terminations | truncations)
        return self.observations(), rewards, terminations, truncations, {}

    def close_extras(self, **kwargs: Any) -> None:
        """Close the env that lent its model."""
        self.task.close()


class HalfCheetah(MujocoVectorEnv):
    """HalfCheetah-v5: run to the right; no termination."""

    def initial_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Uniform noise on positions, normal noise on velocities."""
        task, scale = self.task, self.task._reset_noise_scale
        qpos = task.init_qpos + generator.uniform(low=-scale, high=scale, size=task.model.nq)
        qvel = task.init_qvel + scale * generator.standard_normal(task.model.nv)
        return qpos, qvel

    def observations(self) -> np.ndarray:
        """Positions, by default without the x coordinate of the root, then velocities."""
        skip = int(self.task._exclude_current_positions_from_observation)
        return np.concatenate([self.qpos[:, skip:], self.qvel], axis=1)

    def outcome(self, qpos_before: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Forward velocity minus the cost of control."""
        task = self.task
        x_velocity = (self.qpos[:, 0] - qpos_before[:, 0]) / self.dt
        cost = task._ctrl_cost_weight * np.add.reduce(np.square(actions), axis=1)
        return task._forward_reward_weight * x_velocity - cost, np.zeros(self.num_envs, dtype=bool)


_TASKS: dict[str, type[MujocoVectorEnv]] = {
    "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv": HalfCheetah,
}


def vector_task(spec: EnvSpec) -> type[MujocoVectorEnv] | None:
    """Return the class for a registered env, or None if it has to be stepped by Gymnasium."""
    try:
        import mujoco.batch  # noqa: F401
    except ImportError:
        return None
    plain = not spec.additional_wrappers and isinstance(spec.entry_point, str)
    return _TASKS.get(spec.entry_point) if plain else None  # type: ignore[arg-type]
