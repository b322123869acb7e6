import math
import os
import subprocess
import sys
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import population as population_module
from eggroll_rl.errors import UnsupportedModuleError
from eggroll_rl.lowrank import estimate_gradient, perturbed_parameters
from eggroll_rl.noise import LowRank, Noise, standard_normal
from eggroll_rl.population import Population


def make_noise(rank=1, **changes):
    values = {"seed": 5, "generation": 3, "population_size": 8, "sigma": 0.1, "slice_size": 4}
    return Noise(**({"family": LowRank(rank)} | values | changes))


def mlp(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 7, bias=bias), nn.ReLU(), nn.Linear(7, 3, bias=bias)
    ).double()


def dense(module, population, member, x):
    """Evaluate one member from its explicit parameters."""
    return torch.func.functional_call(module, population.parameters_of(member), (x,))


# Noise -----------------------------------------------------------------------------------------------------


def test_noise_does_not_depend_on_how_it_is_asked_for():
    noise = make_noise()
    whole = standard_normal(noise, 2, 0, 10, 37)
    for pair in range(10):
        assert torch.equal(standard_normal(noise, 2, pair, 1, 37)[0], whole[pair])
    assert torch.equal(standard_normal(noise, 2, 3, 4, 37), whole[3:7])


def plain_noise(noise, parameter, first, n_directions, size):
    """The noise by its definition, all at once: published runs depend on every bit of it."""
    blocks = -(-size // 8)
    key = np.random.SeedSequence(noise.seed).generate_state(2, np.uint64)
    philox = np.random.Philox(counter=[first * blocks, parameter, noise.generation, 0], key=key)
    bits = philox.random_raw(n_directions * blocks * 4).view(np.uint32).reshape(n_directions, 2, blocks * 4)
    uniform = ((bits >> 8).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)
    radius = np.sqrt(np.float32(-2) * np.log(uniform[:, 0]))
    angle = np.float32(2 * math.pi) * uniform[:, 1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]


@pytest.mark.parametrize("at_once", [1, 100, 2**16])
def test_noise_is_that_of_its_definition_to_the_bit_however_much_is_drawn_at_once(at_once, monkeypatch):
    monkeypatch.setattr("eggroll_rl.noise._DRAWN_AT_ONCE", at_once)
    for size in (*range(1, 26), 128, 1000):
        for first, n_directions in ((0, 1), (7, 13)):
            drawn = standard_normal(make_noise(), 2, first, n_directions, size).numpy()
            assert drawn.tobytes() == plain_noise(make_noise(), 2, first, n_directions, size).tobytes(), size
    whole = standard_normal(make_noise(), 0, 0, 300, 1000).numpy()  # more than fits into a block
    assert whole.tobytes() == plain_noise(make_noise(), 0, 0, 300, 1000).tobytes()


def test_noise_differs_by_seed_generation_parameter_and_pair():
    reference = standard_normal(make_noise(), 0, 0, 1, 64)
    others = [
        standard_normal(make_noise(seed=6), 0, 0, 1, 64),
        standard_normal(make_noise(generation=4), 0, 0, 1, 64),
        standard_normal(make_noise(), 1, 0, 1, 64),
        standard_normal(make_noise(), 0, 1, 1, 64),
    ]
    drawn = torch.cat([reference, *others]).flatten()
    assert len(drawn.unique()) == len(drawn)


def test_noise_is_standard_normal():
    sample = standard_normal(make_noise(), 0, 0, 1000, 1000).double()
    assert abs(sample.mean()) < 5e-3
    assert abs(sample.var() - 1) < 5e-3
    assert abs(sample.pow(4).mean() - 3) < 0.03
    assert sample.abs().max() < 6
    # Neighbours, and the two halves that one Box-Muller pair fills, are uncorrelated.
    assert abs((sample[:, :-1] * sample[:, 1:]).mean()) < 5e-3
    assert abs((sample[:, :500] * sample[:, 500:]).mean()) < 5e-3


def test_noise_is_the_same_in_another_process():
    code = (
        "from eggroll_rl.noise import LowRank, Noise, standard_normal; import hashlib; "
        "x = standard_normal(Noise(5, 3, 8, .1, LowRank(1), 4), 1, 0, 4, 50); "
        "print(hashlib.sha256(x.numpy().tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop()) == 65


def test_equal_layers_get_different_noise():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    parameters = Population(module, make_noise()).parameters_of(0)
    step = [parameters[f"{i}.weight"] - module[i].weight for i in (0, 1)]
    assert not torch.allclose(*step)


# Members ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_batched_forward_equals_explicit_members(rank, bias):
    module, noise = mlp(bias), make_noise(rank=rank)
    population = Population(module, noise)
    shared, single, own = torch.randn(6, 5), torch.randn(8, 1, 5), torch.randn(8, 6, 5)
    shared, single, own = shared.double(), single.double(), own.double()
    y_shared = population.forward(shared)
    y_single = population.forward(single, per_member=True)
    y_own = population.forward(own, per_member=True)
    assert y_shared.shape == (8, 6, 3) and y_single.shape == (8, 1, 3)
    for member in range(8):
        for y, x in ((y_shared, shared), (y_single, single[member]), (y_own, own[member])):
            assert torch.allclose(y[member], dense(module, population, member, x), atol=1e-10, rtol=0)


def test_a_slice_holds_the_same_members_as_the_whole():
    module, noise = mlp(), make_noise()
    whole, part = Population(module, noise), Population(module, noise, first=4, size=4)
    for member in range(4):
        for a, b in zip(whole.parameters_of(4 + member).values(), part.parameters_of(member).values(), strict=True):
            assert torch.equal(a, b)
    x = torch.randn(3, 5).double()
    assert torch.allclose(whole.forward(x)[4:], part.forward(x), atol=1e-12)


def test_every_member_is_the_mean_plus_signed_sigma_times_its_perturbation():
    module, noise = mlp(), make_noise(sigma=0.25)
    population = Population(module, noise)
    for p in perturbed_parameters(module):
        perturbation = p.dense(noise, 0, 4)
        if p.is_matrix:
            a, b = p.draw(noise, 0, 4)
            assert torch.allclose(perturbation, torch.einsum("por,pir->poi", a, b) / math.sqrt(a.shape[2]))
        for member in range(8):
            sign = 1 if member % 2 == 0 else -1
            expected = p.parameter + sign * 0.25 * perturbation[member // 2]
            assert torch.equal(population.parameters_of(member)[p.name], expected)


@pytest.mark.parametrize("rank", [1, 3, 50])
def test_perturbations_have_unit_variance_at_any_rank_also_when_clamped(rank):
    module = nn.Linear(6, 4)
    weight = perturbed_parameters(module)[0]
    perturbation = weight.dense(make_noise(population_size=8000, rank=rank), 0, 4000)
    assert weight.draw(make_noise(rank=rank), 0, 1)[0].shape[2] == min(rank, 4)
    assert abs(perturbation.var() - 1) < 0.05


def test_a_module_with_its_own_forward_works_and_is_left_as_it_was():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            for _ in range(2):
                x = x + torch.relu(self.inner(x))
            return self.outer(x.flatten(1))

    module = Residual().double()
    before = {name: p.clone() for name, p in module.named_parameters()}
    population = Population(module, make_noise())
    x = torch.randn(3, 5).double()
    y = population.forward(x)
    for member in range(8):
        assert torch.allclose(y[member], dense(module, population, member, x), atol=1e-10)
    assert type(module.inner) is nn.Linear
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_a_layer_that_stands_twice_in_a_sequential_is_applied_twice():
    act, shared = nn.Tanh(), nn.Linear(5, 5)
    module = nn.Sequential(shared, act, shared, act, nn.Linear(5, 2)).double()
    population, x = Population(module, make_noise()), torch.randn(3, 5).double()
    y = population.forward(x)
    for member in range(8):
        assert torch.allclose(y[member], dense(module, population, member, x), atol=1e-10)


def test_parts_of_a_sequential_can_be_used_by_themselves():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(OrderedDict(first=nn.Linear(5, 5), act=nn.Tanh(), last=nn.Linear(5, 2)))

        def forward(self, x):
            y = x
            for layer in self.body:
                y = layer(y)
            return y + self.body.last(self.body[0](x))

    module = Parts().double()
    population = Population(module, make_noise())
    x = torch.randn(3, 5).double()
    for member in range(8):
        assert torch.allclose(population.forward(x)[member], dense(module, population, member, x), atol=1e-10)


def test_hooks_of_a_sequential_are_kept():
    module = nn.Sequential(mlp())
    module[0].register_forward_hook(lambda module, args, output: 100 * output)
    population = Population(module, make_noise())
    x = torch.randn(3, 5).double()
    for member in range(8):
        assert torch.allclose(population.forward(x)[member], dense(module, population, member, x), atol=1e-8)


def test_tied_weights_share_one_perturbation():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    module[2].weight = module[0].weight
    population = Population(module, make_noise())
    x = torch.randn(3, 4).double()
    y = population.forward(x)
    for member in range(8):
        assert torch.allclose(y[member], dense(module, population, member, x), atol=1e-10)


def test_frozen_parameters_stay_and_do_not_move_the_noise_of_others():
    module, noise = mlp(), make_noise()
    free = Population(module, noise).parameters_of(0)
    module[0].weight.requires_grad_(False)
    module[2].bias.requires_grad_(False)
    population = Population(module, noise)
    assert set(free) - set(population.parameters_of(0)) == {"0.weight", "2.bias"}
    assert torch.equal(population.parameters_of(0)["4.weight"], free["4.weight"])
    x = torch.randn(3, 5).double()
    for member in range(8):
        assert torch.allclose(population.forward(x)[member], dense(module, population, member, x), atol=1e-10)


def test_a_forward_that_reaches_past_the_layer_sees_the_members_weights():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) @ self.layer.weight.t()

    module = Sneaky().double()
    population, x = Population(module, make_noise()), torch.randn(2, 3).double()
    for member in range(8):
        assert torch.allclose(population.forward(x)[member], dense(module, population, member, x), atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm1d(3, affine=False), "BatchNorm1d"),
        (nn.Dropout(0.5), "Dropout"),
        (nn.GRU(3, 3, num_layers=2, dropout=0.5), "GRU"),
        (type("OwnGRU", (nn.GRU,), {})(3, 3), "OwnGRU"),
    ],
)
def test_a_layer_that_cannot_be_right_is_named(layer, named):
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer))
    with pytest.raises(UnsupportedModuleError, match=rf"'1\.0' \({named}\)"):
        Population(module, make_noise())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.func runs it member by member
def test_a_linear_layer_that_is_more_than_linear_gets_explicit_weights():
    hooked = nn.Linear(3, 3)
    hooked.register_forward_hook(lambda module, args, output: 100 * output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated in torch, and still in use
        normed = nn.utils.weight_norm(nn.Linear(3, 3))
    for layer in (hooked, normed, nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))):
        module = nn.Sequential(layer).double()
        population, x = Population(module, make_noise()), torch.randn(2, 3).double()
        for member in range(8):
            assert torch.allclose(population.forward(x)[member], dense(module, population, member, x), atol=1e-8)


def test_a_module_without_free_parameters_is_refused():
    with pytest.raises(UnsupportedModuleError, match="nothing to optimise"):
        Population(nn.Tanh(), make_noise())


def test_per_member_input_must_have_one_entry_per_member():
    with pytest.raises(ValueError, match="expected 8, got 5"):
        Population(mlp(), make_noise()).forward(torch.zeros(5, 1, 5), per_member=True)


# Gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 100])
@pytest.mark.parametrize("at_once", [1, 20, 2**18])
def test_gradient_equals_the_explicit_sum(rank, at_once, monkeypatch):
    monkeypatch.setattr("eggroll_rl.lowrank._NOISE_AT_ONCE", at_once)
    module, noise = mlp(), make_noise(rank=rank)
    utilities = torch.randn(8, dtype=torch.float64)
    gradient = estimate_gradient(perturbed_parameters(module), noise, utilities)
    members = [Population(module, noise).parameters_of(n) for n in range(8)]
    for name, parameter in module.named_parameters():
        # s·E = (theta_n - theta)/sigma, so that this is the definition, weights and biases alike.
        explicit = sum(u * (members[n][name] - parameter) / noise.sigma for n, u in enumerate(utilities)) / 8
        assert gradient[name].dtype == torch.float64
        assert torch.allclose(gradient[name], explicit, atol=1e-10, rtol=0)


def test_gradient_points_along_that_of_a_linear_function():
    module = nn.Linear(6, 4, bias=False).double()
    direction = torch.randn(4, 6).double()
    noise = make_noise(population_size=4000)
    population = Population(module, noise)
    fitness = torch.stack([(population.parameters_of(n)["weight"] * direction).sum() for n in range(4000)])
    gradient = estimate_gradient(perturbed_parameters(module), noise, fitness)["weight"]
    # E[u s E] = sigma · direction.
    assert torch.allclose(gradient / noise.sigma, direction, atol=0.35)
    assert torch.cosine_similarity(gradient.flatten(), direction.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("at_once", [2**19, 60])
def test_the_same_inputs_for_all_members_are_what_they_are_for_each(rank, at_once, monkeypatch):
    """Explicit weights and a column per input, against the factors and inputs repeated for every member."""
    monkeypatch.setattr(population_module, "_NUMBERS_AT_ONCE", at_once)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4, bias=False), nn.ELU(), nn.Linear(4, 2))
    population, x = Population(module, make_noise(rank=rank)), torch.randn(9, 5)
    repeated = population.forward(x.expand(len(population), 9, 5), per_member=True)
    torch.testing.assert_close(population.forward(x), repeated, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(population.forward(x.view(3, 3, 5)), repeated.view(-1, 3, 3, 2), atol=1e-6, rtol=1e-5)
    for few in (1, 2):
        torch.testing.assert_close(population.forward(x[:few]), repeated[:, :few], atol=1e-6, rtol=1e-5)


def test_an_activation_that_works_in_place_leaves_the_inputs_alone(monkeypatch):
    monkeypatch.setattr(population_module, "_NUMBERS_AT_ONCE", 60)
    module = nn.Sequential(nn.SiLU(inplace=True), nn.Linear(5, 3))
    population, x = Population(module, make_noise()), torch.randn(9, 5)
    before = x.clone()
    y = population.forward(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(y, population.forward(before.expand(8, 9, 5), per_member=True), atol=1e-6, rtol=1e-5)
