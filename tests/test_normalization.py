from fractions import Fraction

import numpy as np
import pytest
import torch

from eggroll_rl.normalization import Moments, ObsNormalizer


def observe(x_TNI, active_TN, block):
    moments = Moments.zeros(*x_TNI.shape[1:])
    for start in range(0, len(x_TNI), block):
        moments.add(x_TNI[start : start + block], active_TN[start : start + block])
    return moments


@pytest.mark.parametrize("block", [1, 7, 100])
def test_moments_are_those_of_what_active_members_saw(block):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (20, 4, 3))
    active = np.arange(20)[:, None] < np.array([20, 5, 1, 0])
    moments = observe(x, active, block)
    assert moments.count.tolist() == [20, 5, 1, 0]
    for member, n in enumerate([20, 5, 1]):
        seen = x[:n, member]
        assert np.allclose(moments.mean[member], seen.mean(0), rtol=1e-14)
        assert np.allclose(moments.m2[member], ((seen - seen.mean(0)) ** 2).sum(0), rtol=1e-12)
    assert not moments.mean[3].any() and not moments.m2[3].any()


def test_a_member_that_is_done_cannot_spoil_the_moments():
    x = np.ones((4, 2, 1))
    x[2:, 1] = np.nan
    active = np.array([[True, True], [True, True], [True, False], [True, False]])
    moments = observe(x, active, 4)
    assert np.isfinite(moments.mean).all() and np.isfinite(moments.m2).all()


def test_generations_combine_to_the_whole():
    rng = np.random.default_rng(1)
    normalizer = ObsNormalizer(3)
    everything = []
    for generation in range(4):
        x = rng.normal(generation, 1 + generation, (30, 5, 3))
        normalizer.combine(observe(x, np.ones((30, 5), bool), 8))
        everything.append(x.reshape(-1, 3))
    whole = np.concatenate(everything)
    assert normalizer.count.item() == len(whole)
    assert np.allclose(normalizer.mean.numpy(), whole.mean(0), rtol=1e-13)
    assert np.allclose((normalizer.m2 / normalizer.count).numpy(), whole.var(0), rtol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e9])
def test_a_large_offset_costs_no_precision(offset):
    x = np.random.default_rng(2).normal(offset, 1.0, (64, 4, 1))
    normalizer = ObsNormalizer(1)
    normalizer.combine(observe(x[:32], np.ones((32, 4), bool), 5))
    normalizer.combine(observe(x[32:], np.ones((32, 4), bool), 32))
    values = [Fraction(v) for v in x.ravel().tolist()]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    assert normalizer.mean.item() == pytest.approx(float(mean), rel=1e-15)
    # The naive sum of squares is off by more than the variance itself from 1e8 on.
    assert (normalizer.m2 / normalizer.count).item() == pytest.approx(float(variance), rel=1e-7)


def test_outputs_are_standardized_clipped_and_float32():
    normalizer = ObsNormalizer(2)
    x = np.random.default_rng(3).normal([5.0, -2.0], [0.1, 30.0], (500, 1, 2))
    normalizer.combine(observe(x, np.ones((500, 1), bool), 50))
    y = normalizer(torch.from_numpy(x[:, 0]))
    assert y.dtype == torch.float32
    assert y.mean(0).abs().max() < 1e-5 and (y.std(0) - 1).abs().max() < 0.01
    assert normalizer(torch.tensor([[1e9, -1e9]])).tolist() == [[10.0, -10.0]]


def test_before_any_observation_it_passes_through_and_a_constant_gives_zero():
    normalizer = ObsNormalizer(2)
    assert normalizer(torch.tensor([[3.0, -4.0]])).tolist() == [[3.0, -4.0]]
    normalizer.combine(Moments.zeros(3, 2))
    assert normalizer.count == 0
    normalizer.combine(observe(np.full((10, 2, 2), 7.0), np.ones((10, 2), bool), 3))
    assert normalizer(torch.tensor([[7.0, 7.0]])).tolist() == [[0.0, 0.0]]


def test_forward_changes_no_statistics_and_state_dict_carries_them():
    normalizer, copy = ObsNormalizer(2), ObsNormalizer(2)
    x = np.random.default_rng(4).normal(size=(9, 2, 2))
    normalizer.combine(observe(x, np.ones((9, 2), bool), 3))
    before = {name: tensor.clone() for name, tensor in normalizer.state_dict().items()}
    normalizer.train()
    normalizer(torch.randn(50, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in normalizer.state_dict().items())
    copy.load_state_dict(normalizer.state_dict())
    probe = torch.randn(5, 2)
    assert torch.equal(copy(probe), normalizer(probe))
    copy.load_state_dict(ObsNormalizer(2).state_dict())
    assert torch.equal(copy(probe), probe)
    assert not list(normalizer.parameters())
