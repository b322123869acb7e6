import gymnasium as gym
import numpy as np
import pytest
import toy

from eggroll_rl.config import RunConfig
from eggroll_rl.envs import (
    check_time_limit,
    env_factory,
    find_spec,
    list_presets,
    load_preset,
    read_toml,
    resolve_wrappers,
    time_limit,
)
from eggroll_rl.errors import ConfigError


@pytest.mark.parametrize("name", list(list_presets()))
def test_every_preset_makes_a_model(name):
    config = RunConfig.from_dict(load_preset(name), name)
    assert config.env_id == name
    config.model(config.factory())


def test_the_three_promised_presets_are_there():
    assert {"HalfCheetah-v5", "CartPole-v1", "Pendulum-v1"} <= set(list_presets())


def test_a_preset_of_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "CartPole-v1.toml").write_text('env_id = "CartPole-v1"\ntotal_timesteps = 7\n')
    assert load_preset("CartPole-v1")["total_timesteps"] == 7
    assert load_preset("envs/CartPole-v1.toml")["total_timesteps"] == 7
    assert load_preset("Acrobot-v1") == {"env_id": "Acrobot-v1"}


def test_damaged_and_missing_files_are_named(tmp_path):
    (tmp_path / "bad.toml").write_text("env_id = ")
    with pytest.raises(ConfigError, match="bad.toml is not valid TOML"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot read .*none.toml"):
        load_preset(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"env_id": "X-v0", "sigma": 1}, "unknown setting 'sigma'"),
        ({"env_id": "X-v0", "total_timestep": 1}, "did you mean total_timesteps"),
        ({"env_id": "X-v0", "eggroll": {"populationsize": 2}}, "did you mean population_size"),
        ({"env_id": "X-v0", "eggroll": {"seed": 2}}, r"\[eggroll\]: unknown setting 'seed'"),
        ({"env_id": "X-v0", "eggroll": 3}, "eggroll must be a dict, got 3"),
        ({"env_id": "X-v0", "env_kwargs": 3}, "env_kwargs must be a dict, got 3"),
        ({"env_id": "X-v0", "wrappers": "x"}, "wrappers must be a list, got 'x'"),
        ({}, "env_id must be the id"),
        ({"env_id": "X-v0", "total_timesteps": 1e6}, "total_timesteps must be a whole number.*got 1000000.0"),
        ({"env_id": "X-v0", "seed": -1}, "seed must be a whole number, at least 0, got -1"),
    ],
)
def test_wrong_settings_are_named(table, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(table, "file.toml")


def test_a_configuration_survives_its_file(tmp_path):
    config = RunConfig(
        "CartPole-v1", {"sutton_barto_reward": True}, [{"name": "gymnasium.wrappers.ClipReward", "min_reward": -1}],
        max_episode_steps=30, eggroll={"sigma": "lin_0.1", "policy_kwargs": {"net_arch": [4, 4]}},
    )  # fmt: skip
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert RunConfig.from_dict(read_toml(tmp_path / "config.toml"), "x") == config


def test_unknown_envs_are_answered_with_near_names():
    with pytest.raises(ConfigError, match="did you mean HalfCheetah-v5"):
        find_spec("HalfCheetah-v9")
    with pytest.raises(ConfigError, match="did you mean CartPole-v1"):
        find_spec("cartpole-v1")
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        find_spec("no_such_module:Env-v0")


def test_kwargs_limits_and_wrappers_reach_the_env():
    wrappers = resolve_wrappers([{"name": "gymnasium.wrappers.ClipReward", "min_reward": -1, "max_reward": 0.5}])
    env = env_factory("CartPole-v1", {"sutton_barto_reward": False}, 12, wrappers)()
    assert time_limit(env) == 12
    env.reset(seed=0)
    assert env.step(0)[1] == 0.5
    assert time_limit(env_factory("CartPole-v1", max_episode_steps=12).with_cap(5)()) == 5


def test_only_gymnasium_and_named_packages_are_imported():
    with pytest.raises(ConfigError, match="outside Gymnasium: allow it with --gym-packages os"):
        resolve_wrappers([{"name": "os.system"}])
    with pytest.raises(ConfigError, match=r"is not a gymnasium\.Wrapper"):
        resolve_wrappers([{"name": "toy.make_target"}], ("toy",))
    with pytest.raises(ConfigError, match="may do more than transform"):
        resolve_wrappers([{"name": "gymnasium.wrappers.RecordVideo", "video_folder": "/tmp/x"}])
    with pytest.raises(ConfigError, match="ClipReward refuses"):
        wrappers = resolve_wrappers([{"name": "gymnasium.wrappers.ClipReward", "colour": 1}])
        env_factory("CartPole-v1", wrappers=wrappers)()
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_wrappers([{"name": "gymnasium.wrappers.Nothing"}])
    with pytest.raises(ConfigError, match="allow it with --gym-packages some_package"):
        RunConfig("some_package:Env-v0").factory()
    with pytest.raises(ConfigError, match="--gym-packages no_such_module"):
        RunConfig("CartPole-v1").factory(("no_such_module",))


def test_an_env_without_a_limit_is_refused():
    with pytest.raises(ConfigError, match="CliffWalking-v1 shows no time limit"):
        check_time_limit(gym.make("CliffWalking-v1"))
    check_time_limit(toy.make_target())
    assert time_limit(toy.make_target()) == 50


def test_an_env_that_truncates_by_itself_has_a_limit_of_its_own(rng_state):
    class Truncates(toy.TargetEnv):
        def step(self, action):
            obs, reward, _, _, info = super().step(action)
            return obs, reward, False, self.t >= 17, info

    check_time_limit(Truncates())
    assert rng_state()
    with pytest.raises(ConfigError, match="TargetEnv shows no time limit"):
        check_time_limit(toy.TargetEnv())


def test_an_env_function_must_return_an_env():
    with pytest.raises(ConfigError, match="must return a gymnasium.Env, got int"):
        env_factory(lambda: 3)()
    with pytest.raises(ConfigError, match="must be an id"):
        env_factory(3)


@pytest.mark.parametrize("source", ["BipedalWalker-v3", lambda: gym.make("BipedalWalker-v3")])
def test_an_episode_of_bipedal_walker_does_not_depend_on_those_before(source):
    """Gymnasium's own does: it keeps its Box2D world."""

    def play(env, seed):
        generator = np.random.default_rng(seed)
        observations, ended = [env.reset(seed=seed)[0]], False
        while not ended and len(observations) < 150:
            obs, _, ended, _, _ = env.step(generator.uniform(-1, 1, 4).astype(np.float32))
            observations.append(obs)
        return np.concatenate(observations)

    def later_differs(make):
        env = make()
        for seed in range(7):
            play(env, seed)
        return not np.array_equal(play(env, 7), play(make(), 7))

    assert later_differs(lambda: gym.make("BipedalWalker-v3"))
    assert not later_differs(env_factory(source))
