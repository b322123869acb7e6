"""``MujocoVectorEnv``: many simulations of one Gymnasium MuJoCo task, computed on arrays.

``mujoco.batch.Batch`` (mujoco 3.17) steps the simulations from C++ and hands out live arrays, so that rewards and
observations are computed for all sub-envs at once. It is the same engine on the same model: every number is
Gymnasium's to the last bit. What a task is (its observation, reward and termination) is in
:mod:`eggroll_rl.mujoco_walkers` and :mod:`eggroll_rl.mujoco_arms`; here is what all tasks share.

Shapes: N sub-envs.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from mujoco.batch import Batch

from eggroll_rl.mujoco_contacts import ContactBatch

Infos = dict[str, np.ndarray]
Outcome = tuple[np.ndarray, np.ndarray, Infos]

# A bad position, velocity or acceleration: MuJoCo puts the simulation back to its start and goes on.
DIVERGENCE_WARNINGS = slice(mujoco.mjtWarning.mjWARN_BADQPOS.value, mujoco.mjtWarning.mjWARN_BADQACC.value + 1)
_NO_STAGE = mujoco.mjtStage.mjSTAGE_NONE.value


@contextmanager
def mujoco_warnings_silenced() -> Iterator[None]:
    """Keep MuJoCo from printing warnings and writing MUJOCO_LOG.TXT into the working directory.

    A handler that somebody has set stays in place.
    """
    if mujoco.get_mju_user_warning() is not None:
        yield
        return
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


def _quietly(call: Callable[..., None], *args: Any) -> None:
    # A context manager costs 3 us even where there is nothing to do, and as many times more in a cold cache.
    if mujoco.get_mju_user_warning() is None:
        with mujoco_warnings_silenced():
            call(*args)
    else:
        call(*args)


def uniform(generator: np.random.Generator, scale: float, size: int) -> np.ndarray:
    """Draw from [-scale, scale)."""
    return generator.uniform(low=-scale, high=scale, size=size)


def flat(values: np.ndarray) -> np.ndarray:
    """Flatten (N, ...) to (N, anything)."""
    return values.reshape(len(values), -1)


def sum_of_squares(values: np.ndarray) -> np.ndarray:
    """Sum the squares of (N, ...) to (N,), in the order of ``np.sum`` on one row."""
    return np.add.reduce(np.square(flat(values)), axis=1)


def norm(vectors: np.ndarray) -> np.ndarray:
    """Return the lengths (N,) of vectors (N, 3)."""
    # np.linalg.norm of one vector is BLAS's dot product, that of rows is not.
    return np.sqrt(np.vecdot(vectors, vectors))


class MujocoVectorEnv(VectorEnv):
    """N simulations of a Gymnasium MuJoCo task.

    ``reset`` and ``step`` do what ``SyncVectorEnv``'s do on the same envs, in the three autoreset modes: seeds, masks,
    infos. Two things are added. In ``AutoresetMode.DISABLED`` a finished sub-env may be stepped on: it is left
    untouched, at no cost, with reward 0 and both flags False, until it is reset by mask. And ``infos["diverged"]``
    marks the sub-envs whose physics diverged in this step: MuJoCo resets such a simulation without a word, and
    Gymnasium goes on with it. (In ``SAME_STEP`` it is in ``final_info`` if the episode ends in that step.)

    :param num_envs: number of simulations
    :param max_episode_steps: time limit; None or -1 for no limit
    :param autoreset_mode: a mode or its name; as of ``SyncVectorEnv``
    :param num_threads: of the physics; the numbers are the same with any. The tasks that look at contact forces (Ant
        and the two Humanoids) always take one
    :param kwargs: for the constructor of Gymnasium's env
    :raises ValueError: ``num_envs``, ``max_episode_steps`` or ``num_threads`` is below 1
    """

    entry_point: ClassVar[str]
    task: Any

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int = 1,
        **kwargs: Any,
    ):
        if max_episode_steps == -1:
            max_episode_steps = None
        given = {"num_envs": num_envs, "max_episode_steps": max_episode_steps, "num_threads": num_threads}
        for name, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # One env of the task lends its model, its settings and its renderer.
        with mujoco_warnings_silenced():
            self.task = load_env_creator(self.entry_point)(**kwargs)
        task = self.task
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**task.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = task.render_mode
        self.single_observation_space = task.observation_space
        self.single_action_space = task.action_space
        self.observation_space = batch_space(task.observation_space, num_envs)
        self.action_space = batch_space(task.action_space, num_envs)
        self.dt = task.dt
        self.max_episode_steps = max_episode_steps
        self.batch: Any
        if self.needs_contact_forces:
            self.batch = ContactBatch(task, num_envs)
        else:
            self.batch = Batch(task.model, num_envs, num_threads)
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self.bind_outputs()
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._limit = sys.maxsize if max_episode_steps is None else max_episode_steps
        self._fresh = np.zeros(num_envs, dtype=bool)  # False until the first reset
        self._running = np.zeros(num_envs, dtype=bool)  # an episode is running
        self._all_run = False

    # What a task is -------------------------------------------------------------------------------------

    @property
    def needs_contact_forces(self) -> bool:
        """Whether the task looks at ``cfrc_ext``."""
        return False

    def bind_outputs(self) -> None:
        """Keep the live arrays that the task looks at, beside qpos, qvel and ctrl."""

    def initial_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw qpos and qvel of one new episode, in Gymnasium's order of draws: by default uniform noise on both."""
        task, scale = self.task, self.task._reset_noise_scale
        qpos = task.init_qpos + uniform(generator, scale, task.model.nq)
        return qpos, task.init_qvel + uniform(generator, scale, task.model.nv)

    def observe(self) -> np.ndarray:
        """Return a new array (N, ...) of observations."""
        raise NotImplementedError

    def place(self) -> np.ndarray | None:
        """Return a copy of the position that velocities are measured on, if the task has one."""
        return None

    def outcome(self, before: Any, actions: np.ndarray) -> Outcome:
        """Return rewards (N,), terminations (N,) and infos (N, ...) of the step just made.

        :param before: what :meth:`place` was before the step
        """
        raise NotImplementedError

    def reset_infos(self) -> Infos:
        """Return the infos (N, ...) of a reset."""
        return {}

    # What all tasks share -------------------------------------------------------------------------------

    def nobody(self) -> np.ndarray:
        """Return False for all (N,)."""
        return np.zeros(self.num_envs, dtype=bool)

    def body_xpos(self, name: str | int) -> np.ndarray:
        """Return the live positions (N, 3) of a body."""
        return self.batch.bind("xpos")[:, self.task.model.body(name).id]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Reset the sub-envs of ``options["reset_mask"]`` (all by default).

        ``options["elapsed"]`` (N,) are steps that count for the time limit as if they had been made; 0 by default.

        :param seed: one seed per sub-env; or one number s, for s, s + 1, ...; None goes on with a sub-env's generator
        :raises ValueError: seeds or mask have another length than there are sub-envs
        :raises TypeError: the mask is not a boolean array
        """
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"options['reset_mask'] must be an array of bool, got {mask!r}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"options['reset_mask'] must have shape ({self.num_envs},) and a True value, got {mask}")
        if seed is None:
            seeds: Sequence[int | None] = [None] * self.num_envs
        elif isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = [None if s is None else int(s) for s in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed must be one number or {self.num_envs} of them, got {len(seeds)}")
        self._reset(mask, seeds)
        self._elapsed[mask] = (options or {}).get("elapsed", np.zeros_like(self._elapsed))[mask]
        infos: dict[str, Any] = {}
        _add_infos(infos, self.reset_infos(), mask)
        return self.observe(), infos

    def _reset(self, mask: np.ndarray, seeds: Sequence[int | None] | None = None) -> None:
        _quietly(self.batch.reset, mask, -1, _NO_STAGE)
        for i in np.flatnonzero(mask).tolist():
            generator, seed = self._generators[i], seeds[i] if seeds else None
            if generator is None or seed is not None:
                generator = self._generators[i] = seeding.np_random(seed)[0]
            self.qpos[i], self.qvel[i] = self.initial_state(generator)
        _quietly(self.batch.forward, mask)
        self._elapsed[mask] = 0
        self._fresh |= mask
        self._running = self._running | mask
        self._all_run = bool(self._running.all())

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all sub-envs whose episode is running; what happens to the others, ``autoreset_mode`` says.

        :param actions: (N, ...), not clipped, as in Gymnasium
        :return: observations, rewards, terminations, truncations, all (N, ...), and infos
        :raises ResetNeeded: before the first reset
        :raises ValueError: actions have another shape
        """
        # Sums of squares add up in memory order.
        actions = np.ascontiguousarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions must have shape {self.action_space.shape}, got {actions.shape}")
        running, before = self._running, self.place()
        if self._all_run:
            self.ctrl[:] = actions
            _quietly(self.batch.step, None, self.task.frame_skip)
        else:
            if not (self._fresh.any() if self.autoreset_mode is AutoresetMode.DISABLED else self._fresh.all()):
                raise ResetNeeded("call reset() before step()")
            self.ctrl[running] = actions[running]
            if running.any():
                _quietly(self.batch.step, running, self.task.frame_skip)
        rewards, terminations, terms = self.outcome(before, actions)
        self._elapsed += running
        truncations = self._elapsed >= self._limit
        if not self._all_run:
            rewards = np.where(running, rewards, 0)
            terminations, truncations = terminations & running, truncations & running
        if np.count_nonzero(self.batch.warning):  # any() takes five times as long
            diverged = self.batch.warning[:, DIVERGENCE_WARNINGS, 1].any(axis=1)
            self.batch.warning[:] = 0
            if diverged.any():
                terms["diverged"] = diverged
        infos = self._autoreset(running, terminations | truncations, terms)
        return self.observe(), rewards.astype(np.float64, copy=False), terminations, truncations, infos

    def get_states(self) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of the simulations' states (N, S), float64, and of the steps their episodes have made (N,)."""
        return self.batch.state.copy(), self._elapsed.copy()

    def set_states(self, mask: np.ndarray, states: np.ndarray, elapsed: np.ndarray) -> np.ndarray:
        """Put the masked sub-envs into the middle of episodes, end those of the others, and return all observations.

        A state may come from another sub-env of the same task, or another process: from there on the two make the
        same steps. What MuJoCo derives from the state is computed afresh, where after a step it lags behind by one
        physics substep: tasks that look at it (Reacher, Pusher, Ant, the two Humanoids) observe a slightly later body,
        and a speed measured on it is that of one substep less in the first step.

        :param mask: (N,) bool
        :param states: (N, S), from :meth:`get_states`
        :param elapsed: (N,) steps that the episodes have made
        :raises ValueError: a shape is not that of these sub-envs
        """
        shapes = [self._running.shape, self.batch.state.shape, self._elapsed.shape]
        if [mask.shape, states.shape, elapsed.shape] != shapes:
            raise ValueError(
                f"mask, states and elapsed must have shapes {shapes}, got {[mask.shape, states.shape, elapsed.shape]}"
            )
        self.batch.state[mask] = states[mask]
        if isinstance(self.batch, ContactBatch):
            _quietly(self.batch.forward, mask, True)
        elif mask.any():
            _quietly(self.batch.forward, mask)
        self._elapsed[mask] = elapsed[mask]
        self._fresh |= mask
        self._running, self._all_run = mask.copy(), bool(mask.all())
        return self.observe()

    def leave_alone(self, mask: np.ndarray) -> None:
        """Treat the masked sub-envs (N,) as finished, until they are reset."""
        self._running = self._running & ~mask
        self._all_run = bool(self._running.all())

    def _autoreset(self, running: np.ndarray, ended: np.ndarray, terms: Infos) -> dict[str, Any]:
        """Do what the mode asks for after a step, and return the step's infos."""
        infos: dict[str, Any] = {}
        whole = self._all_run
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and not whole:
            due = ~running
            self._reset(due)
            _add_infos(infos, self.reset_infos(), due)
        if not np.count_nonzero(ended):
            _add_infos(infos, terms, running, whole)
        elif self.autoreset_mode is AutoresetMode.SAME_STEP:
            final_obs = np.full(self.num_envs, None, dtype=object)
            for i, observation in enumerate(self.observe()):
                final_obs[i] = observation if ended[i] else None
            final_info: dict[str, Any] = {}
            _add_infos(final_info, terms, ended)
            infos = {"final_obs": final_obs, "_final_obs": ended, "final_info": final_info, "_final_info": ended.copy()}
            self._reset(ended)
            _add_infos(infos, self.reset_infos(), ended)
            _add_infos(infos, terms, ~ended)
        else:
            _add_infos(infos, terms, running, whole)
            self._running = self._running & ~ended
            self._all_run = False
        return infos

    def render(self) -> tuple[Any, ...] | None:
        """Return one picture per sub-env, of its state now (Gymnasium's are a physics substep behind)."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode, which is given when the env is made")
            return None
        pictures = []
        for i in range(self.num_envs):
            self.task.data.qpos[:], self.task.data.qvel[:] = self.qpos[i], self.qvel[i]
            _quietly(mujoco.mj_forward, self.task.model, self.task.data)
            pictures.append(self.task.render())
        return tuple(pictures)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the env that lent its model."""
        self.task.close()


def _add_infos(infos: dict[str, Any], terms: Infos, mask: np.ndarray, whole: bool = False) -> None:
    """Add the masked rows of some terms to Gymnasium's form of vector infos: ``key`` and its mask ``_key``.

    :param whole: the mask is True everywhere
    """
    if not whole and not mask.any():
        return
    for name, values in terms.items():
        if name in infos:
            infos[name][mask] = values[mask]
            infos["_" + name] = infos["_" + name] | mask
        else:
            if not whole:
                kept = np.zeros_like(values)
                kept[mask] = values[mask]
                values = kept
            infos[name], infos["_" + name] = values, mask.copy()


def normal_velocities(self: MujocoVectorEnv, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw uniform noise on positions and normal noise on velocities."""
    task, scale = self.task, self.task._reset_noise_scale
    qpos = task.init_qpos + uniform(generator, scale, task.model.nq)
    return qpos, task.init_qvel + scale * generator.standard_normal(task.model.nv)
