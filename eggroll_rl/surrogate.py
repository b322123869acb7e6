"""The update of ``fitness="segment"``: the population is evaluated on recorded states, not in simulations.

Simulations recorded what the mean policy f did with Gaussian noise of deviation s on its outputs, and how much better
each action was than expected: its advantage A. The fitness of member n is what its outputs f_n would have gained
there, to first order, in the surrogate of PPO (Schulman et al., arXiv 1707.06347, Eq. 7):

    F_n = mean_b  r_b A_b <f_n(x_b) - f(x_b), a_b - f(x_b)> / s²        a_b: the outputs with noise

r_b is the likelihood of a_b now over that when it was recorded, and samples that the clipping has settled count as 0.
Many members change the same outputs, so pairs are weighed not by fitness but by the natural gradient in the space that
they span (Amari 1998; Kakade 2001). With phi_i, the response of pair i, (f_2i - f_2i+1) / (2 sigma s) on all samples,
and K = phi phiᵀ / B,

    w = (K + lambda I)^-1 F,    theta += c · sum_i w_i E_i

and c is such that the policy moves by a given Kullback-Leibler divergence: a step has a size in actions, whatever
the parameters are. All of it is forward passes of low-rank members; nothing is differentiated.

Shapes: B samples, I inputs, O outputs, P pairs, N = 2P members.
"""

import math
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from eggroll_rl.errors import NonFiniteError
from eggroll_rl.es import EvolutionStrategy, one_thread
from eggroll_rl.lowrank import Noise, Population

_BATCH_STREAM = 8  # spawn key of the seed, beside those of rollout, critic, scoring and segments
_RIDGE = 0.1  # lambda, in units of K's mean eigenvalue
_MAX_ADVANTAGE = 4.0  # deviations


@dataclass(frozen=True)
class Recorded:
    """What simulations recorded in a generation.

    :param features: the network's inputs (B, I), float32
    :param outputs: the network's outputs with noise (B, O), float32
    :param advantages: (B,)
    """

    features: Tensor
    outputs: Tensor
    advantages: np.ndarray


@dataclass(frozen=True)
class Improvement:
    """How a generation's samples are used.

    :param std: deviation s of the noise with which they were recorded
    :param n_epochs: passes over them
    :param batch_size: samples per update, about
    :param target_kl: divergence between the policies before and after if all updates go in one direction, each measured
        on its own samples
    :param clip_range: of the likelihood ratio
    """

    std: float
    n_epochs: int
    batch_size: int
    target_kl: float
    clip_range: float


@torch.no_grad()
def improve(
    es: EvolutionStrategy, recorded: Recorded, settings: Improvement, meanwhile: Future | None = None
) -> dict[str, float]:
    """Make the generation's updates, each with a population of its own, and go on to the next generation.

    If anything goes wrong, be it a signal, the parameters stay as they were.

    :param meanwhile: has to succeed too
    :return: kl (divergence reached), clip_fraction (of samples, in the last epoch), update_ratio, sigma
    :raises NonFiniteError: an update would not be finite
    """
    before = {name: parameter.clone() for name, parameter in es.parameters.items()}
    try:
        with one_thread():
            metrics = _improve(es, recorded, settings)
        now = torch.cat([parameter.flatten() for parameter in es.parameters.values()])
        was = torch.cat([value.flatten() for value in before.values()])
        if not now.isfinite().all():
            raise NonFiniteError(f"the updates of generation {es.generation} are not finite: nothing was updated")
        step, size = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (now - was, was))
        if meanwhile is not None:
            meanwhile.result()
    except BaseException:
        es.set_parameters(before)
        raise
    es.end_generation()
    return {**metrics, "update_ratio": step / size if size > 0 else math.inf}


def _improve(es: EvolutionStrategy, recorded: Recorded, settings: Improvement) -> dict[str, float]:
    noise, n_samples = es.ask().noise, len(recorded.features)
    advantages = recorded.advantages - recorded.advantages.mean()
    advantages = torch.from_numpy(advantages / (advantages.std() + 1e-8)).to(recorded.features)
    advantages = advantages.clamp(-_MAX_ADVANTAGE, _MAX_ADVANTAGE)
    old_BO = (recorded.outputs - es.module(recorded.features)) / settings.std  # the noise, in deviations
    n_batches = max(1, round(n_samples / settings.batch_size))
    step_kl = settings.target_kl / (n_batches * settings.n_epochs) ** 2  # in one direction, deviations add up
    generator = np.random.default_rng(np.random.SeedSequence(noise.seed, spawn_key=(_BATCH_STREAM, noise.generation)))
    clipped = 0
    for epoch in range(settings.n_epochs):
        clipped = 0
        for i, rows in enumerate(np.array_split(generator.permutation(n_samples), n_batches)):
            x_BI, old, advantage_B = recorded.features[rows], old_BO[rows], advantages[rows]
            noise_BO = (recorded.outputs[rows] - es.module(x_BI)) / settings.std
            ratio_B = ((old.square() - noise_BO.square()).sum(1) / 2).exp()
            limit_B = torch.where(advantage_B > 0, ratio_B - 1, 1 - ratio_B)
            settled_B = limit_B > settings.clip_range
            clipped += int(settled_B.sum())
            gain_BO = (ratio_B * advantage_B).masked_fill(settled_B, 0)[:, None] * noise_BO
            now = replace(noise, update=epoch * n_batches + i)
            es.move(now, _natural_weights(_responses(es.module, now, x_BI) / settings.std, gain_BO, step_kl))
    kl = ((recorded.outputs - es.module(recorded.features)) / settings.std - old_BO).square().sum(1).mean() / 2
    return {"kl": kl.item(), "clip_fraction": clipped / n_samples, "sigma": noise.sigma}


def _responses(module: nn.Module, noise: Noise, x_BI: Tensor) -> Tensor:
    """Return what a pair's perturbation changes in the outputs, per unit of it: (P, B, O)."""
    y_NBO = Population(module, noise).forward(x_BI)
    return (y_NBO[0::2] - y_NBO[1::2]) / (2 * noise.sigma)


def _natural_weights(responses_PBO: Tensor, gain_BO: Tensor, step_kl: float) -> Tensor:
    """Return the pairs' weights (P,), float64; zeros if nothing is to be gained."""
    n_samples = len(gain_BO)
    phi = responses_PBO.flatten(1)
    fitness_P = (phi @ gain_BO.flatten()).double() / n_samples
    gram_PP = (phi @ phi.T).double() / n_samples
    ridge = _RIDGE * gram_PP.diagonal().mean()
    if ridge == 0 or not fitness_P.any():
        return torch.zeros_like(fitness_P)
    weights_P = torch.linalg.solve(gram_PP + ridge * torch.eye(len(gram_PP)).to(gram_PP), fitness_P)
    kl = weights_P @ gram_PP @ weights_P / 2
    return weights_P * (step_kl / kl).sqrt()
