"""R23: a thousand generations in float32 stay beside the same in float64, and factors beside dense noise."""

import copy

import pytest
import torch
from torch import nn

from eggroll_rl import EvolutionStrategy
from eggroll_rl.noise import LowRank

pytestmark = pytest.mark.promise("R23")

N = 16
ULP32 = 2.0**-23


class DenseLowRank(LowRank):
    """The same noise, multiplied out: every member's perturbation is a matrix of its own."""

    def draw(self, normal, shape, is_matrix):
        drawn = super().draw(normal, shape, is_matrix)
        if not is_matrix:
            return drawn
        a, b = drawn
        return (a @ b.mT) / a.shape[-1] ** 0.5


def module(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to(dtype)


def targets(like):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator).double() for n, p in like.named_parameters()}


def fitness_of(population, wanted):
    """Return minus the squared distance (N,) to the target, in float64."""
    losses = []
    for member in range(N):
        own = population.parameters_of(member)
        losses.append(-sum((own[name].double() - wanted[name]).square().sum() for name in wanted))
    return torch.stack(losses)


def run(dtype, generations, fitness=None, family=None, round_to=None):
    """Return flat parameters by generation and the fitness that was told; given ``fitness`` is told instead."""
    es = EvolutionStrategy(
        module(dtype), N, sigma=0.1, seed=3, learning_rate=0.02, rank=2, optimizer=torch.optim.SGD,
        fitness_shaping="standardize", noise="lowrank" if family is None else family,
    )  # fmt: skip
    wanted = targets(es.module)
    path, told = [], []
    for generation in range(generations):
        population = es.ask()
        told.append(fitness_of(population, wanted) if fitness is None else fitness[generation])
        es.tell(told[-1])
        if round_to is not None:
            for parameter in es.parameters.values():
                parameter.data = parameter.data.to(round_to).to(dtype)
        path.append(torch.cat([p.detach().double().flatten() for p in es.parameters.values()]))
    return torch.stack(path), told


def drift(a, b):
    """Return the largest difference, and the largest relative to the parameters' norm."""
    difference = (a - b).abs().max().item()
    return difference, ((a - b).norm(dim=1) / b.norm(dim=1)).max().item()


@pytest.mark.parametrize("generations", [20, pytest.param(1000, marks=pytest.mark.reliability)])
def test_float32_stays_beside_float64(cells, generations):
    right, told = run(torch.float64, generations)
    close, _ = run(torch.float32, generations, fitness=told)  # the same utilities: what adds up is the rounding
    free, _ = run(torch.float32, generations)  # the fitness is its own: differences feed back
    for name, path, bound in (("same fitness", close, 1.0), ("own fitness", free, 4.0)):
        absolute, relative = drift(path, right)
        print(f"\n{generations} generations, {name}: absolute {absolute:.3g}, relative {relative:.3g}")
        with cells.cell(f"{name} over {generations} generations"):
            # Each addition rounds by half an ulp; as a walk that is sqrt(generations) of them.
            assert relative < bound * ULP32 * generations**0.5, f"{relative / ULP32} ulp"
    assert drift(right[-1:], right[:1])[1] > 0.1, "nothing moved"


@pytest.mark.parametrize("generations", [20, pytest.param(1000, marks=pytest.mark.reliability)])
def test_factors_stay_beside_dense_noise(cells, generations):
    for dtype, ulp in ((torch.float64, 2.0**-52), (torch.float32, ULP32)):
        low, told = run(dtype, generations)
        dense, _ = run(dtype, generations, fitness=told, family=DenseLowRank(2))
        absolute, relative = drift(low, dense)
        print(
            f"\n{generations} generations, {dtype}, factors and dense: absolute {absolute:.3g}, relative {relative:.3g}"
        )
        with cells.cell(f"{dtype} over {generations} generations"):
            # The dense noise itself is made in float32, which rounds each entry once more.
            assert relative < 4 * ULP32 * (1 if dtype == torch.float64 else generations**0.5), relative
            assert relative > 0 or ulp == 0


def test_a_coarser_type_is_noticed(cells):
    right, told = run(torch.float64, 20)
    with cells.control("bfloat16"):
        rough, _ = run(torch.float32, 20, fitness=told, round_to=torch.bfloat16)
        assert drift(rough, right)[1] < ULP32 * 20**0.5


def test_the_batched_forward_is_the_members_own(cells):
    es = EvolutionStrategy(module(torch.float32), N, sigma=0.1, seed=3, rank=2)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 4, generator=generator)
    population = es.ask()
    batched = population.forward(x)
    own = copy.deepcopy(es.module)
    for member in range(N):
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                parameter.copy_(population.parameters_of(member)[name])
            alone = own(x)
        with cells.cell(f"member {member}"):
            assert (batched[member] - alone).abs().max() < 16 * ULP32 * alone.abs().max()
