"""The inner loop: one slice of the population through one vector env.

A member's evaluation is a pure function of (parameters, normalizer, seed, generation, member, episode). Both
members of a pair see the same episode seeds (common random numbers). The batch keeps its size to the end:
a finished member keeps its row and its action is ignored, for BLAS rounds differently for another shape.

Shapes: N members of the slice, padding included, E episodes, I inputs, S size of a simulation's state.
"""

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from eggroll_rl.actor import Actor
from eggroll_rl.envs import global_generators_kept, seed_globals
from eggroll_rl.errors import EpisodeError
from eggroll_rl.noise import Noise
from eggroll_rl.normalization import Moments
from eggroll_rl.observations import finite_rows
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.serial_vector import DIVERGED, SerialVectorEnv

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
class Failure:
    """Why the episodes of a member, or a simulation, do not count.

    :param member: its number
    :param reason: ``"error"`` (the env raised), ``"reward"``, ``"observation"`` (not finite), ``"diverged"`` (the
        physics), ``"died"`` or ``"stuck"`` (its process)
    :param text: what an :class:`~eggroll_rl.errors.EpisodeError` would say
    """

    member: int
    reason: str
    text: str


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
    :param max_failures: so many members may fail; with 0 the first failure is raised
    """

    noise: Noise
    state: dict[str, np.ndarray]
    n_eval_episodes: int
    anchors: Anchors | None = None
    segment_steps: int = 0
    exploration_std: np.ndarray | None = None
    action_std: float | None = None
    max_failures: int = 0

    def slices(self) -> range:
        """Return the first member of every slice, or the first simulation where segments run."""
        n_rows = self.noise.population_size if self.anchors is None else len(self.anchors.ages)
        return range(0, n_rows, self.noise.slice_size)


@dataclass(frozen=True)
class RolloutResult:
    """What comes back for one slice, for its real members (padding left out).

    :param returns: (N, E) sums of rewards, float64; NaN for members that failed or were left out
    :param lengths: (N, E) env steps
    :param successes: (N, E) 1 or 0 where the env's last info says ``is_success``, else NaN
    :param moments: of the observations that the members acted on, together; none of members that failed
    :param idle_steps: env steps made and not used: none but in the compatible mode
    :param failures: by member
    """

    first: int
    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray
    moments: Moments
    idle_steps: int = 0
    failures: tuple[Failure, ...] = ()


def episode_seeds(noise: Noise, n_eval_episodes: int) -> np.ndarray:
    """Return the reset seeds (population_size, E): one per pair and episode, from one ``SeedSequence``."""
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_EPISODE_STREAM, noise.generation))
    n_pairs = noise.population_size // 2
    return sequence.generate_state(n_pairs * n_eval_episodes).reshape(n_pairs, n_eval_episodes).repeat(2, axis=0)


def load_generation(policy: MlpPolicy, generation: Generation) -> None:
    """Bring a policy to the generation's mean and normalizer."""
    policy.load_state_dict({name: torch.from_numpy(array) for name, array in generation.state.items()})


def running_rows(first: int, n_members: int, size: int, left_out: Container[int]) -> np.ndarray:
    """Return the mask (N,) of a slice's rows that run: no padding, and nobody who is left out."""
    return np.array([row < n_members and first + row not in left_out for row in range(size)])


def nothing() -> None:
    """Do nothing: where nobody watches the steps."""


@torch.no_grad()
def rollout(
    policy: MlpPolicy,
    generation: Generation,
    first: int,
    envs: VectorEnv,
    left_out: Container[int] = (),
    on_step: Callable[[], None] = nothing,
) -> RolloutResult:
    """Evaluate the slice of members that starts at ``first``.

    :param policy: on the CPU, after :func:`load_generation`
    :param envs: ``slice_size`` sub-envs in ``AutoresetMode.DISABLED``, finished ones left alone
    :param left_out: members that do not run; what the others do is the same
    :param on_step: called before every step of the envs
    :raises EpisodeError: an env raised, gave a NaN or infinite reward or observation, or its physics diverged, and
        the generation allows no failures
    """
    noise, n_episodes = generation.noise, generation.n_eval_episodes
    size = noise.slice_size
    seeds_NE = episode_seeds(noise, n_episodes)[first : first + size]
    n_members = len(seeds_NE)  # the last slice may be short: its other rows are padding and never run

    returns_NE = np.full((n_members, n_episodes), np.nan)
    lengths_NE = np.zeros((n_members, n_episodes), dtype=np.int64)
    successes_NE = np.full((n_members, n_episodes), np.nan)
    # Of the running episode:
    episode_N = np.zeros(size, dtype=np.int64)
    return_N, length_N = np.zeros(size), np.zeros(size, dtype=np.int64)

    def where(row: int) -> str:
        return (
            f"generation {noise.generation}, member {first + row}, episode {episode_N[row]}, "
            f"step {length_N[row]}, seed {seeds_NE[row, episode_N[row]]}"
        )

    faults = Faults(envs, where, first, generation.max_failures)
    n_measured = 0 if policy.normalizer is None else policy.n_inputs  # of an image the moments would be large
    moments = Moments.zeros(size, n_measured)
    seen_TNI = np.empty((_MOMENTS_BLOCK, size, n_measured))
    active_TN = np.empty((_MOMENTS_BLOCK, size), dtype=bool)
    t = 0
    active_N = running_rows(first, n_members, size, left_out)
    n_active = int(active_N.sum())
    reset_N: np.ndarray | None = active_N if n_active else None
    with seeded_globals(noise, first):
        actor = Actor(policy, noise, first, size, generation.action_std)
        while n_active:
            on_step()
            if reset_N is not None:
                row_seeds = [int(seeds_NE[i, episode_N[i]]) if reset_N[i] else None for i in range(size)]
                obs, infos = envs.reset(seed=row_seeds, options={"reset_mask": reset_N})  # type: ignore[arg-type]
                actor.restart(reset_N)
                encoded = actor.encode(obs)
                reset_N = None
                failed_N = faults.found(np.zeros(size), encoded, active_N, infos)
                if failed_N is not None:
                    active_N = active_N & ~failed_N
                    n_active = int(active_N.sum())
                    continue
            seen_TNI[t], active_TN[t] = encoded[:, :n_measured], active_N
            t += 1
            if t == _MOMENTS_BLOCK:
                moments.add(seen_TNI, active_TN)
                t = 0
            obs, rewards, terminations, truncations, infos = envs.step(actor.act(encoded))
            encoded = actor.encode(obs)
            return_N += rewards
            length_N += active_N
            ended_N = terminations | truncations  # False where a sub-env is left alone
            failed_N = faults.found(rewards, encoded, active_N, infos)
            if failed_N is not None:
                rows = np.flatnonzero(failed_N)
                lengths_NE[rows, episode_N[rows]] = length_N[rows]
                ended_N = ended_N & ~failed_N
                active_N = active_N & ~failed_N
                n_active = int(active_N.sum())
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
    moments.add(seen_TNI[:t], active_TN[:t])
    bad = [failure.member - first for failure in faults.failures]
    returns_NE[bad], successes_NE[bad] = np.nan, np.nan
    moments.count[bad], moments.mean[bad], moments.m2[bad] = 0.0, 0.0, 0.0
    seen = Moments(moments.count[:n_members], moments.mean[:n_members], moments.m2[:n_members]).together()
    return RolloutResult(first, returns_NE, lengths_NE, successes_NE, seen, failures=tuple(faults.failures))


class Faults:
    """What goes wrong in the envs of a slice: raised, or kept where the generation allows failures.

    :param envs: the slice's; a sub-env that failed is left alone until it is reset
    :param where: says of a row where it is: generation, member, step
    :param first: member of row 0
    :param max_failures: with 0 the first failure is raised
    :ivar failures: in the order in which they were found
    """

    def __init__(self, envs: VectorEnv, where: Callable[[int], str], first: int, max_failures: int):
        self._envs, self._where, self._first, self._max_failures = envs, where, first, max_failures
        self.failures: list[Failure] = []
        if isinstance(envs, SerialVectorEnv):
            envs.keep_going = True  # the other rows' step is made, and found() sees to the failure

    def found(
        self, rewards: np.ndarray, encoded_NI: np.ndarray, active_N: np.ndarray, infos: dict[str, Any]
    ) -> np.ndarray | None:
        """Look at what a step gave, and return the mask (N,) of active rows that failed in it; None if none did.

        :raises EpisodeError: one has, and no failures are allowed
        """
        finite = math.isfinite(np.add.reduce(rewards, axis=None) + np.add.reduce(encoded_NI, axis=None))
        if finite and "failures" not in infos and "diverged" not in infos:
            return None
        failed_N = np.zeros_like(active_N)
        for row, error in infos.get("failures", {}).items():
            self._fail(failed_N, row, "error", f"the env raised in {error.call}: {error.summary}\n{error.text}")
        for what, values in (("reward", rewards), ("observation", encoded_NI)):
            for row in np.flatnonzero(~finite_rows(values) & active_N):
                self._fail(failed_N, int(row), what, f"the env's {what} is not finite: {values[row]}")
        for row in np.flatnonzero(active_N & infos.get("diverged", False)):
            self._fail(failed_N, int(row), "diverged", DIVERGED)
        if not failed_N.any():
            return None
        self._envs.leave_alone(failed_N)  # type: ignore[attr-defined]
        return failed_N

    def _fail(self, failed_N: np.ndarray, row: int, reason: str, what: str) -> None:
        if failed_N[row]:
            return
        text = f"{self._where(row)}: {what}"
        if not self._max_failures:
            error = EpisodeError(text)
            error.member = self._first + row
            raise error
        failed_N[row] = True
        self.failures.append(Failure(self._first + row, reason, text))


@contextmanager
def seeded_globals(noise: Noise, first: int) -> Iterator[None]:
    """Seed the global generators for one slice and put them back: an env may draw from them."""
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_GLOBALS_STREAM, noise.generation, first))
    seed = int(sequence.generate_state(1)[0])
    with global_generators_kept():
        seed_globals(seed)
        yield
