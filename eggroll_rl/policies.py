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
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from torch import Tensor, nn

from eggroll_rl.errors import ConfigError
from eggroll_rl.normalization import ObsNormalizer
from eggroll_rl.observations import check_observation_space, count_inputs, decode, encode, measured

EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {"NatureCNN": NatureCNN, "CombinedExtractor": CombinedExtractor}
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
    elif isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim > 1:
        raise ConfigError(f"action space {action_space} must be one-dimensional")
    elif not isinstance(action_space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        known = "Box, Discrete, MultiDiscrete and MultiBinary"
        raise ConfigError(f"action space {action_space} is not supported; supported are {known}")


def count_outputs(action_space: spaces.Space) -> int:
    """Return O: one per entry of a Box or MultiBinary, one per choice of the others."""
    if isinstance(action_space, spaces.Discrete):
        return int(action_space.n)
    if isinstance(action_space, spaces.MultiDiscrete):
        return int(action_space.nvec.sum())
    return math.prod(action_space.shape or ())


def find_activation(activation_fn: str | type[nn.Module]) -> type[nn.Module]:
    """Look up an activation by name, in any case; a class passes through."""
    if isinstance(activation_fn, str):
        if activation_fn.lower() not in ACTIVATIONS:
            raise ConfigError(f"activation_fn must be one of {', '.join(ACTIVATIONS)}, got {activation_fn!r}")
        return ACTIVATIONS[activation_fn.lower()]
    return activation_fn


def find_extractor(extractor: str | type[BaseFeaturesExtractor]) -> type[BaseFeaturesExtractor]:
    """Look up a features extractor by name; a class passes through."""
    if not isinstance(extractor, str):
        return extractor
    if extractor not in EXTRACTORS:
        raise ConfigError(f"features_extractor_class must be one of {', '.join(EXTRACTORS)}, got {extractor!r}")
    return EXTRACTORS[extractor]


def check_extractor_name(extractor: Any) -> None:
    """Refuse a class of the user's own where only a name can be kept: loading a run folder executes nothing."""
    if extractor is not None and not isinstance(extractor, str):
        raise ConfigError(
            f"features_extractor_class {extractor.__name__} is a class of your own, which a run folder cannot hold, as "
            "loading it executes nothing: use model.save()"
        )


class Extracted(nn.Module):
    """A features extractor of SB3's on rows of encoded observations, and layers behind it."""

    def __init__(self, space: spaces.Space, extractor: nn.Module, head: nn.Module):
        super().__init__()
        self.space, self.extractor, self.head = space, extractor, head

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows (N, I) to outputs (N, O)."""
        return self.head(self.extractor(decode(rows, self.space)))


class MlpPolicy(BasePolicy):
    """Deterministic MLP from normalized observations to actions.

    Box actions: the output is clipped to [-1, 1] (or squashed by tanh) and mapped linearly onto the space's
    bounds. Discrete actions: argmax, of each part where they are MultiDiscrete. MultiBinary: 1 where the output is
    above 0. ``deterministic`` in :meth:`predict` changes nothing.

    :param observation_space: Box of any shape (flattened), Discrete, MultiDiscrete or MultiBinary (one-hot), or a Dict
        of these, joined
    :param action_space: bounded Box, Discrete, MultiDiscrete or MultiBinary
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation between layers, a class or a name in ``ACTIVATIONS``
    :param normalize_obs: normalize observations by running moments, but for one-hot codes
    :param squash_output: tanh instead of clipping
    :param with_bias: give the layers biases
    :param zero_last_layer: start with the last layer at zero: the mean of the action bounds, for every observation
    :param features_extractor_class: SB3's or your own, a class or a name in ``EXTRACTORS``, before the layers; images
        are then not normalized but in [0, 1]
    :param features_extractor_kwargs: more arguments for it
    :raises ConfigError: a space is not supported
    """

    state_size = 0  # numbers that a policy with memory carries from step to step
    network: Any  # a Sequential, or whatever a subclass makes
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
        features_extractor_class: str | type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
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
        self.extractor_class = None if features_extractor_class is None else find_extractor(features_extractor_class)
        self.extractor_kwargs = features_extractor_kwargs
        if features_extractor_kwargs and self.extractor_class is None:
            raise ConfigError(f"features_extractor_kwargs={features_extractor_kwargs} needs a features_extractor_class")
        which = measured(observation_space, images=self.extractor_class is None)
        self.normalizer = ObsNormalizer(self.n_inputs, which=which) if normalize_obs and which.any() else None
        self.n_outputs = count_outputs(action_space)
        self.network = self._make_network()
        if isinstance(action_space, spaces.Box):
            low, high = (
                torch.as_tensor(b, dtype=torch.float32).flatten() for b in (action_space.low, action_space.high)
            )
            self._action_shape = action_space.shape
            self.register_buffer("_action_middle", (low + high) / 2, persistent=False)
            self.register_buffer("_action_half_range", (high - low) / 2, persistent=False)

    def _make_network(self) -> nn.Module:
        """Return the network from rows (N, I) to outputs (N, O)."""
        if self.extractor_class is None:
            return self._make_layers([self.n_inputs, *self.net_arch, self.n_outputs], self.zero_last_layer)
        kwargs = self.extractor_kwargs or {}
        try:
            extractor = self.extractor_class(self.observation_space, **kwargs)
            with torch.no_grad():
                extractor(decode(torch.zeros(2, self.n_inputs), self.observation_space))
        except (AssertionError, RuntimeError, TypeError) as error:
            what = f"{self.extractor_class.__name__} refuses {self.observation_space} and {kwargs}"
            raise ConfigError(f"features_extractor_class {what}: {' '.join(str(error).split())}") from error
        extractor.apply(lambda layer: self.init_weights(layer, math.sqrt(2)))
        head = self._make_layers([extractor.features_dim, *self.net_arch, self.n_outputs], self.zero_last_layer)
        return Extracted(self.observation_space, extractor, head)

    def _make_layers(self, sizes: list[int], zero_last: bool) -> nn.Sequential:
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            linear = nn.Linear(n_in, n_out, bias=self.with_bias)
            nn.init.orthogonal_(linear.weight)
            if self.with_bias:
                nn.init.zeros_(linear.bias)
            layers += [linear, self.activation_fn()]
        last = layers[-2]
        assert isinstance(last, nn.Linear)
        if zero_last:
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
        if isinstance(self.action_space, spaces.MultiDiscrete):
            parts = outputs.split(self.action_space.nvec.tolist(), dim=1)
            choices = torch.stack([part.argmax(1) for part in parts], dim=1)
            return choices + torch.as_tensor(self.action_space.start, device=choices.device)
        if isinstance(self.action_space, spaces.MultiBinary):
            return (outputs > 0).to(torch.int8).view(-1, *self.action_space.shape)
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
            **self._extractor_parameters(),
        }

    def _extractor_parameters(self) -> dict[str, Any]:
        if self.extractor_class is None:
            return {}
        names = {known: name for name, known in EXTRACTORS.items()}
        return {
            "features_extractor_class": names.get(self.extractor_class, self.extractor_class),
            "features_extractor_kwargs": self.extractor_kwargs,
        }


class LinearPolicy(MlpPolicy):
    """One linear layer, without bias by default, as in ARS; of images, a Dict's too, it weighs every pixel."""

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


class CnnPolicy(MlpPolicy):
    """An image through SB3's NatureCNN, and one layer behind it unless ``net_arch`` says more."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: list[int] | None = None,
        features_extractor_class: str | type[BaseFeaturesExtractor] = "NatureCNN",
        **kwargs: Any,
    ):
        if not is_image_space(observation_space):
            raise ConfigError(
                f"CnnPolicy is for images, bytes from 0 to 255 in three dimensions, got {observation_space}"
            )
        super().__init__(
            observation_space,
            action_space,
            net_arch=net_arch or [],
            features_extractor_class=features_extractor_class,
            **kwargs,
        )


class MultiInputPolicy(MlpPolicy):
    """A Dict of observations: its parts joined, or through SB3's CombinedExtractor if it has images.

    Where one of these has fewer than 36 x 36 pixels, too few for the NatureCNN in it, all are flattened.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        features_extractor_class: str | type[BaseFeaturesExtractor] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(observation_space, spaces.Dict):
            raise ConfigError(f"MultiInputPolicy is for a Dict of observations, got {observation_space}; use MlpPolicy")
        images: list[Any] = [part for part in observation_space.spaces.values() if is_image_space(part)]
        if features_extractor_class is None and images and all(min(image.shape[1:]) >= 36 for image in images):
            features_extractor_class = "CombinedExtractor"
        super().__init__(observation_space, action_space, features_extractor_class=features_extractor_class, **kwargs)


def default_policy(observation_space: spaces.Space) -> str:
    """Return the name of the policy for whoever names none."""
    return "MultiInputPolicy" if isinstance(observation_space, spaces.Dict) else "MlpPolicy"
