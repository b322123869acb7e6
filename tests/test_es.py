import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import EvolutionStrategy
from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.lowrank import estimate_gradient, perturbed_parameters


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2).double()


def state(es):
    tensors = [p.clone() for p in es.module.parameters()]
    for entry in es.optimizer.state_dict()["state"].values():
        tensors += [v.clone() for v in entry.values() if isinstance(v, torch.Tensor)]
    return tensors


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_one_step_by_hand():
    # One weight w, two members w + sigma·E and w - sigma·E with E = A·B, fitness 3 and 1, no shaping:
    # g = (1/2)(3·E - 1·E) = E, and SGD with learning rate 0.1 on -g gives w + 0.1·E.
    module = nn.Linear(1, 1, bias=False).double()
    es = EvolutionStrategy(
        module, 2, sigma=0.5, learning_rate=0.1, seed=1, optimizer=torch.optim.SGD, fitness_shaping="none"
    )
    w = module.weight.item()
    plus, minus = (es.ask().parameters_of(n)["weight"].item() for n in (0, 1))
    perturbation = (plus - minus) / (2 * 0.5)
    metrics = es.tell([3.0, 1.0])
    assert module.weight.item() == pytest.approx(w + 0.1 * perturbation, abs=1e-12)
    assert metrics["fitness_mean"] == 2 and metrics["fitness_max"] == 3 and metrics["fitness_std"] == 1
    assert metrics["grad_norm"] == pytest.approx(abs(perturbation))
    assert metrics["update_ratio"] == pytest.approx(abs(0.1 * perturbation / w))


def test_every_torch_optimizer_gets_the_negative_estimate():
    fitness = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop):
        ours, reference = linear(), linear()
        es = EvolutionStrategy(ours, 8, learning_rate=0.1, seed=0, optimizer=optimizer, fitness_shaping="standardize")
        z = (fitness.double() - fitness.double().mean()) / fitness.double().std(correction=0)
        gradient = estimate_gradient(perturbed_parameters(ours), es.ask().noise, z)
        torch_optimizer = optimizer(reference.parameters(), lr=0.1, weight_decay=0.0)
        for name, p in reference.named_parameters():
            p.grad = -gradient[name]
        torch_optimizer.step()
        es.tell(fitness)
        for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_weight_decay_and_clipping():
    module = linear()
    before = module.weight.detach().clone()
    es = EvolutionStrategy(module, 4, learning_rate=0.1, seed=0, optimizer=torch.optim.SGD, weight_decay=0.5)
    es.ask()
    es.tell([1.0, 1.0, 1.0, 1.0])  # no gradient: decay alone
    assert torch.allclose(module.weight, before * (1 - 0.1 * 0.5))

    module = linear()
    before = [p.detach().clone() for p in module.parameters()]
    es = EvolutionStrategy(module, 4, learning_rate=1.0, seed=0, optimizer=torch.optim.SGD, max_grad_norm=0.01)
    es.ask()
    metrics = es.tell([1.0, 2.0, 3.0, 5.0])
    step = math.sqrt(sum((p - b).square().sum().item() for p, b in zip(module.parameters(), before, strict=True)))
    assert metrics["grad_norm"] > 0.01
    assert step == pytest.approx(0.01)


def test_constant_fitness_moves_nothing():
    for shaping in ("centered_rank", "standardize", "none", "best_fraction"):
        module = linear()
        before = [p.clone() for p in module.parameters()]
        es = EvolutionStrategy(module, 8, seed=0, fitness_shaping=shaping)
        es.ask()
        es.tell([123.0] * 8)
        assert same(before, list(module.parameters()))


def test_it_finds_the_optimum_of_a_quadratic():
    module = linear()
    target = torch.randn(2, 3, dtype=torch.float64)
    es = EvolutionStrategy(module, 128, sigma=0.05, learning_rate=0.02, seed=0)
    for _ in range(300):
        population = es.ask()
        y = population.forward(torch.eye(3).double()) - population.forward(torch.zeros(1, 3).double())
        es.tell(-(y.transpose(1, 2) - target).square().sum(dim=(1, 2)))
    assert (module.weight - target).abs().max() < 0.03


def test_step_and_batched_evaluation_give_the_same_update():
    x = torch.randn(5, 3).double()
    one, batch = (EvolutionStrategy(linear(), 8, seed=3) for _ in range(2))
    one.step(lambda module: -module(x).square().sum().item())
    batch.tell(-batch.ask().forward(x).square().sum(dim=(1, 2)))
    for a, b in zip(one.module.parameters(), batch.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_step_evaluates_every_member_at_its_own_parameters():
    es = EvolutionStrategy(linear(), 6, seed=3)
    expected = [es.ask().parameters_of(n) for n in range(6)]
    seen = []
    es.step(lambda module: seen.append({n: p.clone() for n, p in module.named_parameters()}) or 0.0)
    for a, b in zip(seen, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_step_puts_the_mean_back_whatever_is_raised():
    es = EvolutionStrategy(linear(), 8, seed=0)
    before = state(es)
    calls = []

    def fails(module):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        es.step(fails)
    assert same(before, state(es)) and es.generation == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_fitness_that_is_not_finite_changes_nothing(bad):
    es = EvolutionStrategy(linear(), 4, seed=0)
    es.ask()
    es.tell([1, 2, 3, 4])
    before = state(es)
    es.ask()
    with pytest.raises(NonFiniteError, match="member 2 in generation 1"):
        es.tell([1.0, 2.0, bad, 4.0])
    assert same(before, state(es)) and es.generation == 1


def test_a_step_that_overflows_changes_nothing():
    module = nn.Linear(3, 2)
    es = EvolutionStrategy(module, 4, seed=0, learning_rate=1e38, optimizer=torch.optim.SGD, fitness_shaping="none")
    es.ask()
    before = state(es)
    with pytest.raises(NonFiniteError, match="step of generation 0"):
        es.tell([1e6, 0.0, 0.0, -1e6])
    assert same(before, state(es)) and es.generation == 0


def test_an_optimizer_state_that_overflows_changes_nothing():
    es = EvolutionStrategy(nn.Linear(3, 2), 4, seed=0, fitness_shaping="none")
    es.ask()
    before = state(es)
    with pytest.raises(NonFiniteError, match="step of generation 0"):
        es.tell([1e25, 0.0, 0.0, -1e25])  # finite, but its square is not in float32
    assert same(before, state(es))


def test_an_optimizer_that_counts_in_its_groups_is_put_back_too():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                group["seen"] = group["lr"]
            return super().step(closure)

    def step_size(generation):
        return 1e38 if generation == 1 else 0.1

    es = EvolutionStrategy(nn.Linear(3, 2), 4, seed=0, learning_rate=step_size, optimizer=Counting)
    es.ask()
    es.tell([1.0, 0.0, 0.0, -1.0])
    es.fitness_shaping = lambda fitness: fitness
    es.ask()
    before = copy.deepcopy(es.optimizer.param_groups)
    with pytest.raises(NonFiniteError, match="step of generation 1"):
        es.tell([1e6, 0.0, 0.0, -1e6])
    after = es.optimizer.param_groups
    assert [{k: v for k, v in g.items() if k != "params"} for g in after] == [
        {k: v for k, v in g.items() if k != "params"} for g in before
    ]
    assert after[0]["k"] == 1 and after[0]["lr"] == 0.1
    assert after[0]["params"][0] is es.module.weight


def test_tell_needs_ask_and_the_right_shape():
    es = EvolutionStrategy(linear(), 4, seed=0)
    with pytest.raises(RuntimeError, match="without ask"):
        es.tell([1, 2, 3, 4])
    assert es.ask() is es.ask()
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        es.tell([1, 2, 3])
    es.tell(np.arange(4))
    with pytest.raises(RuntimeError, match="without ask"):
        es.tell([1, 2, 3, 4])


def test_schedules_go_by_the_generation():
    es = EvolutionStrategy(linear(), 4, seed=0, sigma=lambda g: 0.1 / (g + 1), learning_rate=lambda g: 0.5**g)
    seen = []
    for _ in range(3):
        es.ask()
        metrics = es.tell([1, 2, 3, 4])
        seen.append((metrics["sigma"], metrics["learning_rate"]))
    assert seen == [(0.1, 1.0), (0.05, 0.5), (0.1 / 3, 0.25)]
    assert es.optimizer.param_groups[0]["lr"] == 0.25


def test_a_resumed_run_is_the_uninterrupted_one():
    def run(es, n):
        for _ in range(n):
            es.tell(-es.ask().forward(torch.ones(1, 3).double()).square().sum(dim=(1, 2)))

    whole = EvolutionStrategy(linear(), 8, seed=0)
    run(whole, 6)
    first = EvolutionStrategy(linear(), 8, seed=0)
    run(first, 2)
    second = EvolutionStrategy(linear(seed=9), 8, seed=77)
    second.module.load_state_dict(first.module.state_dict())
    second.load_state_dict(first.state_dict())
    run(second, 4)
    assert same(state(whole), state(second))


def test_the_seed_decides_and_none_draws_one():
    def after(seed):
        es = EvolutionStrategy(linear(), 8, seed=seed)
        es.tell(-es.ask().forward(torch.ones(1, 3).double()).square().sum(dim=(1, 2)))
        return es

    assert same(state(after(1)), state(after(1)))
    assert not same(state(after(1)), state(after(2)))
    drawn = after(None)
    assert drawn.seed != after(None).seed
    assert same(state(drawn), state(after(drawn.seed)))


def test_global_generators_and_thread_setting_stay(rng_state):
    torch.set_num_threads(2)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    before = torch.get_rng_state()
    es = EvolutionStrategy(module, 8)
    es.step(lambda m: m(torch.ones(3)).item())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population_size": 7}, "population_size must be an even.*got 7"),
        ({"population_size": 0}, "population_size must be an even.*got 0"),
        ({"population_size": 4.0}, "population_size must be an even.*got 4.0"),
        ({"population_size": True}, "population_size must be an even.*got True"),
        ({"slice_size": 5}, "slice_size must be an even.*got 5"),
        ({"rank": 0}, "rank must be a whole number.*got 0"),
        ({"rank": 1.5}, "rank must be a whole number.*got 1.5"),
        ({"sigma": -1.0}, "sigma must be a finite number above 0, got -1.0"),
        ({"sigma": math.nan}, "sigma must be a finite number above 0, got nan"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0, got 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a finite number above 0, got 'fast'"),
        ({"seed": -1}, "seed must be a whole number, at least 0, got -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a finite number above 0, got 0.0"),
        ({"fitness_shaping": "rank"}, "fitness_shaping must be one of"),
        ({"optimizer": torch.optim.LBFGS, "weight_decay": 0.1}, "LBFGS has no weight decay"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates a loss itself"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of 0 or more, got -1.0"),
        ({"optimizer_kwargs": {"momentun": 1}}, "Adam refuses its settings.*momentun"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvolutionStrategy(linear(), **settings)
