"""The population on recorded states: against automatic differentiation, by hand, and what should come of it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import surrogate
from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.es import EvolutionStrategy
from eggroll_rl.surrogate import Improvement, Recorded, improve

STD = 0.3
STDS = np.array([0.1, 0.3, 0.9])
ONCE = Improvement(n_epochs=1, batch_size=10_000, sample_reuse=0, target_kl=0.01, clip_range=0.2, damping=0.1)


def linear(n_in=5, n_out=3, population_size=200, **settings):
    torch.manual_seed(0)
    return EvolutionStrategy(nn.Sequential(nn.Linear(n_in, n_out, bias=False)), population_size, seed=1, **settings)


def mlp(population_size, n_in=5, n_out=2):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, n_out))
    return EvolutionStrategy(module, population_size, seed=1)


def samples(es, n=400, advantage=lambda x, outputs: -(outputs - 1).square().sum(1), std=STD):
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(-1, 1, es.module[0].in_features)
    x = torch.randn(n, len(scale), generator=generator) * scale
    with torch.no_grad():
        mean = es.module(x)
    std = np.full(mean.shape[1], std)
    outputs = mean + torch.from_numpy(std.astype(np.float32)) * torch.randn(mean.shape, generator=generator)
    return Recorded(x, outputs, advantage(x, outputs).double().numpy(), std)


def weights(es):
    return torch.cat([parameter.detach().flatten().clone() for parameter in es.parameters.values()])


def test_one_update_of_a_linear_policy_is_its_natural_gradient(monkeypatch):
    """With hardly any damping and as many steps as it takes: G C^-1, G the gradient and C the second moments.

    Each output has a noise of its own. The logarithms of its deviations go a tenth of their way.
    """
    monkeypatch.setattr(surrogate, "_CG_STEPS", 60)
    es = linear()
    recorded, before = samples(es, std=STDS), weights(es)
    noise = (recorded.outputs - es.module(recorded.features)).detach().double()
    x, gain = recorded.features.double(), shaped(recorded)[:, None]
    expected = torch.linalg.solve(x.T @ x, x.T @ (gain * noise)).T.flatten()
    metrics, std, _ = improve(es, recorded, [], replace(ONCE, damping=1e-7))
    step = (weights(es) - before).double()
    assert torch.cosine_similarity(step, expected, dim=0) > 0.9999
    log_std_step = torch.from_numpy(np.log(std / STDS))
    expected_log = (gain * ((noise / torch.from_numpy(STDS)).square() - 1)).mean(0) / 2
    pace = (step @ expected) / (expected @ expected)
    torch.testing.assert_close(log_std_step, 0.1 * pace * expected_log, rtol=0.02, atol=1e-5)
    moved = (x @ step.view(3, 5).T / torch.from_numpy(STDS)).square().sum(1).mean() / 2
    assert moved + log_std_step.square().sum() == pytest.approx(0.01, rel=1e-3)
    assert metrics["kl"] == pytest.approx(0.01, rel=1e-3)
    assert metrics["update_ratio"] == pytest.approx((step.norm() / before.norm()).item(), rel=1e-4)
    assert metrics["clip_fraction"] == 0 and es.generation == 1


def test_the_noise_falls_no_further_than_its_least_deviation():
    """The best is the mean itself: noise only hurts. What begins below the least deviation does not fall at all."""
    es = linear(n_out=2)
    std = np.array([0.06, 0.01])
    for _ in range(40):
        recorded = samples(es, advantage=lambda x, outputs: -(outputs - es.module(x)).square().sum(1).detach(), std=std)
        _, std, _ = improve(es, recorded, [], replace(ONCE, batch_size=100, target_kl=0.5))
    assert std[0] == pytest.approx(0.05) and 0.01 <= std[1] < 0.05


def shaped(recorded):
    advantage = torch.from_numpy(recorded.advantages)
    return (advantage - advantage.mean()) / advantage.std(correction=0)


def jacobian_and_gain(es, recorded):
    """By automatic differentiation, in float64: (B, O, parameters), and PPO's gradient on the mean outputs (B, O)."""
    module = copy.deepcopy(es.module).double()
    values = dict(module.named_parameters())
    x = recorded.features.double()
    found = torch.func.jacrev(lambda v: torch.func.functional_call(module, v, (x,)))(values)
    noise = (recorded.outputs.double() - module(x)).detach()
    flat = torch.cat([found[name].flatten(2).detach() for name in values], dim=2)
    return flat, shaped(recorded)[:, None] * noise / torch.from_numpy(recorded.std).square()


def test_a_population_as_large_as_the_layers_knows_the_whole_gradient(monkeypatch):
    """And the step is (F + damping)^-1 of it, F the Fisher matrix: against automatic differentiation."""
    monkeypatch.setattr(surrogate, "_CG_STEPS", 60)
    es = mlp(population_size=8, n_out=3)
    recorded, before = samples(es, std=STDS), weights(es)
    jacobian_BOK, gain_BO = jacobian_and_gain(es, recorded)
    n_samples = len(gain_BO)
    gradient = torch.einsum("bok,bo->k", jacobian_BOK, gain_BO) / n_samples
    whitened_BOK = jacobian_BOK / torch.from_numpy(STDS)[:, None]
    fisher = torch.einsum("bok,bol->kl", whitened_BOK, whitened_BOK) / n_samples
    damping = ONCE.damping * fisher.diagonal().mean()
    expected = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), gradient)
    improve(es, recorded, [], ONCE)
    assert torch.cosine_similarity((weights(es) - before).double(), expected, dim=0) > 0.999


def test_the_members_fitness_is_the_gradient_along_them():
    """Four per layer, or as many as it is wide: each member's fitness is the directional derivative along a bᵀ."""
    es = mlp(population_size=4)
    recorded = samples(es)
    jacobian_BOK, gain_BO = jacobian_and_gain(es, recorded)
    gradient = torch.einsum("bok,bo->k", jacobian_BOK, gain_BO) / len(gain_BO)
    with torch.no_grad():
        _, layers = surrogate._evaluate(es.module, recorded.features, es.population_size, np.random.default_rng(0))
    start = 0
    for layer, fitness_PJ in zip(layers, surrogate._score(layers, gain_BO.float().T), strict=True):
        n_out, n_in = layer.linear.weight.shape
        assert len(layer.factors) == min(4, n_out)
        assert torch.allclose(layer.factors @ layer.factors.T, torch.eye(len(layer.factors)), atol=1e-5)
        own = gradient[start : start + n_out * n_in].view(n_out, n_in)
        own = torch.cat([own, gradient[start + n_out * n_in : start + n_out * (n_in + 1)][:, None]], dim=1)
        start += n_out * (n_in + 1)
        expected = layer.factors.double() @ own
        assert torch.allclose(fitness_PJ.double(), expected, rtol=0.02, atol=0.01 * expected.abs().max())


def test_weights_by_hand():
    """One sample with input 1 and members 1 and 2: K = [[1, 2], [2, 4]], F = 3 · [1, 2], damping 0.1 of 2.5."""
    responses = torch.tensor([[[1.0]], [[2.0]]])
    layer = surrogate._Layer(nn.Linear(1, 2, bias=False), torch.ones(1, 1), torch.eye(2), responses)
    (found,) = surrogate._natural_gradient([layer], torch.tensor([[3.0]]), torch.ones(1), damping=0.1)
    gram = np.array([[1.0, 2.0], [2.0, 4.0]])
    expected = np.linalg.solve(gram + 0.25 * np.eye(2), [3.0, 6.0])
    assert found.flatten().numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("population_size", [2, 64])
def test_the_policy_goes_where_the_advantage_is(population_size):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    es = EvolutionStrategy(module, population_size, seed=0)
    settings = replace(ONCE, n_epochs=2, batch_size=128, target_kl=0.05)

    def missed(x, outputs):
        return (outputs - torch.stack([x[:, 0].tanh(), x[:, 1].sin()], 1)).square().sum(1)

    def error():
        recorded = samples(es, advantage=lambda x, outputs: -missed(x, outputs))
        return missed(recorded.features, es.module(recorded.features)).mean().item()

    first = error()
    for _ in range(60):
        recorded = samples(es, advantage=lambda x, outputs: -missed(x, outputs))
        metrics, _, _ = improve(es, recorded, [], settings)
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
        settings = replace(ONCE, n_epochs=n_epochs, batch_size=10, target_kl=0.01 * n_epochs**2)
        recorded = Recorded(x, outputs, np.array([1.0, 0.0]), np.array([STD]))
        metrics, std, _ = improve(es, recorded, [], settings)
        assert metrics["clip_fraction"] == (n_epochs > 1)
        moved.append((es.module(x).detach(), std.item()))
    mean, std = moved[1]
    ratios = STD / std * ((outputs - old) ** 2 / (2 * STD**2) - (outputs - mean) ** 2 / (2 * std**2)).exp()
    assert ratios[0] > 1.2 and ratios[1] < 0.8
    assert torch.equal(mean, moved[2][0]) and not torch.equal(mean, moved[0][0])
    assert std == moved[2][1] != moved[0][1]


def test_samples_of_earlier_generations_count_by_their_likelihood(monkeypatch):
    """The gradient of the truncated, importance-weighted surrogate over both generations' samples, and nothing else."""
    monkeypatch.setattr(surrogate, "_CG_STEPS", 60)
    es = linear()
    past = samples(es, n=300, std=STDS)
    settings = replace(ONCE, target_kl=1.0, damping=1e-7)
    _, std, kept = improve(es, past, [], settings)
    assert torch.equal(kept.features, past.features) and torch.equal(kept.outputs, past.outputs)
    new, before = samples(es, n=200, std=std), weights(es)
    x = torch.cat([new.features, past.features]).double()
    outputs = torch.cat([new.outputs, past.outputs]).double()
    mean = es.module(x.float()).double().detach()

    def likelihood(outputs, mean, std):
        return torch.distributions.Normal(mean, torch.from_numpy(std)).log_prob(outputs).sum(1)

    old = (past.outputs - noise_of(past)).double()
    weight = (likelihood(outputs, mean, std)[200:] - likelihood(past.outputs.double(), old, STDS)).exp()
    assert (weight > 2).any() and (weight < 0.5).any()
    gain = torch.cat([shaped(new), shaped(past) * weight.clamp(max=2)])[:, None]
    expected = torch.linalg.solve(x.T @ x, x.T @ (gain * (outputs - mean))).T.flatten()
    improve(es, new, [kept], settings)
    assert torch.cosine_similarity((weights(es) - before).double(), expected, dim=0) > 0.999


def noise_of(recorded):
    """What :func:`samples` added to the mean's outputs: the same numbers for the same count."""
    generator = torch.Generator().manual_seed(2)
    torch.randn(recorded.features.shape, generator=generator)
    return torch.from_numpy(recorded.std.astype(np.float32)) * torch.randn(recorded.outputs.shape, generator=generator)


@pytest.mark.parametrize("advantage", [7.0, 0.3])
def test_no_differences_no_update(advantage):
    """0.3 has no exact mean: what is left of it is rounding."""
    es = linear()
    before = weights(es)
    recorded = samples(es, advantage=lambda x, outputs: torch.full((len(x),), advantage, dtype=torch.float64))
    metrics, std, _ = improve(es, recorded, [], ONCE)
    assert std == pytest.approx(STD)
    assert torch.equal(weights(es), before) and metrics["kl"] == 0 and es.generation == 1


@pytest.mark.parametrize("fault", ["not finite", "a signal"])
def test_what_goes_wrong_changes_nothing(fault, monkeypatch):
    es = linear()
    before, recorded = weights(es), samples(es)
    settings = replace(ONCE, n_epochs=3, batch_size=100)
    if fault == "not finite":
        recorded.advantages[3] = np.nan
    else:
        calls, move = [], surrogate._move

        def stopped(*args):
            move(*args)
            calls.append(1)
            if len(calls) == 5:
                assert not torch.equal(weights(es), before)
                raise KeyboardInterrupt

        monkeypatch.setattr(surrogate, "_move", stopped)
    with pytest.raises(NonFiniteError if fault == "not finite" else KeyboardInterrupt):
        improve(es, recorded, [], settings)
    assert torch.equal(weights(es), before) and es.generation == 0


def test_the_result_does_not_depend_on_the_number_of_threads():
    def moved(threads):
        torch.set_num_threads(threads)
        module = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6))
        es = EvolutionStrategy(module, 64, seed=0)
        for parameter in es.parameters.values():
            torch.nn.init.uniform_(parameter, -0.2, 0.2, generator=torch.Generator().manual_seed(0))
        improve(es, samples(es, n=2000), [], replace(ONCE, n_epochs=2, batch_size=1000))
        return weights(es)

    threads = torch.get_num_threads()
    try:
        assert torch.equal(moved(1), moved(2))
    finally:
        torch.set_num_threads(threads)


_SHARED = nn.Linear(2, 2)
_FROZEN = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Linear(2, 3), "plain nn.Sequential, got Linear"),
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), r"1 \(LayerNorm\) has parameters"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh())), r"0 \(Sequential\) has parameters"),
        (nn.Sequential(_SHARED, nn.Tanh(), _SHARED), r"2 \(Linear\) shares parameters"),
        (nn.Sequential(_FROZEN, nn.Tanh(), nn.Linear(2, 1)), r"0 \(Linear\) has frozen parameters"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)), r"1 \(ReLU\) works in place"),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), r"1 \(Softmax\) does not work on each number by itself"),
        (nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2))), r"1 \(Unflatten\) does not work on each number"),
    ],
)
def test_a_network_whose_members_cannot_be_evaluated_is_refused(network, message):
    with pytest.raises(ConfigError, match=message):
        surrogate.check_network(network)
