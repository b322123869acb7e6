"""Low-rank noise for a population: sample from a counter, apply in a batched forward, contract into a gradient.

EGGROLL, "Evolution Strategies at the Hyperscale", arXiv 2511.16652, Alg. 1 and Eq. 6. Member n of a generation
is evaluated at

    W + s·sigma·A Bᵀ/sqrt(r)     for the weight W (O x I) of a Linear layer, A (O x r) and B (I x r) ~ N(0, 1)
    b + s·sigma·eps              for every other parameter, eps ~ N(0, 1)

with r clamped to min(O, I), s = +1 for even n and -1 for odd n, and the same A, B, eps for members 2k and 2k+1
(an antithetic pair). Y = X Wᵀ + s·sigma/sqrt(r)·(X B) Aᵀ needs no A Bᵀ; it is formed, for a few members at a time, only
where many inputs are evaluated per member and it costs less.

Shapes: N members, P pairs, B batch, I inputs, O outputs, R rank.
"""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from eggroll_rl.errors import UnsupportedModuleError

_NOISE_AT_ONCE = 2**18  # numbers; bounds the memory of a gradient
_NUMBERS_AT_ONCE = 2**19  # of a layer's outputs: what stays in the cache


@dataclass(frozen=True)
class Noise:
    """Everything that determines one generation's perturbations: a few bytes, sent instead of the noise.

    :param seed: any non-negative integer
    :param generation: counts updates
    :param population_size: number of members N (even; two per antithetic pair)
    :param sigma: scale of the perturbation
    :param rank: rank of a weight's perturbation
    :param slice_size: members per slice (even). Forward passes run slice by slice, because floating point
        gives another last bit for another batch shape
    """

    seed: int
    generation: int
    population_size: int
    sigma: float
    rank: int
    slice_size: int


def standard_normal(noise: Noise, parameter: int, first_pair: int, n_pairs: int, size: int) -> Tensor:
    """Return N(0, 1) noise (n_pairs, size), float32: a pure function of (seed, generation, pair, parameter).

    Philox is counter based: a pair's numbers lie at a fixed place of the stream, so any range of pairs is
    made in one call, anywhere. Box-Muller is used because it consumes a fixed number of draws per normal, as
    the ziggurat of ``Generator.standard_normal`` does not. 24-bit uniforms bound |x| by 5.9.
    """
    blocks = -(-size // 8)  # one Philox block is 4 uint64: 8 normals
    counter = [first_pair * blocks, parameter, noise.generation, 0]
    philox = np.random.Philox(counter=counter, key=_key(noise.seed))
    bits = philox.random_raw(n_pairs * blocks * 4).view(np.uint32).reshape(n_pairs, 2, blocks * 4)
    uniform = ((bits >> 8).astype(np.float32) + np.float32(0.5)) * np.float32(2**-24)  # in (0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(uniform[:, 0]))
    angle = np.float32(2 * math.pi) * uniform[:, 1]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return torch.from_numpy(np.ascontiguousarray(normal[:, :size]))


@lru_cache(maxsize=8)
def _key(seed: int) -> np.ndarray:
    return np.random.SeedSequence(seed).generate_state(2, np.uint64)


@dataclass(frozen=True)
class Perturbed:
    """One parameter that is perturbed and updated.

    :param name: name in the module
    :param index: position among all the module's parameters, frozen ones included: its place in the noise
    :param factored: a weight matrix with low-rank noise, or else dense noise
    """

    name: str
    index: int
    parameter: nn.Parameter
    factored: bool

    def factors(self, noise: Noise, first_pair: int, n_pairs: int) -> tuple[Tensor, Tensor]:
        """Return A (P, O, R) and B (P, I, R) of a weight matrix; the perturbation is A Bᵀ/sqrt(R)."""
        n_out, n_in = self.parameter.shape
        rank = min(noise.rank, n_out, n_in)
        flat = standard_normal(noise, self.index, first_pair, n_pairs, rank * (n_out + n_in))
        flat = flat.to(self.parameter.device, self.parameter.dtype)
        return (
            flat[:, : rank * n_out].reshape(n_pairs, n_out, rank),
            flat[:, rank * n_out :].reshape(n_pairs, n_in, rank),
        )

    def dense(self, noise: Noise, first_pair: int, n_pairs: int) -> Tensor:
        """Return the perturbations E as (P, *shape). For weights this is the product that we avoid elsewhere."""
        if self.factored:
            a_POR, b_PIR = self.factors(noise, first_pair, n_pairs)
            return a_POR @ b_PIR.transpose(1, 2) / math.sqrt(a_POR.shape[2])
        eps = standard_normal(noise, self.index, first_pair, n_pairs, self.parameter.numel())
        return eps.to(self.parameter.device, self.parameter.dtype).view(n_pairs, *self.parameter.shape)


def perturbed_parameters(module: nn.Module) -> list[Perturbed]:
    """List what a population perturbs: every parameter that requires grad.

    :raises UnsupportedModuleError: naming a layer whose members could not be evaluated exactly
    """
    matrices: set[int] = set()
    for path, layer in module.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if type(layer) is nn.Linear and not _is_altered(layer, set(own)):
            matrices.add(id(layer.weight))
        elif own or _mixes_members(layer):
            name = path or "the module itself"
            raise UnsupportedModuleError(
                f"cannot perturb {name!r} ({type(layer).__name__}): "
                "supported are plain Linear layers and activations without parameters"
            )
    found = [
        Perturbed(name, index, parameter, id(parameter) in matrices)
        for index, (name, parameter) in enumerate(module.named_parameters())
        if parameter.requires_grad
    ]
    if not found:
        raise UnsupportedModuleError("the module has no parameter that requires grad: there is nothing to optimise")
    return found


def _is_altered(layer: nn.Linear, own: set[str]) -> bool:
    # Weight norm keeps other parameters and computes the weight in a hook; the batched form runs no hooks.
    return not own <= {"weight", "bias"} or _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def is_plain_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Say whether a module does nothing but call its children in their order."""
    is_sequence = type(module) in (nn.Sequential, Chain)
    return is_sequence and not any(_has_hooks(layer) for layer in (module, *module.children()))


def _is_elementwise(members: nn.Module) -> TypeGuard["Chain"]:
    """Say whether all that stands between the perturbed layers, and there is one, treats each number by itself."""
    elementwise = (PerturbedLinear, nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid)
    kinds = [type(layer) for layer in members] if isinstance(members, Chain) else []
    return PerturbedLinear in kinds and all(kind in elementwise for kind in kinds)


def _mixes_members(layer: nn.Module) -> bool:
    # Batch statistics would leak between members; active dropout draws from the global generator.
    return isinstance(layer, _NormBase) or (isinstance(layer, _DropoutNd) and layer.training and layer.p > 0)


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
    """

    def __init__(self, module: nn.Module, noise: Noise, first: int = 0, size: int | None = None):
        self.noise = noise
        self.first = first
        self.size = noise.population_size - first if size is None else size
        self._mean = module
        self._parameters = perturbed_parameters(module)
        self._members: nn.Module | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def members(self) -> nn.Module:
        """The module for all members at once: input (N·B, ...), member by member, to output (N·B, ...).

        Its weights are the mean's own tensors and its noise, N·r·(m+n) numbers per layer, is made once.
        """
        if self._members is None:
            with torch.no_grad():
                self._members = self._convert(self._mean, {})
        return self._members

    @torch.no_grad()
    def forward(self, x: Tensor, per_member: bool = False) -> Tensor:
        """Evaluate all members in one batched call.

        :param x: (batch, ...), the same for every member; with ``per_member`` (N, batch, ...)
        :return: (N, batch, ...)
        """
        if per_member and len(x) != self.size:
            raise ValueError(f"x must have one leading entry per member: expected {self.size}, got {len(x)}")
        if not per_member and _is_elementwise(self.members):
            x_BI = x.reshape(-1, x.shape[-1])
            if all(len(x_BI) >= layer.pays_dense for layer in self.members if isinstance(layer, PerturbedLinear)):
                return self._forward_in_columns(x_BI).unflatten(1, x.shape[:-1])
        x_NB = x if per_member else x.expand(self.size, *x.shape)
        return self.members(x_NB.flatten(0, 1)).unflatten(0, x_NB.shape[:2])

    def _forward_in_columns(self, x_BI: Tensor) -> Tensor:
        """Evaluate all members on the same inputs, with explicit weights and an input per column; (N, B, O).

        A few members at a time: their activations stay in the cache, and their weights are never many.
        """
        assert isinstance(self.members, Chain)
        layers = list(self.members)
        linear = [layer for layer in layers if isinstance(layer, PerturbedLinear)]
        at_once = max(1, _NUMBERS_AT_ONCE // (len(x_BI) * max(layer.n_outputs for layer in linear)))
        parts = []
        for first in range(0, self.size, at_once):
            members = slice(first, first + at_once)
            y = x_BI.t() if layers[0] is linear[0] else x_BI.t().clone()  # an activation may work in place
            for layer in layers:
                if isinstance(layer, PerturbedLinear):
                    weight_NOI, bias_NO1 = layer.dense(members)
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
        step = self.noise.sigma * (1 if member % 2 == 0 else -1)
        return {p.name: p.parameter.detach() + step * p.dense(self.noise, member // 2, 1)[0] for p in self._parameters}

    def _convert(self, module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
        """Copy the module tree with every Linear replaced; containers keep their own forward, leaves are shared."""
        if id(module) in seen:
            return seen[id(module)]
        if isinstance(module, nn.Linear):
            converted: nn.Module = self._perturb(module)
        elif not module._modules:
            return module
        elif is_plain_sequence(module):
            converted = Chain(OrderedDict((name, self._convert(c, seen)) for name, c in module._modules.items() if c))
        else:
            converted = copy.copy(module)
            # copy.copy shares the dict of children with the original.
            converted._modules = {
                name: child if child is None else self._convert(child, seen) for name, child in module._modules.items()
            }
        seen[id(module)] = converted
        return converted

    def _perturb(self, linear: nn.Linear) -> PerturbedLinear:
        pairs = (self.first // 2, self.size // 2)
        by_parameter = {id(p.parameter): p for p in self._parameters}
        weight, bias = by_parameter.get(id(linear.weight)), by_parameter.get(id(linear.bias))
        if weight is None:  # frozen
            a_NOR = linear.weight.new_zeros(self.size, linear.out_features, 1)
            b_NIR = linear.weight.new_zeros(self.size, linear.in_features, 1)
        else:
            a_POR, b_PIR = weight.factors(self.noise, *pairs)
            a_POR = a_POR * (self.noise.sigma / math.sqrt(a_POR.shape[2]))
            a_NOR, b_NIR = _interleave(a_POR, -a_POR), _interleave(b_PIR, b_PIR)
        bias_NO = None
        if linear.bias is not None:
            bias_NO = linear.bias.detach().expand(self.size, -1)
            if bias is not None:
                step_PO = self.noise.sigma * bias.dense(self.noise, *pairs)
                bias_NO = bias_NO + _interleave(step_PO, -step_PO)
        return PerturbedLinear(linear, a_NOR, b_NIR, bias_NO)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    # The members of a pair: +E and -E.
    return torch.stack((even, odd), dim=1).flatten(0, 1)


@torch.no_grad()
def estimate_gradient(module: nn.Module, noise: Noise, utilities: Tensor) -> dict[str, Tensor]:
    """Return g = (1/N) sum_n u_n s_n E_n by parameter name, in float64 (paper Eq. 6, with 1/sigma left out).

    For weights it is (diag(w) A)ᵀ B, summed over blocks of pairs in their order; nothing of size N·O·I exists. The
    blocks do not depend on ``slice_size``.

    :param utilities: shaped fitness u (N,), float64
    """
    weights_P = (utilities[0::2] - utilities[1::2]) / noise.population_size
    gradient = {}
    for p in perturbed_parameters(module):
        total = torch.zeros_like(p.parameter, dtype=torch.float64)
        size = noise.rank * sum(p.parameter.shape) if p.factored else p.parameter.numel()
        block = max(1, _NOISE_AT_ONCE // size)
        for first in range(0, len(weights_P), block):
            w_P = weights_P[first : first + block].to(total.device)
            pairs = (first, len(w_P))
            if p.factored:
                a_POR, b_PIR = p.factors(noise, *pairs)
                w_P = w_P / math.sqrt(a_POR.shape[2])
                # float32 times float64 is float64.
                total += torch.tensordot(a_POR * w_P[:, None, None], b_PIR.double(), dims=([0, 2], [0, 2]))
            else:
                total += torch.tensordot(w_P, p.dense(noise, *pairs).double(), dims=1)
        gradient[p.name] = total
    return gradient
