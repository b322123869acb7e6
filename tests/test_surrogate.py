"""The population on recorded states: against least squares, a hand calculation, and what should come of it."""

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import lowrank, surrogate
from eggroll_rl.errors import NonFiniteError
from eggroll_rl.es import EvolutionStrategy
from eggroll_rl.surrogate import Improvement, Recorded, improve

STD = 0.3
ONCE = Improvement(STD, n_epochs=1, batch_size=10_000, target_kl=0.01, clip_range=0.2)


def linear(n_in=5, n_out=3, population_size=200, **settings):
    torch.manual_seed(0)
    return EvolutionStrategy(nn.Linear(n_in, n_out, bias=False), population_size, seed=1, **settings)


def samples(es, n=400, advantage=lambda x, outputs: -(outputs - 1).square().sum(1)):
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(-1, 1, es.module.in_features if isinstance(es.module, nn.Linear) else 5)
    x = torch.randn(n, len(scale), generator=generator) * scale
    with torch.no_grad():
        mean = es.module(x)
    outputs = mean + STD * torch.randn(mean.shape, generator=generator)
    return Recorded(x, outputs, advantage(x, outputs).double().numpy())


def weights(es):
    return torch.cat([parameter.detach().flatten().clone() for parameter in es.parameters.values()])


def test_one_update_of_a_linear_policy_is_its_natural_gradient(monkeypatch):
    """With more pairs than parameters, and hardly any ridge: G C^-1, G the gradient and C the second moments."""
    monkeypatch.setattr(surrogate, "_RIDGE", 1e-7)
    es = linear()
    recorded, before = samples(es), weights(es)
    noise = (recorded.outputs - es.module(recorded.features)).detach().double()
    advantage = torch.from_numpy(recorded.advantages)
    advantage = ((advantage - advantage.mean()) / advantage.std(correction=0)).clamp(-4, 4)
    x = recorded.features.double()
    expected = torch.linalg.solve(x.T @ x, x.T @ (advantage[:, None] * noise)).T.flatten()
    metrics = improve(es, recorded, ONCE)
    step = (weights(es) - before).double()
    assert torch.cosine_similarity(step, expected, dim=0) > 0.9999
    assert metrics["kl"] == pytest.approx(0.01, rel=1e-3)
    assert metrics["update_ratio"] == pytest.approx((step.norm() / before.norm()).item(), rel=1e-4)
    assert metrics["clip_fraction"] == 0 and es.generation == 1


def test_weights_by_hand():
    """Two pairs, one sample, one output: responses 1 and 2, gain 3, so K = [[1, 2], [2, 4]], F = [3, 6], ridge 0.25."""
    found = surrogate._natural_weights(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[3.0]]), step_kl=0.5)
    gram = np.array([[1.0, 2.0], [2.0, 4.0]])
    expected = np.linalg.solve(gram + 0.25 * np.eye(2), [3.0, 6.0])
    # The policy moves by w·(1, 2): half its square is to be 0.5.
    assert found.numpy() == pytest.approx(expected / abs(expected @ [1, 2]))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_policy_goes_where_the_advantage_is(rank):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    es = EvolutionStrategy(module, population_size=64, rank=rank, seed=0)
    settings = Improvement(STD, n_epochs=2, batch_size=128, target_kl=0.05, clip_range=0.2)

    def missed(x, outputs):
        return (outputs - torch.stack([x[:, 0].tanh(), x[:, 1].sin()], 1)).square().sum(1)

    def error():
        recorded = samples(es, advantage=lambda x, outputs: -missed(x, outputs))
        return missed(recorded.features, es.module(recorded.features)).mean().item()

    first = error()
    for _ in range(60):
        metrics = improve(es, samples(es, advantage=lambda x, outputs: -missed(x, outputs)), settings)
        assert 0 < metrics["kl"] < 0.06
    assert error() < first / 4


def test_samples_that_have_moved_far_enough_count_no_more():
    """The first should become likelier, the second less likely; once both ratios have left the range, nothing moves."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    moved = []
    for n_epochs in (1, 8, 9):
        es = linear(2, 1)
        old = es.module(x).detach()
        outputs = old + torch.tensor([[0.4], [0.1]])
        # Steps of one size, however many there are.
        settings = Improvement(STD, n_epochs, batch_size=10, target_kl=0.01 * n_epochs**2, clip_range=0.2)
        metrics = improve(es, Recorded(x, outputs, np.array([1.0, 0.0])), settings)
        assert metrics["clip_fraction"] == (n_epochs > 1)
        moved.append(es.module(x).detach())
    ratios = (((outputs - old) ** 2 - (outputs - moved[1]) ** 2) / (2 * STD**2)).exp()
    assert ratios[0] > 1.2 and ratios[1] < 0.8
    assert torch.equal(moved[1], moved[2]) and not torch.equal(moved[0], moved[1])


def test_no_differences_no_update():
    es = linear()
    before = weights(es)
    metrics = improve(es, samples(es, advantage=lambda x, outputs: torch.full((len(x),), 7.0)), ONCE)
    assert torch.equal(weights(es), before) and metrics["kl"] == 0 and es.generation == 1


@pytest.mark.parametrize("fault", ["not finite", "a signal"])
def test_what_goes_wrong_changes_nothing(fault, monkeypatch):
    es = linear()
    before, recorded = weights(es), samples(es)
    settings = Improvement(STD, n_epochs=3, batch_size=100, target_kl=0.01, clip_range=0.2)
    if fault == "not finite":
        recorded.advantages[3] = np.nan
    else:
        calls, move = [], es.move

        def stopped(*args):
            move(*args)
            calls.append(1)
            if len(calls) == 5:
                assert not torch.equal(weights(es), before)
                raise KeyboardInterrupt

        monkeypatch.setattr(es, "move", stopped)
    with pytest.raises(NonFiniteError if fault == "not finite" else KeyboardInterrupt):
        improve(es, recorded, settings)
    assert torch.equal(weights(es), before) and es.generation == 0


def test_the_result_depends_neither_on_threads_nor_on_how_many_members_fit_into_the_cache(monkeypatch):
    def moved(threads):
        torch.set_num_threads(threads)
        es = linear()
        improve(es, samples(es), Improvement(STD, 2, 100, 0.01, 0.2))
        return weights(es)

    threads = torch.get_num_threads()
    try:
        assert torch.equal(moved(1), moved(2))
        one = moved(1)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(lowrank, "_NUMBERS_AT_ONCE", 2000)
    assert torch.allclose(moved(1), one, atol=1e-5)
