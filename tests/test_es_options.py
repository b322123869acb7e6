"""One case by hand for each option of the strategy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import EvolutionStrategy, schedules
from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.fitness import centered, sign_of_pair, standardize_groups


def weight(value=2.0):
    module = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        module.weight.fill_(value)
    return module


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def noise_of(es):
    """Return the members' E of the first parameter."""
    name, parameter = next(iter(es.parameters.items()))
    population = es.ask()
    return [(population.parameters_of(n)[name] - parameter).detach() / es.sigma for n in range(len(population))]


def sgd(module, n, **settings):
    return EvolutionStrategy(module, n, **{"sigma": 0.5, "seed": 1, "optimizer": torch.optim.SGD, **settings})


# Noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reuse", "same"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (0, [0, 0, 0, 0])])
def test_noise_is_reused_for_as_many_generations_as_it_says(reuse, same):
    es = sgd(weight(), 2, noise_reuse=reuse, fitness_shaping="none")
    drawn = []
    for _ in range(4):
        drawn.append(noise_of(es)[0].item())
        es.tell([1.0, 1.0])
    assert [drawn.index(min(drawn, key=lambda x, d=d: abs(x - d))) for d in drawn] == [same.index(s) for s in same]


def test_without_pairs_each_member_has_its_own_direction():
    es = sgd(weight(), 4, antithetic=False, learning_rate=0.1, fitness_shaping="none")
    e = torch.stack(noise_of(es)).flatten()
    assert len(e.unique()) == 4 and not torch.allclose(e[0], -e[1])
    metrics = es.tell([1.0, 0.0, 0.0, 3.0])
    assert es.module.weight.item() == pytest.approx(2 + 0.1 * (1 * e[0] + 3 * e[3]).item() / 4)
    assert "pair_snr" not in metrics
    with pytest.raises(ConfigError, match="'sign_of_pair' compares the members of pairs"):
        sgd(weight(), 4, antithetic=False, fitness_shaping="sign_of_pair")


def test_the_sign_update_sums_signs():
    module = nn.Linear(3, 2, bias=False).double()
    es = sgd(module, 4, noise="sign", learning_rate=1.0, fitness_shaping="none")
    before, e = module.weight.detach().clone(), noise_of(es)
    es.tell([2.0, 0.0, 0.0, 1.0])
    # Rank 1: the sign of A Bᵀ is sign(A) sign(B)ᵀ.
    assert torch.allclose(module.weight - before, (2 * e[0].sign() - e[2].sign()) / 4)


def test_frozen_and_filtered_parameters_stay():
    for settings, left in (
        ({"freeze_nonmatrix": True}, ["0.weight", "2.weight"]),
        ({"param_filter": lambda name, parameter: name.startswith("2")}, ["2.weight", "2.bias"]),
    ):
        module = mlp()
        before = {name: p.clone() for name, p in module.named_parameters()}
        es = EvolutionStrategy(module, 4, seed=0, weight_decay=0.1, optimizer=torch.optim.AdamW, **settings)
        es.ask()
        es.tell([1.0, 2.0, 3.0, 4.0])
        moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]
        assert moved == left == list(es.parameters)


# Fitness ---------------------------------------------------------------------------------------------------


def test_groups_by_hand():
    # Means 2 and 20 of the groups; deviation of all eight around 11.
    fitness = torch.tensor([1.0, 3.0, 2.0, 2.0, 10.0, 30.0, 20.0, 20.0], dtype=torch.float64)
    deviation = math.sqrt(((fitness - 11) ** 2).mean().item())
    expected = [-1, 1, 0, 0, -10, 10, 0, 0]
    assert standardize_groups(fitness, 4).tolist() == pytest.approx([x / deviation for x in expected])
    # Against the first two of each group, (1 + 3)/2 and (10 + 30)/2.
    assert standardize_groups(fitness + torch.tensor([0, 0, 5, 5] * 2), 4, baseline=True).tolist() == pytest.approx(
        [x / standardize_deviation(fitness + torch.tensor([0, 0, 5, 5] * 2)) for x in (0, 0, 5, 5, 0, 0, 5, 5)]
    )


def standardize_deviation(fitness):
    return math.sqrt(((fitness - fitness.mean()) ** 2).mean().item())


def test_sign_and_centre_by_hand():
    assert sign_of_pair(torch.tensor([3.0, 1.0, 2.0, 9.0, 4.0, 4.0])).tolist() == [0.5, -0.5, -0.5, 0.5, 0.0, 0.0]
    assert centered(torch.tensor([1.0, 2.0, 6.0])).tolist() == [-2.0, -1.0, 3.0]


def test_a_baseline_is_the_mean_itself_and_moves_nothing():
    es = sgd(weight(), 4, baseline=True, fitness_shaping="standardize", learning_rate=0.1)
    e = noise_of(es)
    assert e[0] == e[1] == 0 and e[2] == -e[3] != 0
    es.tell([5.0, 5.0, 8.0, 6.0])
    deviation = standardize_deviation(torch.tensor([5.0, 5.0, 8.0, 6.0]))
    assert es.module.weight.item() == pytest.approx(2 + 0.1 * e[2].item() * (3 - 1) / deviation / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 3, "fitness_shaping": "standardize"}, "must be even and divide population_size 8, got 3"),
        ({"group_size": 6, "fitness_shaping": "standardize"}, "must be even and divide population_size 8, got 6"),
        ({"group_size": 4}, "group_size=4 needs fitness_shaping='standardize'"),
        ({"baseline": True, "group_size": 2, "fitness_shaping": "standardize"}, "at least 4, got 2"),
        ({"noise": "cauchy"}, "noise must be one of lowrank, gaussian, sparse, sign"),
        ({"noise_reuse": -1}, "noise_reuse must be a whole number, at least 0"),
        ({"learning_rate": lambda g: 0.1, "lr_scheduler": lambda o: None}, "must be a number where lr_scheduler"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates a loss itself"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvolutionStrategy(mlp(), 8, **settings)


def test_large_returns_are_kept():
    es = sgd(weight(), 2, fitness_shaping="none", learning_rate=1e-4)
    e = noise_of(es)[0].item()
    es.tell([12_000.0, -3_000.0])
    assert es.module.weight.item() == pytest.approx(2 + 1e-4 * 15_000 * e / 2)


def test_missing_members_leave_with_the_other_of_their_pair():
    full, part = sgd(mlp(), 4, fitness_shaping="none"), sgd(mlp(), 8, fitness_shaping="none")
    before = [p.clone() for p in part.module.parameters()]
    part.ask()
    metrics = part.tell({0: 1.0, 1: 2.0, 3: 100.0, 4: math.nan, 5: 7.0, 6: 5.0, 7: 9.0}, partial=True)
    assert part.missing == [2, 4] and metrics["fitness_mean"] == (1 + 2 + 5 + 9) / 4
    full.ask()
    assert full.missing == []
    # Pairs 0 and 3 alone, as a mean over these four.
    population = sgd(mlp(), 8).ask()
    for name, parameter, old in zip(part.parameters, part.module.parameters(), before, strict=True):
        e = {n: (population.parameters_of(n)[name] - old) / 0.5 for n in (0, 6)}
        assert torch.allclose(parameter - old, 0.03 * ((1 - 2) * e[0] + (5 - 9) * e[6]) / 4)


def test_missing_members_are_an_error_unless_they_are_allowed():
    es = sgd(mlp(), 4)
    before = [p.clone() for p in es.module.parameters()]
    es.ask()
    with pytest.raises(NonFiniteError, match="fitness of member 3 in generation 0 is nan"):
        es.tell({0: 1.0, 1: 2.0, 2: 3.0})
    with pytest.raises(NonFiniteError, match="too few others are left"):
        es.tell([math.nan, 1.0, math.inf, 1.0], partial=True)
    with pytest.raises(ValueError, match="names member 4"):
        es.tell({4: 1.0})
    assert all(torch.equal(a, b) for a, b in zip(before, es.module.parameters(), strict=True)) and es.generation == 0


# Schedules and optimizers ----------------------------------------------------------------------------------


def test_schedules_by_hand():
    assert [schedules.exponential(0.1, 0.5)(g) for g in (0, 1, 3)] == pytest.approx([0.1, 0.05, 0.0125])
    assert schedules.exponential(0.1, 0.5, least=0.02)(9) == 0.02
    assert [schedules.linear(0.4, 0.2, 4)(g) for g in (0, 1, 4, 9)] == pytest.approx([0.4, 0.35, 0.2, 0.2])
    assert [schedules.cosine(0.4, 0.2, 4)(g) for g in (0, 2, 4, 9)] == pytest.approx([0.4, 0.3, 0.2, 0.2])
    assert schedules.cosine(0.4, 0.2, 4)(1) == pytest.approx(0.2 + 0.1 * (1 + math.sqrt(0.5)))
    with pytest.raises(ConfigError, match="decay of the schedule must be"):
        schedules.exponential(0.1, 0.0)


def test_schedules_reach_noise_and_step():
    es = sgd(weight(), 2, sigma=schedules.linear(0.5, 0.1, 4), learning_rate=schedules.exponential(0.1, 0.5),
             fitness_shaping="none")  # fmt: skip
    for sigma, rate in ((0.5, 0.1), (0.4, 0.05), (0.3, 0.025)):
        value, plus = es.module.weight.item(), es.ask().parameters_of(0)["weight"].item()
        metrics = es.tell([1.0, 0.0])
        assert (metrics["sigma"], metrics["learning_rate"]) == (pytest.approx(sigma), pytest.approx(rate))
        assert es.module.weight.item() - value == pytest.approx(rate * (plus - value) / sigma / 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
    ],
)
def test_an_optimizer_of_the_users_own_steps_by_the_negative_estimate(make):
    ours, theirs = mlp(), mlp()
    es = EvolutionStrategy(ours, 4, seed=1, optimizer=make(ours.parameters()), fitness_shaping="none")
    optimizer = make(theirs.parameters())
    for _ in range(3):
        population = es.ask()
        fitness = [1.0, -1.0, 0.5, 2.0]
        for name, parameter in theirs.named_parameters():
            members = [population.parameters_of(n)[name] - es.parameters[name] for n in range(4)]
            parameter.grad = -sum(f * m for f, m in zip(fitness, members, strict=True)).detach() / es.sigma / 4
        metrics = es.tell(fitness)
        optimizer.step()
        assert metrics["learning_rate"] == 0.1
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-10)
    with pytest.raises(ConfigError, match="has its own"):
        EvolutionStrategy(ours, 4, optimizer=make(ours.parameters()), learning_rate=0.1)
    with pytest.raises(ConfigError, match=r"lacks the parameters 2\.weight, 2\.bias"):
        EvolutionStrategy(ours, 4, optimizer=make(ours[0].parameters()))


def test_a_torch_scheduler_is_stepped_once_per_update():
    es = sgd(weight(), 2, learning_rate=0.1, lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.1))
    rates = []
    for _ in range(5):
        es.ask()
        rates.append(es.tell([1.0, 0.0])["learning_rate"])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


# Metrics, best and resuming --------------------------------------------------------------------------------


def test_metrics_by_hand():
    es = sgd(weight(), 4, learning_rate=0.1, fitness_shaping="none")
    es.ask()
    first = es.tell([4.0, 1.0, 2.0, 1.0])
    # Differences 3 and 1, mean square 5; means 2.5 and 1.5, variance 1/4.
    assert first["pair_snr"] == pytest.approx(5 / (4 * 0.25)) and first["update_cosine"] == 0
    e, moved = noise_of(es), es.module.weight.item() - 2
    second = es.tell([1.0, 0.0, 0.0, 0.0])
    assert second["update_cosine"] == pytest.approx(np.sign(moved * e[0].item()))


def test_independent_scores_have_a_ratio_of_one():
    es = sgd(weight(), 20_000)
    es.ask()
    fitness = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert es.tell(fitness)["pair_snr"] == pytest.approx(1, abs=0.05)


def test_the_best_member_scores_what_was_recorded():
    target = torch.tensor([0.3, -0.2, 0.9]).double()
    torch.manual_seed(0)
    module = nn.Linear(3, 1).double()

    def fitness_fn(m):
        return -((m.weight[0] - target) ** 2).sum().item()

    es = EvolutionStrategy(module, 16, sigma=0.1, seed=0)
    seen, of_mean = [], []
    for _ in range(10):
        scores = []
        metrics = es.step(lambda m, s=scores: s.append(fitness_fn(m)) or s[-1], evaluate_mean=True)
        seen.append(max(scores[:16]))
        of_mean.append(metrics["fitness_of_mean"])
        assert metrics["fitness_of_mean"] == fitness_fn(es.module)
    assert es.best.fitness == max(seen) and seen[es.best.generation] == max(seen)
    copy = nn.Linear(3, 1).double()
    copy.load_state_dict(es.best.parameters)
    assert fitness_fn(copy) == es.best.fitness
    assert of_mean[-1] > of_mean[0]


def test_resuming_continues_to_the_bit():
    def start():
        module = mlp()
        return EvolutionStrategy(
            module, 8, seed=3, sigma=schedules.exponential(0.1, 0.9), noise_reuse=2,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        )  # fmt: skip

    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(es, n):
        return [es.tell(-es.ask().forward(x).square().sum((1, 2))) for _ in range(n)]

    whole, first, resumed = start(), start(), start()
    expected = run(whole, 7)
    run(first, 3)
    resumed.module.load_state_dict(first.module.state_dict())
    resumed.load_state_dict(first.state_dict())
    assert run(resumed, 4) == expected[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True))
    assert resumed.best.fitness == whole.best.fitness and resumed.best.member == whole.best.member


def test_tell_needs_no_more_than_scores():
    """A fitness from anywhere: members as plain arrays, evaluated by a stranger."""
    es = EvolutionStrategy(weight(), 32, sigma=0.2, learning_rate=0.1, seed=0)
    for _ in range(60):
        members = [es.ask().parameters_of(n)["weight"].numpy() for n in range(32)]
        es.tell([-((m.item() - 5.0) ** 2) for m in members])
    assert abs(es.module.weight.item() - 5) < 0.3
