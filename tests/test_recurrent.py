"""Policies beyond an MLP: memory, convolutions, and actions of several parts."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from eggroll_rl import EGGROLL
from eggroll_rl.actor import Actor
from eggroll_rl.agents import load_policy, save_policy
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError
from eggroll_rl.evaluation import acting, evaluate
from eggroll_rl.noise import LowRank, Noise
from eggroll_rl.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from eggroll_rl.population import Population
from eggroll_rl.recurrent import RecurrentPolicy


class RecallEnv(gym.Env):
    """A sign is shown in the first step alone; the last of four actions has to be the same."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.sign = 0, int(self.np_random.integers(2))
        return np.array([2 * self.sign - 1, 0], np.float32), {}

    def step(self, action):
        self.t += 1
        last = self.t == 4
        return np.array([0, self.t == 3], np.float32), float(last and action == self.sign), last, False, {}


class BarEnv(gym.Env):
    """Which quarter of the picture, of 12 x 12, is bright? A new one in each step."""

    observation_space = spaces.Box(0, 255, (12, 12, 1), np.uint8)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        reward = float(action == self.quarter)
        return self._obs(), reward, False, False, {}

    def _obs(self):
        self.quarter = int(self.np_random.integers(4))
        picture = self.np_random.integers(0, 60, (12, 12, 1)).astype(np.uint8)
        row, column = (int(self.np_random.integers(4)) + 6 * part for part in divmod(self.quarter, 2))
        picture[row : row + 2, column : column + 2] = 250
        return picture


class PartsEnv(gym.Env):
    """Name the parts that the observation shows."""

    observation_space = spaces.MultiBinary(3)

    def __init__(self, kind="MultiBinary"):
        self.action_space = spaces.MultiBinary(3) if kind == "MultiBinary" else spaces.MultiDiscrete([2, 3, 2])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.shown = self.np_random.integers(0, 2, 3).astype(np.int8)
        return self.shown, {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, dtype=self.action_space.dtype))
        reward = float((action == self.shown).mean())
        self.shown = self.np_random.integers(0, 2, 3).astype(np.int8)
        return self.shown, reward, False, False, {}


class SmallCnn(BaseFeaturesExtractor):
    def __init__(self, observation_space, features_dim=16):
        super().__init__(observation_space, features_dim)
        self.layers = nn.Sequential(
            nn.Conv2d(observation_space.shape[0], 8, 3, stride=3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 16, features_dim),
        )

    def forward(self, observations):
        return self.layers(observations)


def make_recall():
    return TimeLimit(RecallEnv(), 10)


def make_bar():
    return TimeLimit(BarEnv(), 32)


class make_parts:
    def __init__(self, kind):
        self.kind = kind

    def __call__(self):
        return TimeLimit(PartsEnv(self.kind), 5)


def train(policy, source, steps, **settings):
    settings = {
        "population_size": 64,
        "sigma": 0.2,
        "learning_rate": 0.1,
        "n_eval_episodes": 8,
        "n_workers": 0,
    } | settings
    return EGGROLL(policy, source, seed=0, **settings).learn(steps, log_interval=None)


def mean_return(model, source, n=256):
    return evaluate(acting(model.policy), env_factory(source), range(1000, 1000 + n)).mean


# Memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_members_carry_a_state_each(cell):
    torch.manual_seed(0)
    policy = RecurrentPolicy(RecallEnv.observation_space, spaces.Box(-1, 1, (2,)), [5], 4, cell, normalize_obs=False)
    noise = Noise(1, 0, 6, 0.5, LowRank(), 6)
    actor, population = Actor(policy, noise, 0, 6), Population(policy.network, noise)
    rng = np.random.default_rng(0)
    states = torch.zeros(6, policy.state_size)
    for t in range(4):
        obs = rng.normal(size=(6, 2)).astype(np.float32)
        if t == 2:  # new episodes for two of them
            actor.restart(np.arange(6) < 2)
            states[:2] = 0.0
        actions = actor.act(actor.encode(obs))
        for member in range(6):
            outputs, following = torch.func.functional_call(
                policy.network,
                population.parameters_of(member),
                (torch.from_numpy(obs[member : member + 1]), states[member : member + 1]),
            )
            states[member] = following.detach()
            assert np.allclose(actions[member], policy.actions(outputs.detach())[0], atol=1e-5)


@pytest.mark.parametrize("cell", ["gru", pytest.param("lstm", marks=pytest.mark.slow)])
def test_memory_solves_what_cannot_be_solved_without(cell):
    kwargs = {"hidden_size": 8, "net_arch": [8], "cell": cell}
    model = train("RecurrentPolicy", make_recall, 100_000, policy_kwargs=kwargs)
    assert mean_return(model, make_recall) > 0.95
    if cell == "gru":
        assert mean_return(train("MlpPolicy", make_recall, 30_000), make_recall) < 0.6


def test_predict_carries_the_state_as_sb3_contribs_recurrent_policies_do(tmp_path):
    model = train("RecurrentPolicy", make_recall, 20_000, policy_kwargs={"hidden_size": 8, "net_arch": [8]})
    ours = mean_return(model, make_recall)
    theirs, _ = evaluate_policy(model, make_vec_env(make_recall, 4, seed=0), n_eval_episodes=200, warn=False)
    assert abs(ours - theirs) < 0.15
    obs, _ = make_recall().reset(seed=0)
    action, state = model.predict(obs)
    assert np.shape(action) == () and state.shape == (1, 8)
    # The start of an episode forgets.
    forgotten = model.predict(obs, state=state, episode_start=np.ones(1, bool))[1]
    assert np.array_equal(forgotten, state) and not np.array_equal(model.predict(obs, state=state)[1], state)
    save_policy(tmp_path / "policy.safetensors", model.policy, {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert np.array_equal(loaded.predict(obs, state)[1], model.predict(obs, state)[1])


def test_workers_and_ready_made_envs_do_with_memory_too():
    settings = {"policy_kwargs": {"hidden_size": 4, "net_arch": []}, "population_size": 8, "slice_size": 4}
    vectors = [
        train("RecurrentPolicy", make_recall, 300, n_workers=n, **settings).policy.parameters_to_vector()
        for n in (0, 2)
    ]
    assert np.array_equal(*vectors)
    model = train("RecurrentPolicy", DummyVecEnv([make_recall] * 3), 300, **settings)
    assert model.num_timesteps >= 300


LARGE = {
    "lstm": ("RecurrentPolicy", toy.make_target, {"net_arch": [64], "hidden_size": 64, "cell": "lstm"}),
    "cnn": (
        "CnnPolicy",
        toy.make_large_picture,
        {"net_arch": [64], "features_extractor_kwargs": {"features_dim": 64}},
    ),
}


@pytest.mark.promise("R11")
@pytest.mark.reliability
@pytest.mark.parametrize("kind", LARGE)
def test_large_networks_give_the_same_to_the_bit_for_any_number_of_workers(kind):
    """Scores that are not ranked, of continuous actions: the last bit of an output reaches the parameters."""
    policy, make, kwargs = LARGE[kind]
    settings = {"population_size": 16, "slice_size": 4, "n_eval_episodes": 1, "fitness_shaping": "standardize"}

    def trained(**changes):
        model = train(policy, make, 300, policy_kwargs=kwargs, **{**settings, **changes})
        assert model._n_updates >= 3
        return model.policy.parameters_to_vector()

    alone = trained(n_workers=0)
    assert np.array_equal(trained(n_workers=2), alone)
    # It would be seen: the next larger float instead of sigma is too much.
    nearly = trained(n_workers=0, sigma=float(np.nextafter(np.float32(0.2), np.float32(1))))
    assert not np.array_equal(nearly, alone) and np.allclose(nearly, alone, atol=1e-3)


def test_segments_refuse_memory():
    with pytest.raises(ConfigError, match="plain nn.Sequential"):
        EGGROLL("RecurrentPolicy", make_recall, fitness="segment", segment_steps=10)


@pytest.mark.parametrize(("settings", "named"), [({"hidden_size": 0}, "hidden_size"), ({"cell": "mgu"}, "gru, lstm")])
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        RecurrentPolicy(RecallEnv.observation_space, RecallEnv.action_space, **settings)


# Convolutions ----------------------------------------------------------------------------------------------


def test_a_cnn_learns_a_small_image_task(tmp_path):
    kwargs = {"features_extractor_class": SmallCnn}
    settings = {"n_eval_episodes": 1, "sigma": 0.1, "learning_rate": 0.03}
    model = train("CnnPolicy", make_bar, 60_000, policy_kwargs=kwargs, **settings)
    assert mean_return(model, make_bar, 32) > 0.85 * 32  # chance is a quarter
    model.save(tmp_path / "model")
    obs = make_bar().reset(seed=0)[0]
    assert np.array_equal(EGGROLL.load(tmp_path / "model").predict(obs)[0], model.predict(obs)[0])
    with pytest.raises(ConfigError, match="SmallCnn is a class of your own"):
        save_policy(tmp_path / "policy.safetensors", model.policy, {})


def test_nature_cnn_is_evaluated_exactly_and_saved(tmp_path):
    torch.manual_seed(0)
    space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    policy = CnnPolicy(space, spaces.Discrete(3), zero_last_layer=False)
    assert policy.normalizer is None
    noise = Noise(1, 0, 4, 0.05, LowRank(), 4)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 36, 36), dtype=np.uint8)
    rows = policy.features(policy.encode(torch.from_numpy(images)))
    population = Population(policy.network, noise)
    outputs = population.members(rows)
    for member in range(4):
        expected = torch.func.functional_call(
            policy.network, population.parameters_of(member), (rows[member : member + 1],)
        )
        assert torch.allclose(outputs[member], expected[0], atol=1e-4)
    save_policy(tmp_path / "policy.safetensors", policy, {})
    assert np.array_equal(load_policy(tmp_path / "policy.safetensors").predict(images)[0], policy.predict(images)[0])


def test_a_dict_with_images_goes_through_the_combined_extractor():
    vector = spaces.Box(-1, 1, (2,))
    large = spaces.Dict(picture=spaces.Box(0, 255, (3, 36, 36), np.uint8), vector=vector)
    small = spaces.Dict(picture=spaces.Box(0, 255, (3, 7, 7), np.uint8), vector=vector)
    policy = MultiInputPolicy(large, spaces.Discrete(2))
    assert type(policy.network.extractor).__name__ == "CombinedExtractor"
    # The vector is normalized, the picture is not.
    assert policy.normalizer.which.sum() == 2
    assert policy.predict(large.sample())[0].shape == ()
    assert isinstance(MultiInputPolicy(small, spaces.Discrete(2)).network, nn.Sequential)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CnnPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2)), "CnnPolicy is for images"),
        (lambda: CnnPolicy(spaces.Box(0, 255, (3, 8, 8), np.uint8), spaces.Discrete(2)), "NatureCNN refuses"),
        (lambda: MlpPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), features_extractor_class="Resnet"), "'Resnet'"),
        (lambda: MlpPolicy(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), features_extractor_kwargs={"a": 1}), "needs a"),
    ],
)
def test_what_cannot_be_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# Actions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MultiBinary", "MultiDiscrete"])
def test_actions_of_several_parts_are_learned(kind):
    model = train("MlpPolicy", make_parts(kind), 40_000, policy_kwargs={"net_arch": []}, n_eval_episodes=2)
    assert mean_return(model, make_parts(kind), 64) > 4.9
    one, many = model.predict(np.zeros(3, np.int8))[0], model.predict(np.zeros((5, 3), np.int8))[0]
    assert one.shape == (3,) and many.shape == (5, 3) and np.issubdtype(one.dtype, np.integer)
    assert model.action_space.contains(one.astype(model.action_space.dtype))


# Sampled actions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "outputs", "expected"),
    [
        (spaces.Discrete(3), [1.0, 0.0, -1.0], np.exp([1, 0, -1]) / np.exp([1, 0, -1]).sum()),
        (spaces.MultiDiscrete([2, 3]), [1.0, 0.0, 0.0, 2.0, 0.0], [1 / (1 + np.exp(-1)), 2 / (2 + np.exp(2))]),
        (spaces.MultiBinary(2), [1.0, -2.0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(2))]),
    ],
)
def test_sampled_choices_come_as_often_as_their_scores_say(space, outputs, expected):
    policy = MlpPolicy(spaces.Box(-1, 1, (2,)), space, net_arch=[])
    with torch.no_grad():
        policy.network[-1].bias.copy_(torch.tensor(outputs))
    noise = Noise(1, 0, 2000, 1e-9, LowRank(), 2000)
    actor, encoded = Actor(policy, noise, 0, 2000, action_std=0.4), np.zeros((2000, 2), np.float32)
    actions = np.concatenate([actor.act(encoded) for _ in range(10)])
    if isinstance(space, spaces.Discrete):
        shares = np.bincount(actions, minlength=3) / len(actions)
    elif isinstance(space, spaces.MultiDiscrete):
        shares = [(actions[:, 0] == 0).mean(), (actions[:, 1] != 1).mean()]
    else:
        shares = actions.mean(0)
    assert np.allclose(shares, expected, atol=0.02)
    # Pairs see the same noise; the same seed gives the same actions again.
    again = Actor(policy, noise, 0, 2000, action_std=0.4)
    first = again.act(encoded)
    assert np.array_equal(first, actions[:2000]) and np.array_equal(first[0::2], first[1::2])
    assert not np.array_equal(Actor(policy, noise, 0, 2000).act(encoded), first)


def test_sampled_boxes_have_the_deviation_that_is_set():
    policy = MlpPolicy(spaces.Box(-1, 1, (2,)), spaces.Box(-2, 2, (1,)), net_arch=[])
    noise = Noise(1, 0, 2000, 1e-9, LowRank(), 2000)
    actions = Actor(policy, noise, 0, 2000, action_std=0.1).act(np.zeros((2000, 2), np.float32))
    assert actions.std() == pytest.approx(0.2, rel=0.05) and abs(actions.mean()) < 0.02


def test_training_on_sampled_actions_is_the_same_for_any_number_of_workers_and_learns():
    settings = {"deterministic": False, "slice_size": 16, "policy_kwargs": {"net_arch": []}, "n_eval_episodes": 2}
    parts = make_parts("MultiDiscrete")
    vectors = [train("MlpPolicy", parts, 2_000, n_workers=n, **settings).policy.parameters_to_vector() for n in (0, 2)]
    assert np.array_equal(*vectors)
    model = train("MlpPolicy", parts, 40_000, **settings)
    assert mean_return(model, parts, 64) > 4.5
    with pytest.raises(ConfigError, match="deterministic"):
        EGGROLL("MlpPolicy", "HalfCheetah-v5", fitness="segment", deterministic=False)
