"""Dict and image observations through training, evaluation and run folders."""

import numpy as np
import pytest
import toy
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from eggroll_rl import EGGROLL
from eggroll_rl.agents import load_policy, save_policy
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, EpisodeError
from eggroll_rl.evaluation import batched, evaluate
from eggroll_rl.serial_vector import SerialVectorEnv

SEGMENTS = {"fitness": "segment", "segment_steps": 50, "n_segments": 8, "slice_size": 4, "batch_size": 100}
EPISODES = {"population_size": 64, "slice_size": 16, "n_eval_episodes": 2, "sigma": 0.05, "learning_rate": 0.02}
KINDS = {
    "Dict": ("MultiInputPolicy", toy.make_goal),
    "Dict, linear": ("LinearPolicy", toy.make_goal),
    "image": ("MlpPolicy", toy.make_picture),
}


def train(kind, n_workers, steps, settings):
    policy, make = KINDS[kind]
    return EGGROLL(policy, make, n_workers=n_workers, seed=0, **settings).learn(steps, log_interval=None)


def returns(model, kind, n=64):
    return np.mean(evaluate(batched(lambda obs: model.predict(obs)[0]), env_factory(KINDS[kind][1]), range(n)).returns)


@pytest.mark.parametrize(("kind", "settings"), [("Dict", SEGMENTS), ("image", EPISODES)], ids=["Dict", "image"])
def test_training_uses_them_and_workers_change_nothing(kind, settings):
    models = [train(kind, n_workers, 2_000, settings) for n_workers in (0, 2)]
    vectors = [model.policy.parameters_to_vector() for model in models]
    assert np.array_equal(*vectors) and models[0].num_timesteps == models[1].num_timesteps


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_is_learned(kind):
    model = train(kind, 2, 40_000, EPISODES)
    blind = train(kind, 0, 1, EPISODES)
    # The middle of the bounds is what a policy that sees nothing settles on; both see where the column is.
    assert returns(model, kind) > returns(blind, kind) + 2


def test_a_ready_made_env_gives_the_same_kind_of_rows():
    model = EGGROLL("MultiInputPolicy", DummyVecEnv([toy.make_goal] * 3), population_size=8, seed=0).learn(100)
    assert model.policy.normalizer.count > 0
    columns = model.policy.normalizer.mean.reshape(-1)
    # 72 bytes of the picture in [0, 1], the goal, and a one-hot code, whose shares add up to 1.
    assert len(columns) == 75 and columns[:72].max() <= 200 / 255 and columns[73:].sum() == pytest.approx(1)


def test_a_saved_policy_predicts_the_same(tmp_path):
    model = train("Dict", 0, 500, EPISODES)
    save_policy(tmp_path / "policy.safetensors", model.policy, {})
    loaded = load_policy(tmp_path / "policy.safetensors")
    obs = SerialVectorEnv([toy.make_goal] * 5).reset(seed=3)[0]
    assert np.array_equal(loaded.predict(obs)[0], model.predict(obs)[0])
    model.save(tmp_path / "model")
    assert np.array_equal(EGGROLL.load(tmp_path / "model").predict(obs)[0], model.predict(obs)[0])


def test_the_wrong_policy_is_refused():
    with pytest.raises(ConfigError, match="policy must be 'MultiInputPolicy'"):
        EGGROLL("MlpPolicy", toy.make_goal)
    with pytest.raises(ConfigError, match="MultiInputPolicy is for a Dict"):
        EGGROLL("MultiInputPolicy", toy.make_target)


def test_a_part_that_is_not_finite_is_named():
    class Broken(toy.GoalEnv):
        def _obs(self):
            return {**super()._obs(), "goal": np.array([np.inf])}

    with pytest.raises(EpisodeError, match="observation is not finite"):
        EGGROLL("MultiInputPolicy", lambda: toy.TimeLimit(Broken(), 9), n_workers=0, population_size=4).learn(10)


def test_rows_of_a_dict_are_copies():
    envs = SerialVectorEnv([toy.make_goal] * 2)
    obs, _ = envs.reset(seed=0)
    kept = {key: part.copy() for key, part in obs.items()}
    envs.step(np.zeros((2, 2), np.float32))
    assert all(np.array_equal(obs[key], kept[key]) for key in kept) and isinstance(envs.observation_space, spaces.Dict)
