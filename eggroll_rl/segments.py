"""The inner loop of ``fitness="segment"``: one slice of the simulations, for a few steps with exploration noise.

The mean policy acts, with Gaussian noise on its outputs. A simulation starts from its anchor, where it was at the end
of the generation before, and begins a new episode whenever one ends. An env whose state cannot be copied begins a new
episode with every segment. A slice's result is a pure function of (parameters, normalizer, anchors, seed, generation),
as in :mod:`eggroll_rl.rollout`.

Shapes: T steps, N simulations of the slice, padding included, I inputs, O outputs, D ends, S a simulation's state.
"""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from eggroll_rl.actor import Actor
from eggroll_rl.errors import EpisodeError
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.noise import Noise
from eggroll_rl.normalization import Moments
from eggroll_rl.observations import Observations
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import (
    Failure,
    Faults,
    Generation,
    RolloutResult,
    nothing,
    rollout,
    running_rows,
    seeded_globals,
)
from eggroll_rl.serial_vector import SerialVectorEnv

Infos = dict[str, Any]

_RESET_STREAM = 6  # spawn keys of the seed, beside those of rollout, critic and scoring
_EXPLORATION_STREAM = 7
_RESET_TRIES = 3  # of a simulation whose reset fails, each with another seed


@dataclass(frozen=True)
class SegmentResult:
    """What comes back for one slice, for its real simulations.

    :param features: (T + 1, N, I) the network's inputs, float32; the last are where the segment ended
    :param outputs: (T, N, O) the network's outputs with the noise, float32
    :param rewards: (T, N); NaN where a simulation failed
    :param terminated: (T, N) the task ended the episode at this step
    :param truncated: (T, N) the time limit did
    :param successes: (T, N) 1 or 0 where the info at the end of an episode says ``is_success``, else NaN
    :param final_features: (D, I) the network's inputs for the states in which episodes ended, in the order of
        ``np.argwhere(terminated | truncated)``
    :param states: (N, S) at the end; S is 0 where states cannot be copied
    :param ages: (N,) env steps of the running episode
    :param moments: of the observations that were acted on
    :param failures: of simulations. Where one failed its episode is cut short, as by a time limit, at the observation
        before, and the next begins; the reward of that step is NaN
    """

    first: int
    features: np.ndarray
    outputs: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    successes: np.ndarray
    final_features: np.ndarray
    states: np.ndarray
    ages: np.ndarray
    moments: Moments
    idle_steps: int = 0
    failures: tuple[Failure, ...] = ()

    @property
    def lengths(self) -> np.ndarray:
        """Env steps (N,)."""
        return np.full(self.rewards.shape[1], len(self.rewards))


Result = RolloutResult | SegmentResult


def reset_seed(noise: Noise, simulation: int, n_resets: int) -> int:
    """Return the seed of a simulation's next reset, after ``n_resets`` in this generation."""
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_RESET_STREAM, noise.generation, simulation, n_resets))
    return int(sequence.generate_state(1)[0])


def exploration_noise(noise: Noise, first: int, shape: tuple[int, ...], std_O: np.ndarray) -> np.ndarray:
    """Return a slice's noise on the outputs (T, N, O), float32."""
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_EXPLORATION_STREAM, noise.generation, first))
    return np.random.default_rng(sequence).standard_normal(shape, dtype=np.float32) * std_O.astype(np.float32)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), dtype=rows.dtype)])


class _Resets:
    """Begins episodes of a slice's simulations, each with a seed of its own; again where that fails."""

    def __init__(self, noise: Noise, first: int, envs: VectorEnv, actor: Actor, faults: Faults, real_N: np.ndarray):
        self._noise, self._first, self._envs, self._actor, self._faults = noise, first, envs, actor, faults
        self._real_N = real_N
        self._n_resets_N = np.zeros(len(real_N), dtype=np.int64)

    def __call__(self, mask_N: np.ndarray, **options: np.ndarray) -> tuple[Observations, Infos]:
        """Reset the masked rows; observations and infos are those of all."""
        n_resets_N = self._n_resets_N
        seeds = [
            reset_seed(self._noise, self._first + row, n_resets_N[row]) if masked else None
            for row, masked in enumerate(mask_N)
        ]
        n_resets_N[mask_N] += 1
        return self._envs.reset(seed=seeds, options={"reset_mask": mask_N, **options})  # type: ignore[arg-type]

    def encoded(self, obs: Observations, infos: Infos) -> np.ndarray:
        """Return the encoded observations (N, I) after a reset, and after more of them where it failed.

        :raises EpisodeError: a reset fails, and no failures are allowed or it is the third in a row
        """
        for n_tries in count(1):
            encoded = self._actor.encode(obs)
            failed_N = self._faults.found(np.zeros(len(encoded)), encoded, self._real_N, infos)
            if failed_N is None:
                return encoded
            if n_tries == _RESET_TRIES:
                break
            obs, infos = self(failed_N)
        failure = self._faults.failures[-1]
        error = EpisodeError(failure.text)
        error.member = failure.member
        raise error


@torch.no_grad()
def segment_rollout(
    policy: MlpPolicy,
    generation: Generation,
    first: int,
    envs: VectorEnv,
    left_out: Container[int] = (),
    on_step: Callable[[], None] = nothing,
) -> SegmentResult:
    """Run the slice of simulations that starts at ``first`` for ``segment_steps``.

    :param policy: on the CPU, after :func:`eggroll_rl.rollout.load_generation`
    :param envs: ``slice_size`` sub-envs in ``AutoresetMode.DISABLED``
    :param left_out: simulations that do not run: theirs are zeros, in episodes that have just ended
    :param on_step: called before every step of the envs
    :raises EpisodeError: an env raised, a reward or observation is NaN or infinite, or the physics diverged, and the
        generation allows no failures; or a reset fails again and again
    """
    noise, anchors, n_steps = generation.noise, generation.anchors, generation.segment_steps
    assert anchors is not None and generation.exploration_std is not None
    size = noise.slice_size
    rows = slice(first, first + size)
    n_real = len(anchors.ages[rows])  # the last slice may be short: its other rows are padding and never run
    real_N = running_rows(first, n_real, size, left_out)
    new_N, age_N, states_NS = (_padded(a[rows], size) for a in (anchors.new, anchors.ages, anchors.states))
    t = 0

    def where(row: int) -> str:
        return f"generation {noise.generation}, simulation {first + row}, step {t} of its segment"

    faults = Faults(envs, where, first, generation.max_failures)

    obs_TNI = np.empty((n_steps, size, policy.n_inputs))
    rewards_TN = np.zeros((n_steps, size))
    terminated_TN, truncated_TN = np.zeros((2, n_steps, size), dtype=bool)
    successes_TN = np.full((n_steps, size), np.nan)
    with seeded_globals(noise, first):
        actor = Actor(policy, None, first, size)
        reset = _Resets(noise, first, envs, actor, faults, real_N)
        if isinstance(envs, MujocoVectorEnv):
            obs: Observations = envs.set_states(real_N & ~new_N, states_NS, age_N)
            if new_N.any():
                obs, _ = reset(new_N, elapsed=age_N)
            encoded = reset.encoded(obs, {})
        else:
            assert isinstance(envs, SerialVectorEnv)
            envs.leave_alone(np.ones(size, dtype=bool))
            encoded = reset.encoded(*reset(real_N))
        n_features = actor.features(encoded).shape[1]
        features_TNI = np.empty((n_steps + 1, size, n_features), dtype=np.float32)
        noise_TNO = exploration_noise(noise, first, (n_steps, size, policy.n_outputs), generation.exploration_std)
        outputs_TNO = np.empty_like(noise_TNO)
        final: list[np.ndarray] = []
        for t in range(n_steps):
            on_step()
            obs_TNI[t] = encoded
            features_TNI[t], outputs_TNO[t], actions = actor.explore(obs_TNI[t], noise_TNO[t])
            obs, rewards_TN[t], terminated_TN[t], truncated_TN[t], infos = envs.step(actions)
            encoded = actor.encode(obs)
            failed_N = faults.found(rewards_TN[t], encoded, real_N, infos)
            if failed_N is not None:
                rewards_TN[t, failed_N], truncated_TN[t, failed_N] = math.nan, True
                terminated_TN[t, failed_N] = False
                encoded = np.where(failed_N[:, None], obs_TNI[t], encoded)
            ended_N = terminated_TN[t] | truncated_TN[t]
            if ended_N.any():
                successes_TN[t] = np.where(infos.get("_is_success", False), infos.get("is_success", math.nan), math.nan)
                final.append(actor.features(encoded)[ended_N])
                if t < n_steps - 1:  # else the next generation resets
                    encoded = reset.encoded(*reset(ended_N))
        features_TNI[n_steps] = actor.features(encoded)
    moments = Moments.zeros(size, policy.n_inputs)
    moments.add(obs_TNI, np.broadcast_to(real_N, (n_steps, size)))
    if isinstance(envs, MujocoVectorEnv):
        states_NS, age_N = envs.get_states()
        states_NS[~np.isfinite(states_NS).all(axis=1)] = 0.0  # of simulations that failed in the last step
    return SegmentResult(
        first,
        features_TNI[:, :n_real],
        outputs_TNO[:, :n_real],
        rewards_TN[:, :n_real],
        terminated_TN[:, :n_real],
        (truncated_TN & ~terminated_TN)[:, :n_real],
        successes_TN[:, :n_real],
        np.concatenate([*final, np.empty((0, n_features), dtype=np.float32)]),
        states_NS[:n_real],
        age_N[:n_real],
        Moments(moments.count[:n_real], moments.mean[:n_real], moments.m2[:n_real]),
        failures=tuple(faults.failures),
    )


def evaluate_slice(
    policy: MlpPolicy,
    generation: Generation,
    first: int,
    envs: VectorEnv,
    left_out: Container[int] = (),
    on_step: Callable[[], None] = nothing,
) -> Result:
    """Run the slice that starts at ``first``, by whole episodes or segments."""
    run = rollout if generation.anchors is None else segment_rollout
    return run(policy, generation, first, envs, left_out, on_step)
