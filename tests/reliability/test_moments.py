"""R22: running moments against exact arithmetic, beside Stable-Baselines3's and sums of squares in float32."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd

from eggroll_rl.normalization import Moments, ObsNormalizer

pytestmark = pytest.mark.promise("R22")

ULP = Fraction(1, 2**52)  # relative distance of neighbouring float64, at most
OFFSETS = (0.0, 1e3, 1e6, 1e9)
SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)


def samples(offset, scale, n_members=6, n_steps=40, seed=0):
    """Return observations (T, N, 3) in float64: noise, a constant, and one that two values alternate in."""
    rng = np.random.default_rng(seed)
    x = offset + scale * rng.standard_normal((n_steps, n_members, 3))
    x[..., 1] = offset + scale
    x[..., 2] = offset + scale * (np.arange(n_steps)[:, None] % 2)
    return x


def exact(x_BI):
    """Return mean and variance (I,) as fractions."""
    means, variances = [], []
    for column in x_BI.T.tolist():
        values = [Fraction(x) for x in column]
        mean = sum(values) / len(values)
        means.append(mean)
        variances.append(sum((x - mean) ** 2 for x in values) / len(values))
    return means, variances


def by_ours(blocks, active):
    """Return mean and variance (I,) after a generation per block, as training adds them."""
    normalizer = ObsNormalizer(blocks[0].shape[2])
    for x_TNI, active_TN in zip(blocks, active, strict=True):
        moments = Moments.zeros(x_TNI.shape[1], x_TNI.shape[2])
        for first in range(0, len(x_TNI), 7):
            moments.add(x_TNI[first : first + 7], active_TN[first : first + 7])
        normalizer.combine(moments)
    return normalizer.mean.numpy(), (normalizer.m2 / normalizer.count).numpy()


def by_sb3(blocks, active):
    kept = RunningMeanStd(epsilon=0.0, shape=(blocks[0].shape[2],))
    kept.count = 1e-300  # its own 1e-4 is a prior, not a rounding error; 0 divides by 0
    for x_TNI, active_TN in zip(blocks, active, strict=True):
        for n in range(x_TNI.shape[1]):
            if active_TN[:, n].any():
                kept.update(x_TNI[active_TN[:, n], n])
    return kept.mean, kept.var


def by_float32_sums(blocks, active):
    """Sum and sum of squares in float32, as EvoTorch keeps them by default."""
    total, squares, count = 0, 0, 0
    for x_TNI, active_TN in zip(blocks, active, strict=True):
        x = x_TNI[active_TN].astype(np.float32)
        total, squares, count = total + x.sum(0), squares + np.square(x).sum(0), count + len(x)
    mean = total / np.float32(count)
    return mean.astype(np.float64), (squares / np.float32(count) - np.square(mean)).astype(np.float64)


def error_in_ulp(found, right, scale):
    """Return |found - right| in units of the last place of ``scale``."""
    return float(abs(Fraction(float(found)) - right) / (ULP * scale))


def errors(method, blocks, active):
    """Return the worst error of the mean in ulp of the data, that of the variance in ulp times kappa, and variances.

    kappa = sqrt(1 + mean²/variance) is the condition of a variance: Chan, Golub & LeVeque, "Algorithms for computing
    the sample variance" (1983), bound the error of good algorithms by it, and that of sums of squares by its square.

    :return: besides, the variance found of the constant, and the least of all
    """
    x = np.concatenate([x[a] for x, a in zip(blocks, active, strict=True)])
    mean, variance = method(blocks, active)
    means, variances = exact(x)
    size = [max(Fraction(abs(v)) for v in column) for column in x.T.tolist()]
    of_mean = max(error_in_ulp(m, r, s) for m, r, s in zip(mean, means, size, strict=True))
    unit = [v * Fraction(math.sqrt(1 + m**2 / v)) if v else None for m, v in zip(means, variances, strict=True)]
    of_variance = max(error_in_ulp(m, r, u) for m, r, u in zip(variance, variances, unit, strict=True) if u)
    constant = max(float(v) for v, u in zip(variance, unit, strict=True) if u is None)
    return of_mean, of_variance, constant, float(np.min(variance))


def grid():
    for offset in OFFSETS:
        for scale in SCALES:
            blocks = [samples(offset, scale, seed=seed) for seed in range(4)]
            rng = np.random.default_rng(1)
            active = [rng.random(x.shape[:2]) < 0.8 for x in blocks]
            active[1][:, 2] = False  # a member that saw nothing
            yield offset, scale, blocks, active


METHODS = {"ours": by_ours, "SB3 RunningMeanStd": by_sb3, "float32 sums": by_float32_sums}


def test_moments_are_exact_to_a_few_ulp(cells):
    rows = []
    for offset, scale, blocks, active in grid():
        found = {name: errors(method, blocks, active) for name, method in METHODS.items()}
        rows.append((offset, scale, found))
        with cells.cell(f"offset {offset:g}, scale {scale:g}"):
            of_mean, of_variance, constant, least = found["ours"]
            assert of_mean < 2 and of_variance < 4, found["ours"]
            assert constant == 0 and least >= 0
    print(
        "\nworst error of the mean in ulp of the data, of the variance in ulp times its condition; constant's variance"
    )
    for offset, scale, found in rows:
        parts = (f"{name} {m:9.3g} {v:9.3g} {c:9.2g}" for name, (m, v, c, _) in found.items())
        print(f"offset {offset:6g} scale {scale:6g} | " + " | ".join(parts))
    # The data tell the methods apart: else they would be too easy.
    assert max(found["float32 sums"][1] for _, _, found in rows) > 1e9
    assert min(found["float32 sums"][3] for _, _, found in rows) < 0


def test_the_plain_formula_is_noticed(cells):
    with cells.control("sums of squares in float32"):
        for _, _, blocks, active in grid():
            assert errors(by_float32_sums, blocks, active)[1] < 4


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e9 + 0.1, 1e-300, 12345.678, 1e150])
def test_a_constant_has_no_variance_and_gives_zero(cells, value):
    with cells.cell(f"constant {value}"):
        normalizer = ObsNormalizer(2)
        for n_steps in (1, 7, 100, 1000):
            moments = Moments.zeros(3, 2)
            x = np.full((n_steps, 3, 2), value)  # a mean by sums would not be it: 0.1 + 0.1 + 0.1 is not 0.3
            active = np.ones((n_steps, 3), bool)
            active[n_steps // 2 :, 1] = False
            moments.add(x, active)
            normalizer.combine(moments)
        assert normalizer.m2.tolist() == [0.0, 0.0]
        assert normalizer.mean.tolist() == [value, value]
        assert normalizer(torch.full((4, 2), value, dtype=torch.float64)).tolist() == [[0.0, 0.0]] * 4


def merged(parts):
    """Return count, mean and m2 of (count, mean, m2) merged in their order, exactly."""
    count, mean, m2 = parts[0]
    for n, x, s in parts[1:]:
        delta, total = x - mean, count + n
        mean, m2, count = mean + delta * n / total, m2 + s + delta**2 * count * n / total, total
    return count, mean, m2


def combine_all(parts):
    normalizer = ObsNormalizer(1)
    for count, mean, m2 in parts:
        normalizer.combine(Moments(np.array([float(count)]), np.array([[float(mean)]]), np.array([[float(m2)]])))
    return normalizer


@pytest.mark.parametrize("exponent", [10, 30, 52, 53])
def test_counts_up_to_2_53_are_merged(cells, exponent):
    rng = np.random.default_rng(exponent)
    parts = []
    for count in (2**exponent // 2, 2**exponent // 4, 3, 1, 2**exponent // 8):
        mean = Fraction(float(rng.standard_normal()))
        parts.append((count, mean, Fraction(float(count * rng.random()))))
    normalizer = combine_all(parts)
    count, mean, m2 = merged(parts)
    with cells.cell(f"2**{exponent}"):
        assert normalizer.count.item() == count
        assert error_in_ulp(normalizer.mean.item(), mean, abs(mean)) < 4
        assert error_in_ulp(normalizer.m2.item(), m2, m2) < 16


@pytest.mark.parametrize("n", [1000, pytest.param(100_000, marks=pytest.mark.reliability)])
def test_many_merges_drift_little(cells, n):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 1000, n)
    means = 1e3 + rng.standard_normal(n)
    m2s = counts * rng.random(n)
    normalizer = combine_all(zip(counts, means, m2s, strict=True))
    # Exactly, from the sums of all parts.
    fractions = [(int(c), Fraction(float(m)), Fraction(float(s))) for c, m, s in zip(counts, means, m2s, strict=True)]
    count = sum(c for c, _, _ in fractions)
    mean = sum(c * m for c, m, _ in fractions) / count
    m2 = sum(s for _, _, s in fractions) + sum(c * (m - mean) ** 2 for c, m, _ in fractions)
    of_mean = error_in_ulp(normalizer.mean.item(), mean, abs(mean))
    of_m2 = error_in_ulp(normalizer.m2.item(), m2, m2)
    print(f"\n{n} merges: mean {of_mean:.2f} ulp, variance {of_m2:.2f} ulp")
    with cells.cell(f"{n} merges"):
        # Each adds half an ulp of the mean's size, times a share that falls as 1/k; rounding of m2 adds up as a walk.
        assert of_mean < 2 + 4 * math.log(n) and of_m2 < 4 * math.sqrt(n)


def test_merging_is_the_same_in_any_grouping_to_a_few_ulp(cells):
    x = samples(1e6, 1e-3, n_members=12)
    active = np.ones(x.shape[:2], bool)
    together = by_ours([x], [active])
    for size in (1, 2, 5):
        parts = [x[:, first : first + size] for first in range(0, 12, size)]
        split = by_ours(parts, [active[:, first : first + size] for first in range(0, 12, size)])
        with cells.cell(f"groups of {size}"):
            np.testing.assert_allclose(split[0], together[0], rtol=8 * 2**-52)
            np.testing.assert_allclose(split[1], together[1], rtol=1e-6, atol=0)


def test_nothing_seen_changes_nothing_and_an_overflow_is_no_nan(cells):
    normalizer = ObsNormalizer(1)
    with cells.cell("no observation"):
        normalizer.combine(Moments.zeros(4, 1))
        assert normalizer.count.item() == 0 and normalizer(torch.tensor([[3.0]])).item() == 3.0
