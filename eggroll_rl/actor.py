"""From raw observations to the actions of a slice's members, on NumPy arrays.

Between two batched physics steps nothing of torch is in the caches: its dispatch then costs more than these small
kernels do. So the inner loop computes in NumPy, into arrays that it keeps, whatever is a plain MLP. Layers and
policy methods that are not known here run as they are, in torch, between the others.

Shapes: N members, I inputs, O outputs, R rank.
"""

from collections.abc import Callable

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from eggroll_rl.noise import Noise
from eggroll_rl.normalization import ObsNormalizer
from eggroll_rl.observations import Observations, as_policies_see, is_plain, map_arrays
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.population import PerturbedLinear, Population, is_plain_sequence

_ACTIONS_STREAM = 8  # spawn key of the seed, beside those of rollout, segments, critic and scoring

Stage = Callable[[np.ndarray], np.ndarray]


class Actor:
    """Consecutive members of a generation, one observation each.

    :param policy: holds the mean parameters and the normalizer; as both are when this is made
    :param noise: the generation's noise; None lets the mean policy act in every row
    :param first: first member (even)
    :param n_members: number of members N (even)
    :param action_std: sample the actions, a Box's with this deviation of the network's outputs; None takes the best
    """

    def __init__(
        self, policy: MlpPolicy, noise: Noise | None, first: int, n_members: int, action_std: float | None = None
    ):
        self._policy = policy
        self._is_flat = is_plain(policy.observation_space) and _is_own(policy, "encode")
        network = policy.network if noise is None else Population(policy.network, noise, first, n_members).members
        self._features = _features(policy, n_members)
        self._state = torch.zeros(n_members, policy.state_size)
        self._network = network
        self._layers = [self._remembering] if policy.state_size else _layers(network)
        self._actions = _actions(policy)
        self._sampled = None
        if action_std is not None and noise is not None:
            self._sampled = _sampling(policy, noise, first, n_members, action_std)

    @torch.no_grad()
    def encode(self, obs: Observations) -> np.ndarray:
        """Flatten an env's observations (N, ...) to (N, I), as :meth:`MlpPolicy.encode`."""
        if self._is_flat:
            assert isinstance(obs, np.ndarray)
            return obs.reshape(len(obs), -1)
        obs = as_policies_see(obs, self._policy.observation_space)
        return self._policy.encode(map_arrays(torch.tensor, obs)).numpy()

    def act(self, encoded: np.ndarray) -> np.ndarray:
        """Return the env's actions (N, *action_space.shape), a new array, for encoded observations (N, I)."""
        with np.errstate(all="ignore"):  # whatever the caller has set: torch would be silent too
            outputs = self._outputs(self._features(encoded))
            return self._actions(outputs if self._sampled is None else outputs + self._sampled())

    def explore(self, encoded: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act with noise (N, O) added to the network's outputs.

        :return: the network's inputs (N, I), valid until the next call; its outputs with the noise (N, O), new; the
            env's actions (N, *action_space.shape), new
        """
        with np.errstate(all="ignore"):
            features = self._features(encoded)
            outputs = self._outputs(features) + noise
            return features, outputs, self._actions(outputs)

    def features(self, encoded: np.ndarray) -> np.ndarray:
        """Return the network's inputs (N, I) alone, valid until the next call."""
        with np.errstate(all="ignore"):
            return self._features(encoded)

    def restart(self, rows: np.ndarray) -> None:
        """Forget what the rows of this mask remember: an episode starts there."""
        if self._policy.state_size:
            self._state[torch.from_numpy(rows)] = 0.0

    @torch.no_grad()
    def _remembering(self, x: np.ndarray) -> np.ndarray:
        outputs, self._state = self._network(torch.tensor(x), self._state)
        return outputs.numpy()

    def _outputs(self, x: np.ndarray) -> np.ndarray:
        for layer in self._layers:
            x = layer(x)
        return x


def _is_own(policy: MlpPolicy, method: str) -> bool:
    """Say whether a method is MlpPolicy's own, neither a subclass's nor set on the object."""
    return getattr(getattr(policy, method), "__func__", None) is getattr(MlpPolicy, method)


def _in_torch(forward: Callable[[torch.Tensor], torch.Tensor]) -> Stage:
    @torch.no_grad()
    def stage(x: np.ndarray) -> np.ndarray:
        # A copy: who knows what keeps its input, and ours are overwritten at the next step.
        return forward(torch.tensor(x)).numpy()

    return stage


def _features(policy: MlpPolicy, n_members: int) -> Stage:
    if not _is_own(policy, "features") or type(policy.normalizer) not in (ObsNormalizer, type(None)):
        return _in_torch(policy.features)
    x_NI = np.empty((n_members, policy.n_inputs), dtype=np.float32)
    if policy.normalizer is None:

        def features(encoded: np.ndarray) -> np.ndarray:
            x_NI[:] = encoded
            return x_NI

        return features
    normalizer = policy.normalizer
    center_I, scale_I, clip = normalizer.center.numpy().copy(), normalizer.scale.numpy().copy(), normalizer.clip
    wide_NI = np.empty((n_members, policy.n_inputs))

    def normalized(encoded: np.ndarray) -> np.ndarray:
        np.subtract(encoded, center_I, out=wide_NI)
        np.multiply(wide_NI, scale_I, out=wide_NI)
        np.maximum(wide_NI, -clip, out=wide_NI)
        np.minimum(wide_NI, clip, out=wide_NI)
        x_NI[:] = wide_NI
        return x_NI

    return normalized


def _layers(network: nn.Module) -> list[Stage]:
    return [_layer(layer) for layer in network] if is_plain_sequence(network) else [_in_torch(network)]


def _layer(layer: nn.Module) -> Stage:
    if type(layer) is PerturbedLinear and layer.dtype is torch.float32:
        return _linear(layer)
    if type(layer) is nn.Linear and layer.weight.dtype is torch.float32:
        return _plain_linear(layer)
    if type(layer) is nn.Tanh:
        return np.tanh
    if type(layer) is nn.ReLU:
        return lambda x: np.maximum(x, 0)
    return _in_torch(layer)


def _plain_linear(layer: nn.Linear) -> Stage:
    weight_IO = layer.weight.detach().numpy().T.copy()
    bias_O = 0.0 if layer.bias is None else layer.bias.detach().numpy().copy()
    return lambda x_NI: np.add(np.matmul(x_NI, weight_IO), bias_O)


def _linear(layer: PerturbedLinear) -> Stage:
    """Y = X Wᵀ + b + sum_r (X·b_r) a_r, as the layer itself, with one small kernel at a time."""
    weight_IO, bias_NO, factors = layer.arrays()
    y_NO, term_NO = (np.empty((len(factors[0][0]), weight_IO.shape[1]), dtype=np.float32) for _ in range(2))
    shape = (len(y_NO), len(weight_IO))
    along_N1 = np.empty((len(y_NO), 1), dtype=np.float32)
    along_N = along_N1[:, 0]

    in_torch = _in_torch(layer)

    def linear(x_NI: np.ndarray) -> np.ndarray:
        if x_NI.dtype != np.float32 or x_NI.shape != shape:
            return in_torch(x_NI)
        np.matmul(x_NI, weight_IO, out=y_NO)
        if bias_NO is not None:
            np.add(y_NO, bias_NO, out=y_NO)
        for a_NO, b_NI in factors:
            np.vecdot(x_NI, b_NI, out=along_N)
            np.multiply(a_NO, along_N1, out=term_NO)
            np.add(y_NO, term_NO, out=y_NO)
        return y_NO

    return linear


def _sampling(
    policy: MlpPolicy, noise: Noise, first: int, n_members: int, action_std: float
) -> Callable[[], np.ndarray]:
    """Return a function that draws what, added to the outputs (N, O), makes the best action a sampled one.

    Gumbel noise makes the argmax of scores a draw from their softmax, logistic noise a sign one from their sigmoid. The
    two members of a pair see the same noise.
    """
    sequence = np.random.SeedSequence(noise.seed, spawn_key=(_ACTIONS_STREAM, noise.generation, first))
    generator, shape = np.random.default_rng(sequence), (n_members // 2, policy.n_outputs)

    def draw() -> np.ndarray:
        if isinstance(policy.action_space, spaces.Box):
            drawn = action_std * generator.standard_normal(shape, dtype=np.float32)
        elif isinstance(policy.action_space, spaces.MultiBinary):
            drawn = generator.logistic(size=shape).astype(np.float32)
        else:
            drawn = generator.gumbel(size=shape).astype(np.float32)
        return drawn.repeat(2, axis=0)

    return draw


def _actions(policy: MlpPolicy) -> Stage:
    """Return what maps outputs (N, O) to actions (N, *action_space.shape), in the space's dtype and bounds."""
    computed, cast = _computed(policy), policy.in_space()
    return computed if cast is None else lambda outputs: cast(computed(outputs))


def _computed(policy: MlpPolicy) -> Stage:
    if not _is_own(policy, "actions"):
        return _in_torch(policy.actions)
    space = policy.action_space
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return lambda outputs: outputs.argmax(1) + start
    if not isinstance(space, spaces.Box):
        return _in_torch(policy.actions)
    middle, half_range = policy._action_middle.numpy(), policy._action_half_range.numpy()
    shape = space.shape or ()

    def actions(outputs: np.ndarray) -> np.ndarray:
        # New arrays: an env may keep its action to compare it with the next.
        unit = np.tanh(outputs) if policy.squash_output else np.maximum(np.minimum(outputs, 1), -1)
        np.multiply(unit, half_range, out=unit)
        np.add(unit, middle, out=unit)
        return unit if len(shape) == 1 else unit.reshape(-1, *shape)

    return actions
