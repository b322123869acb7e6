"""A population's perturbations of a module's parameters, and their contraction into a gradient.

EGGROLL, "Evolution Strategies at the Hyperscale", arXiv 2511.16652, Alg. 1 and Eq. 6. Member n of a generation
is evaluated at

    W + s·sigma·A Bᵀ/sqrt(r)     for weight matrices W (O x I), A (O x r) and B (I x r) ~ N(0, 1)
    b + s·sigma·eps              for every other parameter, eps ~ N(0, 1)

with r clamped to min(O, I), s = +1 for even n and -1 for odd n, and the same A, B, eps for members 2k and 2k+1
(an antithetic pair). Filters of a convolution are a matrix of O x (I·kernel). Other families of noise than this one
are in :mod:`eggroll_rl.noise`.

Shapes: N members, P directions, I inputs, O outputs, R rank.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eggroll_rl.errors import UnsupportedModuleError
from eggroll_rl.forms import check_layer, matrices_of
from eggroll_rl.noise import Factors, Noise, standard_normal

_NOISE_AT_ONCE = 2**18  # numbers of a block; bounds the memory of a gradient

ParamFilter = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Perturbed:
    """One parameter that is perturbed and updated.

    :param name: name in the module
    :param index: position among all the module's parameters, frozen ones included: its place in the noise
    :param is_matrix: a weight that maps inputs to outputs, or else dense noise
    :param padding_row: of an embedding, never perturbed
    """

    name: str
    index: int
    parameter: nn.Parameter
    is_matrix: bool
    padding_row: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I) of a matrix, else the parameter's own."""
        shape = tuple(self.parameter.shape)
        return (shape[0], math.prod(shape[1:])) if self.is_matrix else shape

    def draw(self, noise: Noise, first: int, n_directions: int) -> Factors | Tensor:
        """Return perturbations of some directions: A (P, O, R) and B (P, I, R) of A Bᵀ/sqrt(R), or dense (P, ...)."""
        size = noise.family.count(self.shape, self.is_matrix)
        normal = standard_normal(noise, self.index, first, n_directions, size)
        normal = normal.to(self.parameter.device, self.parameter.dtype)
        drawn = noise.family.draw(normal, self.shape, self.is_matrix)
        if self.padding_row is not None:
            (drawn[0] if isinstance(drawn, tuple) else drawn)[:, self.padding_row] = 0.0
        return drawn

    def dense(self, noise: Noise, first: int, n_directions: int) -> Tensor:
        """Return the perturbations E as (P, *shape of the parameter): the product that we avoid elsewhere."""
        drawn = self.draw(noise, first, n_directions)
        if isinstance(drawn, tuple):
            drawn = drawn[0] @ drawn[1].transpose(1, 2) / math.sqrt(drawn[0].shape[2])
        return drawn.reshape(n_directions, *self.parameter.shape)


def perturbed_parameters(
    module: nn.Module, param_filter: ParamFilter | None = None, freeze_nonmatrix: bool = False
) -> list[Perturbed]:
    """List what a population perturbs: every parameter that requires grad.

    :param param_filter: ``param_filter(name, parameter)`` says which of them
    :param freeze_nonmatrix: weight matrices alone
    :raises UnsupportedModuleError: naming a layer whose members could not be evaluated exactly, or nothing is left
    """
    matrices: set[int] = set()
    padding: dict[int, int] = {}
    for path, layer in module.named_modules():
        check_layer(layer, path or "the module itself")
        matrices |= {id(getattr(layer, name)) for name in matrices_of(layer)}
        if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
            padding[id(layer.weight)] = layer.padding_idx
    found = [
        Perturbed(name, index, parameter, id(parameter) in matrices, padding.get(id(parameter)))
        for index, (name, parameter) in enumerate(module.named_parameters())
        if parameter.requires_grad
        and not (freeze_nonmatrix and id(parameter) not in matrices)
        and (param_filter is None or param_filter(name, parameter))
    ]
    if not found:
        raise UnsupportedModuleError(
            "the module has no parameter that requires grad and is chosen: there is nothing to optimise"
        )
    return found


@dataclass(frozen=True)
class Block:
    """Consecutive directions of one parameter.

    :param position: of the parameter in the list of those that are perturbed
    """

    position: int
    first: int
    n_directions: int


Draw = Callable[[Perturbed, int, int], Factors | Tensor]


@dataclass(frozen=True)
class Contraction:
    """A sum over directions, g = sum_p w_p E_p, in blocks that anybody may compute, anywhere.

    For factors a block is (diag(w) A)ᵀ B; nothing of size N·O·I exists. Blocks do not depend on ``slice_size``, nor on
    who computes them.

    :param noise: determines E
    :param weights: w (P,), float64
    """

    noise: Noise
    weights: np.ndarray

    def blocks(self, parameters: list[Perturbed]) -> list[Block]:
        """Return what is computed at once, in the order in which it is added."""
        found = []
        for position, p in enumerate(parameters):
            size = max(1, _NOISE_AT_ONCE // self.noise.family.count(p.shape, p.is_matrix))
            for first in range(0, len(self.weights), size):
                found.append(Block(position, first, min(size, len(self.weights) - first)))
        return found

    @torch.no_grad()
    def contract(self, parameters: list[Perturbed], index: int, draw: Draw | None = None) -> Tensor:
        """Return a block's part of g, of the shape of its parameter, float64.

        :param index: of the block
        :param draw: ``draw(parameter, first, n_directions)`` gives perturbations that somebody has already; else they
            are drawn again, here
        """
        block = self.blocks(parameters)[index]
        p, first, n_directions = parameters[block.position], block.first, block.n_directions
        w_P = torch.from_numpy(self.weights[first : first + n_directions]).to(p.parameter.device)
        drawn = draw(p, first, n_directions) if draw else p.draw(self.noise, first, n_directions)
        drawn = self.noise.family.in_update(drawn)
        if isinstance(drawn, tuple):
            a_POR, b_PIR = drawn
            w_P = w_P / math.sqrt(a_POR.shape[2])
            # float32 times float64 is float64.
            part = torch.tensordot(a_POR * w_P[:, None, None], b_PIR.double(), dims=([0, 2], [0, 2]))
        else:
            part = torch.tensordot(w_P, drawn.double(), dims=1)
        return part.view(p.parameter.shape)


ContractElsewhere = Callable[[Contraction, list[Perturbed]], Iterable[Tensor] | None]
"""Returns the parts of all blocks in their order, or None: it is as well done here."""


@torch.no_grad()
def estimate_gradient(
    parameters: list[Perturbed],
    noise: Noise,
    utilities: Tensor,
    draw: Draw | None = None,
    elsewhere: ContractElsewhere | None = None,
) -> dict[str, Tensor]:
    """Return g = (1/N) sum_n u_n s_n E_n by parameter name, in float64 (paper Eq. 6, with 1/sigma left out).

    :param utilities: shaped fitness u (N,), float64
    :param draw: as of :meth:`Contraction.contract`
    :param elsewhere: who else may compute it
    """
    steps_N = torch.from_numpy(noise.steps(0, noise.population_size)).sign()
    signed_N = utilities * steps_N
    weights_P = (signed_N[0::2] + signed_N[1::2] if noise.antithetic else signed_N) / noise.population_size
    contraction = Contraction(noise, weights_P.numpy())
    blocks = contraction.blocks(parameters)
    parts = None if elsewhere is None else elsewhere(contraction, parameters)
    if parts is None:
        parts = (contraction.contract(parameters, index, draw) for index in range(len(blocks)))
    gradient: dict[str, Tensor] = {}
    for block, part in zip(blocks, parts, strict=True):
        name = parameters[block.position].name
        # Never in place: a part may be read-only memory.
        gradient[name] = gradient[name] + part if name in gradient else part
    return gradient
