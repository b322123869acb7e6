"""SB3 policies for EGGROLL: deterministic networks with the observation normalizer inside.

``predict(raw_obs)`` works everywhere; no statistics have to be carried beside the model.
"""

import copy
import inspect
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

from eggroll_rl.actions import Cast, make_cast
from eggroll_rl.checks import check_arguments_table, check_flag, check_whole, nearest, shown
from eggroll_rl.errors import ConfigError
from eggroll_rl.normalization import ObsNormalizer
from eggroll_rl.observations import check_entries, check_observation_space, count_inputs, decode, encode, measured

EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {"NatureCNN": NatureCNN, "CombinedExtractor": CombinedExtractor}
ACTIVATIONS = {name.lower(): getattr(nn, name) for name in ("Tanh", "ReLU", "ELU", "GELU", "SiLU", "LeakyReLU")}


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Refuse spaces that the policies cannot handle, naming them."""
    check_observation_space(observation_space)
    if isinstance(action_space, spaces.Box):
        check_entries("action space", action_space)
        bounds = np.concatenate([action_space.low.ravel(), action_space.high.ravel()]).astype(np.float64)
        if np.isfinite(bounds).all() and np.abs(bounds).max() > np.finfo(np.float32).max:
            raise ConfigError(
                f"action space {action_space} has bounds beyond float32; RescaleAction makes them smaller"
            )
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
            raise ConfigError(f"activation_fn must be one of {', '.join(ACTIVATIONS)}, got {shown(activation_fn)}")
        return ACTIVATIONS[activation_fn.lower()]
    if not (isinstance(activation_fn, type) and issubclass(activation_fn, nn.Module)):
        raise ConfigError(f"activation_fn must be a name or a class of torch.nn, got {shown(activation_fn)}")
    return activation_fn


def find_extractor(extractor: str | type[BaseFeaturesExtractor]) -> type[BaseFeaturesExtractor]:
    """Look up a features extractor by name; a class passes through."""
    if isinstance(extractor, str) and extractor in EXTRACTORS:
        return EXTRACTORS[extractor]
    if isinstance(extractor, type) and issubclass(extractor, BaseFeaturesExtractor):
        return extractor
    known = ", ".join(EXTRACTORS)
    raise ConfigError(
        f"features_extractor_class must be one of {known}, or a subclass of Stable-Baselines3's BaseFeaturesExtractor, "
        f"got {shown(extractor)}"
    )


def check_net_arch(net_arch: Any) -> None:
    """Refuse what is neither None nor a list of layer widths."""
    if net_arch is None:
        return
    if not isinstance(net_arch, list | tuple):
        raise ConfigError(f"net_arch must be a list of layer widths, at least 1, got {shown(net_arch)}")
    for width in net_arch:
        check_whole("net_arch: a layer width", width, 1)


def check_policy_kwargs(policy: "type[MlpPolicy]", policy_kwargs: dict[str, Any]) -> None:
    """Refuse arguments that a policy does not take, or not these, as far as can be told without its spaces.

    :raises ConfigError: a name is unknown, with the nearest one, or a value is wrong
    """
    known: list[str] = []
    for kind in inspect.getmro(policy):  # each hands on to the next what it does not know
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        known += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    known = [name for name in dict.fromkeys(known) if name not in ("self", "observation_space", "action_space")]
    for name in policy_kwargs:
        if name not in known:
            raise ConfigError(f"policy_kwargs: {policy.__name__} has no {shown(name)}{nearest(name, known)}")
    policy.check_values(policy_kwargs)


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

    _default_extractor: str | None = None
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
        values = {"net_arch": net_arch, "activation_fn": activation_fn, "normalize_obs": normalize_obs}
        values |= {"squash_output": squash_output, "with_bias": with_bias, "zero_last_layer": zero_last_layer}
        values |= {"features_extractor_class": features_extractor_class}
        MlpPolicy.check_values({**values, "features_extractor_kwargs": features_extractor_kwargs})
        super().__init__(
            observation_space,
            action_space,
            squash_output=squash_output and isinstance(action_space, spaces.Box),
        )
        self.net_arch = [64, 64] if net_arch is None else [int(width) for width in net_arch]
        self.activation_fn = find_activation(activation_fn)
        self.with_bias = with_bias
        self.zero_last_layer = zero_last_layer
        self.normalize_obs = normalize_obs
        self.n_inputs = count_inputs(observation_space)
        self.extractor_class = None if features_extractor_class is None else find_extractor(features_extractor_class)
        self.extractor_kwargs = features_extractor_kwargs
        which = measured(observation_space, images=self.extractor_class is None)
        self.normalizer = ObsNormalizer(self.n_inputs, which=which) if normalize_obs and which.any() else None
        self.n_outputs = count_outputs(action_space)
        self.network = self._make_network()
        if isinstance(action_space, spaces.Box):
            low, high = (
                torch.as_tensor(b, dtype=torch.float32).flatten() / 2 for b in (action_space.low, action_space.high)
            )
            self._action_shape = action_space.shape
            self.register_buffer("_action_middle", low + high, persistent=False)
            self.register_buffer("_action_half_range", high - low, persistent=False)

    @classmethod
    def check_values(cls, given: dict[str, Any]) -> None:
        """Refuse values of the constructor's arguments that are wrong whatever the spaces are.

        A subclass with arguments of its own checks these, and leaves the rest to its base.

        :param given: some of the arguments by name
        :raises ConfigError: naming the argument
        """
        check_net_arch(given.get("net_arch"))
        find_activation(given.get("activation_fn", nn.Tanh))
        for name in ("normalize_obs", "squash_output", "with_bias", "zero_last_layer"):
            check_flag(name, given.get(name, True))
        extractor, extractor_kwargs = (given.get(f"features_extractor_{what}") for what in ("class", "kwargs"))
        if extractor is not None:
            find_extractor(extractor)
        check_arguments_table("features_extractor_kwargs", extractor_kwargs)
        if extractor_kwargs and extractor is None and cls._default_extractor is None:
            raise ConfigError(f"features_extractor_kwargs={shown(extractor_kwargs)} needs a features_extractor_class")

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

    def in_space(self) -> Cast | None:
        """Return what brings actions (..., *action_space.shape) of this policy into its space; None: they are there."""
        low = high = np.zeros(())
        if isinstance(self.action_space, spaces.Box):
            middle, half = self._action_middle.cpu().numpy(), self._action_half_range.cpu().numpy()
            low, high = (x.reshape(self.action_space.shape) for x in (middle - half, middle + half))
        return make_cast(self.action_space, low, high)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """As SB3's, with actions in the space's dtype."""
        actions, state = super().predict(observation, state, episode_start, deterministic)
        cast = self.in_space()
        return (actions if cast is None else np.asarray(cast(np.asarray(actions)))), state

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
    """One linear layer, without bias by default, as in ARS."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        net_arch: list[int] | None = None,
        with_bias: bool = False,
        **kwargs: Any,
    ):
        self.check_values({"net_arch": net_arch})
        super().__init__(observation_space, action_space, net_arch=[], with_bias=with_bias, **kwargs)

    @classmethod
    def check_values(cls, given: dict[str, Any]) -> None:
        """As the base; and there are no hidden layers."""
        super().check_values(given)
        if given.get("net_arch"):
            raise ConfigError(f"LinearPolicy has no hidden layers, got net_arch={given['net_arch']!r}; use MlpPolicy")


class CnnPolicy(MlpPolicy):
    """An image through SB3's NatureCNN, and one layer behind it unless ``net_arch`` says more."""

    _default_extractor = "NatureCNN"

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

    _default_extractor = "CombinedExtractor"  # of some spaces

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
