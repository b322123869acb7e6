"""The inner loop: one slice of the population through one vector env.

A member's evaluation is a pure function of (parameters, normalizer, seed, generation, member, episode). Both
members of a pair see the same episode seeds (common random numbers). The batch keeps its size to the end:
a finished member keeps its row and its action is ignored, for BLAS rounds differently for another shape.

Shapes: N members of the slice, padding included, E episodes, I inputs, S size of a simulation's state.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from eggroll_rl.actor import Actor
from eggroll_rl.envs import global_generators_kept
from eggroll_rl.errors import EpisodeError
from eggroll_rl.noise import Noise
from eggroll_rl.normalization import Moments
from eggroll_rl.observations import finite_rows
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.serial_vector import DIVERGED, SubEnvError

_EPISODE_STREAM = 1  # spawn keys of the seed: the noise uses the seed itself
_GLOBALS_STREAM = 2
_MOMENTS_BLOCK = 32  # steps whose observations are added to the moments at once


@dataclass(frozen=True)
class Anchors:
    """Where each simulation of a generation starts its segment.

    :param states: (N, S), of ``MujocoVectorEnv.get_states``; without meaning where a new episode starts. S is 0 where
        states cannot be copied
    :param ages: (N,) env steps that count for the time limit
    :param new: (N,) whether a new episode starts. It may have an age: then the time limit cuts it short
    """

    states: np.ndarray
    ages: np.ndarray
    new: np.ndarray


@dataclass(frozen=True)
class Generation:
    """What a worker needs once per generation.

    :param noise: determines all perturbations
    :param state: the policy's ``state_dict`` as arrays: mean parameters and the frozen normalizer
    :param n_eval_episodes: episodes per member
    :param anchors: where segments start; None for whole episodes
    :param segment_steps: env steps of a segment
    :param exploration_std: (O,) of the noise on the outputs, in segments
    :param action_std: of the noise on the outputs for a Box, where whole episodes sample their actions; else None
    """

    noise: Noise
    state: dict[str, np.ndarray]
    n_eval_episodes: int
    anchors: Anchors | None = None
    segment_steps: int = 0
    exploration_std: np.ndarray | None = None
    action_std: float | None = None

    def slices(self) -> range:
        """Return the first member of every slice, or the first simulation where segments run."""
        n_rows = self.noise.population_size if self.anchors is None else len(self.anchors.ages)
        return range(0, n_rows, self.noise.slice_size)


@dataclass(frozen=True)
class RolloutResult:
    """What comes back for one slice, for its real members (padding left out).

    :param returns: (N, E) sums of rewards, float64
    :param lengths: (N, E) env steps
    :param successes: (N, E) 1 or 0 where the env's last info says ``is_success``, else NaN
    :param moments: of the observations that each member acted on
    :param idle_steps: env steps made and not used: none but in the compatible mode
    """

    first: int
    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray
    moments: Moments
    idle_steps: int = 0


def episode_seeds(noise: Noise, n_eval_episodes: int) -> np.ndarray:
    """Return the reset seeds (population_size, E): one per pair and episode, from one ``SeedSequence``."""
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_EPISODE_STREAM, noise.generation))
    n_pairs = noise.population_size // 2
    return sequence.generate_state(n_pairs * n_eval_episodes).reshape(n_pairs, n_eval_episodes).repeat(2, axis=0)


def load_generation(policy: MlpPolicy, generation: Generation) -> None:
    """Bring a policy to the generation's mean and normalizer."""
    policy.load_state_dict({name: torch.from_numpy(array) for name, array in generation.state.items()})


@torch.no_grad()
def rollout(policy: MlpPolicy, generation: Generation, first: int, envs: VectorEnv) -> RolloutResult:
    """Evaluate the slice of members that starts at ``first``.

    :param policy: on the CPU, after :func:`load_generation`
    :param envs: ``slice_size`` sub-envs in ``AutoresetMode.DISABLED``, finished ones left alone
    :raises EpisodeError: an env raised, gave a NaN or infinite reward or observation, or its physics diverged
    """
    noise, n_episodes = generation.noise, generation.n_eval_episodes
    size = noise.slice_size
    seeds_NE = episode_seeds(noise, n_episodes)[first : first + size]
    n_members = len(seeds_NE)  # the last slice may be short: its other rows are padding and never run

    returns_NE = np.zeros((n_members, n_episodes))
    lengths_NE = np.zeros((n_members, n_episodes), dtype=np.int64)
    successes_NE = np.full((n_members, n_episodes), np.nan)
    # Of the running episode:
    episode_N = np.zeros(size, dtype=np.int64)
    return_N, length_N = np.zeros(size), np.zeros(size, dtype=np.int64)

    def episode_error(row: int, what: str) -> EpisodeError:
        return EpisodeError(
            f"generation {noise.generation}, member {first + row}, episode {episode_N[row]}, "
            f"step {length_N[row]}, seed {seeds_NE[row, episode_N[row]]}: {what}"
        )

    n_measured = 0 if policy.normalizer is None else policy.n_inputs  # of an image the moments would be large
    moments = Moments.zeros(size, n_measured)
    seen_TNI = np.empty((_MOMENTS_BLOCK, size, n_measured))
    active_TN = np.empty((_MOMENTS_BLOCK, size), dtype=bool)
    t = 0
    active_N = np.arange(size) < n_members
    reset_N: np.ndarray | None = active_N
    with seeded_globals(noise, first):
        actor = Actor(policy, noise, first, size, generation.action_std)
        try:
            n_active = n_members
            while n_active:
                if reset_N is not None:
                    row_seeds = [int(seeds_NE[i, episode_N[i]]) if reset_N[i] else None for i in range(size)]
                    obs, _ = envs.reset(seed=row_seeds, options={"reset_mask": reset_N})  # type: ignore[arg-type]
                    actor.restart(reset_N)
                    encoded = actor.encode(obs)
                    check_finite(np.zeros(size), encoded, active_N, episode_error)
                    reset_N = None
                seen_TNI[t], active_TN[t] = encoded[:, :n_measured], active_N
                t += 1
                if t == _MOMENTS_BLOCK:
                    moments.add(seen_TNI, active_TN)
                    t = 0
                obs, rewards, terminations, truncations, infos = envs.step(actor.act(encoded))
                encoded = actor.encode(obs)
                return_N += rewards
                length_N += active_N
                check_finite(rewards, encoded, active_N, episode_error)
                if "diverged" in infos:
                    raise episode_error(int(np.flatnonzero(infos["diverged"])[0]), DIVERGED)
                ended_N = terminations | truncations  # False where a sub-env is left alone
                if np.count_nonzero(ended_N):
                    rows = np.flatnonzero(ended_N)
                    returns_NE[rows, episode_N[rows]] = return_N[rows]
                    lengths_NE[rows, episode_N[rows]] = length_N[rows]
                    if "is_success" in infos:
                        told = rows[infos["_is_success"][rows]]
                        successes_NE[told, episode_N[told]] = infos["is_success"][told]
                    return_N[rows], length_N[rows] = 0, 0
                    episode_N[rows] += 1
                    active_N = active_N & (episode_N < n_episodes)
                    n_active = int(active_N.sum())
                    if active_N[rows].any():
                        reset_N = ended_N & active_N
        except SubEnvError as error:
            length_N[error.index] += error.call == "step()"  # the step that was being made
            raise episode_error(error.index, f"the env raised in {error.call}: {error.summary}\n{error.text}") from None
    moments.add(seen_TNI[:t], active_TN[:t])
    real = Moments(moments.count[:n_members], moments.mean[:n_members], moments.m2[:n_members])
    return RolloutResult(first, returns_NE, lengths_NE, successes_NE, real)


def check_finite(
    rewards: np.ndarray, encoded_NI: np.ndarray, active_N: np.ndarray, episode_error: Callable[[int, str], EpisodeError]
) -> None:
    """Raise for the first active sub-env whose reward or observation is NaN or infinite."""
    if math.isfinite(np.add.reduce(rewards, axis=None) + np.add.reduce(encoded_NI, axis=None)):
        return
    for what, values in (("reward", rewards), ("observation", encoded_NI)):
        bad_N = ~finite_rows(values) & active_N
        if bad_N.any():
            row = int(np.flatnonzero(bad_N)[0])
            raise episode_error(row, f"the env's {what} is not finite: {values[row]}")


@contextmanager
def seeded_globals(noise: Noise, first: int) -> Iterator[None]:
    """Seed the global generators for one slice and put them back: an env may draw from them."""
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_GLOBALS_STREAM, noise.generation, first))
    seed = int(sequence.generate_state(1)[0])
    with global_generators_kept():
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch accelerators too
        yield
