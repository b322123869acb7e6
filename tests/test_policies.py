import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from eggroll_rl.actor import Actor
from eggroll_rl.errors import ConfigError
from eggroll_rl.normalization import Moments
from eggroll_rl.observations import space_as_policies_see
from eggroll_rl.policies import LinearPolicy, MlpPolicy, MultiInputPolicy

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))


def with_output(policy, values):
    """Make the network put out ``values`` for any observation."""
    with torch.no_grad():
        policy.network[-1].weight.zero_()
        policy.network[-1].bias.copy_(torch.tensor(values))
    return policy


def test_a_new_policy_acts_in_the_middle_of_the_bounds():
    action, _ = MlpPolicy(OBS, BOX).predict(np.ones(3))
    assert action.tolist() == [0.0, 0.5]
    action, _ = MlpPolicy(OBS, BOX, zero_last_layer=False).predict(np.ones(3))
    assert action.tolist() != [0.0, 0.5]


@pytest.mark.parametrize("squash", [False, True])
def test_outputs_map_linearly_onto_the_bounds(squash):
    policy = with_output(MlpPolicy(OBS, BOX, squash_output=squash), [0.5, -3.0])
    unit = np.tanh([0.5, -3.0]) if squash else np.array([0.5, -1.0])
    expected = np.array([2.0, 0.5]) * unit + np.array([0.0, 0.5])
    single, _ = policy.predict(np.zeros(3))
    batch, _ = policy.predict(np.zeros((4, 3)))
    assert np.allclose(single, expected, atol=1e-6) and single.shape == (2,) and single.dtype == np.float32
    assert np.allclose(batch, expected, atol=1e-6) and batch.shape == (4, 2)
    # What rollouts send to the env is what predict returns.
    assert np.allclose(policy(torch.zeros(1, 3)).detach().numpy(), expected, atol=1e-6)


def test_extreme_outputs_stay_within_the_space():
    for policy in (with_output(MlpPolicy(OBS, BOX), [1e9, -1e9]), with_output(MlpPolicy(OBS, BOX), [-1e9, 1e9])):
        assert BOX.contains(policy.predict(np.zeros(3))[0])


def test_discrete_actions_are_the_argmax_and_start_where_the_space_starts():
    space = spaces.Discrete(3, start=5)
    policy = with_output(MlpPolicy(OBS, space), [0.0, 2.0, 1.0])
    action, _ = policy.predict(np.zeros(3))
    assert action == 6 and space.contains(int(action))
    assert policy.predict(np.zeros((2, 3)))[0].tolist() == [6, 6]


def test_actions_of_any_shape():
    space = spaces.Box(-1, 1, (2, 3), np.float32)
    policy = MlpPolicy(OBS, space)
    assert policy.predict(np.zeros(3))[0].shape == (2, 3)
    assert policy(torch.zeros(4, 3)).shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("space", "n_inputs"),
    [
        (spaces.Box(-1, 1, (2, 4), np.float32), 8),
        (spaces.Box(0, 255, (8, 8), np.uint8), 64),
        (spaces.Discrete(5), 5),
        (spaces.Discrete(5, start=-2), 5),
        (spaces.MultiDiscrete([2, 3]), 5),
        (spaces.MultiBinary(4), 4),
    ],
)
def test_observation_spaces(space, n_inputs):
    policy = MlpPolicy(space, BOX)
    space.seed(0)
    obs = np.stack([space.sample() for _ in range(6)])
    assert policy.encode(torch.as_tensor(obs)).shape == (6, n_inputs)
    assert policy.predict(obs)[0].shape == (6, 2)
    assert (policy.normalizer is not None) == isinstance(space, spaces.Box)


def test_a_dict_is_its_parts_joined_and_only_measurements_are_normalized():
    space = spaces.Dict(
        [("z", OBS), ("kind", spaces.Discrete(4, start=1)), ("a", spaces.Box(0, 9, (2, 2), np.float32))]
    )
    policy = MultiInputPolicy(space, BOX)
    z, a = np.array([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]]), np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    obs = {"z": torch.from_numpy(z), "a": torch.from_numpy(a), "kind": torch.tensor([2, 4])}
    encoded = policy.encode(obs)
    expected = np.concatenate([z, [[0, 1, 0, 0], [0, 0, 0, 1]], a.reshape(2, 4)], axis=1)
    assert np.array_equal(encoded.numpy(), expected)
    moments = Moments.zeros(2, 11)
    moments.add(expected[None], np.ones((1, 2), dtype=bool))
    policy.normalizer.combine(moments)
    # Two observations: one deviation below and above their mean; the one-hot code stays.
    one = np.concatenate([-np.ones(3), [0, 1, 0, 0], -np.ones(4)])
    assert np.allclose(policy.features(encoded), [one, np.concatenate([np.ones(3), [0, 0, 0, 1], np.ones(4)])])
    assert policy.predict({name: part.numpy() for name, part in obs.items()})[0].shape == (2, 2)


def test_a_linear_policy_weighs_every_pixel_of_a_dicts_images():
    image = spaces.Box(0, 255, (3, 4, 5), np.uint8)
    space = spaces.Dict([("picture", image), ("z", OBS), ("kind", spaces.Discrete(4, start=1))])
    policy = LinearPolicy(space, BOX, normalize_obs=False)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 67)).astype(np.float32) / 100
    with torch.no_grad():
        policy.network[0].weight.copy_(torch.from_numpy(weight))
    obs = {"picture": rng.integers(0, 256, (6, 3, 4, 5), dtype=np.uint8), "z": rng.normal(size=(6, 3))}
    obs["kind"] = rng.integers(1, 5, 6)
    rows = np.concatenate([obs["picture"].reshape(6, 60) / 255, obs["z"], np.eye(4)[obs["kind"] - 1]], axis=1)
    expected = np.array([0.0, 0.5]) + np.array([2.0, 0.5]) * np.clip(rows @ weight.T, -1, 1)
    assert np.allclose(policy.predict(obs)[0], expected, atol=1e-6)
    assert np.ptp(expected, axis=0).min() > 0.01
    channels_last = obs | {"picture": obs["picture"].transpose(0, 2, 3, 1)}
    assert np.array_equal(policy.predict(channels_last)[0], policy.predict(obs)[0])


def test_an_image_looks_the_same_with_its_channels_first_and_last():
    channels_last = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), dtype=np.uint8)
    seen = space_as_policies_see(spaces.Box(0, 255, (8, 9, 3), np.uint8))
    assert seen == spaces.Box(0, 255, (3, 8, 9), np.uint8)
    policy = MlpPolicy(seen, BOX, zero_last_layer=False)
    channels_first = channels_last.transpose(0, 3, 1, 2)
    assert np.array_equal(policy.predict(channels_last)[0], policy.predict(channels_first)[0])
    rows = Actor(policy, None, 0, 5).encode(channels_last)
    assert np.allclose(rows, channels_first.reshape(5, -1) / 255)
    assert not np.array_equal(policy.predict(channels_last)[0], policy.predict(channels_last[:, :, ::-1].copy())[0])


def test_the_normalizer_is_part_of_predict_and_of_the_saved_policy(tmp_path):
    policy = MlpPolicy(OBS, BOX, zero_last_layer=False)
    moments = Moments.zeros(2, 3)
    moments.add(np.random.default_rng(0).normal(100, 5, (20, 2, 3)), np.ones((20, 2), bool))
    before = policy.predict(np.full(3, 101.0))[0]
    policy.normalizer.combine(moments)
    after = policy.predict(np.full(3, 101.0))[0]
    assert not np.allclose(before, after)
    policy.save(tmp_path / "policy")
    assert np.array_equal(MlpPolicy.load(tmp_path / "policy").predict(np.full(3, 101.0))[0], after)


def test_constructor_arguments_survive_saving(tmp_path):
    policy = MlpPolicy(
        OBS, BOX, net_arch=[7], activation_fn="relu", normalize_obs=False, squash_output=True, with_bias=False
    )
    policy.save(tmp_path / "policy")
    loaded = MlpPolicy.load(tmp_path / "policy")
    assert loaded._get_constructor_parameters() == policy._get_constructor_parameters()
    assert isinstance(loaded.network[1], nn.ReLU) and loaded.network[0].bias is None


def test_a_replica_is_the_same_policy_also_of_a_subclass():
    class Amplified(MlpPolicy):
        def __init__(self, observations, actions, gain=1.0):
            super().__init__(observations, actions, net_arch=[4], zero_last_layer=False)
            self.gain = gain

        def features(self, encoded):
            return self.gain * super().features(encoded)

    policy = Amplified(OBS, BOX, gain=3.0)
    policy.optimizer = torch.optim.Adam(policy.parameters())
    replica = policy.replica()
    assert replica.optimizer is None and policy.optimizer is not None
    assert np.array_equal(replica.predict(np.ones(3))[0], policy.predict(np.ones(3))[0])


def test_the_linear_policy_is_one_layer():
    policy = LinearPolicy(OBS, BOX)
    assert [tuple(p.shape) for p in policy.network.parameters()] == [(2, 3)]
    with pytest.raises(ConfigError, match="no hidden layers"):
        LinearPolicy(OBS, BOX, net_arch=[3])


@pytest.mark.parametrize(
    ("observation_space", "action_space", "named"),
    [
        (spaces.Dict(a=OBS, b=spaces.Text(4)), BOX, "part 'b' of the observation space, Text.*FilterObservation"),
        (spaces.Dict(a=spaces.Dict(b=OBS)), BOX, "part 'a' of the observation space, Dict.*not supported"),
        (spaces.Text(4), BOX, "observation space Text"),
        (spaces.MultiDiscrete([[2, 3]]), BOX, "one-dimensional"),
        (OBS, spaces.Box(-np.inf, np.inf, (2,)), "action space Box.*unbounded"),
        (OBS, spaces.MultiDiscrete([[2, 2]]), "action space MultiDiscrete.*one-dimensional"),
        (OBS, spaces.Dict(a=BOX), "action space Dict"),
    ],
)
def test_unsupported_spaces_are_named(observation_space, action_space, named):
    with pytest.raises(ConfigError, match=named):
        MlpPolicy(observation_space, action_space)


@pytest.mark.parametrize("settings", [{"net_arch": [0]}, {"net_arch": ["a"]}, {"activation_fn": "sinus"}])
def test_bad_arguments_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        MlpPolicy(OBS, BOX, **settings)
