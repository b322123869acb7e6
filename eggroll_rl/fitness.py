"""Fitness shaping: fitness (N,) to utilities (N,), both float64; higher is better.

Members 2k and 2k+1 are an antithetic pair. Every function here gives a population without differences a zero
update. Permuting the pairs permutes the utilities (for :func:`best_fraction`, up to ties at its edge).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eggroll_rl.checks import as_finite, shown
from eggroll_rl.errors import ConfigError

FitnessShaping = Callable[[Tensor], Tensor]


def centered_rank(fitness: Tensor) -> Tensor:
    """Return ranks scaled to [-0.5, 0.5]; equal fitness gets the mean of its ranks (Salimans et al. 2017)."""
    return _mean_ranks(fitness) / (len(fitness) - 1) - 0.5


def _mean_ranks(values: Tensor) -> Tensor:
    """Return ranks 0 .. N - 1, and their mean where values are equal."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() + 1) / 2)[inverse]


def pair_rank(fitness: Tensor) -> Tensor:
    """Rank the pairs by the distance between their members, which get plus and minus half of it, in (0, 0.5].

    For pairs that are tried on different tasks or states, where only the two members of a pair can be compared.
    """
    pairs = fitness.view(-1, 2)
    difference = pairs[:, 0] - pairs[:, 1]
    rank = (_mean_ranks(difference.abs()) + 1) / len(pairs)
    half = difference.sign() * rank / 2
    return torch.stack([half, -half], dim=1).flatten()


def in_range(fitness: Tensor) -> Tensor:
    """Scale by a power of two, which is exact, so that squares and sums of float64 neither overflow nor vanish.

    The largest magnitude becomes at most 1. Beyond 1e-290 and 1e300 digits of the smallest numbers may go.
    """
    _, exponent = torch.frexp(fitness.abs().amax())
    return fitness * 2.0 ** -min(max(int(exponent), -960), 960) if fitness.any() else fitness


def _deviation(fitness: Tensor) -> Tensor:
    return (fitness - fitness.mean()).square().mean().sqrt()


def standardize(fitness: Tensor) -> Tensor:
    """Return z-scores with the population's deviation (divisor N); zeros if all are equal."""
    if bool((fitness == fitness[0]).all()):  # their mean may differ from them in its last bit
        return torch.zeros_like(fitness)
    fitness = in_range(fitness)
    deviation = _deviation(fitness)
    return (fitness - fitness.mean()) / deviation if deviation > 0 else torch.zeros_like(fitness)


def standardize_groups(fitness: Tensor, group_size: int, baseline: bool = False) -> Tensor:
    """Return (f - mean of its group) / deviation of all: for groups of members that are tried on different tasks.

    :param group_size: consecutive members per group; even, so that pairs stay together
    :param baseline: the first two members of each group are the mean itself: the group is measured against these,
        and their own utilities are 0
    """
    if bool((fitness == fitness[0]).all()):
        return torch.zeros_like(fitness)
    fitness = in_range(fitness)
    groups = fitness.view(-1, group_size)
    deviation = _deviation(fitness)
    centered = groups - (groups[:, :2] if baseline else groups).mean(1, keepdim=True)
    if baseline:
        centered[:, :2] = 0.0
    return (centered / deviation).flatten() if deviation > 0 else torch.zeros_like(fitness)


def sign_of_pair(fitness: Tensor) -> Tensor:
    """Return 0.5 for the better member of a pair and -0.5 for the other; 0 if they are equal."""
    pairs = fitness.view(-1, 2)
    half = (pairs[:, 0] - pairs[:, 1]).sign() / 2
    return torch.stack([half, -half], dim=1).flatten()


def centered(fitness: Tensor) -> Tensor:
    """Return the fitness minus its mean."""
    return fitness - fitness.mean() if bool((fitness != fitness[0]).any()) else torch.zeros_like(fitness)


def none(fitness: Tensor) -> Tensor:
    """Return the fitness as it is."""
    return fitness


def best_fraction(fitness: Tensor, fraction: float = 0.5) -> Tensor:
    """Keep the pairs whose better member is best, as z-scores over the kept members (ARS V2-t, arXiv 1803.07055).

    The rest gets zero. Kept utilities are multiplied by n_pairs / n_kept, so that the update is the mean over
    kept members and a fraction of 1 is :func:`standardize`. ARS's step size alpha equals ``learning_rate / 2``
    with SGD: it divides by the number of kept pairs where we divide by members.
    """
    pairs = fitness.view(-1, 2)
    n_kept = max(1, round(fraction * len(pairs)))
    # A stable sort, so that ties do not depend on the sorting algorithm.
    kept = torch.sort(pairs.amax(1), descending=True, stable=True).indices[:n_kept]
    utilities = torch.zeros_like(pairs)
    utilities[kept] = standardize(pairs[kept].flatten()).view(-1, 2) * (len(pairs) / n_kept)
    return utilities.flatten()


FITNESS_SHAPING: dict[str, FitnessShaping] = {
    "centered_rank": centered_rank,
    "pair_rank": pair_rank,
    "sign_of_pair": sign_of_pair,
    "standardize": standardize,
    "centered": centered,
    "none": none,
    "best_fraction": best_fraction,
}


def make_fitness_shaping(shaping: str | FitnessShaping, fraction: float | None = None) -> FitnessShaping:
    """Look up a shaping function by name; ``fraction`` is for ``"best_fraction"``."""
    named = isinstance(shaping, str)
    if fraction is not None:
        if not named or shaping != "best_fraction":
            raise ConfigError(f"best_fraction={shown(fraction)} is only used with fitness_shaping='best_fraction'")
        share = as_finite(fraction)
        if share is None or not 0 < share <= 1:
            raise ConfigError(f"best_fraction must be in (0, 1], got {shown(fraction)}")
        return partial(best_fraction, fraction=share)
    if not named and callable(shaping):
        return shaping
    if not named or shaping not in FITNESS_SHAPING:
        known = ", ".join(FITNESS_SHAPING)
        raise ConfigError(f"fitness_shaping must be one of {known} or a function, got {shown(shaping)}")
    return FITNESS_SHAPING[shaping]
