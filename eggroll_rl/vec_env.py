"""The compatible mode: evaluate a generation on a ready-made SB3 ``VecEnv``.

Such an env cannot be rebuilt in workers or seeded per episode, and resets by itself. Members run in blocks of
``num_envs``; a block ends when its last member has finished, and the others' further steps are only counted.
"""

from typing import Any, Self

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from eggroll_rl.actor import Actor
from eggroll_rl.errors import EpisodeError
from eggroll_rl.es import one_thread
from eggroll_rl.normalization import Moments
from eggroll_rl.observations import finite_rows
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import Failure, Generation, RolloutResult, load_generation
from eggroll_rl.segments import Result


class VecEnvEvaluator:
    """Evaluate on ``env``, in this process; see :class:`eggroll_rl.workers.Evaluator`."""

    def __init__(self, policy: MlpPolicy, env: VecEnv):
        self._policy = policy.replica()
        self._env = env

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per block of members, in order."""
        load_generation(self._policy, generation)
        size = generation.noise.population_size
        with one_thread():
            return [self._block(generation, first) for first in range(0, size, self._env.num_envs)]

    def close(self) -> None:
        """Leave the env open: it is the user's."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @torch.no_grad()
    def _block(self, generation: Generation, first: int) -> RolloutResult:
        noise, n_episodes, n_envs = generation.noise, generation.n_eval_episodes, self._env.num_envs
        n_members = min(n_envs, noise.population_size - first)
        # A population is whole pairs: the envs sit at `offset` among its rows.
        offset = first % 2
        rows = offset + n_envs + (offset + n_envs) % 2
        actor = Actor(self._policy, noise, first - offset, rows, generation.action_std)
        returns_NE = np.zeros((n_members, n_episodes))
        lengths_NE = np.zeros((n_members, n_episodes), dtype=np.int64)
        n_measured = 0 if self._policy.normalizer is None else self._policy.n_inputs
        moments = Moments.zeros(n_envs, n_measured)
        failures: dict[int, Failure] = {}
        episode_N = np.where(np.arange(n_envs) < n_members, 0, n_episodes)
        steps = 0
        padding = ((offset, rows - offset - n_envs), (0, 0))

        def without_failures(active: np.ndarray, encoded: np.ndarray, rewards: np.ndarray) -> np.ndarray:
            for what, values in (("reward", rewards), ("observation", encoded)):
                for row in active[~finite_rows(values[active])].tolist():
                    text = (
                        f"generation {noise.generation}, member {first + row}, episode {episode_N[row]}, "
                        f"step {lengths_NE[row, episode_N[row]]}: the env's {what} is not finite: {values[row]}"
                    )
                    if not generation.max_failures:
                        raise EpisodeError(text)
                    failures.setdefault(row, Failure(first + row, what, text))
            if not failures:
                return encoded
            episode_N[list(failures)] = n_episodes
            encoded = encoded.copy()
            encoded[list(failures)] = 0.0  # the env goes on in these rows, to no purpose
            return encoded

        obs: Any = self._env.reset()
        encoded = without_failures(np.arange(n_members), actor.encode(obs), np.zeros(n_envs))
        while (episode_N < n_episodes).any():
            active_N = episode_N < n_episodes
            # Rows beyond the envs repeat real observations: a policy may rely on what it is given.
            moments.add(encoded[None, :, :n_measured], active_N[None])
            actions = actor.act(np.pad(encoded, padding, mode="edge"))
            obs, rewards, dones, _ = self._env.step(actions[offset : offset + n_envs])
            actor.restart(np.pad(dones.astype(bool), padding[0]))
            steps += n_envs
            active = np.flatnonzero(active_N)
            returns_NE[active, episode_N[active]] += rewards[active]
            lengths_NE[active, episode_N[active]] += 1
            encoded = without_failures(active, actor.encode(obs), rewards)
            episode_N += active_N & dones & (episode_N < n_episodes)
        bad = list(failures)
        returns_NE[bad] = np.nan
        moments.count[bad], moments.mean[bad], moments.m2[bad] = 0.0, 0.0, 0.0
        real = Moments(moments.count[:n_members], moments.mean[:n_members], moments.m2[:n_members])
        unknown = np.full_like(returns_NE, np.nan)
        idle_steps = steps - int(lengths_NE.sum())
        return RolloutResult(first, returns_NE, lengths_NE, unknown, real, idle_steps, tuple(failures.values()))
