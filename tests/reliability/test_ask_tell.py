"""R17: a random user of ask and tell. The strategy must equal a simple model of it, whatever comes in which order."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import EvolutionStrategy
from eggroll_rl.errors import ConfigError, NonFiniteError

pytestmark = pytest.mark.promise("R17")


def small(generator):
    module = nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def everything(es):
    """Return all that a refusal has to leave alone, as bytes."""
    parts = [parameter.detach().numpy().tobytes() for parameter in es.parameters.values()]
    for entry in es.optimizer.state.values():
        parts += [
            value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value) for value in entry.values()
        ]
    groups = [{name: value for name, value in group.items() if name != "params"} for group in es.optimizer.param_groups]
    last = None if es._last_step is None else es._last_step.numpy().tobytes()
    best = None if es.best is None else (es.best.fitness, es.best.generation, es.best.member)
    return [*parts, repr(groups), last, best, es.generation, es.seed]


class Model:
    """What the strategy should be: the same settings, told only what it ought to accept, and copied on every save."""

    def __init__(self, es):
        self.es, self.asked, self.generation = copy.deepcopy(es), False, 0


N = 6


def right_fitness(rng):
    kind = rng.randrange(6)
    if kind == 0:
        return [1.0] * N
    if kind == 1:
        return np.array([rng.gauss(0, 1) for _ in range(N)], dtype=rng.choice([np.float32, np.float64]))
    if kind == 2:
        return torch.tensor([rng.gauss(0, 10.0 ** rng.randint(-300, 300)) for _ in range(N)], dtype=torch.float64)
    if kind == 3:
        return {member: rng.random() for member in range(N)}
    if kind == 4:
        return [rng.randint(-5, 5) for _ in range(N)]
    return [rng.random() for _ in range(N)]


def wrong_fitness(rng):
    """Return a fitness and the error that it has to give."""
    right = [rng.random() for _ in range(N)]
    bad = rng.choice([math.nan, math.inf, -math.inf])
    at = rng.randrange(N)
    return rng.choice(
        [
            (right[:-1], ValueError), ([*right, 0.0], ValueError), ([], ValueError), (None, ValueError),
            ("high", ValueError), (1.0, ValueError), ([right], ValueError), ([[f] for f in right], ValueError),
            (np.array(right) * 1j, ValueError), ([None] * N, ValueError), ([*right[:-1], "x"], ValueError),
            ([*right[:-1], 10**400], ValueError), ({N: 1.0}, ValueError), ({-1: 1.0}, ValueError),
            ({"a": 1.0}, ValueError), ({True: 1.0}, ValueError),
            ([*right[:at], bad, *right[at + 1 :]], NonFiniteError), ([bad] * N, NonFiniteError),
            ({0: 1.0}, NonFiniteError), ({}, NonFiniteError),
        ]
    )  # fmt: skip


def wrong_state(rng, state):
    state = copy.deepcopy(state)
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice([None, {}, [], "state", {"seed": 1}])
    if kind == 1:
        del state[rng.choice(["seed", "generation", "optimizer"])]
    elif kind == 2:
        state["seed"] = rng.choice([-1, "a", 1.5, None])
    elif kind == 3:
        state["generation"] = rng.choice([-1, "a", 0.5, None, True])
    elif kind == 4:
        state["optimizer"] = rng.choice([None, {}, {"state": {}}, {"state": {}, "param_groups": []}, 3])
    elif kind == 5:
        state["optimizer"]["state"] = {0: {"exp_avg": torch.zeros(7, 7)}}
    else:
        state["last_step"] = rng.choice([torch.zeros(3), "step"])
    return state


def play(seed, n_moves=15):
    """Play random moves on a strategy and its model, comparing them after each."""
    rng = random.Random(seed)
    settings = {
        "optimizer": rng.choice([torch.optim.SGD, torch.optim.Adam]),
        "fitness_shaping": rng.choice(["centered_rank", "standardize", "sign_of_pair"]),
        "antithetic": True,
        "max_grad_norm": rng.choice([None, 0.1]),
        "learning_rate": rng.choice([0.01, lambda generation: 0.1 / (1 + generation)]),
        "noise_reuse": rng.choice([0, 1, 2]),
    }
    if rng.random() < 0.2:
        settings |= {"antithetic": False, "fitness_shaping": "standardize"}
    generator = torch.Generator().manual_seed(seed)
    es = EvolutionStrategy(small(generator), N, sigma=0.1, seed=seed, slice_size=4, **settings)
    model = Model(es)
    saved = []
    for _ in range(n_moves):
        move(rng, es, model, saved)
        assert es.generation == model.generation, "the generation counts something else than successful tells"
        assert everything(es) == everything(model.es)
        assert all(parameter.isfinite().all() for parameter in es.parameters.values())


def move(rng, es, model, saved):
    kind = rng.choice(["ask", "ask", "tell", "tell", "tell wrong", "partial", "step", "save", "load", "load wrong"])
    before = everything(es)
    if kind == "ask":
        population, theirs = es.ask(), model.es.ask()
        assert population is es.ask() and population.noise == theirs.noise
        model.asked = True
    elif kind == "tell":
        fitness = right_fitness(rng)
        if not model.asked:
            with pytest.raises(RuntimeError, match="without ask"):
                es.tell(fitness)
            assert everything(es) == before
            return
        told(es.tell(fitness), model, fitness)
    elif kind == "tell wrong":
        fitness, error = wrong_fitness(rng)
        with pytest.raises(error if model.asked else RuntimeError):
            es.tell(fitness)
        assert everything(es) == before
    elif kind == "partial" and model.asked:
        partial(rng, es, model, before)
    elif kind == "step":
        step(rng, es, model, before)
    elif kind == "save":
        saved.append((es.state_dict(), copy.deepcopy(es.module.state_dict()), copy.deepcopy(model)))
    elif kind == "load" and saved:
        state, parameters, then = rng.choice(saved)
        es.load_state_dict(state)
        es.module.load_state_dict(parameters)
        model.es, model.generation, model.asked = copy.deepcopy(then.es), then.generation, False
    elif kind == "load wrong":
        with pytest.raises(ConfigError, match="state"):
            es.load_state_dict(wrong_state(rng, es.state_dict()))
        assert everything(es) == before


def partial(rng, es, model, before):
    fitness = {member: rng.choice([rng.random(), math.nan]) for member in rng.sample(range(N), rng.randint(0, N))}
    there = [math.isfinite(fitness.get(member, math.nan)) for member in range(N)]
    if es.antithetic:
        there = [there[member] and there[member ^ 1] for member in range(N)]
    if sum(there) < 2:
        with pytest.raises(NonFiniteError):
            es.tell(fitness, partial=True)
        assert everything(es) == before
    else:
        told(es.tell(fitness, partial=True), model, fitness, among=True)


def told(metrics, model, fitness, among=False):
    assert metrics == model.es.tell(fitness, partial=among)
    model.generation, model.asked = model.generation + 1, False


def step(rng, es, model, before):
    calls = []
    end = rng.choice([None, None, None, rng.randrange(N)])

    def fitness_fn(module):
        if len(calls) == end:
            raise KeyError("the user's own")
        calls.append(sum(parameter.sum().item() for parameter in module.parameters()))
        return calls[-1]

    if end is not None:
        with pytest.raises(KeyError):
            es.step(fitness_fn)
        model.es.ask()
        model.asked = True
        assert everything(es) == before
    else:
        metrics = es.step(fitness_fn)
        model.es.ask()
        told(metrics, model, calls)


@pytest.mark.parametrize("n", [25, pytest.param(3000, marks=pytest.mark.reliability)])
def test_random_moves_keep_to_the_model(cells, n):
    for seed in range(n):
        with cells.cell(f"sequence {seed}"):
            play(seed)


def test_a_tell_that_counts_although_it_was_refused_is_noticed(cells, monkeypatch):
    original = EvolutionStrategy.tell

    def tell(es, *args, **kwargs):
        try:
            return original(es, *args, **kwargs)
        except NonFiniteError:
            es.generation += 1
            raise

    monkeypatch.setattr(EvolutionStrategy, "tell", tell)
    with cells.control("refusals count"):
        for seed in range(20):
            play(seed)


def test_a_state_by_reference_is_noticed(cells, monkeypatch):
    def state_dict(es):
        best = None if es.best is None else vars(es.best)
        state = {"seed": es.seed, "generation": es.generation, "best": best, "last_step": es._last_step}
        return {**state, "optimizer": es.optimizer.state_dict()}

    monkeypatch.setattr(EvolutionStrategy, "state_dict", state_dict)
    with cells.control("state_dict() gives references"):
        for seed in range(60):
            play(seed)
