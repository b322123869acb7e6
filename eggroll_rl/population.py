"""All members of a generation evaluated in one call, without forming their weights.

A sequence of Linear layers and activations runs on kernels of our own: Y = X Wᵀ + s·sigma/sqrt(r)·(X B) Aᵀ. Any other
module runs in :mod:`eggroll_rl.memberwise`.

Shapes: N members, P directions, B batch, I inputs, O outputs, R rank.
"""

import inspect
import math
from collections import OrderedDict
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from eggroll_rl.errors import UnsupportedModuleError
from eggroll_rl.forms import PACKED_ADVICE, is_packed
from eggroll_rl.lowrank import Perturbed, perturbed_parameters
from eggroll_rl.memberwise import MemberWise
from eggroll_rl.noise import Noise

_NUMBERS_AT_ONCE = 2**19  # of a layer's outputs: what stays in the cache
_KEPT = 2**22  # numbers of one parameter's noise, kept from the evaluation to the update
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


def _of_members(drawn: Tensor, each: int, scale_N: Tensor | None = None) -> Tensor:
    """Return what directions (P, ...) are for ``each`` members of theirs, times a number per member; (N, ...)."""
    drawn = drawn.unsqueeze(1)
    if scale_N is None:
        return drawn.expand(-1, each, *drawn.shape[2:]).flatten(0, 1).contiguous()
    return (drawn * scale_N.view(-1, each, *[1] * (drawn.dim() - 2))).flatten(0, 1)


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
                steps_N = torch.from_numpy(self.noise.steps(self.first, self.size))
                drawn = {id(p.parameter): self._draw(p, steps_N) for p in self._parameters}
                # A chain needs factors of every matrix, which not every family of noise has.
                factored = all(isinstance(drawn[id(p.parameter)], tuple) for p in self._parameters if p.is_matrix)
                is_chain = factored and _is_mlp(self._mean)
                self._members = self._chain(drawn) if is_chain else MemberWise(self._mean, self._per_member(drawn))
        return self._members

    @torch.no_grad()
    def forward(self, *inputs: Any, per_member: bool = False, **keywords: Any) -> Any:
        """Evaluate all members in one call.

        :param inputs: what the module takes: tensors (batch, ...), or dicts, lists and tuples of them, the same for
            every member; with ``per_member`` (N, batch, ...). None and anything else is passed as it is
        :param keywords: the same, by the names that the module's forward has for them: masks, for example
        :param per_member: every tensor has a leading entry per member. One that they share is given as
            ``x.expand(N, *x.shape)``, which costs nothing, and is seen as shared
        :return: what the module returns, its tensors (N, batch, ...)
        :raises ValueError: with ``per_member``, a tensor has another number of entries
        :raises UnsupportedModuleError: the module does what ``torch.func.vmap`` cannot do for all members, or an
            input is a PackedSequence
        """
        for name, value in [*enumerate(inputs), *keywords.items()]:
            self._check_argument(f"input {name!r}", value, per_member)
        members = self.members
        if isinstance(members, MemberWise):
            return members.evaluate(inputs, keywords, per_member)
        if keywords or len(inputs) != 1:  # a TypeError as the module's own, where it is not one input
            inputs = inspect.signature(self._mean.forward).bind(*inputs, **keywords).args
        (x,) = inputs
        linear = [layer for layer in members if isinstance(layer, PerturbedLinear)]
        if not per_member and linear and x.dim() > 1:
            x_BI = x.reshape(-1, x.shape[-1])
            if all(len(x_BI) >= layer.pays_dense for layer in linear):
                return self._forward_in_columns(members, x_BI).unflatten(1, x.shape[:-1])
        if x.dim() == 1 + per_member:  # one input without a batch
            return self.forward(x.unsqueeze(-2), per_member=per_member).squeeze(-2)
        x_NB = x if per_member else x.expand(self.size, *x.shape)
        return members(x_NB.flatten(0, 1)).unflatten(0, x_NB.shape[:2])

    def _check_argument(self, name: str, value: Any, per_member: bool) -> None:
        for x in tree_leaves(value, is_leaf=is_packed):
            if is_packed(x):
                raise UnsupportedModuleError(f"{name} is a PackedSequence, which {PACKED_ADVICE}")
            if per_member and isinstance(x, Tensor) and (x.dim() == 0 or len(x) != self.size):
                got = "a number" if x.dim() == 0 else f"{len(x)} of shape {tuple(x.shape)}"
                raise ValueError(
                    f"{name} must have one leading entry per member: expected {self.size}, got {got}; "
                    f"what members share is given as x.expand({self.size}, *x.shape)"
                )

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

    def _draw(self, p: Perturbed, steps_N: Tensor) -> "tuple[Tensor, Tensor] | Tensor":
        """Return s·sigma·E of all members: factors (N, O, R) and (N, I, R) of the product, or dense (N, ...)."""
        each = 2 if self.noise.antithetic else 1
        first, last = self.noise.direction(self.first), self.noise.direction(self.first + self.size - 1)
        drawn = p.draw(self.noise, first, last - first + 1)
        if sum(side.numel() for side in tree_leaves(drawn)) <= _KEPT:
            self._drawn[p.index] = drawn
        if isinstance(drawn, tuple):
            scale_N = (steps_N / math.sqrt(drawn[0].shape[2])).to(drawn[0])
            return _of_members(drawn[0], each, scale_N), _of_members(drawn[1], each)
        return _of_members(drawn, each, steps_N.to(drawn))

    def _chain(self, drawn: "dict[int, tuple[Tensor, Tensor] | Tensor]") -> Chain:
        def perturb(layer: nn.Module) -> nn.Module:
            if not isinstance(layer, nn.Linear):
                return layer
            factors, step_NO = drawn.get(id(layer.weight)), drawn.get(id(layer.bias))
            if factors is None:  # frozen
                a_NOR = layer.weight.new_zeros(self.size, layer.out_features, 1)
                b_NIR = layer.weight.new_zeros(self.size, layer.in_features, 1)
            else:
                a_NOR, b_NIR = factors
            bias_NO = None
            if layer.bias is not None:
                bias_NO = layer.bias.detach().expand(self.size, -1)
                if isinstance(step_NO, Tensor):
                    bias_NO = bias_NO + step_NO
            return PerturbedLinear(layer, a_NOR, b_NIR, bias_NO)

        assert isinstance(self._mean, nn.Sequential)
        converted: dict[int, nn.Module] = {}
        for layer in self._mean:
            converted.setdefault(id(layer), perturb(layer))
        return Chain(OrderedDict((name, converted[id(layer)]) for name, layer in self._mean._modules.items() if layer))

    def _per_member(
        self, drawn: "dict[int, tuple[Tensor, Tensor] | Tensor]"
    ) -> "dict[int, tuple[Tensor, Tensor] | Tensor]":
        """Return by the parameter's id what its members have: factors of their step, or explicit values."""
        found = dict(drawn)
        for p in self._parameters:
            step = drawn[id(p.parameter)]
            if isinstance(step, Tensor):
                found[id(p.parameter)] = p.parameter.detach() + step.view(self.size, *p.parameter.shape)
        return found
