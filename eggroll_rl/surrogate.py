"""The update of ``fitness="segment"``: the population is evaluated on recorded states, not in simulations.

Simulations recorded what the mean policy f did with Gaussian noise of deviations s on its outputs, and how much better
each action was than expected: its advantage A. The fitness of member n is what its outputs f_n would have gained
there, to first order, in the surrogate of PPO (Schulman et al., arXiv 1707.06347, Eq. 7):

    F_n = mean_b  v_b r_b A_b <f_n(x_b) - f(x_b), a_b - f(x_b)> / s²        a_b: the outputs with noise

r_b is the likelihood of a_b now over that at the generation's start, and samples that the clipping has settled count as
0. Samples of the generations before are used again (as in GePPO, Queeney et al., arXiv 2111.00072): v_b is the
likelihood at the start over that when the sample was recorded, truncated (Ionides 2008). Its observation stays as the
normalizer of its time saw it, which is an approximation while the normalizer still moves.

A member perturbs one layer by a bᵀ (EGGROLL, rank 1). A sample whose input to that layer is h sees the layer's output
move by a <b, h>: all that b does is to say how far. So one forward pass along a, through the slopes of the activations
and the weights behind the layer, gives the responses u to all members that share a, whatever their b is, and P passes
evaluate the P x J members a e_jᵀ, of which all others are sums. The factors a of a layer are orthonormal (Choromanski
et al., arXiv 1804.02395), so as many passes as the layer is wide span it.

Among the P x J members the update follows the natural gradient (Amari 1998; Kakade 2001). With phi their responses
in units of s, on all samples, and K = phi phiᵀ / B,

    w = (K + lambda I)^-1 F        by conjugate gradients, without K

and its length is such that the policy moves by a given Kullback-Leibler divergence: a step has a size in actions,
whatever the parameters are. The logarithms of s move along, at a tenth of their natural gradient's pace, which is
mean_b v_b r_b A_b (z_b² - 1) / 2 with z the noise in deviations. All of it is forward passes; nothing is
propagated back.

Shapes: B samples, I features, J inputs of a layer (with a 1 for the bias), H its outputs, O outputs, P passes. Samples
come last inside: there a product of (P, O, B) with (P, B) took about a quarter of the time of B small matrix products.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.es import EvolutionStrategy, one_thread
from eggroll_rl.population import is_plain_sequence

_BATCH_STREAM = 8  # spawn keys of the seed, beside those of rollout, critic, scoring and segments
_FACTOR_STREAM = 9
_STEP = 0.003  # of activations' slopes: small against a tanh's bend, large against float32's rounding
_CG_STEPS = 10
_MAX_WEIGHT = 2.0  # of an earlier generation's sample
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


class Samples(NamedTuple):
    """A generation's samples, as later ones use them again.

    :param features: the network's inputs (B, I), float32
    :param outputs: the network's outputs with noise (B, O), float32
    :param advantages: standardized (B,), float32
    :param log_likelihood: of the outputs (B,), float32, under the policy that recorded them; up to a constant
    """

    features: Tensor
    outputs: Tensor
    advantages: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True)
class Improvement:
    """How a generation's samples are used.

    :param n_epochs: passes over them
    :param batch_size: samples of the generation per update, about; those of earlier ones come on top
    :param sample_reuse: generations before whose samples are used again
    :param target_kl: divergence between the policies before and after if all updates go in one direction, each measured
        on its own samples
    :param clip_range: of the likelihood ratio
    :param damping: lambda in units of K's mean eigenvalue: the larger, the closer to the plain gradient
    """

    n_epochs: int
    batch_size: int
    sample_reuse: int
    target_kl: float
    clip_range: float
    damping: float


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
    width = next((layer.in_features for layer in network if isinstance(layer, nn.Linear)), 1)
    for index, layer in enumerate(network):  # named_children() would leave out one that stands twice
        own = list(layer.parameters())
        faults = {
            "has parameters and is no Linear layer": own and type(layer) is not nn.Linear,
            "has frozen parameters": not all(parameter.requires_grad for parameter in own),
            "shares parameters with another layer": not seen.isdisjoint(map(id, own)),
            "works in place": getattr(layer, "inplace", False),
            "does not work on each number by itself": not own and not _works_on_each_number(layer, width),
        }
        for fault, found in faults.items():
            if found:
                raise ConfigError(
                    f"fitness='segment' cannot use a network in which {index} ({type(layer).__name__}) {fault}; "
                    "use fitness='episode' for this one"
                )
        seen.update(map(id, own))
        width = getattr(layer, "out_features", width)


@torch.no_grad()
def _works_on_each_number(layer: nn.Module, width: int) -> bool:
    probe = torch.linspace(-1, 1, width)[None]
    moved = probe.clone()
    moved[0, 0] += 0.5
    try:
        y, other = layer(probe), layer(moved)
    except Exception:  # whatever a layer says to an input that does not suit it
        return False
    return y.shape == probe.shape and torch.equal(y[0, 1:], other[0, 1:])


@torch.no_grad()
def improve(
    es: EvolutionStrategy,
    recorded: Recorded,
    earlier: Sequence[Samples],
    settings: Improvement,
    meanwhile: Future | None = None,
) -> tuple[dict[str, float], np.ndarray, Samples]:
    """Make the generation's updates, each with a population of its own, and go on to the next generation.

    If anything goes wrong, be it a signal, the parameters stay as they were.

    :param es: of a network that :func:`check_network` lets pass
    :param earlier: samples of generations before, to be used again
    :param meanwhile: has to succeed too
    :return: kl (divergence reached, on the recorded samples), clip_fraction (of all samples, in the last epoch) and
        update_ratio; then the next deviations of the noise (O,); then what was recorded, for later generations
    :raises NonFiniteError: an update would not be finite
    """
    before = {name: parameter.clone() for name, parameter in es.parameters.items()}
    try:
        with one_thread():
            metrics, std_O, samples = _improve(es, recorded, earlier, settings)
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
    return {**metrics, "update_ratio": step / size if size > 0 else math.inf}, std_O, samples


def _improve(
    es: EvolutionStrategy, recorded: Recorded, earlier: Sequence[Samples], settings: Improvement
) -> tuple[dict[str, float], np.ndarray, Samples]:
    network, n_recorded = es.module, len(recorded.features)
    assert isinstance(network, nn.Sequential)
    # One pass over a copy of all samples: BLAS may round differently where they happen to lie in memory.
    features_BI = torch.cat([recorded.features, *(past.features for past in earlier)])
    outputs_BO = torch.cat([recorded.outputs, *(past.outputs for past in earlier)])
    mean_BO = network(features_BI)
    old_mean_BO = mean_BO[:n_recorded]
    old_log_std_O = torch.from_numpy(recorded.std).to(mean_BO).log()
    log_std_O = old_log_std_O.clone()
    start_B = _log_likelihood(outputs_BO, mean_BO, old_log_std_O)
    advantages = torch.from_numpy(_standardized(recorded.advantages)).to(mean_BO)
    new = Samples(recorded.features, recorded.outputs, advantages, start_B[:n_recorded].clone())
    advantages_B = torch.cat([advantages, *(past.advantages for past in earlier)])
    recorded_B = torch.cat([new.log_likelihood, *(past.log_likelihood for past in earlier)])
    gain_B = advantages_B * (start_B - recorded_B).exp().clamp(max=_MAX_WEIGHT)
    n_batches = max(1, round(n_recorded / settings.batch_size))
    step_kl = settings.target_kl / (n_batches * settings.n_epochs) ** 2  # in one direction, deviations add up
    batches, factors = (
        np.random.default_rng(np.random.SeedSequence(es.seed, spawn_key=(stream, es.generation)))
        for stream in (_BATCH_STREAM, _FACTOR_STREAM)
    )
    clipped = 0
    for _ in range(settings.n_epochs):
        clipped = 0
        for rows in np.array_split(batches.permutation(len(start_B)), n_batches):
            outputs, advantage = outputs_BO[rows], advantages_B[rows]
            mean, layers = _evaluate(network, features_BI[rows], es.population_size, factors)
            ratio = (_log_likelihood(outputs, mean, log_std_O) - start_B[rows]).exp()
            settled = torch.where(advantage > 0, ratio - 1, 1 - ratio) > settings.clip_range
            clipped += int(settled.sum())
            gain = (ratio * gain_B[rows]).masked_fill(settled, 0)
            std_O = log_std_O.exp()
            noise = (outputs - mean) / std_O
            weights = _natural_gradient(layers, (noise / std_O).T * gain, std_O, settings.damping)
            log_std_step_O = _STD_RATE * (noise.square() - 1).T @ gain / len(rows) / 2
            kl = (
                _combined(layers, weights).div(std_O[:, None]).square().sum(0).mean() / 2
                + log_std_step_O.square().sum()
            )
            length = float((step_kl / kl).sqrt()) if kl > 0 else 0.0
            _move(layers, weights, length)
            log_std_O = torch.maximum(log_std_O + length * log_std_step_O, log_std_O.clamp(max=math.log(_LEAST_STD)))
    moved_BO = (network(features_BI[:n_recorded]) - old_mean_BO) / old_log_std_O.exp()
    kl = moved_BO.square().sum(1).mean() / 2 + (log_std_O - old_log_std_O).square().sum()
    metrics = {"kl": kl.item(), "clip_fraction": clipped / len(start_B)}
    return metrics, log_std_O.exp().double().cpu().numpy(), new


def _log_likelihood(outputs_BO: Tensor, mean_BO: Tensor, log_std_O: Tensor) -> Tensor:
    """Return that of Gaussian outputs (B,), up to a constant."""
    return -((outputs_BO - mean_BO) / log_std_O.exp()).square().sum(1) / 2 - log_std_O.sum()


def _standardized(advantages: np.ndarray) -> np.ndarray:
    """Return them with mean 0 and deviation 1; zeros if they are all the same."""
    mean, std = advantages.mean(), advantages.std()
    if std <= 1e-9 * abs(mean):  # rounding
        return np.zeros_like(advantages)
    return (advantages - mean) / (std + 1e-8)  # unclipped: a fall is many deviations, and what is to be learned


def _evaluate(
    network: nn.Sequential, x_BI: Tensor, n_passes: int, generator: np.random.Generator
) -> tuple[Tensor, list[_Layer]]:
    """Return the mean's outputs (B, O), and every layer with as many passes as it is wide, at most ``n_passes``."""
    inputs: list[Tensor] = []
    stages: list[Callable[[Tensor], Tensor]] = []  # what each module makes of a change (H, B) of its input
    x = x_BI
    for module in network:
        y = module(x)
        inputs.append(x)
        if isinstance(module, nn.Linear):
            stages.append(module.weight.matmul)
        else:
            stages.append(((module(x + _STEP) - y) / _STEP).T.contiguous().mul)
        x = y
    outputs_BO, layers = x, []
    for index, (module, h_BJ) in enumerate(zip(network, inputs, strict=True)):
        if isinstance(module, nn.Linear):
            a_PH = _orthonormal(generator, n_passes, module.out_features).to(outputs_BO)
            responses_POB = outputs_BO.new_empty(len(a_PH), *outputs_BO.T.shape)
            for u_OB, a_H in zip(responses_POB, a_PH, strict=True):
                change = a_H[:, None]
                for stage in stages[index + 1 :]:
                    change = stage(change)
                u_OB.copy_(change)
            if module.bias is not None:
                h_BJ = torch.cat([h_BJ, h_BJ.new_ones(len(h_BJ), 1)], dim=1)
            layers.append(_Layer(module, h_BJ.T.contiguous(), a_PH, responses_POB))
    return outputs_BO, layers


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


def _natural_gradient(layers: list[_Layer], gain_OB: Tensor, std_O: Tensor, damping: float) -> list[Tensor]:
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
    shift = damping * float(torch.stack(squares).sum()) / gain_OB.shape[1] / len(fitness)
    if shift == 0 or not fitness.any():
        return split(torch.zeros_like(fitness))

    def product(flat: Tensor) -> Tensor:
        return flatten(_score(layers, _combined(layers, split(flat)) * precision_O1)).add_(flat, alpha=shift)

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
