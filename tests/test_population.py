"""Every kind of layer: all members in one call against each member's explicit parameters, in float64."""

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from eggroll_rl import EvolutionStrategy, memberwise
from eggroll_rl.errors import UnsupportedModuleError
from eggroll_rl.lowrank import estimate_gradient, perturbed_parameters
from eggroll_rl.memberwise import MemberWise
from eggroll_rl.noise import FAMILIES, Gaussian, LowRank, Noise, Sparse, make_family
from eggroll_rl.population import Population

N = 6


class Scale(nn.Module):
    """A parameter of the user's own, a matrix of the user's own, and a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.mix, self.layer = nn.Parameter(torch.ones(5)), nn.Parameter(torch.eye(5)), nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(x @ self.mix) * self.scale + x.mean(0)  # over the batch: members must not be mixed


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(7, 5), nn.GRU(5, 5, batch_first=True), nn.Linear(5, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.gru(self.embedding(tokens))[0])


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **settings)
        self.settings = settings

    def forward(self, query, key, mask=None, padding=None):
        wide = {"k": "kdim" in self.settings, "v": "vdim" in self.settings}
        k, v = (torch.cat([key, key[..., : 4 if w else 0]], -1) for w in wide.values())
        causal = mask is not None
        return self.attention(query, k, v, attn_mask=mask, key_padding_mask=padding, average_attn_weights=causal)


def transformer(norm_first=False):
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder(**settings):
    layer = nn.TransformerDecoderLayer(6, 2, 12, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(6))


def encoder_and_decoder(**settings):
    return nn.Transformer(6, 2, 2, 2, 12, dropout=0.0, batch_first=True, **settings)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


TOKENS = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(2))
MASK = torch.ones(4, 4, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False, False, False, True]] * 3)
OTHER_PADDING = torch.tensor([[False, False, False, True, True], [False] * 5, [False] * 5])

# What makes the module, its inputs by position, and perhaps others by name.
CASES: dict[str, tuple] = {
    "Linear, 3-D input": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Flatten(), nn.Linear(12, 2)), (numbers(2, 3, 5),)),
    "Linear alone": (lambda: nn.Linear(5, 4), (numbers(3, 5),)),
    "Linear without batch": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4)), (numbers(5),)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (numbers(2, 4, 9),)),
    "Conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (numbers(2, 4, 9),)),
    "Conv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, (2, 3), stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 3, 2)),
        (numbers(2, 3, 8, 8),),
    ),
    "Conv2d without batch": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), (numbers(3, 8, 8),)),
    "Conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (numbers(2, 4, 6, 6),)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (numbers(2, 2, 3, 3, 3),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (numbers(2, 2, 3, 3),)),
    "Embedding": (lambda: nn.Embedding(7, 5), (TOKENS,)),
    "Embedding, padded": (lambda: nn.Embedding(7, 5, padding_idx=2), (TOKENS,)),
    "LayerNorm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.RMSNorm(4)), (numbers(3, 5),)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (numbers(3, 4, 5),)),
    "BatchNorm in eval": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4)).eval(), (numbers(3, 2, 4, 4),)),
    "BatchNorm of the batch": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (numbers(5, 4),)),
    "PReLU and Bilinear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4)), (numbers(3, 5),)),
    "RNNCell": (lambda: nn.RNNCell(5, 4, nonlinearity="relu"), (numbers(3, 5), numbers(3, 4))),
    "GRUCell": (lambda: nn.GRUCell(5, 4), (numbers(3, 5), numbers(3, 4))),
    "GRUCell at the start": (lambda: nn.GRUCell(5, 4, bias=False), (numbers(5),)),
    "LSTMCell": (lambda: nn.LSTMCell(5, 4), (numbers(3, 5), (numbers(3, 4), numbers(3, 4)))),
    "RNN": (lambda: nn.RNN(5, 4), (numbers(6, 3, 5),)),
    "GRU": (lambda: nn.GRU(5, 4, num_layers=2, batch_first=True), (numbers(3, 6, 5), numbers(2, 3, 4))),
    "GRU without batch": (lambda: nn.GRU(5, 4, bidirectional=True), (numbers(6, 5),)),
    "LSTM": (lambda: nn.LSTM(5, 4, num_layers=2, bidirectional=True), (numbers(6, 3, 5),)),
    "LSTM with projection": (
        lambda: nn.LSTM(5, 4, proj_size=2, bias=False),
        (numbers(6, 3, 5), (numbers(1, 3, 2), numbers(1, 3, 4))),
    ),
    "Attention": (lambda: Attention(batch_first=True), (numbers(3, 4, 6), numbers(3, 4, 6), MASK)),
    "Attention, padded": (lambda: Attention(batch_first=True), (numbers(3, 4, 6), numbers(3, 4, 6), None, PADDING)),
    "Attention, wide": (lambda: Attention(kdim=10, vdim=10), (numbers(4, 3, 6), numbers(5, 3, 6))),
    "Attention without batch": (lambda: Attention(bias=False), (numbers(4, 6), numbers(5, 6))),
    "Attention with added keys": (lambda: Attention(add_bias_kv=True), (numbers(4, 3, 6), numbers(5, 3, 6))),
    "Transformer": (transformer, (numbers(3, 4, 6),)),
    "Transformer in eval": (lambda: transformer(norm_first=True).eval(), (numbers(3, 4, 6), MASK, None, False)),
    "Transformer, padded, by name": (
        transformer,
        (numbers(3, 4, 6),),
        {"mask": MASK, "src_key_padding_mask": PADDING, "is_causal": True},
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
        (numbers(3, 4, 6), numbers(3, 5, 6)),
    ),
    "TransformerDecoderLayer, time first, in eval": (
        lambda: nn.TransformerDecoderLayer(6, 2, 12, activation="gelu", norm_first=True, bias=False).eval(),
        (numbers(4, 3, 6), numbers(5, 3, 6)),
        {"memory_key_padding_mask": OTHER_PADDING},
    ),
    "TransformerDecoder": (decoder, (numbers(3, 4, 6), numbers(3, 5, 6), MASK)),
    "TransformerDecoder without batch": (decoder, (numbers(4, 6), numbers(5, 6)), {"tgt_mask": MASK}),
    "TransformerDecoder, padded, by name": (
        lambda: decoder(norm_first=True).eval(),
        (numbers(3, 4, 6),),
        {
            "memory": numbers(3, 5, 6),
            "tgt_mask": MASK,
            "memory_mask": torch.tensor([[False, False, True, False, True]] * 4),
            "tgt_key_padding_mask": PADDING,
            "memory_key_padding_mask": OTHER_PADDING,
            "tgt_is_causal": True,
        },
    ),
    "Transformer of both": (encoder_and_decoder, (numbers(3, 5, 6), numbers(3, 4, 6))),
    "Transformer of both, padded, by name": (
        encoder_and_decoder,
        (),
        {
            "src": numbers(3, 5, 6),
            "tgt": numbers(3, 4, 6),
            "tgt_mask": MASK,
            "src_key_padding_mask": OTHER_PADDING,
            "memory_key_padding_mask": OTHER_PADDING,
        },
    ),
    "Linear, by name": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh()), (), {"input": numbers(3, 5)}),
    "parameters of the user's own": (Scale, (numbers(3, 5),)),
    "tied": (TiedLanguageModel, (TOKENS,)),
}


def make_noise(**changes):
    values = {"seed": 5, "generation": 3, "population_size": N, "sigma": 0.3, "family": LowRank(), "slice_size": 2}
    return Noise(**(values | changes))


def build(case):
    make, inputs = CASES[case][:2]
    torch.manual_seed(0)
    return make().double(), inputs


def by_name(case):
    return dict(*CASES[case][2:])


def leaves(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def one(module, population, member, inputs, keywords=None):
    with torch.no_grad():
        return torch.func.functional_call(module, population.parameters_of(member), inputs, keywords)


def check(module, population, shared, own):
    """Compare with one member after the other; ``shared`` and ``own`` are inputs by position and by name."""
    mapped = torch.utils._pytree.tree_map
    together = leaves(population.forward(*shared[0], **shared[1]))
    each = leaves(population.forward(*own[0], **own[1], per_member=True))
    for member in range(len(population)):
        alike = leaves(one(module, population, member, *shared))
        mine = mapped(lambda x, m=member: x[m] if isinstance(x, torch.Tensor) else x, own)
        alone = leaves(one(module, population, member, *mine))
        assert len(alike) == len(together) == len(each) > 0
        for a, b in [*zip(together, alike, strict=True), *zip(each, alone, strict=True)]:
            assert torch.allclose(a[member], b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_batched_forward_equals_explicit_members(case, rank):
    module, inputs = build(case)
    before = {name: p.clone() for name, p in module.named_parameters()}
    population = Population(module, make_noise(family=LowRank(rank)))
    generator = torch.Generator().manual_seed(3)

    def of_each(x):
        if not isinstance(x, torch.Tensor) or x.dtype == torch.bool:
            return x if not isinstance(x, torch.Tensor) else x.expand(N, *x.shape)
        if x.dtype == torch.int64:
            return torch.randint(7, (N, *x.shape), generator=generator)
        return torch.randn(N, *x.shape, dtype=x.dtype, generator=generator)

    shared = (inputs, by_name(case))
    check(module, population, shared, torch.utils._pytree.tree_map(of_each, shared))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_explicit_sum_and_moves_only_what_was_perturbed(case):
    module, _ = build(case)
    noise, parameters = make_noise(family=LowRank(2)), perturbed_parameters(module)
    utilities = numbers(N)
    gradient = estimate_gradient(parameters, noise, utilities)
    members = [Population(module, noise).parameters_of(n) for n in range(N)]
    assert set(gradient) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        explicit = sum(u * (members[n][name] - parameter) / noise.sigma for n, u in enumerate(utilities)) / N
        assert torch.allclose(gradient[name], explicit, atol=1e-10, rtol=0)
        moved = torch.stack([members[n][name] != parameter for n in range(N)]).any(0)
        rows = torch.arange(len(parameter)) != (2 if case == "Embedding, padded" else -1)
        assert torch.equal(moved, gradient[name] != 0) and moved[rows].all() and not moved[~rows].any()


@pytest.mark.parametrize("case", ["Conv2d", "GRU", "Transformer", "tied", "parameters of the user's own"])
@pytest.mark.parametrize("name", [*FAMILIES, "without pairs", "with a baseline"])
def test_every_family_is_evaluated_as_it_is_drawn(case, name):
    module, inputs = build(case)
    changes = {"without pairs": {"antithetic": False}, "with a baseline": {"group_size": N}}.get(name, {})
    population = Population(
        module, make_noise(family=make_family(name if name in FAMILIES else "lowrank", 2), **changes)
    )
    for member, y in enumerate(leaves(population.forward(*inputs))[0]):
        assert torch.allclose(y, leaves(one(module, population, member, inputs))[0], atol=1e-10, rtol=0)
    if name == "with a baseline":
        for member in range(N):
            mean = all(torch.equal(v, module.get_parameter(n)) for n, v in population.parameters_of(member).items())
            assert mean == (member < 2)
    if name == "without pairs":
        steps = [population.parameters_of(m)[n] - p for n, p in [*module.named_parameters()][:1] for m in range(N)]
        assert len({tuple(s.abs().flatten()[:5].tolist()) for s in steps}) == N


def test_frozen_layers_stay_and_the_noise_of_others_does_not_move():
    module, inputs = build("Conv2d")
    free = Population(module, make_noise()).parameters_of(0)
    module[0].weight.requires_grad_(False)
    population = Population(module, make_noise())
    assert set(free) - set(population.parameters_of(0)) == {"0.weight"}
    assert torch.equal(population.parameters_of(0)["3.weight"], free["3.weight"])
    for member, y in enumerate(population.forward(*inputs)):
        assert torch.allclose(y, one(module, population, member, inputs), atol=1e-10, rtol=0)


def test_filters_choose_what_is_perturbed():
    module, _ = build("Conv2d")
    filtered = perturbed_parameters(module, lambda name, parameter: name.startswith("3."))
    assert [p.name for p in filtered] == ["3.weight", "3.bias"]
    assert [p.name for p in perturbed_parameters(module, freeze_nonmatrix=True)] == ["0.weight", "3.weight"]
    with pytest.raises(UnsupportedModuleError, match="nothing to optimise"):
        perturbed_parameters(module, lambda name, parameter: False)


def test_equal_layers_of_any_kind_get_different_noise():
    module = nn.Sequential(*[nn.Conv1d(4, 4, 3) for _ in range(2)], *[nn.LayerNorm(4) for _ in range(2)])
    step = {n: v - module.get_parameter(n) for n, v in Population(module, make_noise()).parameters_of(0).items()}
    assert not torch.allclose(step["0.weight"], step["1.weight"]) and not torch.allclose(step["2.bias"], step["3.bias"])


@pytest.mark.parametrize("family", [LowRank(1), LowRank(3), LowRank(100), Gaussian(), Sparse(0.2)], ids=repr)
def test_perturbations_have_unit_variance(family):
    for p in perturbed_parameters(nn.Conv2d(3, 4, 3)):
        noise = make_noise(family=family, population_size=8000)
        e = p.dense(noise, 0, 4000)
        assert abs(e.var() - 1) < 0.05 and abs(e.mean()) < 0.02
        # A direction's perturbation does not depend on the others that are drawn with it.
        assert torch.equal(p.dense(noise, 7, 1)[0], e[7])
    share = (e != 0).float().mean()
    assert abs(share - (0.2 if isinstance(family, Sparse) else 1)) < 0.02


def test_a_chunk_at_a_time_gives_the_same(monkeypatch):
    module, inputs = build("Transformer")
    whole = Population(module, make_noise()).forward(*inputs)
    for budget in (1, 40_000):
        monkeypatch.setattr(memberwise, "_MEMORY_BUDGET", budget)
        memberwise._CHUNKS.clear()
        assert torch.allclose(Population(module, make_noise()).forward(*inputs), whole, atol=1e-12)
    (chunk,) = memberwise._CHUNKS[module].values()
    assert 1 <= chunk < N


def test_a_buffer_that_forward_updates_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    with pytest.raises(UnsupportedModuleError, match="updates 'calls'"):
        Population(Counts(), make_noise()).forward(torch.zeros(2, 3))


def test_a_forward_that_depends_on_values_is_refused_with_what_can_be_done():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            y = self.layer(x)
            return y if y.sum() > 0 else -y

    module = Branch()
    with pytest.raises(UnsupportedModuleError, match=r"one at a time they can be: EvolutionStrategy\.step"):
        Population(module, make_noise()).forward(torch.zeros(2, 3))
    EvolutionStrategy(module, 4, seed=0).step(lambda m: m(torch.ones(2, 3)).sum().item())


class Gated(nn.Module):
    """Takes a mask by name, and branches on it as torch's decoder does."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)

    def forward(self, x, *, mask=None, options=None):
        if mask is not None and bool(mask.all()):
            mask = None
        y = self.norm(self.layer(x))
        y = y if mask is None else y * mask
        return y + options["shift"] if options else y


def test_inputs_by_name_are_shared_or_of_each_member():
    torch.manual_seed(0)
    module = Gated().double()
    population = Population(module, make_noise())
    x, shift = numbers(N, 3, 5), numbers(N, 5)
    mask = torch.tensor([True, False, True, True, False])
    check(module, population, ((x[0],), {"mask": mask}), ((x,), {"options": {"shift": shift, "name": "any"}}))
    # What all share is given as expanded, and forward may branch on it; on a mask of each member's own it may not.
    check(module, population, ((x[0],), {}), ((x,), {"mask": mask.expand(N, 5)}))
    with pytest.raises(UnsupportedModuleError, match=r"EvolutionStrategy\.step"):
        population.forward(x, mask=mask.repeat(N, 1), per_member=True)


@pytest.mark.parametrize("make", [Gated, lambda: nn.Sequential(nn.Linear(5, 5))], ids=["any module", "Linear layers"])
def test_inputs_that_cannot_be_are_named(make):
    population = Population(make(), make_noise())
    x = torch.zeros(3, 5)
    with pytest.raises(TypeError, match="'masks'"):
        population.forward(x, masks=x)
    with pytest.raises(TypeError, match="argument"):
        population.forward()
    with pytest.raises(ValueError, match=r"input 0 must .* expected 6, got 3 of shape \(3, 5\); .* x\.expand\(6,"):
        population.forward(x, per_member=True)
    with pytest.raises(ValueError, match="input 'mask' must .* expected 6, got a number"):
        population.forward(x.expand(N, 3, 5), mask={"deep": torch.tensor(1.0)}, per_member=True)


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.gru = nn.Linear(5, 4), nn.GRU(4, 3, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.layer(x), lengths, batch_first=True)
        return self.gru(packed)[1]


def test_packed_sequences_are_refused_with_what_can_be_done():
    torch.manual_seed(0)
    x, lengths = torch.randn(2, 4, 5), torch.tensor([4, 2])
    advice = r"PackedSequence, which .* padded .* EvolutionStrategy\.step\(fitness_fn\)"
    with pytest.raises(UnsupportedModuleError, match=f"GRU is given a {advice}"):
        Population(Packs(), make_noise()).forward(x, lengths)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    for module in (nn.GRU(5, 3), nn.Sequential(nn.Linear(5, 3))):
        with pytest.raises(UnsupportedModuleError, match=f"input 0 is a {advice}"):
            Population(module, make_noise()).forward(packed)
    # What the errors advise works: the padding after a sequence's end does not reach the outputs before it.
    gru = nn.GRU(5, 3, batch_first=True)
    population = Population(gru, make_noise())
    outputs, _ = population.forward(x)
    for member in range(N):
        alone = nn.utils.rnn.pad_packed_sequence(one(gru, population, member, (packed,))[0], batch_first=True)[0]
        assert torch.allclose(outputs[member, 0], alone[0], atol=1e-6)
        assert torch.allclose(outputs[member, 1, :2], alone[1, :2], atol=1e-6)
    EvolutionStrategy(Packs(), 4, seed=0).step(lambda module: module(x, lengths).sum().item())


def test_an_attention_that_is_causal_without_a_mask_is_refused_as_by_torch():
    module, x = Attention(batch_first=True), torch.randn(3, 4, 6)
    attention = Population(module.attention, make_noise())
    attention.forward(x, x, x)  # not the first time, when members are compared with the module
    for forward in (module.attention, attention.forward):
        with pytest.raises(RuntimeError, match=r"(Need|needs) attn_mask"):
            forward(x, x, x, is_causal=True)


def test_errors_of_the_users_own_are_left_alone():
    with pytest.raises(RuntimeError, match="shape"):
        Population(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), make_noise()).forward(torch.zeros(2, 4))


def test_global_generators_and_settings_are_left_alone():
    module, inputs = build("Transformer")
    es = EvolutionStrategy(module, N, seed=0)
    fast = torch.backends.mha.get_fastpath_enabled()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    es.tell(es.ask().forward(*inputs).sum((1, 2, 3)))
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_float32_and_bfloat16():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.15)):
        torch.manual_seed(0)
        for module in (
            nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)),
            nn.Sequential(nn.Linear(5, 2), nn.LayerNorm(2)),
        ):
            module = module.to(dtype)
            population, x = Population(module, make_noise()), numbers(3, 5).to(dtype)
            y = population.forward(x)
            assert y.dtype == dtype
            for member in range(N):
                assert torch.allclose(y[member], one(module, population, member, (x,)), atol=tolerance)
            es = EvolutionStrategy(module, N, seed=0)
            es.ask()
            es.tell(torch.arange(N))
            assert all(p.dtype == dtype and p.isfinite().all() for p in module.parameters())


def test_a_compiled_module_is_as_good_as_its_own():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(plain, backend="eager")
        es = EvolutionStrategy(compiled, N, sigma=0.1, seed=0)
        before = compiled(torch.ones(1, 5)).clone()
        es.tell(es.ask().forward(torch.ones(1, 5)).sum((1, 2)))
        assert set(es.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        assert not torch.equal(compiled(torch.ones(1, 5)), before)


def test_what_is_not_an_mlp_runs_member_wise():
    assert isinstance(Population(build("Conv2d")[0], make_noise()).members, MemberWise)
    assert not isinstance(Population(nn.Sequential(nn.Linear(2, 2)), make_noise()).members, MemberWise)


# What a forward may do ---------------------------------------------------------------------------------------


class OutOfReach(nn.Module):
    """Keeps its layers in a list beside, where a copy of the module does not find them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.LSTM(5, 3)
        self.layers = [self.first]

    def forward(self, x):
        return self.second(self.layers[0](x))[0]


class Remembers(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.layer = nn.Conv1d(2, 2, 1)
        if buffer:
            self.register_buffer("last", torch.zeros(2, 3))
        else:
            self.last = torch.zeros(2, 3)

    def forward(self, x):
        self.last = torch.tanh(self.layer(x) + self.last)
        return self.last


class AsksWhatItHas(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.LayerNorm(5), nn.LSTM(5, 4)])

    def forward(self, x):
        for layer in self.layers:
            if isinstance(layer, nn.LSTM):
                layer.flatten_parameters()
            x = layer(x)
            x = x.relu() if isinstance(layer, nn.Linear) else x
        return {"outputs": x[0], "kind": "lstm", "cache": None}


def test_a_layer_that_is_reached_otherwise_is_refused_instead_of_going_unperturbed():
    with pytest.raises(UnsupportedModuleError, match="reaches layers other than as its children"):
        Population(OutOfReach(), make_noise()).forward(torch.randn(4, 5))


@pytest.mark.parametrize("buffer", [True, False])
def test_a_forward_that_keeps_something_is_refused_and_the_module_left_as_it_was(buffer):
    module = Remembers(buffer)
    for _ in range(2):
        with pytest.raises(UnsupportedModuleError, match="forward updates 'last'"):
            Population(module, make_noise()).forward(torch.randn(2, 3))
        assert not module.last.any()


def test_a_forward_may_ask_for_classes_and_return_what_is_no_tensor():
    torch.manual_seed(0)
    module, x = AsksWhatItHas().double(), numbers(3, 5)
    population = Population(module, make_noise())
    result = population.forward(x)
    assert result["kind"] == "lstm" and result["cache"] is None
    for member in range(N):
        assert torch.allclose(result["outputs"][member], one(module, population, member, (x,))["outputs"], atol=1e-10)


def test_inputs_are_left_alone_by_layers_that_work_in_place():
    torch.manual_seed(0)
    module = nn.Sequential(nn.ELU(inplace=True), nn.Linear(5, 4), nn.LayerNorm(4)).double()
    population, x, own = Population(module, make_noise()), numbers(3, 5), torch.randn(N, 3, 5).double()
    kept = x.clone(), own.clone()
    for _ in range(2):
        y, each = population.forward(x), population.forward(own, per_member=True)
        assert torch.equal(x, kept[0]) and torch.equal(own, kept[1])
        for member in range(N):
            assert torch.allclose(y[member], one(module, population, member, (x.clone(),)), atol=1e-10)
            assert torch.allclose(each[member], one(module, population, member, (own[member].clone(),)), atol=1e-10)


def test_compiled_parts_are_run_as_what_they_are_and_left_whole():
    torch.manual_seed(0)
    inner = nn.Linear(5, 4)
    module = nn.Sequential(torch.compile(inner, backend="eager"), nn.LayerNorm(4))
    population, x = Population(module, make_noise()), torch.randn(3, 5)
    y = population.forward(x)
    reference = nn.Sequential(inner, nn.LayerNorm(4))
    names = {n: n.replace("_orig_mod.", "") for n, _ in module.named_parameters()}
    for member in range(N):
        values = {names[n]: v for n, v in population.parameters_of(member).items()}
        assert torch.allclose(y[member], torch.func.functional_call(reference, values, (x,)), atol=1e-5)
    assert inner.weight is not None and len(list(module.parameters())) == 4
    with torch.inference_mode():
        assert torch.allclose(Population(module, make_noise()).forward(x), y, atol=1e-6)


@pytest.mark.parametrize("widths", [(4,), (4, 1)])
def test_one_input_without_a_batch(widths):
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(5 if i == 0 else widths[i - 1], w) for i, w in enumerate(widths)])
    population, x = Population(module, make_noise()), torch.randn(5)
    y, each = population.forward(x), population.forward(torch.stack([x] * N), per_member=True)
    assert y.shape == each.shape == (N, widths[-1])
    for member in range(N):
        assert torch.allclose(y[member], one(module, population, member, (x,)), atol=1e-5)
        assert torch.allclose(each[member], y[member], atol=1e-5)
