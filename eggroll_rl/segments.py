"""The inner loop of ``fitness="segment"``: one slice of the population, for a few steps from cloned states.

Both members of a pair start from one simulation's state, their anchor, so that what they differ in is their
perturbation alone. A slice's evaluation is a pure function of (parameters, normalizer, anchors, seed, generation), as
that of :mod:`eggroll_rl.rollout` is.

Shapes: T steps, N members of the slice, padding included, P pairs of the population, I inputs, S a simulation's state.
"""

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from eggroll_rl.actor import Actor
from eggroll_rl.errors import EpisodeError
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.normalization import Moments
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import Generation, RolloutResult, check_finite, episode_seeds, rollout, seeded_globals
from eggroll_rl.serial_vector import DIVERGED


@dataclass(frozen=True)
class SegmentResult:
    """What comes back for one slice, for its real members.

    :param obs: (T + 1, N, I) encoded observations, float64. Member n acted on the first ``lengths[n]``; the one after
        them is where its segment ended, and is repeated to the end
    :param rewards: (T, N), 0 after the end
    :param lengths: (N,) env steps
    :param terminated: (N,) the task ended the episode
    :param truncated: (N,) the time limit did
    :param states: (N, S) where the segments ended
    :param moments: of the observations that each member acted on
    """

    first: int
    obs: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    states: np.ndarray
    moments: Moments
    idle_steps: int = 0


Result = RolloutResult | SegmentResult


def _padded(of_pairs: np.ndarray, size: int) -> np.ndarray:
    """Repeat rows (P, ...) for the members of each pair, and fill with zeros to ``size``."""
    rows = np.zeros((size, *of_pairs.shape[1:]), dtype=of_pairs.dtype)
    rows[: 2 * len(of_pairs)] = of_pairs.repeat(2, axis=0)
    return rows


@torch.no_grad()
def segment_rollout(policy: MlpPolicy, generation: Generation, first: int, envs: MujocoVectorEnv) -> SegmentResult:
    """Run the slice of members that starts at ``first`` for ``segment_steps``, or to the end of their episode.

    :param policy: on the CPU, after :func:`eggroll_rl.rollout.load_generation`
    :param envs: ``slice_size`` sub-envs in ``AutoresetMode.DISABLED``
    :raises EpisodeError: a reward or observation is NaN or infinite, or the physics diverged
    """
    noise, anchors, n_steps = generation.noise, generation.anchors, generation.segment_steps
    assert anchors is not None
    size = noise.slice_size
    pairs = slice(first // 2, (first + size) // 2)
    n_members = 2 * len(anchors.ages[pairs])  # the last slice may be short: its other rows are padding and never run
    new_N, age_N, states_NS = (_padded(a[pairs], size) for a in (anchors.new, anchors.ages, anchors.states))
    active_N = np.arange(size) < n_members
    length_N = np.zeros(size, dtype=np.int64)

    def episode_error(row: int, what: str) -> EpisodeError:
        return EpisodeError(
            f"generation {noise.generation}, member {first + row}, step {length_N[row]} of its segment: {what}"
        )

    obs = envs.set_states(active_N & ~new_N, states_NS, age_N)
    if new_N.any():
        seeds = episode_seeds(noise, 1)[first : first + size, 0].tolist() + [None] * (size - n_members)
        obs, _ = envs.reset(seed=seeds, options={"reset_mask": new_N, "elapsed": age_N})

    obs_TNI = np.empty((n_steps + 1, size, policy.n_inputs))
    rewards_TN = np.zeros((n_steps, size))
    active_TN = np.zeros((n_steps, size), dtype=bool)
    terminated_N, truncated_N = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    check_finite(np.zeros(size), obs, active_N, episode_error)
    with seeded_globals(noise, first):
        actor = Actor(policy, noise, first, size)
        encoded = actor.encode(obs)
        for t in range(n_steps):
            obs_TNI[t], active_TN[t] = encoded, active_N
            obs, rewards_TN[t], terminations, truncations, infos = envs.step(actor.act(encoded))
            length_N += active_N
            check_finite(rewards_TN[t], obs, active_N, episode_error)
            if "diverged" in infos:
                raise episode_error(int(np.flatnonzero(infos["diverged"])[0]), DIVERGED)
            terminated_N |= terminations
            truncated_N |= truncations
            active_N = active_N & ~(terminations | truncations)
            encoded = actor.encode(obs)
            if not active_N.any():
                break
        obs_TNI[t + 1 :] = encoded
    moments = Moments.zeros(size, policy.n_inputs)
    moments.add(obs_TNI[:-1], active_TN)
    real = slice(n_members)
    return SegmentResult(
        first,
        obs_TNI[:, real],
        rewards_TN[:, real],
        length_N[real],
        terminated_N[real],
        (truncated_N & ~terminated_N)[real],
        envs.get_states()[0][real],
        Moments(moments.count[real], moments.mean[real], moments.m2[real]),
    )


def evaluate_slice(policy: MlpPolicy, generation: Generation, first: int, envs: VectorEnv) -> Result:
    """Run the slice that starts at ``first``, by whole episodes or segments."""
    if generation.anchors is None:
        return rollout(policy, generation, first, envs)
    assert isinstance(envs, MujocoVectorEnv)
    return segment_rollout(policy, generation, first, envs)
