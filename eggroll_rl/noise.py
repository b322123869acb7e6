"""Noise for a population: normal numbers from a counter, and the families of perturbations that are made of them.

Shapes: P directions, K numbers, O outputs, I inputs, R rank.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from eggroll_rl.checks import as_finite, shown
from eggroll_rl.errors import ConfigError

_DRAWN_AT_ONCE = 2**16  # normal numbers whose temporaries stay in the cache

Factors = tuple[Tensor, Tensor]
"""A (P, O, R) and B (P, I, R) of the matrices A Bᵀ/sqrt(R)."""


class NoiseFamily:
    """What a perturbation E looks like. Derive from it for one of your own; keep it hashable.

    Directions should be independent and symmetric, every entry with mean 0 and variance 1: ``sigma`` and the sign of a
    member come on top.
    """

    def count(self, shape: tuple[int, ...], is_matrix: bool) -> int:
        """Return how many normal numbers a direction of a parameter takes: all of its entries, by default.

        :param shape: (O, I) of a matrix, whatever the parameter's own shape; else that
        :param is_matrix: a weight that maps inputs to outputs
        """
        return math.prod(shape)

    def draw(self, normal: Tensor, shape: tuple[int, ...], is_matrix: bool) -> Factors | Tensor:
        """Turn N(0, 1) numbers (P, K) into perturbations: dense (P, *shape), or the factors of matrices.

        Row by row: a direction's perturbation must not depend on the other rows.
        """
        return normal.view(-1, *shape)

    def in_update(self, drawn: Factors | Tensor) -> Factors | Tensor:
        """Return what the update sums up instead of the perturbations: the same, by default."""
        return drawn


@dataclass(frozen=True)
class LowRank(NoiseFamily):
    """EGGROLL: A Bᵀ/sqrt(r) for matrices, A and B ~ N(0, 1), and N(0, 1) for everything else.

    :param rank: r, clamped to the smaller side of a matrix
    """

    rank: int = 1

    def count(self, shape: tuple[int, ...], is_matrix: bool) -> int:
        """Return r (O + I) for matrices."""
        return self._clamped(shape) * sum(shape) if is_matrix else math.prod(shape)

    def draw(self, normal: Tensor, shape: tuple[int, ...], is_matrix: bool) -> Factors | Tensor:
        """Return the factors of matrices."""
        if not is_matrix:
            return normal.view(-1, *shape)
        rank, n_out = self._clamped(shape), shape[0]
        return (
            normal[:, : rank * n_out].reshape(-1, n_out, rank),
            normal[:, rank * n_out :].reshape(-1, shape[1], rank),
        )

    def _clamped(self, shape: tuple[int, ...]) -> int:
        return min(self.rank, *shape)


@dataclass(frozen=True)
class SignUpdate(LowRank):
    """Low-rank noise whose update sums sign(A) sign(B)ᵀ: products of ±1, as low-precision hardware would add them.

    That of HyperscaleES's ``alteggroll``. Perturbations that are no matrices give their sign too.
    """

    def in_update(self, drawn: Factors | Tensor) -> Factors | Tensor:
        """Return the signs."""
        return (drawn[0].sign(), drawn[1].sign()) if isinstance(drawn, tuple) else drawn.sign()


@dataclass(frozen=True)
class Gaussian(NoiseFamily):
    """OpenES: N(0, 1) for every entry. The members' weights are explicit: memory N·O·I."""


@dataclass(frozen=True)
class Sparse(NoiseFamily):
    """N(0, 1/density) for a random share of the entries, and 0 for the others.

    :param density: share of the entries that a direction perturbs, above 0 and at most 1
    """

    density: float = 0.1

    def __post_init__(self) -> None:
        density = as_finite(self.density)
        if density is None or not 0 < density <= 1:
            raise ConfigError(f"density must be above 0 and at most 1, got {shown(self.density)}")

    def count(self, shape: tuple[int, ...], is_matrix: bool) -> int:
        """Return two numbers per entry: its value, and whether it is there."""
        return 2 * math.prod(shape)

    def draw(self, normal: Tensor, shape: tuple[int, ...], is_matrix: bool) -> Tensor:
        """Return mostly zeros."""
        value, chance = normal.chunk(2, dim=1)
        there = torch.special.ndtr(chance.float()) < self.density
        return (value * there / math.sqrt(self.density)).view(-1, *shape)


FAMILIES: dict[str, type[NoiseFamily]] = {
    "lowrank": LowRank,
    "gaussian": Gaussian,
    "sparse": Sparse,
    "sign": SignUpdate,
}


def make_family(family: "str | NoiseFamily", rank: int) -> NoiseFamily:
    """Return a family by name, with ``rank`` where it has one; an instance passes through.

    :raises ConfigError: there is no such family
    """
    if isinstance(family, NoiseFamily):
        return family
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"noise must be one of {', '.join(FAMILIES)} or a NoiseFamily, got {shown(family)}")
    made = FAMILIES[family]
    return made(rank) if issubclass(made, LowRank) else made()


@dataclass(frozen=True)
class Noise:
    """Everything that determines one generation's perturbations: a few bytes, sent instead of the noise.

    :param seed: any non-negative integer
    :param generation: counts updates
    :param population_size: number of members N
    :param sigma: scale of the perturbation
    :param family: what a perturbation looks like
    :param slice_size: members per slice (even). Forward passes run slice by slice, because floating point
        gives another last bit for another batch shape
    :param antithetic: members 2k and 2k + 1 are at +E and -E; else each has a direction of its own
    :param group_size: members per group, in which the first two are the mean itself; 0 for none of this
    """

    seed: int
    generation: int
    population_size: int
    sigma: float
    family: NoiseFamily
    slice_size: int
    antithetic: bool = True
    group_size: int = 0

    def direction(self, member: int) -> int:
        """Return which direction a member is perturbed along."""
        return member // 2 if self.antithetic else member

    def steps(self, first: int, size: int) -> np.ndarray:
        """Return s·sigma of consecutive members (size,): how far each goes along its direction."""
        member = np.arange(first, first + size)
        steps = np.where(self.antithetic & (member % 2 == 1), -self.sigma, self.sigma)
        return np.where(member % self.group_size < 2, 0.0, steps) if self.group_size else steps


def standard_normal(noise: Noise, parameter: int, first: int, n_directions: int, size: int) -> Tensor:
    """Return N(0, 1) noise (n_directions, size), float32: a pure function of (seed, generation, direction, parameter).

    Philox is counter based: a direction's numbers lie at a fixed place of the stream, so any range of them is
    made in one call, anywhere. Box-Muller is used because it consumes a fixed number of draws per normal, as
    the ziggurat of ``Generator.standard_normal`` does not. 24-bit uniforms bound |x| by 5.9.
    """
    blocks = -(-size // 8)  # one Philox block is 4 uint64: 8 normals
    half = 4 * blocks  # a direction's radii, then as many angles
    counter = [first * blocks, parameter, noise.generation, 0]
    philox = np.random.Philox(counter=counter, key=_key(noise.seed))
    normal = np.empty((n_directions, size), np.float32)
    at_once = max(1, _DRAWN_AT_ONCE // (2 * half))
    for start in range(0, n_directions, at_once):
        rows = normal[start : start + at_once]
        bits = philox.random_raw(len(rows) * half).view(np.uint32)
        bits >>= 8
        # Signed, which the CPU turns into float faster; below 2**24 there is no difference.
        integers = bits.view(np.int32).reshape(len(rows), 2, half)
        radius, angle = integers[:, 0].astype(np.float32), integers[:, 1].astype(np.float32)
        for uniform, scale in ((radius, 1.0), (angle, np.float32(2 * math.pi))):
            uniform += np.float32(0.5)
            # In (0, 1), and of the angle in (0, 2 pi): a power of two rounds nothing, whenever it is multiplied.
            uniform *= np.float32(scale * 2**-24)
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        n_sines = max(0, size - half)
        np.multiply(radius[:, :size], np.cos(angle)[:, :size], out=rows[:, :half])
        np.multiply(radius[:, :n_sines], np.sin(angle, out=angle)[:, :n_sines], out=rows[:, half:])
    return torch.from_numpy(normal)


@lru_cache(maxsize=8)
def _key(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)
