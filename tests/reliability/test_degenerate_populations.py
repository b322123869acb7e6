"""R24: populations from which nothing can be learnt change nothing, or are refused; nothing is ever not finite."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import EvolutionStrategy
from eggroll_rl.errors import ConfigError, NonFiniteError, UnsupportedModuleError
from eggroll_rl.fitness import FITNESS_SHAPING

pytestmark = pytest.mark.promise("R24")

CONSTANTS = (0.0, 1.0, -3.7, 0.1, 1e-300, 1e300, -1e9 - 0.1)
EVERYTHING_FINITE = 1.7e308


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def strategy(n=8, module=None, **settings):
    return EvolutionStrategy(
        small() if module is None else module, n, **{"sigma": 0.1, "seed": 0, "learning_rate": 0.1, **settings}
    )


def parameters(es):
    return torch.cat([parameter.detach().flatten() for parameter in es.parameters.values()])


def told(es, fitness, **how):
    """Tell, and return the distance moved; every number kept must be finite."""
    before = parameters(es).clone()
    es.ask()
    metrics = es.tell(fitness, **how)
    assert parameters(es).isfinite().all() and math.isfinite(metrics["grad_norm"])
    for entry in es.optimizer.state.values():
        assert all(value.isfinite().all() for value in entry.values() if isinstance(value, torch.Tensor))
    return torch.linalg.vector_norm(parameters(es) - before).item()


def refused(es, fitness, error=NonFiniteError, **how):
    before = parameters(es).clone()
    es.ask()
    with pytest.raises(error):
        es.tell(fitness, **how)
    assert torch.equal(parameters(es), before) and es.generation == 0


SHAPINGS = [name for name in FITNESS_SHAPING if name != "none"]  # that one keeps a constant, which pairs cancel


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_constant_fitness_moves_nothing(cells, optimizer):
    for name in FITNESS_SHAPING:
        for antithetic in (True, False):
            if not antithetic and name in ("none", "pair_rank", "sign_of_pair", "best_fraction"):
                continue
            for value in CONSTANTS if optimizer is torch.optim.SGD else CONSTANTS[:2]:
                if name == "none" and abs(value) > 1e9:
                    continue  # the sum of its terms cancels, each of which is that large
                for n in (2, 14):
                    with cells.cell(f"{name} {optimizer.__name__} antithetic={antithetic} {n} x {value}"):
                        es = strategy(n, fitness_shaping=name, optimizer=optimizer, antithetic=antithetic)
                        assert told(es, [value] * n) == 0.0


def test_groups_of_a_constant_move_nothing(cells):
    for value in CONSTANTS:
        for settings in ({"group_size": 4}, {"group_size": 4, "baseline": True}, {"baseline": True}):
            with cells.cell(f"{settings} {value}"):
                assert told(strategy(12, fitness_shaping="standardize", **settings), [value] * 12) == 0.0


def test_fitness_without_a_number_is_refused(cells):
    for name in FITNESS_SHAPING:
        for bad in (math.nan, -math.inf, math.inf):
            with cells.cell(f"all {bad}, {name}"):
                refused(strategy(fitness_shaping=name), [bad] * 8)
            with cells.cell(f"all {bad}, partial, {name}"):
                refused(strategy(fitness_shaping=name), [bad] * 8, partial=True)
            with cells.cell(f"one finite, {bad}, {name}"):
                refused(strategy(fitness_shaping=name), [1.0] + [bad] * 7, partial=True)
            with cells.cell(f"one pair, {bad}, {name}"):
                assert told(strategy(fitness_shaping=name), [1.0, 2.0] + [bad] * 6, partial=True) > 0


def test_fitness_at_the_ends_of_float64(cells):
    fitness = torch.tensor([3.0, -1.0, 0.5, 2.0, -2.0, 0.0, 1.0, -0.5], dtype=torch.float64)
    for name in FITNESS_SHAPING:
        plain = strategy(fitness_shaping=name, optimizer=torch.optim.SGD)
        moved = told(plain, fitness)
        for exponent in (-1000, -600, -300, 300, 600, 1020):
            with cells.cell(f"{name} times 2**{exponent}"):
                es = strategy(fitness_shaping=name, optimizer=torch.optim.SGD)
                scaled = fitness * 2.0**exponent
                if name in ("centered", "none"):  # whose step has the fitness' own size
                    if exponent > 100:
                        refused(es, scaled)
                    else:
                        told(es, scaled)
                else:
                    assert told(es, scaled) == moved, "the step depends on the fitness' unit"
        with cells.cell(f"{name}, both ends"):
            es = strategy(fitness_shaping=name, optimizer=torch.optim.SGD)
            both = [EVERYTHING_FINITE, -EVERYTHING_FINITE] * 4
            if name in ("centered", "none"):
                refused(es, both)
            else:
                assert math.isfinite(told(es, both))


@pytest.mark.parametrize("n", [2, 4])
def test_the_least_populations_work(cells, n):
    for name in FITNESS_SHAPING:
        with cells.cell(f"{n} members, {name}"):
            assert told(strategy(n, fitness_shaping=name), [1.0, 0.0, 3.0, 1.0][:n]) > 0


def test_noise_and_steps_too_small_for_float32_do_no_harm(cells):
    for sigma in (1e-12, 1e-30, 1e-45, 5e-324):
        with cells.cell(f"sigma {sigma}"):
            es = strategy(sigma=sigma)
            population = es.ask()
            mean = dict(es.module.named_parameters())
            same = all(torch.equal(p, mean[name]) for name, p in population.parameters_of(0).items())
            x = torch.randn(5, 2)
            outputs = population.forward(x)
            assert outputs.isfinite().all()
            if same:
                assert torch.allclose(outputs[0], es.module(x))
            assert math.isfinite(told(es, torch.randn(8)))
    for rate in (1e-12, 1e-30, 1e-45, 5e-324):
        for optimizer in (torch.optim.SGD, torch.optim.Adam):
            with cells.cell(f"learning rate {rate}, {optimizer.__name__}"):
                es = strategy(learning_rate=rate, optimizer=optimizer)
                assert told(es, torch.arange(8.0)) < 1e-6
    with cells.cell("a schedule that reaches 0"):
        assert told(strategy(learning_rate=lambda generation: 0.0), torch.arange(8.0)) == 0.0


def test_sizes_too_large_for_float32_are_refused_as_a_whole(cells):
    for settings in ({"learning_rate": 1e39}, {"learning_rate": 1e300}, {"sigma": 1e39}, {"sigma": 1e300}):
        with cells.cell(str(settings)):
            es = strategy(optimizer=torch.optim.SGD, **settings)
            before = parameters(es).clone()
            es.ask()
            try:
                es.tell(torch.arange(8.0))
            except NonFiniteError:
                assert torch.equal(parameters(es), before)
            assert parameters(es).isfinite().all()
    for rate in (math.nan, math.inf, -1.0):
        with cells.cell(f"a schedule that gives {rate}"):
            es = strategy(learning_rate=lambda generation, rate=rate: rate if generation else 0.1)
            told(es, torch.arange(8.0))
            before = parameters(es).clone()
            es.ask()
            with pytest.raises(ConfigError, match="learning_rate"):
                es.tell(torch.arange(8.0))
            assert torch.equal(parameters(es), before) and es.generation == 1
    for sigma in (math.nan, math.inf, -1.0, 0.0):
        with cells.cell(f"a schedule of sigma that gives {sigma}"), pytest.raises(ConfigError, match="sigma"):
            strategy(sigma=lambda generation, sigma=sigma: sigma).ask()


def test_modules_without_anything_to_perturb_are_refused(cells):
    frozen = small().requires_grad_(False)
    for name, module in {"no parameters": nn.Tanh(), "frozen": frozen, "empty": nn.Sequential()}.items():
        with cells.cell(name), pytest.raises(UnsupportedModuleError, match="nothing to optimise"):
            strategy(module=module)
    with cells.cell("all filtered away"), pytest.raises(UnsupportedModuleError, match="nothing to optimise"):
        strategy(param_filter=lambda name, parameter: False)


def test_an_optimizer_that_fails_in_its_step_leaves_nothing_behind(cells):
    class Fails(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            super().step(closure)
            if self.fail:
                self.param_groups[0]["extra"] = 1
                raise KeyError("in the middle")

    es = strategy(optimizer=Fails, optimizer_kwargs={"momentum": 0.9})
    told(es, torch.arange(8.0))
    before, state = parameters(es).clone(), es.state_dict()
    es.optimizer.fail = True
    es.ask()
    with cells.cell("KeyError"):
        with pytest.raises(KeyError, match="in the middle"):
            es.tell(torch.arange(8.0))
        assert torch.equal(parameters(es), before)
        now = es.state_dict()
        assert now["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
        for index, entry in state["optimizer"]["state"].items():
            assert torch.equal(now["optimizer"]["state"][index]["momentum_buffer"], entry["momentum_buffer"])


def test_shapings_of_ones_own_that_are_wrong_are_refused(cells):
    wrong = {
        "a number": lambda f: f.sum(), "another length": lambda f: f[:-2], "two dimensions": lambda f: f[:, None],
        "an array": lambda f: f.numpy(), "nothing": lambda f: None,
    }  # fmt: skip
    for name, shaping in wrong.items():
        with cells.cell(name):
            refused(strategy(fitness_shaping=shaping), torch.arange(8.0), ConfigError)
    for bad in (math.nan, math.inf):
        with cells.cell(f"all {bad}"):
            refused(strategy(fitness_shaping=lambda f, bad=bad: f * bad), torch.arange(1.0, 9.0))


def test_z_scores_by_the_plain_formula_are_noticed(cells, monkeypatch):
    def plain(fitness):
        centered = fitness - fitness.mean()
        deviation = centered.square().mean().sqrt()
        return centered / deviation if deviation > 0 else torch.zeros_like(fitness)

    monkeypatch.setitem(FITNESS_SHAPING, "standardize", plain)
    with cells.control("z-scores of a constant"):
        for n in range(2, 40, 2):
            values = np.linspace(0.1, 0.9, 9)
            for value in values:
                assert told(strategy(n, fitness_shaping="standardize", antithetic=False), [value] * n) == 0.0


def test_a_step_that_is_not_checked_is_noticed(cells, monkeypatch):
    monkeypatch.setattr("eggroll_rl.es.math.isfinite", lambda x: True)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda t: torch.ones(t.shape, dtype=torch.bool))
    with cells.control("NaN is told"):
        es = strategy(fitness_shaping="centered")
        es.ask()
        es.tell([math.nan] + [1.0] * 7)
        assert not any(math.isnan(x) for x in parameters(es).tolist())
