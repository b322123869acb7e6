"""The update of ``fitness="segment"``: the population is evaluated on recorded states, not in simulations.

Simulations recorded what the mean policy f did with Gaussian noise of deviations s on its outputs, and how much better
each action was than expected: its advantage A. The fitness of member n is what its outputs f_n would have gained
there, to first order, in the surrogate of PPO (Schulman et al., arXiv 1707.06347, Eq. 7):

    F_n = mean_b  r_b A_b <f_n(x_b) - f(x_b), a_b - f(x_b)> / s²        a_b: the outputs with noise

r_b is the likelihood of a_b now over that when it was recorded, and samples that the clipping has settled count as 0.

A member perturbs one layer by a bᵀ (EGGROLL, rank 1). A sample whose input to that layer is h sees the layer's output
move by a <b, h>: all that b does is to say how far. So one forward pass with the layer's output moved along a gives the
responses u to all members that share a, whatever their b is, and P passes evaluate the P x J members a e_jᵀ, of which
all others are sums. The factors a of a layer are orthonormal (Choromanski et al., arXiv 1804.02395), so as many passes
as the layer is wide span it.

Among the P x J members the update follows the natural gradient (Amari 1998; Kakade 2001). With phi their responses
in units of s, on all samples, and K = phi phiᵀ / B,

    w = (K + lambda I)^-1 F        by conjugate gradients, without K

and its length is such that the policy moves by a given Kullback-Leibler divergence: a step has a size in actions,
whatever the parameters are. The logarithms of s move along, at a tenth of their natural gradient's pace, which is
mean_b r_b A_b (z_b² - 1) / 2 with z the noise in deviations. All of it is forward passes; nothing is differentiated.

Shapes: B samples, I features, J inputs of a layer (with a 1 for the bias), H its outputs, O outputs, P passes. Samples
come last inside: there a product of (P, O, B) with (P, B) took about a quarter of the time of B small matrix products.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.es import EvolutionStrategy, one_thread
from eggroll_rl.lowrank import is_plain_sequence

_BATCH_STREAM = 8  # spawn keys of the seed, beside those of rollout, critic, scoring and segments
_FACTOR_STREAM = 9
_STEP = 0.003  # of finite differences: small against a tanh's bend, large against float32's rounding
_DAMPING = 0.1  # lambda, in units of K's mean eigenvalue
_CG_STEPS = 10
_NUMBERS_AT_ONCE = 2**17  # of activations: half a megabyte stays in the cache
_MAX_ADVANTAGE = 4.0  # deviations
_STD_RATE = 0.1  # at 1 exploration ends early: Hopper-v5 stays standing (agents/LOG.md)
_LEAST_STD = 0.05  # below, it falls no more


@dataclass(frozen=True)
class Recorded:
    """What simulations recorded in a generation.

    :param features: the network's inputs (B, I), float32
    :param outputs: the network's outputs with noise (B, O), float32
    :param advantages: (B,)
    :param std: deviations s of the noise (O,)
    """

    features: Tensor
    outputs: Tensor
    advantages: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Improvement:
    """How a generation's samples are used.

    :param n_epochs: passes over them
    :param batch_size: samples per update, about
    :param target_kl: divergence between the policies before and after if all updates go in one direction, each measured
        on its own samples
    :param clip_range: of the likelihood ratio
    """

    n_epochs: int
    batch_size: int
    target_kl: float
    clip_range: float


class _Layer(NamedTuple):
    """A layer and what moving its output does.

    :param linear: the layer
    :param inputs: h (J, B)
    :param factors: a (P, H)
    :param responses: u (P, O, B), the change of the network's outputs per unit along a
    """

    linear: nn.Linear
    inputs: Tensor
    factors: Tensor
    responses: Tensor


def check_network(network: nn.Module) -> None:
    """Refuse a network whose members cannot be evaluated from a layer's output on, naming what stands in the way."""
    if not is_plain_sequence(network):
        raise ConfigError(
            "fitness='segment' needs a policy whose network is a plain nn.Sequential, "
            f"got {type(network).__name__}; use fitness='episode' for this one"
        )
    seen: set[int] = set()
    for index, layer in enumerate(network):  # named_children() would leave out one that stands twice
        own = list(layer.parameters())
        faults = {
            "has parameters and is no Linear layer": own and type(layer) is not nn.Linear,
            "has frozen parameters": not all(parameter.requires_grad for parameter in own),
            "shares parameters with another layer": not seen.isdisjoint(map(id, own)),
            "works in place": getattr(layer, "inplace", False),
        }
        for fault, found in faults.items():
            if found:
                raise ConfigError(
                    f"fitness='segment' cannot use a network in which {index} ({type(layer).__name__}) {fault}; "
                    "use fitness='episode' for this one"
                )
        seen.update(map(id, own))


@torch.no_grad()
def improve(
    es: EvolutionStrategy, recorded: Recorded, settings: Improvement, meanwhile: Future | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """Make the generation's updates, each with a population of its own, and go on to the next generation.

    If anything goes wrong, be it a signal, the parameters stay as they were.

    :param es: of a network that :func:`check_network` lets pass
    :param meanwhile: has to succeed too
    :return: kl (divergence reached), clip_fraction (of samples, in the last epoch) and update_ratio; then the next
        deviations of the noise (O,)
    :raises NonFiniteError: an update would not be finite
    """
    before = {name: parameter.clone() for name, parameter in es.parameters.items()}
    try:
        with one_thread():
            metrics, std_O = _improve(es, recorded, settings)
        now = torch.cat([parameter.flatten() for parameter in es.parameters.values()])
        was = torch.cat([value.flatten() for value in before.values()])
        if not now.isfinite().all() or not np.isfinite(std_O).all():
            raise NonFiniteError(f"the updates of generation {es.generation} are not finite: nothing was updated")
        step, size = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (now - was, was))
        if meanwhile is not None:
            meanwhile.result()
    except BaseException:
        es.set_parameters(before)
        raise
    es.end_generation()
    return {**metrics, "update_ratio": step / size if size > 0 else math.inf}, std_O


def _improve(es: EvolutionStrategy, recorded: Recorded, settings: Improvement) -> tuple[dict[str, float], np.ndarray]:
    network, n_samples = es.module, len(recorded.features)
    assert isinstance(network, nn.Sequential)
    advantages = torch.from_numpy(_standardized(recorded.advantages)).to(recorded.features)
    old_log_std_O = torch.from_numpy(recorded.std).to(recorded.features).log()
    log_std_O = old_log_std_O.clone()
    old_mean_BO = network(recorded.features)
    old_BO = (recorded.outputs - old_mean_BO) / old_log_std_O.exp()  # the noise, in deviations
    n_batches = max(1, round(n_samples / settings.batch_size))
    step_kl = settings.target_kl / (n_batches * settings.n_epochs) ** 2  # in one direction, deviations add up
    batches, factors = (
        np.random.default_rng(np.random.SeedSequence(es.seed, spawn_key=(stream, es.generation)))
        for stream in (_BATCH_STREAM, _FACTOR_STREAM)
    )
    clipped = 0
    for _ in range(settings.n_epochs):
        clipped = 0
        for rows in np.array_split(batches.permutation(n_samples), n_batches):
            std_O, before_BO, advantage_B = log_std_O.exp(), old_BO[rows], advantages[rows]
            outputs_BO, layers = _evaluate(network, recorded.features[rows], es.population_size, factors)
            noise_BO = (recorded.outputs[rows] - outputs_BO) / std_O
            ratio_B = ((before_BO.square() - noise_BO.square()).sum(1) / 2 - (log_std_O - old_log_std_O).sum()).exp()
            limit_B = torch.where(advantage_B > 0, ratio_B - 1, 1 - ratio_B)
            settled_B = limit_B > settings.clip_range
            clipped += int(settled_B.sum())
            gain_B = (ratio_B * advantage_B).masked_fill(settled_B, 0)
            weights = _natural_gradient(layers, (noise_BO / std_O).T * gain_B, std_O)
            log_std_step_O = _STD_RATE * (noise_BO.square() - 1).T @ gain_B / len(rows) / 2
            kl = (
                _combined(layers, weights).div(std_O[:, None]).square().sum(0).mean() / 2
                + log_std_step_O.square().sum()
            )
            length = float((step_kl / kl).sqrt()) if kl > 0 else 0.0
            _move(layers, weights, length)
            log_std_O = torch.maximum(log_std_O + length * log_std_step_O, log_std_O.clamp(max=math.log(_LEAST_STD)))
    moved_BO = (network(recorded.features) - old_mean_BO) / old_log_std_O.exp()
    kl = moved_BO.square().sum(1).mean() / 2 + (log_std_O - old_log_std_O).square().sum()
    return {"kl": kl.item(), "clip_fraction": clipped / n_samples}, log_std_O.exp().double().cpu().numpy()


def _standardized(advantages: np.ndarray) -> np.ndarray:
    """Return them with mean 0 and deviation 1, at most so many deviations off; zeros if they are all the same."""
    mean, std = advantages.mean(), advantages.std()
    if std <= 1e-9 * abs(mean):  # rounding
        return np.zeros_like(advantages)
    return np.clip((advantages - mean) / (std + 1e-8), -_MAX_ADVANTAGE, _MAX_ADVANTAGE)


def _evaluate(
    network: nn.Sequential, x_BI: Tensor, n_passes: int, generator: np.random.Generator
) -> tuple[Tensor, list[_Layer]]:
    """Return the mean's outputs (B, O), and every layer with as many passes as it is wide, at most ``n_passes``."""
    seen: list[tuple[int, nn.Linear, Tensor, Tensor]] = []
    x = x_BI
    for index, module in enumerate(network):
        y = module(x)
        if isinstance(module, nn.Linear):
            seen.append((index, module, x, y))
        x = y
    outputs_BO, layers = x, []
    for index, linear, h_BJ, z_BH in seen:
        a_PH = _orthonormal(generator, n_passes, linear.out_features).to(z_BH)
        at_once = max(1, _NUMBERS_AT_ONCE // z_BH.numel())
        responses = [_measured(network[index + 1 :], z_BH, some, outputs_BO) for some in (_STEP * a_PH).split(at_once)]
        if linear.bias is not None:
            h_BJ = torch.cat([h_BJ, h_BJ.new_ones(len(h_BJ), 1)], dim=1)
        layers.append(_Layer(linear, h_BJ.T.contiguous(), a_PH, torch.cat(responses)))
    return outputs_BO, layers


def _measured(rest: nn.Module, z_BH: Tensor, steps_PH: Tensor, outputs_BO: Tensor) -> Tensor:
    """Return what steps of a layer's outputs change in the network's, per unit: (P, O, B)."""
    y_PBO = rest((z_BH + steps_PH[:, None]).flatten(0, 1)).unflatten(0, (len(steps_PH), len(z_BH)))
    return y_PBO.sub(outputs_BO).div_(_STEP).transpose(1, 2).contiguous()


def _orthonormal(generator: np.random.Generator, n_rows: int, width: int) -> Tensor:
    """Return random orthonormal rows (min(n_rows, width), width), float32."""
    normal = generator.standard_normal((width, min(n_rows, width)), dtype=np.float32)
    return torch.linalg.qr(torch.from_numpy(normal))[0].T.contiguous()


def _combined(layers: list[_Layer], weights: list[Tensor]) -> Tensor:
    """Return how the outputs (O, B) change when members are added with weights (P, J) per layer."""
    changes = [
        ((w_PJ @ layer.inputs)[:, None] * layer.responses).sum(0) for layer, w_PJ in zip(layers, weights, strict=True)
    ]
    return torch.stack(changes).sum(0)


def _score(layers: list[_Layer], gain_OB: Tensor) -> list[Tensor]:
    """Return the fitness of all members (P, J) per layer: the mean over samples of <response, gain>."""
    n_samples = gain_OB.shape[1]
    return [(layer.responses * gain_OB).sum(1) @ layer.inputs.T / n_samples for layer in layers]


def _natural_gradient(layers: list[_Layer], gain_OB: Tensor, std_O: Tensor) -> list[Tensor]:
    """Return the direction to go as members' weights (P, J) per layer; zeros if nothing is to be gained."""
    shapes = [(len(layer.factors), len(layer.inputs)) for layer in layers]

    def split(flat: Tensor) -> list[Tensor]:
        parts = flat.split([rows * columns for rows, columns in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def flatten(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in parts])

    fitness = flatten(_score(layers, gain_OB))
    precision_O1 = std_O.square().reciprocal()[:, None]
    squares = [(layer.responses.square() * precision_O1).sum((0, 1)) @ layer.inputs.square().sum(0) for layer in layers]
    damping = _DAMPING * float(torch.stack(squares).sum()) / gain_OB.shape[1] / len(fitness)
    if damping == 0 or not fitness.any():
        return split(torch.zeros_like(fitness))

    def product(flat: Tensor) -> Tensor:
        return flatten(_score(layers, _combined(layers, split(flat)) * precision_O1)).add_(flat, alpha=damping)

    return split(_conjugate_gradients(product, fitness))


def _conjugate_gradients(product: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
    """Return x of K x = target, about, for a positive definite K given by its products (Hestenes & Stiefel 1952)."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, squares = residual.clone(), target @ target
    for _ in range(_CG_STEPS):
        image = product(direction)
        along = squares / (direction @ image)
        x.add_(along * direction)
        residual.sub_(along * image)
        before, squares = squares, residual @ residual
        if squares <= 1e-10 * (target @ target):
            break
        direction = residual + (squares / before) * direction
    return x


def _move(layers: list[_Layer], weights: list[Tensor], length: float) -> None:
    """Add the members with their weights, times the length, to the mean."""
    for layer, w_PJ in zip(layers, weights, strict=True):
        step_HJ = length * layer.factors.T @ w_PJ
        layer.linear.weight.add_(step_HJ[:, : layer.linear.in_features])
        if layer.linear.bias is not None:
            layer.linear.bias.add_(step_HJ[:, -1])
