"""All members of a generation evaluated in one call, without forming their weights.

A sequence of Linear layers and activations runs on kernels of our own: Y = X Wᵀ + s·sigma/sqrt(r)·(X B) Aᵀ. Any other
module runs under ``torch.func.vmap``, layer by layer in the forms of :mod:`eggroll_rl.forms`, so that its forward sees
what it would see for one member.

Shapes: N members, P directions, B batch, I inputs, O outputs, R rank.
"""

import math
from collections import OrderedDict
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from eggroll_rl.errors import UnsupportedModuleError
from eggroll_rl.forms import AttentionForm, Form, form_of
from eggroll_rl.lowrank import Perturbed, perturbed_parameters
from eggroll_rl.noise import Noise

_NUMBERS_AT_ONCE = 2**19  # of a layer's outputs: what stays in the cache
_MEMORY_BUDGET = 2**28  # bytes of one chunk of members, where torch.func evaluates them
_KEPT = 2**22  # numbers of one parameter's noise, kept from the evaluation to the update
_CHUNKS: WeakKeyDictionary[nn.Module, dict[Any, int]] = WeakKeyDictionary()  # by module and shapes
_OF_VMAP = ("vmap", "functorch", "Batching rule", "data pointer")
_ONE_BY_ONE = "one at a time they can be: EvolutionStrategy.step(fitness_fn)"
_ELEMENTWISE = (
    nn.Tanh, nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU, nn.Sigmoid,
    nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Identity,
)  # fmt: skip


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def is_plain_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Say whether a module does nothing but call its children in their order."""
    is_sequence = type(module) in (nn.Sequential, Chain)
    return is_sequence and not any(_has_hooks(layer) for layer in (module, *module.children()))


def _is_mlp(module: nn.Module) -> bool:
    """Say whether a module is plain Linear layers, and activations that treat each number by itself."""
    return is_plain_sequence(module) and all(
        type(layer) is nn.Linear or type(layer) in _ELEMENTWISE for layer in module.children()
    )


class PerturbedLinear(nn.Module):
    """A Linear layer for N members at once: input (N·B, ..., I), member by member, to output (N·B, ..., O).

    It has no attribute ``weight``: a forward that reaches past the layer fails instead of going unperturbed.
    """

    def __init__(self, linear: nn.Linear, signed_a_NOR: Tensor, b_NIR: Tensor, bias_NO: Tensor | None):
        super().__init__()
        # Plain attributes: a Parameter here would be found by the outer module and by `.weight`.
        self._weight_IO = linear.weight.detach().t()
        self._bias_NO = bias_NO
        self._a_NRO = signed_a_NOR.transpose(1, 2).contiguous()
        self._b_NIR = b_NIR.contiguous()
        if b_NIR.shape[2] == 1:
            self._a_NO = self._a_NRO[:, 0].contiguous()
            self._b_NI = self._b_NIR[:, :, 0].contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self._weight_IO.dtype

    @property
    def n_outputs(self) -> int:
        """Outputs O."""
        return self._weight_IO.shape[1]

    @property
    def pays_dense(self) -> float:
        """Inputs per member from which explicit weights cost less than the factors do."""
        n_in, n_out = self._weight_IO.shape
        return n_in * n_out / (n_in + n_out)

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None, list[tuple[np.ndarray, np.ndarray]]]:
        """Return the weight (I, O), the members' biases (N, O) and per rank their a (N, O) and b (N, I); on the CPU.

        A member's output is x W + bias + sum over ranks of (x·b) a: sign, sigma and 1/sqrt(rank) are in a.
        """
        factors = [
            (np.ascontiguousarray(self._a_NRO[:, r].numpy()), np.ascontiguousarray(self._b_NIR[:, :, r].numpy()))
            for r in range(self._b_NIR.shape[2])
        ]
        bias_NO = None if self._bias_NO is None else self._bias_NO.numpy().copy()
        return self._weight_IO.numpy().copy(order="C"), bias_NO, factors

    def dense(self, members: slice) -> tuple[Tensor, Tensor | None]:
        """Return some members' weights (N, O, I) and biases (N, O, 1): for many inputs per member it pays."""
        b_NRI = self._b_NIR[members].transpose(1, 2)
        weight_NOI = self._weight_IO.t().expand(len(b_NRI), -1, -1)
        weight_NOI = torch.baddbmm(weight_NOI, self._a_NRO[members].transpose(1, 2), b_NRI)
        return weight_NOI, None if self._bias_NO is None else self._bias_NO[members].unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the layer for every member."""
        n_members, n_in, rank = self._b_NIR.shape
        if rank == 1 and x.dim() == 2 and len(x) == n_members:
            # One observation per member: three small kernels over the plain layer.
            y = (
                torch.mm(x, self._weight_IO)
                if self._bias_NO is None
                else torch.addmm(self._bias_NO, x, self._weight_IO)
            )
            return y.addcmul_(self._a_NO, torch.linalg.vecdot(x, self._b_NI).unsqueeze(1))
        x_NBI = x.reshape(n_members, -1, n_in)
        y_NBO = (x.reshape(-1, n_in) @ self._weight_IO).view(*x_NBI.shape[:2], -1)
        y_NBO = torch.baddbmm(y_NBO, torch.bmm(x_NBI, self._b_NIR), self._a_NRO)
        if self._bias_NO is not None:
            y_NBO += self._bias_NO.unsqueeze(1)
        return y_NBO.reshape(*x.shape[:-1], -1)


class Chain(nn.Sequential):
    """A Sequential that calls its layers' forward: nn.Module's own call costs as much as a small kernel."""

    def __init__(self, layers: OrderedDict[str, nn.Module]):
        super().__init__(layers)
        self._forwards = [layer.forward for layer in layers.values()]

    def forward(self, x: Tensor) -> Tensor:
        """Call the layers in their order."""
        for forward in self._forwards:
            x = forward(x)
        return x


class Population:
    """Consecutive members of one generation, evaluated together.

    :param module: holds the mean parameters, which are read and never written
    :param noise: the generation's noise
    :param first: first member (even); the whole population by default
    :param size: number of members (even). It may reach beyond ``population_size``: the noise is defined there
        too, which is how the last slice is padded
    :param parameters: what is perturbed; by default all that requires grad
    """

    def __init__(
        self,
        module: nn.Module,
        noise: Noise,
        first: int = 0,
        size: int | None = None,
        parameters: list[Perturbed] | None = None,
    ):
        self.noise = noise
        self.first = first
        self.size = noise.population_size - first if size is None else size
        self._mean = module
        self._parameters = perturbed_parameters(module) if parameters is None else parameters
        self._members: Chain | MemberWise | None = None
        self._drawn: dict[int, tuple[Tensor, Tensor] | Tensor] = {}

    def __len__(self) -> int:
        return self.size

    @property
    def members(self) -> "Chain | MemberWise":
        """The module for all members at once: input (N·B, ...), member by member, to output (N·B, ...).

        Its weights are the mean's own tensors and its noise, N·r·(m+n) numbers per layer, is made once.
        """
        if self._members is None:
            with torch.no_grad():
                self._members = self._chain() if self._is_chain() else MemberWise(self._mean, self._per_member())
        return self._members

    @torch.no_grad()
    def forward(self, *inputs: Any, per_member: bool = False) -> Any:
        """Evaluate all members in one call.

        :param inputs: what the module takes: tensors (batch, ...), or dicts, lists and tuples of them, the same for
            every member; with ``per_member`` (N, batch, ...). None and anything else is passed as it is
        :return: what the module returns, its tensors (N, batch, ...)
        :raises UnsupportedModuleError: the module does what ``torch.func.vmap`` cannot do for all members
        """
        if per_member:
            for x in tree_leaves(inputs):
                if isinstance(x, Tensor) and (x.dim() == 0 or len(x) != self.size):
                    got = tuple(x.shape)[:1] or "a number"
                    raise ValueError(
                        f"x must have one leading entry per member: expected {self.size}, "
                        f"got {got[0] if isinstance(got, tuple) else got}"
                    )
        members = self.members
        if isinstance(members, MemberWise):
            return members.evaluate(inputs, per_member)
        (x,) = inputs
        linear = [layer for layer in members if isinstance(layer, PerturbedLinear)]
        if not per_member and linear and x.dim() > 1:
            x_BI = x.reshape(-1, x.shape[-1])
            if all(len(x_BI) >= layer.pays_dense for layer in linear):
                return self._forward_in_columns(members, x_BI).unflatten(1, x.shape[:-1])
        if x.dim() == 1 + per_member:  # one input without a batch
            return self.forward(x.unsqueeze(-2), per_member=per_member).squeeze(-2)
        if x.dim() == 1 + per_member:  # one input without a batch
            return self.forward(x.unsqueeze(-2), per_member=per_member).squeeze(-2)
        x_NB = x if per_member else x.expand(self.size, *x.shape)
        return members(x_NB.flatten(0, 1)).unflatten(0, x_NB.shape[:2])

    def _forward_in_columns(self, members: Chain, x_BI: Tensor) -> Tensor:
        """Evaluate all members on the same inputs, with explicit weights and an input per column; (N, B, O).

        A few members at a time: their activations stay in the cache, and their weights are never many.
        """
        layers = list(members)
        linear = [layer for layer in layers if isinstance(layer, PerturbedLinear)]
        at_once = max(1, _NUMBERS_AT_ONCE // (len(x_BI) * max(layer.n_outputs for layer in linear)))
        parts = []
        for first in range(0, self.size, at_once):
            part = slice(first, first + at_once)
            y = x_BI.t() if layers[0] is linear[0] else x_BI.t().clone()  # an activation may work in place
            for layer in layers:
                if isinstance(layer, PerturbedLinear):
                    weight_NOI, bias_NO1 = layer.dense(part)
                    if y.dim() == 2:  # the same for all: one matrix product
                        y = (weight_NOI.flatten(0, 1) @ y).view(*weight_NOI.shape[:2], -1)
                    else:
                        y = torch.bmm(weight_NOI, y)
                    if bias_NO1 is not None:
                        y += bias_NO1
                else:
                    y = layer(y)
            parts.append(y.transpose(1, 2))
        return torch.cat(parts)

    def parameters_of(self, member: int) -> dict[str, Tensor]:
        """Return theta + s·sigma·E of one member, dense, by name; ``member`` counts from this range's first."""
        if not 0 <= member < self.size:
            raise IndexError(f"member must be in 0 .. {self.size - 1}, got {member}")
        member += self.first
        step, direction = float(self.noise.steps(member, 1)[0]), self.noise.direction(member)
        return {p.name: p.parameter.detach() + step * p.dense(self.noise, direction, 1)[0] for p in self._parameters}

    def draw(self, p: Perturbed, first: int, n_directions: int) -> "tuple[Tensor, Tensor] | Tensor":
        """Return what :meth:`Perturbed.draw` does, without drawing again what the members were made of."""
        if p.index not in self._drawn:
            return p.draw(self.noise, first, n_directions)
        first -= self.noise.direction(self.first)
        part = slice(first, first + n_directions)
        drawn = self._drawn[p.index]
        return (drawn[0][part], drawn[1][part]) if isinstance(drawn, tuple) else drawn[part]

    def _draw(self, p: Perturbed) -> "tuple[Tensor, Tensor] | Tensor":
        """Return s·sigma·E of all members: factors (N, O, R) and (N, I, R) of the product, or dense (N, ...)."""
        each = 2 if self.noise.antithetic else 1
        first, last = self.noise.direction(self.first), self.noise.direction(self.first + self.size - 1)
        drawn = p.draw(self.noise, first, last - first + 1)
        if sum(side.numel() for side in tree_leaves(drawn)) <= _KEPT:
            self._drawn[p.index] = drawn
        steps_N = self.noise.steps(self.first, self.size)
        if isinstance(drawn, tuple):
            a_NOR, b_NIR = (side.repeat_interleave(each, 0) for side in drawn)
            scale = torch.from_numpy(steps_N / math.sqrt(a_NOR.shape[2])).to(a_NOR)
            return a_NOR * scale[:, None, None], b_NIR
        dense = drawn.repeat_interleave(each, 0)
        return dense * torch.from_numpy(steps_N).to(dense).view(-1, *[1] * (dense.dim() - 1))

    def _is_chain(self) -> bool:
        if not _is_mlp(self._mean):
            return False
        # Only low-rank noise has factors for every matrix, and a chain can do without the first.
        matrices = [p for p in self._parameters if p.is_matrix]
        return all(isinstance(p.draw(self.noise, 0, 1), tuple) for p in matrices)

    def _chain(self) -> Chain:
        by_parameter = {id(p.parameter): p for p in self._parameters}

        def perturb(layer: nn.Module) -> nn.Module:
            if not isinstance(layer, nn.Linear):
                return layer
            weight, bias = by_parameter.get(id(layer.weight)), by_parameter.get(id(layer.bias))
            if weight is None:  # frozen
                a_NOR = layer.weight.new_zeros(self.size, layer.out_features, 1)
                b_NIR = layer.weight.new_zeros(self.size, layer.in_features, 1)
            else:
                a_NOR, b_NIR = self._draw(weight)
            bias_NO = None
            if layer.bias is not None:
                bias_NO = layer.bias.detach().expand(self.size, -1)
                if bias is not None:
                    step_NO = self._draw(bias)
                    assert isinstance(step_NO, Tensor)
                    bias_NO = bias_NO + step_NO
            return PerturbedLinear(layer, a_NOR, b_NIR, bias_NO)

        assert isinstance(self._mean, nn.Sequential)
        converted: dict[int, nn.Module] = {}
        for layer in self._mean:
            converted.setdefault(id(layer), perturb(layer))
        return Chain(OrderedDict((name, converted[id(layer)]) for name, layer in self._mean._modules.items() if layer))

    def _per_member(self) -> "dict[int, tuple[Tensor, Tensor] | Tensor]":
        """Return by the parameter's id what its members have: factors of their step, or explicit values."""
        found: dict[int, tuple[Tensor, Tensor] | Tensor] = {}
        for p in self._parameters:
            drawn = self._draw(p)
            if not isinstance(drawn, tuple):
                drawn = p.parameter.detach() + drawn.view(self.size, *p.parameter.shape)
            found[id(p.parameter)] = drawn
        return found


class MemberWise(nn.Module):
    """Any module, for all members at once by ``torch.func.vmap``.

    :param mean: the module, which is left as it is
    :param per_member: by the parameter's id, factors of the members' steps, or their values (N, *shape)
    """

    def __init__(self, mean: nn.Module, per_member: "dict[int, tuple[Tensor, Tensor] | Tensor]"):
        super().__init__()
        self.size = len(tree_leaves(list(per_member.values()))[0])
        factored = {key for key, value in per_member.items() if isinstance(value, tuple)}
        # In a list: these must not be found as children, whose parameters somebody could take for the members'.
        self._template = [_member_form(mean, factored, {})]
        self._tensors: dict[str, Tensor] = {}
        self._mean, self._per_member = [mean], per_member
        for path, layer in self._template[0].named_modules():
            prefix = f"{path}." if path else ""
            for name, parameter in layer._parameters.items():
                value = per_member.get(id(parameter))
                if isinstance(value, Tensor):
                    self._tensors[prefix + name] = value
                elif isinstance(value, tuple):  # a layer without a form needs the product
                    a, b = value
                    dense = (a @ b.transpose(1, 2)).view(self.size, *parameter.shape)
                    self._tensors[prefix + name] = parameter.detach() + dense
            for name in layer._buffers:
                if name.endswith("_a") and isinstance(layer, Form):
                    value = per_member[id(getattr(layer.__dict__["_base"], name[:-2]))]
                    self._tensors[f"{prefix}{name}"], self._tensors[f"{prefix}{name[:-2]}_b"] = value

    def forward(self, *inputs: Any) -> Any:
        """Evaluate rows (N·B, ...), member by member."""
        each = tree_map(lambda x: x.unflatten(0, (self.size, -1)) if isinstance(x, Tensor) else x, inputs)
        result = self.evaluate(each, per_member=True)
        return tree_map(lambda x: x.flatten(0, 1) if isinstance(x, Tensor) else x, result)

    def evaluate(self, inputs: tuple[Any, ...], per_member: bool) -> Any:
        """Evaluate the members; see :meth:`Population.forward`."""
        told: dict[str, Any] = {}

        def one(tensors: dict[str, Tensor], *inputs: Any) -> list[Tensor]:
            leaves, told["structure"] = tree_flatten(self._call(tensors, inputs))
            told["others"] = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        dims = tree_map(lambda x: 0 if per_member and isinstance(x, Tensor) else None, inputs)
        fast_attention = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights itself
        try:
            chunk = self._chunk(inputs, per_member)
            before = self._state()
            mapped = torch.func.vmap(one, in_dims=(0, *dims), randomness="error", chunk_size=chunk)
            tensors = iter(mapped(self._tensors, *inputs))
            self._refuse_changes(before)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _OF_VMAP):
                raise
            raise UnsupportedModuleError(
                f"torch.func cannot evaluate all members of this module in one call ({' '.join(str(error).split())}); "
                f"{_ONE_BY_ONE}"
            ) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)
        leaves = [next(tensors) if other is None else other[0] for other in told["others"]]
        return tree_unflatten(leaves, told["structure"])

    def _call(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        # Copies: a forward may work in place, and other members see the same inputs.
        own = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
        return torch.func.functional_call(self._template[0], tensors, own, tie_weights=False)

    def _state(self) -> dict[str, Any]:
        """Return what forward must leave alone: which tensors the modules hold, and how often each was written."""
        return {
            f"{path}.{name}" if path else name: (id(value), None if value.is_inference() else value._version)
            for path, layer in self._template[0].named_modules()
            # A hook that sets an attribute before each forward, as weight norm's does, carries nothing over.
            for name, value in [*layer._buffers.items(), *({} if layer._forward_pre_hooks else layer.__dict__).items()]
            if isinstance(value, Tensor)
        }

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        after = self._state()
        for name in {**before, **after}:
            if before.get(name) != after.get(name):
                raise UnsupportedModuleError(
                    f"forward updates {name!r}, so that members would see each other's: call eval(), or {_ONE_BY_ONE}"
                )

    def _chunk(self, inputs: tuple[Any, ...], per_member: bool) -> int | None:
        """Return how many members fit into the memory budget, by what the first of them computes.

        :raises UnsupportedModuleError: the first member does not compute what the module would at its parameters
        """
        leaves, structure = tree_flatten(inputs)
        key = (per_member, structure, *(tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves))
        chunks = _CHUNKS.setdefault(self._mean[0], {})
        if key not in chunks:
            sample = tree_map(lambda x: x[0] if per_member and isinstance(x, Tensor) else x, inputs)
            before = self._state()
            with _Counting() as counting:
                result = self._call({name: tensor[0] for name, tensor in self._tensors.items()}, sample)
            self._refuse_changes(before)
            if not chunks:
                self._check(sample, result)
            chunks[key] = max(1, _MEMORY_BUDGET // max(counting.bytes, 1))
        return chunks[key] if chunks[key] < self.size else None

    def _check(self, sample: tuple[Any, ...], result: Any) -> None:
        """Compare the first member with the module itself, once: forms cannot reach what is no child of a module."""
        mean = self._mean[0]
        values: dict[str, Tensor] = {name: buffer.clone() for name, buffer in mean.named_buffers()}
        plain = dict(values)
        for name, parameter in mean.named_parameters():
            value = self._per_member.get(id(parameter))
            if isinstance(value, tuple):
                values[name] = parameter.detach() + (value[0][0] @ value[1][0].t()).view(parameter.shape)
            elif value is not None:
                values[name] = value[0]

        def at(values: dict[str, Tensor]) -> Tensor:
            own = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, sample)
            return _joined(torch.func.functional_call(mean, values, own))

        found, expected = _joined(result), at(values)
        # Rounding may turn a neuron that is on or off; what is not perturbed is wrong by all of the perturbation.
        allowed = 0.1 * (expected - at(plain)).norm() + 1e-2 * expected.norm() * torch.finfo(found.dtype).eps ** 0.25
        if not (found - expected).norm() <= allowed and expected.isfinite().all():
            raise UnsupportedModuleError(
                "this module's forward reaches layers other than as its children, where members cannot be told apart; "
                f"{_ONE_BY_ONE}"
            )


def _joined(tree: Any) -> Tensor:
    parts = [x.flatten() for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
    return torch.cat([part.to(parts[0]) for part in parts]) if parts else torch.zeros(1)


class _Counting(TorchDispatchMode):
    """Adds up the bytes of all results of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


def _member_form(module: nn.Module, factored: set[int], seen: dict[int, nn.Module]) -> nn.Module:
    """Copy the module tree with forms in place of layers; everything else keeps its own forward."""
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper computes the module that it wraps
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper computes the module that it wraps
    if id(module) in seen:
        return seen[id(module)]
    form = form_of(module)
    if form is not None:
        names = {name for name, parameter in module.named_parameters(recurse=False) if id(parameter) in factored}
        if form is AttentionForm:
            out_proj = _member_form(module.get_submodule("out_proj"), factored, seen)
            converted: nn.Module = AttentionForm(module, frozenset(names), out_proj)
        else:
            converted = form(module, frozenset(names))
    else:
        # Not copy.copy(), which parametrized modules refuse.
        kind: Any = type(module)
        converted = kind.__new__(kind)
        converted.__dict__.update(module.__dict__)
        converted.__dict__.pop("_compiled_call_impl", None)  # of the original
        converted._parameters = dict(module._parameters)
        converted._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
        converted._modules = {
            name: child if child is None else _member_form(child, factored, seen)
            for name, child in module._modules.items()
        }
    seen[id(module)] = converted
    return converted
