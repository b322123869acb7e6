"""The value function of ``fitness="segment"``, and the advantages that follow from it.

The policy learns by evolution alone; this small network learns by gradient descent. Targets are scaled by running
moments, and the last layer is rescaled with them, so that its predictions stay what they were (Pop-Art, van Hasselt
et al., arXiv 1602.07714).

Shapes: T steps, N simulations, B samples, I inputs.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eggroll_rl.checks import check_arguments_table, check_positive, check_whole, nearest, shown
from eggroll_rl.errors import ConfigError, NonFiniteError

_CRITIC_STREAM = 3  # spawn key of the seed, beside those of eggroll_rl.rollout
_MOMENTS_DECAY = 0.9  # per generation
_LEAST_SCALE = 1e-3


class Critic(nn.Module):
    """A tanh MLP from the policy's features to values.

    :param n_inputs: I
    :param seed: of the initial weights and of the order of samples
    :param net_arch: sizes of the hidden layers
    :param learning_rate: Adam's
    :param n_epochs: passes over a generation's samples
    :param batch_size: samples per step of Adam
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        n_inputs: int,
        seed: int,
        net_arch: tuple[int, ...] = (64, 64),
        learning_rate: float = 1e-3,
        n_epochs: int = 4,
        batch_size: int = 256,
    ):
        super().__init__()
        self.seed, self.net_arch, self.n_epochs, self.batch_size = seed, tuple(net_arch), n_epochs, batch_size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(self._generator(0).integers(2**63)))
            layers: list[nn.Module] = []
            for n_in, n_out in pairwise([n_inputs, *self.net_arch]):
                layers += [nn.Linear(n_in, n_out), nn.Tanh()]
            self.body, self.head = nn.Sequential(*layers), nn.Linear([n_inputs, *self.net_arch][-1], 1)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.zeros((), dtype=torch.float64))  # 0: nothing seen yet
        self.optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, fused=True)

    def _generator(self, generation: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_CRITIC_STREAM, generation)))

    def forward(self, features: Tensor) -> Tensor:
        """Return scaled values (B,) of features (B, I)."""
        return self.head(self.body(features))[:, 0]

    @torch.no_grad()
    def values(self, features: Tensor) -> np.ndarray:
        """Return values (B,), float64, of features (B, I); zeros before the first fit."""
        return (self(features).double() * self.scale + self.mean).numpy()

    @torch.enable_grad()
    def fit(self, features: Tensor, targets: np.ndarray, generation: int) -> float:
        """Go towards targets (B,) of features (B, I), in an order that follows from the generation.

        :return: mean squared error over the targets' running variance, in the last pass
        :raises NonFiniteError: a parameter is not finite any more
        """
        self._rescale(targets)
        wanted = torch.from_numpy((targets - self.mean.item()) / self.scale.item()).float()
        generator = self._generator(generation + 1)
        for _ in range(self.n_epochs):
            total = 0.0
            for rows in torch.from_numpy(generator.permutation(len(wanted))).split(self.batch_size):
                loss = (self(features[rows]) - wanted[rows]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                total += loss.item() * len(rows)
        if not all(parameter.isfinite().all() for parameter in self.parameters()) or not self.scale.isfinite():
            raise NonFiniteError(
                f"the critic's step after generation {generation} is not finite (targets from {targets.min():g} to "
                f"{targets.max():g}): critic_kwargs may need a smaller learning_rate"
            )
        return total / len(wanted)

    @torch.no_grad()
    def _rescale(self, targets: np.ndarray) -> None:
        decay = _MOMENTS_DECAY if self.scale > 0 else 0.0
        mean = decay * self.mean.item() + (1 - decay) * targets.mean()
        scale = decay * self.scale.item() + (1 - decay) * max(targets.std(), _LEAST_SCALE)
        if decay:
            self.head.weight.mul_(self.scale.item() / scale)
            self.head.bias.mul_(self.scale.item()).add_(self.mean.item() - mean).div_(scale)
        self.mean.fill_(mean)
        self.scale.fill_(scale)


def check_critic(critic_kwargs: dict[str, Any]) -> None:
    """Refuse arguments that :class:`Critic` would not understand, naming them."""
    known = ("net_arch", "learning_rate", "n_epochs", "batch_size")
    check_arguments_table("critic_kwargs", critic_kwargs)
    for name, value in critic_kwargs.items():
        if name not in known:
            raise ConfigError(f"critic_kwargs has no {name!r}{nearest(name, known)}")
        if name == "learning_rate":
            check_positive("critic_kwargs learning_rate", value)
        elif name == "net_arch":
            if not isinstance(value, list | tuple):
                raise ConfigError(f"critic_kwargs net_arch must be a list of layer widths, got {shown(value)}")
            for width in value:
                check_whole("critic_kwargs net_arch: a width", width, 1)
        else:
            check_whole(f"critic_kwargs {name}", value, 1)


def advantages(
    rewards_TN: np.ndarray,
    values_TN: np.ndarray,
    next_values_TN: np.ndarray,
    ended_TN: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """Return generalized advantages (T, N) (Schulman et al., arXiv 1506.02438, Eq. 16).

    :param values_TN: of the states that were acted in
    :param next_values_TN: of the states that followed, before any reset; 0 where the task ended the episode
    :param ended_TN: the episode ended at this step, for whatever reason
    """
    delta_TN = rewards_TN + gamma * next_values_TN - values_TN
    advantages_TN = np.empty_like(delta_TN)
    running_N: Any = 0.0
    for t in reversed(range(len(delta_TN))):
        running_N = advantages_TN[t] = delta_TN[t] + gamma * gae_lambda * np.where(ended_TN[t], 0.0, running_N)
    return advantages_TN
