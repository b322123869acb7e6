"""Both vector envs: the serial one against the env itself, the MuJoCo one against Gymnasium bit by bit."""

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import toy
from gymnasium.vector import AutoresetMode

from eggroll_rl import EGGROLL
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, EpisodeError
from eggroll_rl.evaluation import evaluate
from eggroll_rl.mujoco_tasks import TASKS, HalfCheetah
from eggroll_rl.mujoco_vector import MujocoVectorEnv, mujoco_warnings_silenced
from eggroll_rl.serial_vector import SerialVectorEnv, SubEnvError


def test_the_serial_env_runs_the_episodes_of_its_sub_envs():
    envs, single = SerialVectorEnv([toy.make_target] * 3), toy.make_target()
    rng = np.random.default_rng(0)
    actions = rng.uniform(0, 1, (12, 3, 2)).astype(np.float32)
    obs, _ = envs.reset(seed=[7, 8, 9])
    history = [obs]
    rewards, ends = np.zeros((12, 3)), np.zeros((12, 3), bool)
    for t in range(12):
        obs, rewards[t], terminations, truncations, _ = envs.step(actions[t])
        ends[t] = terminations | truncations
        history.append(obs)
    for i in range(3):
        assert np.array_equal(history[0][i], single.reset(seed=7 + i)[0])
        length = int(np.flatnonzero(ends[:, i])[0]) + 1
        for t in range(length):
            obs, reward, terminated, truncated, _ = single.step(actions[t, i])
            assert np.array_equal(history[t + 1][i], obs)
            assert rewards[t, i] == reward
        assert (terminated or truncated) and ends[:, i].sum() == 1
        # Afterwards nothing moves.
        assert not rewards[length:, i].any()
        assert all(np.array_equal(h[i], obs) for h in history[length + 1 :])


def test_reset_by_mask_leaves_the_others_alone():
    envs = SerialVectorEnv([toy.make_target] * 2)
    first, _ = envs.reset(seed=3)
    assert np.array_equal(first[1], toy.make_target().reset(seed=4)[0])
    for _ in range(2):
        moved, *_ = envs.step(np.zeros((2, 2), np.float32))
    obs, _ = envs.reset(seed=[3, None], options={"reset_mask": np.array([True, False])})
    assert np.array_equal(obs[0], first[0]) and np.array_equal(obs[1], moved[1])


def test_observations_are_not_a_reused_buffer():
    envs = SerialVectorEnv([toy.make_target])
    obs, _ = envs.reset(seed=0)
    copy = obs.copy()
    envs.step(np.zeros((1, 2), np.float32))
    assert np.array_equal(obs, copy)


def test_infos_of_finished_episodes_arrive():
    envs = SerialVectorEnv([toy.make_target] * 2)
    envs.reset(seed=0)
    while True:
        _, _, terminations, _, infos = envs.step(np.zeros((2, 2), np.float32))
        if terminations.any():
            break
        assert infos == {}
    assert infos["_is_success"].tolist() == terminations.tolist()


def test_a_function_that_returns_one_env_again_and_again_is_refused():
    env = toy.make_target()
    with pytest.raises(ConfigError, match="same env twice"):
        SerialVectorEnv([lambda: env] * 2)


@pytest.mark.parametrize("fault", ["raise", "old_api"])
def test_a_sub_env_that_raises_is_named(fault):
    envs = SerialVectorEnv([toy.make_target, toy.make_fault(fault, at=1)])
    envs.reset(seed=0)
    with pytest.raises(SubEnvError, match="sub-env 1 raised in step") as caught:
        envs.step(np.zeros((2, 2), np.float32))
    assert "Traceback" in caught.value.text


def test_a_finished_simulation_is_left_alone_until_its_reset():
    envs = env_factory("HalfCheetah-v5", max_episode_steps=4).vector(2)
    envs.reset(seed=[1, 2])
    actions = np.ones((2, 6), np.float32)
    for _ in range(2):
        envs.step(actions)
    envs.reset(seed=[5, None], options={"reset_mask": np.array([True, False])})
    for _ in range(2):
        obs, _, _, truncations, _ = envs.step(actions)
    assert truncations.tolist() == [False, True]
    state = envs.qpos[1].copy(), envs.qvel[1].copy(), envs.batch.time[1]
    later, rewards, _terminations, truncations, _ = envs.step(actions)
    assert np.array_equal(envs.qpos[1], state[0]) and np.array_equal(envs.qvel[1], state[1])
    assert envs.batch.time[1] == state[2]
    assert np.array_equal(later[1], obs[1]) and rewards[1] == 0 and not truncations[1]
    assert not np.array_equal(later[0], obs[0])


def test_wrapped_and_other_envs_go_through_gymnasium():
    wrapped = env_factory("HalfCheetah-v5", wrappers=((gym.wrappers.ClipAction, {}),))
    assert isinstance(wrapped.vector(1), SerialVectorEnv)
    assert isinstance(env_factory("HalfCheetah-v5").vector(1), MujocoVectorEnv)
    assert isinstance(env_factory("CartPole-v1").vector(1), SerialVectorEnv)


def test_no_warning_file_is_left(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    env_factory("HalfCheetah-v5").vector(1).close()
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().err == ""


@pytest.fixture
def absurd_cheetah(tmp_path):
    """Half-cheetah with motors a million times too strong: its physics diverges within a few steps."""
    path = Path(gym.envs.mujoco.__file__).parent / "assets" / "half_cheetah.xml"
    text = re.sub(r'gear="(\d+)"', r'gear="\g<1>000000"', path.read_text())
    (tmp_path / "absurd.xml").write_text(text)
    return {"xml_file": str(tmp_path / "absurd.xml")}


def test_diverged_physics_is_marked_and_goes_on_as_gymnasiums(absurd_cheetah, tmp_path, monkeypatch, capfd):
    envs = HalfCheetah(2, autoreset_mode="Disabled", **absurd_cheetah)
    with mujoco_warnings_silenced():
        single = gym.make("HalfCheetah-v5", **absurd_cheetah)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rng, marked = np.random.default_rng(0), []
    envs.reset(seed=[0, 1]), single.reset(seed=0)
    for step in range(20):
        actions = rng.uniform(-1, 1, (2, 6)).astype(np.float32) * (step > 4)
        actions[1] = 0  # this one stands still
        obs, rewards, _, _, infos = envs.step(actions)
        with mujoco_warnings_silenced():
            expected, reward, *_ = single.step(actions[0])
        assert np.array_equal(obs[0], expected) and rewards[0] == reward
        marked.append(infos["diverged"].tolist() if "diverged" in infos else None)
    assert marked[:5] == [None] * 5 and [True, False] in marked and [True, True] not in marked
    assert not list((tmp_path / "here").iterdir()) and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "wrappers", [(), ((gym.wrappers.RescaleAction, {"min_action": -1, "max_action": 1}),)], ids=["batch", "serial"]
)
def test_a_member_whose_physics_diverged_is_reported(absurd_cheetah, wrappers):
    factory = env_factory("HalfCheetah-v5", absurd_cheetah, wrappers=wrappers)
    model = EGGROLL("MlpPolicy", factory, population_size=4, slice_size=4, sigma=1.0, n_workers=0, seed=0)
    with pytest.raises(EpisodeError, match=r"generation 0, member \d, episode 0, step \d+, .*: the physics diverged"):
        model.learn(1)
    with pytest.raises(EpisodeError, match=r"evaluation, seed 3, step \d+: the physics diverged"):
        evaluate(lambda obs: np.ones((len(obs), 6), np.float32), factory, [3])


@pytest.mark.parametrize("env_id", ["Hopper-v5", "Ant-v5"])
def test_threads_change_no_number(env_id):
    several = [TASKS[env_id](5, 100, AutoresetMode.SAME_STEP, num_threads=n) for n in (1, 2, 3)]
    rng = np.random.default_rng(0)
    assert len({envs.reset(seed=7)[0].tobytes() for envs in several}) == 1
    for _ in range(150):
        actions = rng.uniform(-1, 1, several[0].action_space.shape)
        steps = [envs.step(actions) for envs in several]
        for part in range(4):
            assert len({step[part].tobytes() for step in steps}) == 1
    for envs in several:
        envs.close()
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        TASKS[env_id](2, num_threads=0)
