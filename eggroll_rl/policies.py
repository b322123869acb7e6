"""SB3 policies for EGGROLL: deterministic networks with the observation normalizer inside.

``predict(raw_obs)`` works everywhere; no statistics have to be carried beside the model.
"""

import copy
import math
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn

from eggroll_rl.errors import ConfigError
from eggroll_rl.normalization import ObsNormalizer
from eggroll_rl.observations import check_observation_space, count_inputs, encode, measured

ACTIVATIONS = {name.lower(): getattr(nn, name) for name in ("Tanh", "ReLU", "ELU", "GELU", "SiLU", "LeakyReLU")}


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Refuse spaces that the policies cannot handle, naming them."""
    check_observation_space(observation_space)
    if isinstance(action_space, spaces.Box):
        if not np.isfinite(action_space.low).all() or not np.isfinite(action_space.high).all():
            raise ConfigError(
                f"action space {action_space} is unbounded; wrap the env in gymnasium.wrappers.ClipAction's "
                "finite counterpart RescaleAction, or give it finite bounds"
            )
    elif not isinstance(action_space, spaces.Discrete):
        raise ConfigError(f"action space {action_space} is not supported; supported are Box and Discrete")


def find_activation(activation_fn: str | type[nn.Module]) -> type[nn.Module]:
    """Look up an activation by name, in any case; a class passes through."""
    if isinstance(activation_fn, str):
        if activation_fn.lower() not in ACTIVATIONS:
            raise ConfigError(f"activation_fn must be one of {', '.join(ACTIVATIONS)}, got {activation_fn!r}")
        return ACTIVATIONS[activation_fn.lower()]
    return activation_fn


class MlpPolicy(BasePolicy):
    """Deterministic MLP from normalized observations to actions.

    Box actions: the output is clipped to [-1, 1] (or squashed by tanh) and mapped linearly onto the space's
    bounds. Discrete actions: argmax. ``deterministic`` in :meth:`predict` changes nothing.

    :param observation_space: Box of any shape (flattened), Discrete, MultiDiscrete or MultiBinary (one-hot), or a Dict
        of these, joined
    :param action_space: bounded Box or Discrete
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation between layers, a class or a name in ``ACTIVATIONS``
    :param normalize_obs: normalize observations by running moments, but for one-hot codes
    :param squash_output: tanh instead of clipping
    :param with_bias: give the layers biases
    :param zero_last_layer: start with the last layer at zero: the mean of the action bounds, for every observation
    :raises ConfigError: a space is not supported
    """

    _action_middle: Tensor
    _action_half_range: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: list[int] | None = None,
        activation_fn: str | type[nn.Module] = nn.Tanh,
        normalize_obs: bool = True,
        squash_output: bool = False,
        with_bias: bool = True,
        zero_last_layer: bool = True,
    ):
        check_spaces(observation_space, action_space)
        super().__init__(
            observation_space,
            action_space,
            squash_output=squash_output and isinstance(action_space, spaces.Box),
        )
        self.net_arch = [64, 64] if net_arch is None else list(net_arch)
        if any(not isinstance(width, int) or width < 1 for width in self.net_arch):
            raise ConfigError(f"net_arch must be a list of layer widths, at least 1, got {net_arch!r}")
        self.activation_fn = find_activation(activation_fn)
        self.with_bias = with_bias
        self.zero_last_layer = zero_last_layer
        self.normalize_obs = normalize_obs
        self.n_inputs = count_inputs(observation_space)
        which = measured(observation_space)
        self.normalizer = ObsNormalizer(self.n_inputs, which=which) if normalize_obs and which.any() else None
        self.n_outputs = (
            int(action_space.n) if isinstance(action_space, spaces.Discrete) else math.prod(action_space.shape or ())
        )
        self.network = self._make_network([self.n_inputs, *self.net_arch, self.n_outputs])
        if isinstance(action_space, spaces.Box):
            low, high = (
                torch.as_tensor(b, dtype=torch.float32).flatten() for b in (action_space.low, action_space.high)
            )
            self._action_shape = action_space.shape
            self.register_buffer("_action_middle", (low + high) / 2, persistent=False)
            self.register_buffer("_action_half_range", (high - low) / 2, persistent=False)

    def _make_network(self, sizes: list[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            linear = nn.Linear(n_in, n_out, bias=self.with_bias)
            nn.init.orthogonal_(linear.weight)
            if self.with_bias:
                nn.init.zeros_(linear.bias)
            layers += [linear, self.activation_fn()]
        last = layers[-2]
        assert isinstance(last, nn.Linear)
        if self.zero_last_layer:
            nn.init.zeros_(last.weight)
        return nn.Sequential(*layers[:-1])

    def encode(self, obs: Any) -> Tensor:
        """Flatten observations (N, ...), of a Dict one tensor per key, to (N, I): the discrete spaces one-hot."""
        return encode(obs, self.observation_space)

    def features(self, encoded: Tensor) -> Tensor:
        """Return the network's input (N, I), float32."""
        if self.normalizer is not None:
            return self.normalizer.forward(encoded)
        # A copy in torch's own memory even if it is float32 already: BLAS may round differently for another alignment.
        return encoded.to(torch.float32, copy=True)

    def actions(self, outputs: Tensor) -> Tensor:
        """Map the network's outputs (N, O) to actions of the env (N, *action_space.shape)."""
        if isinstance(self.action_space, spaces.Discrete):
            return outputs.argmax(1) + int(self.action_space.start)
        unit = outputs.tanh() if self.squash_output else outputs.clamp(-1.0, 1.0)
        actions = torch.addcmul(self._action_middle, unit, self._action_half_range)
        return actions if len(self._action_shape) == 1 else actions.view(-1, *self._action_shape)

    def forward(self, obs: Any, deterministic: bool = True) -> Tensor:
        """Return the env's actions for a batch of raw observations."""
        return self.actions(self.network(self.features(self.encode(obs))))

    def _predict(self, observation: Any, deterministic: bool = True) -> Tensor:
        if self.squash_output:
            # predict() of the base class maps squashed actions onto the bounds itself.
            return self.network(self.features(self.encode(observation))).tanh()
        return self(observation)

    def replica(self) -> Self:
        """Return a copy on the CPU, without the optimizer."""
        optimizer = getattr(self, "optimizer", None)
        return copy.deepcopy(self, {id(optimizer): None}).cpu()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "normalize_obs": self.normalize_obs,
            "squash_output": self.squash_output,
            "with_bias": self.with_bias,
            "zero_last_layer": self.zero_last_layer,
        }


class LinearPolicy(MlpPolicy):
    """One linear layer, without bias by default, as in ARS."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: list[int] | None = None,
        with_bias: bool = False,
        **kwargs: Any,
    ):
        if net_arch:
            raise ConfigError(f"LinearPolicy has no hidden layers, got net_arch={net_arch!r}; use MlpPolicy")
        super().__init__(observation_space, action_space, net_arch=[], with_bias=with_bias, **kwargs)


class MultiInputPolicy(MlpPolicy):
    """:class:`MlpPolicy` under the name that SB3 asks for where observations are a Dict."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, **kwargs: Any):
        if not isinstance(observation_space, spaces.Dict):
            raise ConfigError(f"MultiInputPolicy is for a Dict of observations, got {observation_space}; use MlpPolicy")
        super().__init__(observation_space, action_space, **kwargs)


POLICIES: dict[str, type[MlpPolicy]] = {
    policy.__name__: policy for policy in (MlpPolicy, LinearPolicy, MultiInputPolicy)
}


def default_policy(observation_space: spaces.Space) -> str:
    """Return the name of the policy for whoever names none."""
    return "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
