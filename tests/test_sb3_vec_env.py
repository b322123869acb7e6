"""Our vector envs under Gymnasium's ``make_vec`` and SB3's ``VecEnv`` contract."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from eggroll_rl.errors import ConfigError
from eggroll_rl.mujoco_tasks import TASKS, HalfCheetah, Hopper
from eggroll_rl.sb3_vec_env import Sb3VecEnv


@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_is_registered(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gym.make_vec(f"eggroll_rl:eggroll_rl/{env_id}", num_envs=2, autoreset_mode="SameStep")
    assert isinstance(envs, TASKS[env_id]) and envs.autoreset_mode is AutoresetMode.SAME_STEP
    assert envs.max_episode_steps == gym.spec(env_id).max_episode_steps
    assert gym.spec(f"eggroll_rl/{env_id}").reward_threshold == gym.spec(env_id).reward_threshold
    single = gym.make(f"eggroll_rl/{env_id}")
    assert type(single.unwrapped) is type(gym.make(env_id).unwrapped)
    envs.close()


def test_settings_reach_the_task_through_make_vec():
    envs = gym.make_vec(
        "eggroll_rl/Hopper-v5", num_envs=3, max_episode_steps=7, healthy_reward=4.0, terminate_when_unhealthy=False
    )
    assert envs.task._healthy_reward == 4.0 and envs.autoreset_mode is AutoresetMode.NEXT_STEP
    envs.reset(seed=0)
    for _ in range(7):
        *_, truncations, _ = envs.step(envs.action_space.sample())
    assert truncations.all()


def test_sb3_sees_what_dummy_vec_env_shows():
    ours = Sb3VecEnv(Hopper(3, max_episode_steps=25, autoreset_mode="SameStep"))
    theirs = DummyVecEnv([lambda: gym.make("Hopper-v5", max_episode_steps=25)] * 3)
    ours.seed(5), theirs.seed(5)
    assert np.array_equal(ours.reset(), theirs.reset())
    assert ours.reset_infos == theirs.reset_infos
    rng, ends = np.random.default_rng(0), 0
    for _ in range(80):
        actions = rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        obs, rewards, dones, infos = ours.step(actions)
        expected = theirs.step(actions)
        assert np.array_equal(obs, expected[0]) and np.array_equal(dones, expected[2])
        assert np.array_equal(rewards, expected[1]) and rewards.dtype == expected[1].dtype
        for info, other in zip(infos, expected[3], strict=True):
            assert np.array_equal(info.pop("terminal_observation", 0), other.pop("terminal_observation", 0))
            assert info == other
        assert ours.reset_infos == theirs.reset_infos
        ends += dones.sum()
    assert ends > 6
    ours.close(), theirs.close()


def test_ppo_trains_on_it_under_sb3s_wrappers():
    envs = VecNormalize(VecMonitor(Sb3VecEnv(HalfCheetah(4, max_episode_steps=20, autoreset_mode="SameStep"))))
    model = PPO("MlpPolicy", envs, n_steps=32, batch_size=64, n_epochs=1, seed=0, device="cpu")
    model.learn(256)
    assert {e["l"] for e in model.ep_info_buffer} == {20}
    envs.close()


def test_attributes_and_methods_reach_the_vector_env():
    envs = Sb3VecEnv(HalfCheetah(2, autoreset_mode="SameStep"))
    assert envs.get_attr("dt") == [envs.envs.dt] * 2 and envs.get_attr("dt", [1]) == [envs.envs.dt]
    assert envs.get_attr("action_space") == [envs.action_space] * 2
    envs.set_attr("mark", 3)
    assert envs.envs.mark == 3
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit) == [False, False]
    for call in (lambda: envs.set_attr("mark", 3, indices=0), lambda: envs.env_method("place", indices=0)):
        with pytest.raises(ConfigError, match="leave indices away"):
            call()


def test_another_autoreset_mode_is_refused():
    with pytest.raises(ConfigError, match="autoreset_mode='SameStep'"):
        Sb3VecEnv(HalfCheetah(2))


def test_infos_of_vector_wrappers_arrive():
    envs = Sb3VecEnv(RecordEpisodeStatistics(HalfCheetah(2, max_episode_steps=3, autoreset_mode="SameStep")))
    envs.reset()
    for _ in range(3):
        *_, infos = envs.step(np.zeros((2, 6), np.float32))
    assert [info["episode"]["l"] for info in infos] == [3, 3]
