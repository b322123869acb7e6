"""The NumPy forms of a policy's steps against the policy's own, in torch."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from eggroll_rl.actor import Actor
from eggroll_rl.es import one_thread
from eggroll_rl.noise import LowRank, Noise
from eggroll_rl.normalization import Moments
from eggroll_rl.policies import LinearPolicy, MlpPolicy
from eggroll_rl.population import Population

N = 6
OBS = spaces.Box(-np.inf, np.inf, (5,), dtype=np.float64)
BOX = spaces.Box(np.float32([-2, 0, -1]), np.float32([2, 3, 1]))


class Amplified(MlpPolicy):
    def features(self, encoded):
        return 3.0 * super().features(encoded)


class Reversed(MlpPolicy):
    def actions(self, outputs):
        return -super().actions(outputs)


class Double(MlpPolicy):
    def features(self, encoded):
        return encoded.double()


class Encoded(MlpPolicy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def encode(self, obs):
        return super().encode(obs) * self.gain


class Unclipped(MlpPolicy):
    def actions(self, outputs):
        return outputs


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x):
        return x + self.inner(x)


def nested(policy):
    policy.network = nn.Sequential(nn.Tanh(), Residual(), nn.Sequential(nn.Linear(5, 4), nn.ELU()), nn.Linear(4, 3))
    return policy


def reshaped(policy):
    layers = (nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
    policy.network = nn.Sequential(*layers)
    return policy


def repeated(policy):
    tanh = nn.Tanh()
    policy.network = nn.Sequential(nn.Linear(5, 4), tanh, nn.Linear(4, 4), tanh, nn.Linear(4, 3))
    return policy


def hooked(policy):
    policy.network = Residual()
    policy.network.inner = nn.Linear(5, 5)
    policy.network.register_forward_hook(lambda module, inputs, output: output[:, :3])
    return policy


def overridden(policy):
    original = policy.features
    policy.features = lambda encoded: original(encoded) + 1
    return policy


def frozen(policy):
    policy.network[0].weight.requires_grad_(False)
    return policy


POLICIES = {
    "default": lambda: MlpPolicy(OBS, BOX, zero_last_layer=False),
    "ReLU": lambda: MlpPolicy(OBS, BOX, [7], activation_fn="relu", zero_last_layer=False),
    "ELU": lambda: MlpPolicy(OBS, BOX, [7, 3], activation_fn="elu", zero_last_layer=False),
    "no bias": lambda: MlpPolicy(OBS, BOX, [7], with_bias=False, zero_last_layer=False),
    "linear": lambda: LinearPolicy(OBS, BOX, zero_last_layer=False),
    "squashed": lambda: MlpPolicy(OBS, BOX, [7], squash_output=True, zero_last_layer=False),
    "not normalized": lambda: MlpPolicy(OBS, BOX, [7], normalize_obs=False, zero_last_layer=False),
    "float32 observations": lambda: MlpPolicy(spaces.Box(-9, 9, (5,)), BOX, [7], normalize_obs=False),
    "whole numbers": lambda: MlpPolicy(spaces.Box(-9, 9, (5,), np.int64), BOX, [7], zero_last_layer=False),
    "two-dimensional": lambda: MlpPolicy(
        spaces.Box(-9, 9, (2, 5)), spaces.Box(-1, 1, (3, 2)), [7], zero_last_layer=False
    ),
    "discrete actions": lambda: MlpPolicy(OBS, spaces.Discrete(4, start=-1), [7], zero_last_layer=False),
    "discrete observations": lambda: MlpPolicy(spaces.Discrete(5, start=2), BOX, [7], zero_last_layer=False),
    "own features": lambda: Amplified(OBS, BOX, [7], zero_last_layer=False),
    "own actions": lambda: Reversed(OBS, BOX, [7], zero_last_layer=False),
    "own encode": lambda: Encoded(OBS, BOX, [7], zero_last_layer=False),
    "outputs as they are": lambda: Unclipped(OBS, BOX, [7], zero_last_layer=False),
    "set on the object": lambda: overridden(MlpPolicy(OBS, BOX, [7], zero_last_layer=False)),
    "double precision": lambda: Double(OBS, BOX, [7], zero_last_layer=False).double(),
    "another shape within": lambda: reshaped(MlpPolicy(OBS, BOX)),
    "a layer used twice": lambda: repeated(MlpPolicy(OBS, BOX)),
    "a hook": lambda: hooked(MlpPolicy(OBS, BOX)),
    "own network": lambda: nested(MlpPolicy(OBS, BOX)),
    "a frozen layer": lambda: frozen(MlpPolicy(OBS, BOX, [7], zero_last_layer=False)),
}


def observations(policy, seed=0):
    space = policy.observation_space
    if space.dtype == np.int64:
        space.seed(seed)
        return np.stack([space.sample() for _ in range(N)])
    return np.random.default_rng(seed).normal(1, 4, (N, *space.shape)).astype(space.dtype)


def observed(policy):
    """Give the normalizer something to do."""
    if policy.normalizer is not None:
        x = observations(policy, seed=1).reshape(1, N, -1)
        moments = Moments.zeros(N, policy.n_inputs)
        moments.add(x.astype(np.float64), np.ones((1, N), dtype=bool))
        policy.normalizer.combine(moments)
    return policy


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_an_actor_does_what_the_members_of_the_policy_do(name, rank):
    torch.manual_seed(0)
    policy = observed(POLICIES[name]())
    noise = Noise(seed=1, generation=2, population_size=8, sigma=0.5, family=LowRank(rank), slice_size=N)
    actor, obs = Actor(policy, noise, 2, N), observations(policy)
    before = obs.copy()
    encoded = actor.encode(obs)
    actions = actor.act(encoded)
    members = Population(policy.network, noise, 2, N).members
    in_torch = policy.encode(torch.from_numpy(obs))
    expected = policy.actions(members(policy.features(in_torch))).numpy()
    assert np.array_equal(encoded, in_torch) and encoded.shape == (N, policy.n_inputs)
    assert actions.shape == expected.shape and actions.dtype == expected.dtype
    np.testing.assert_allclose(actions, expected, atol=3e-6)
    assert len(np.unique(actions, axis=0)) > 1  # or else nothing was compared
    assert np.array_equal(obs, before)


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_without_noise_the_mean_policy_acts(name):
    policy = observed(POLICIES[name]())
    if name == "a hook":
        policy.network.inner.register_forward_hook(lambda module, inputs, output: 2 * output)
    actor, obs = Actor(policy, None, 0, N), observations(policy)
    np.testing.assert_allclose(actor.act(actor.encode(obs)), policy(torch.from_numpy(obs)).numpy(), atol=3e-6)
    noise = np.full((N, policy.n_outputs), 0.25, np.float32)
    features, outputs, actions = (x.copy() for x in actor.explore(actor.encode(obs), noise))
    np.testing.assert_allclose(outputs, policy.network(torch.from_numpy(features)) + 0.25, atol=3e-6)
    np.testing.assert_allclose(actions, policy.actions(torch.from_numpy(outputs)).numpy(), atol=3e-6)
    assert np.array_equal(actor.features(actor.encode(obs)), features)


def test_actions_are_clipped_to_the_bounds_and_nan_stays():
    policy = MlpPolicy(OBS, BOX, [7], zero_last_layer=False)
    noise = Noise(seed=1, generation=0, population_size=N, sigma=100.0, family=LowRank(), slice_size=N)
    obs = observations(policy)
    obs[0] = np.nan
    actions = Actor(policy, noise, 0, N).act(obs)
    assert np.isnan(actions[0]).all()
    assert (actions[1:] >= BOX.low).all() and (actions[1:] <= BOX.high).all()
    assert (actions[1:] == BOX.low).any() and (actions[1:] == BOX.high).any()


@pytest.mark.parametrize("name", POLICIES)
def test_earlier_actions_keep_their_values(name):
    policy = POLICIES[name]()
    actor = Actor(policy, Noise(1, 0, N, 0.5, LowRank(), N), 0, N)
    first = actor.act(actor.encode(observations(policy, 0)))
    kept = first.copy()
    actor.act(actor.encode(observations(policy, 1)))
    assert np.array_equal(first, kept)


def test_an_actor_keeps_the_normalizer_that_it_was_made_with():
    policy = observed(MlpPolicy(OBS, BOX, [7], zero_last_layer=False))
    actor, obs = Actor(policy, Noise(1, 0, N, 0.5, LowRank(), N), 0, N), observations(policy)
    before = actor.act(obs)
    observed(policy)
    policy.normalizer.scale.mul_(2)
    assert np.array_equal(actor.act(obs), before)


def test_numpy_computes_on_one_thread_there_and_on_all_afterwards():
    def threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    with threadpool_limits(2, "blas"):
        assert threads() == {2}
        with one_thread():
            assert threads() == {1}
        assert threads() == {2}


def test_numpys_error_state_is_not_the_policys():
    policy = MlpPolicy(OBS, BOX, [7], normalize_obs=False, zero_last_layer=False)
    actor = Actor(policy, Noise(1, 0, N, 0.5, LowRank(), N), 0, N)
    obs = np.full((N, 5), 1e-42)
    obs[0] = 1e300
    with np.errstate(all="raise"):
        actions = actor.act(obs)
    assert np.isfinite(actions[1:]).all()
