"""Running moments that combine exactly, and the normalizer that carries them inside a policy.

Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979), in
float64. A moment is a count, a mean and m2, the sum of squared distances to that mean: the variance is m2/count.

Shapes: N members, I inputs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moments:
    """Moments of the observations that each member saw, or each slice's members together.

    :param count: observations (N,), float64
    :param mean: (N, I), float64
    :param m2: (N, I), float64
    """

    count: np.ndarray
    mean: np.ndarray
    m2: np.ndarray

    @staticmethod
    def zeros(n_members: int, n_inputs: int) -> "Moments":
        """Return the moments of no observation."""
        return Moments(np.zeros(n_members), np.zeros((n_members, n_inputs)), np.zeros((n_members, n_inputs)))

    @staticmethod
    def concatenate(parts: list["Moments"]) -> "Moments":
        """Join the members of several parts, in their order."""
        fields = ("count", "mean", "m2")
        return Moments(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))

    def add(self, x_TNI: np.ndarray, active_TN: np.ndarray) -> None:
        """Add the observations of T steps, those of active members only, in place.

        Distances to each member's first observation make the mean, and distances to that the spread: no cancellation,
        whatever the offset, and a constant is its own mean to the bit.
        """
        count_N = active_TN.sum(0, dtype=np.float64)
        if not count_N.any():
            return
        mask_TN1, whole = active_TN[:, :, None], bool(active_TN.all())
        if not whole:
            x_TNI = np.where(mask_TN1, x_TNI, 0.0)  # the others may hold anything
        first_NI = x_TNI[active_TN.argmax(0), np.arange(len(count_N))]
        distance_TNI = np.subtract(x_TNI, first_NI, dtype=np.float64)
        if not whole:
            distance_TNI *= mask_TN1
        offset_NI = distance_TNI.sum(0) / np.maximum(count_N, 1)[:, None]
        distance_TNI -= offset_NI
        if not whole:
            distance_TNI *= mask_TN1
        total_N1 = np.maximum(self.count + count_N, 1)[:, None]
        delta_NI = np.where(count_N[:, None] > 0, first_NI + offset_NI - self.mean, 0.0)
        self.mean[:] += delta_NI * (count_N[:, None] / total_N1)
        self.m2[:] += np.square(distance_TNI).sum(0) + np.square(delta_NI) * (
            (self.count * count_N)[:, None] / total_N1
        )
        self.count[:] += count_N

    def total(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Return count, mean (I,) and m2 (I,) over all members: the sums run in member order."""
        count = float(self.count.sum())
        if count == 0:
            return 0.0, np.zeros(self.mean.shape[1]), np.zeros(self.mean.shape[1])
        first_I = self.mean[int(self.count.argmax())]
        mean_I = first_I + (self.count[:, None] * (self.mean - first_I)).sum(0) / count
        spread_NI = self.count[:, None] * np.square(self.mean - mean_I)
        return count, mean_I, (self.m2 + spread_NI).sum(0)

    def together(self) -> "Moments":
        """Return what all members saw as that of one: what travels need not grow with the members."""
        count, mean_I, m2_I = self.total()
        return Moments(np.array([count]), mean_I[None], m2_I[None])


class ObsNormalizer(nn.Module):
    """Scale observations to zero mean and unit deviation, clipped; its moments are buffers of the policy.

    Nothing updates the moments in ``forward``: a generation sees one normalizer, and :meth:`combine` is called
    after the update. Without any observation yet it passes observations through.

    :param n_inputs: size I of a flat observation
    :param clip: bound of the output
    :param epsilon: added to the variance; a constant input gives 0
    :param which: inputs (I,) to normalize, bool; all by default. The others pass through
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    scale: Tensor
    center: Tensor
    which: Tensor

    def __init__(self, n_inputs: int, clip: float = 10.0, epsilon: float = 1e-8, which: Tensor | None = None):
        super().__init__()
        self.clip = clip
        self.epsilon = epsilon
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(n_inputs, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(n_inputs, dtype=torch.float64))
        which = torch.ones(n_inputs, dtype=torch.bool) if which is None else which
        self.register_buffer("which", which, persistent=False)
        # These follow from the others; kept so that the inner loop does not compute a square root per step.
        self.register_buffer("scale", torch.ones(n_inputs, dtype=torch.float64), persistent=False)
        self.register_buffer("center", torch.zeros(n_inputs, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., I) of any dtype to float32."""
        # The distance comes first, so that a constant gives 0 whatever its size.
        return ((x.to(self.center.dtype) - self.center) * self.scale).clamp_(-self.clip, self.clip).float()

    @torch.no_grad()
    def combine(self, moments: Moments) -> None:
        """Add what a generation's members observed, exactly."""
        count, mean, m2 = moments.total()
        if count == 0:
            return
        delta = torch.from_numpy(mean).to(self.mean.device) - self.mean
        total = self.count + count
        self.mean += delta * (count / total)
        self.m2 += torch.from_numpy(m2).to(self.m2.device) + delta.square() * (self.count * count / total)
        self.count.copy_(total)
        self._refresh_scale()

    def _refresh_scale(self) -> None:
        if self.count > 0:
            self.scale.copy_(torch.rsqrt(self.m2 / self.count + self.epsilon))
        else:
            self.scale.fill_(1.0)
        self.scale.masked_fill_(~self.which, 1.0)
        self.center.copy_(torch.where(self.which, self.mean, 0.0))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh_scale()
