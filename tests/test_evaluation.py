import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import toy
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, ConsentError, EpisodeError, RunFolderError
from eggroll_rl.evaluation import batched, evaluate, find_algorithm, load_agent
from eggroll_rl.policies import LinearPolicy, MlpPolicy


def test_one_episode_per_seed_with_the_envs_own_reward():
    env = toy.make_target()
    policy = LinearPolicy(env.observation_space, env.action_space, zero_last_layer=False)
    seeds = [*range(40), 3]
    result = evaluate(lambda obs: policy.predict(obs)[0], env_factory(toy.make_target), seeds)
    assert result.returns[3] == result.returns[40]
    for i in (0, 17, 39):
        obs, _ = env.reset(seed=i)
        total, length, done = 0.0, 0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(policy.predict(obs)[0])
            total, length, done = total + reward, length + 1, terminated or truncated
        assert result.lengths[i] == length and result.returns[i] == pytest.approx(total, abs=1e-5)
    assert result.mean == pytest.approx(np.mean(result.returns)) and result.std == pytest.approx(np.std(result.returns))


def test_an_env_that_raises_is_named():
    with pytest.raises(EpisodeError, match="evaluation, episode 0.*ZeroDivisionError"):
        evaluate(lambda obs: np.zeros((len(obs), 2), np.float32), env_factory(toy.make_fault("raise")), [1, 2])


def test_the_episode_of_a_seed_is_the_same_alone_and_among_others():
    factory = env_factory("HalfCheetah-v5", max_episode_steps=300)
    env = factory()
    policy = MlpPolicy(env.observation_space, env.action_space, net_arch=[32], zero_last_layer=False)
    predict = batched(lambda obs: policy.predict(obs)[0])
    alone = evaluate(predict, factory, [5])
    assert evaluate(predict, factory, [3, 4, 5, 6]).returns[2] == alone.returns[0]
    assert evaluate(predict, factory, range(40)).returns[5] == alone.returns[0]


@pytest.mark.parametrize("fault", ["nan_reward", "nan_obs"])
def test_what_is_not_finite_is_named(fault):
    with pytest.raises(EpisodeError, match="evaluation, seed 9, step 3: .*not finite"):
        evaluate(lambda obs: np.zeros((len(obs), 2), np.float32), env_factory(toy.make_fault(fault, seed=9)), [8, 9])


@pytest.fixture(scope="module")
def ppo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = PPO("MlpPolicy", env, n_steps=64, batch_size=64, n_epochs=1, seed=0, device="cpu")
    model.learn(128)
    model.save(folder / "model")
    env.save(str(folder / "statistics.pkl"))
    return model, env, folder


@pytest.mark.promise("R13")
def test_an_sb3_model_needs_consent_and_its_names(ppo):
    path = ppo[2] / "model.zip"
    with pytest.raises(ConfigError, match="--env and --algo"):
        load_agent(path)
    with pytest.raises(ConsentError, match="--trust-pickle"):
        load_agent(path, env_id="Pendulum-v1", algo="ppo")
    with pytest.raises(ConfigError, match="algo must be one of eggroll, a2c.*'pppo'"):
        load_agent(path, env_id="Pendulum-v1", algo="pppo", trust_pickle=True)
    with pytest.raises(RunFolderError, match="does not exist"):
        load_agent(ppo[2] / "none.zip")
    (ppo[2] / "broken.zip").write_bytes(b"PK no zip")
    with pytest.raises(RunFolderError, match="cannot load .*broken.zip as ppo"):
        load_agent(ppo[2] / "broken.zip", env_id="Pendulum-v1", algo="ppo", trust_pickle=True)


def test_an_sb3_model_acts_as_in_sb3_with_its_statistics(ppo):
    model, env, folder = ppo
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    agent = load_agent(folder / "model.zip", env_id="Pendulum-v1", algo="ppo", trust_pickle=True)
    assert np.allclose(agent.predict(obs), model.predict(obs, deterministic=True)[0], atol=1e-5)
    agent = load_agent(
        folder / "model.zip",
        env_id="Pendulum-v1",
        algo="ppo",
        trust_pickle=True,
        vec_normalize=folder / "statistics.pkl",
    )
    normalized = env.normalize_obs(obs)
    assert not np.allclose(normalized, obs)
    assert np.allclose(agent.predict(obs), model.predict(normalized, deterministic=True)[0], atol=1e-5)
    (folder / "vecnormalize.pkl").write_bytes((folder / "statistics.pkl").read_bytes())
    found = load_agent(folder / "model.zip", env_id="Pendulum-v1", algo="ppo", trust_pickle=True)
    assert np.array_equal(found.predict(obs), agent.predict(obs))
    assert len(evaluate(agent.predict, agent.factory, [0]).returns) == 1


def test_algorithms_are_found_in_any_case():
    assert find_algorithm("PPO") is PPO
    assert find_algorithm("eggroll").__name__ == "EGGROLL"


def test_missing_and_foreign_folders_are_named(tmp_path):
    with pytest.raises(RunFolderError, match="is not there"):
        load_agent(tmp_path / "none")
    with pytest.raises(RunFolderError, match="no config.toml"):
        load_agent(tmp_path)


PUBLISHED = sorted((Path(__file__).parent.parent / "agents").glob("*/*/results.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_agents_load_and_act_as_they_did(path):
    results = json.loads(path.read_text())
    for which, recorded in (("policy", results["evaluation"]), ("best", results["best"])):
        agent = load_agent(path.parent, which)
        again = evaluate(agent.predict, agent.factory, recorded["seeds"][:2])
        # Not to the bit: another processor may round differently.
        assert again.returns == pytest.approx(recorded["returns"][:2], rel=0.5)
