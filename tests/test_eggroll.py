import itertools

import numpy as np
import pytest
import torch
import toy
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from test_workers import digest

from eggroll_rl import EGGROLL
from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.config import RunConfig
from eggroll_rl.envs import env_factory, load_preset
from eggroll_rl.errors import ConfigError, EpisodeError
from eggroll_rl.evaluation import acting, evaluate, load_agent
from eggroll_rl.policies import LinearPolicy, MlpPolicy
from eggroll_rl.training import train


def make(env=toy.make_target, **settings):
    small = {"population_size": 16, "slice_size": 8, "policy_kwargs": {"net_arch": [8]}}
    return EGGROLL("MlpPolicy", env, **{"seed": 0, "n_workers": 0, **small, **settings})


# Learning --------------------------------------------------------------------------------------------------


def test_it_learns_a_target():
    model = make(population_size=32, sigma=0.1, learning_rate=0.05)
    before, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=50, warn=False)
    model.learn(25_000, log_interval=None)
    after, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=50, warn=False)
    # The best possible return is 3 per step, about 21; without any action it is about 14.
    assert after > before + 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("env", "reached"), [("CartPole-v1", 475), ("Pendulum-v1", -250)])
def test_presets_of_the_classic_tasks_reach_their_thresholds(env, reached, seed, tmp_path):
    config = RunConfig.from_dict({**load_preset(env), "seed": seed, "eval_freq": 0}, env)
    train(config, tmp_path / "run", progress_bar=False)
    agent = load_agent(tmp_path / "run")
    assert evaluate(agent.predict, agent.factory, range(100)).mean >= reached


def test_the_alive_bonus_offset_changes_fitness_and_not_the_reported_return():
    plain, offset = make(), make(alive_bonus_offset=-3.0)
    plain.learn(1)
    offset.learn(1)
    assert [e["r"] for e in plain.ep_info_buffer] == [e["r"] for e in offset.ep_info_buffer]
    lengths = np.array([e["l"] for e in plain.ep_info_buffer])
    returns = np.array([e["r"] for e in plain.ep_info_buffer])
    assert offset.last_generation["fitness_mean"] == pytest.approx((returns - 3 * lengths).mean())
    assert plain.last_generation["fitness_mean"] == pytest.approx(returns.mean())


def test_the_episode_cap_is_for_training_and_serves_where_there_is_no_limit():
    model = make(toy.TargetEnv, max_episode_steps=3)
    model.learn(1)
    assert {e["l"] for e in model.ep_info_buffer} == {3}
    # Where there is a limit, the env that SB3 sees keeps it.
    model = make(max_episode_steps=3)
    _, lengths = evaluate_policy(model, model.get_env(), n_eval_episodes=5, return_episode_rewards=True, warn=False)
    assert min(lengths) > 3
    with pytest.raises(ConfigError, match="TargetEnv shows no time limit.*max_episode_steps"):
        make(toy.TargetEnv)


def test_fitness_is_the_mean_over_a_members_episodes():
    model = make(n_eval_episodes=3)
    model.learn(1)
    returns = np.array([e["r"] for e in model.ep_info_buffer]).reshape(16, 3)
    assert model.last_generation["fitness_max"] == pytest.approx(returns.mean(axis=1).max())


def test_steps_of_all_members_are_counted():
    model = make()
    model.learn(1)
    assert model.num_timesteps == sum(e["l"] for e in model.ep_info_buffer)


# SB3's contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["MlpPolicy", "LinearPolicy", LinearPolicy])
def test_save_and_load_keep_everything(policy, tmp_path):
    model = EGGROLL(policy, toy.make_target, seed=0, n_workers=0)
    model.learn(500)
    model.save(tmp_path / "model")
    loaded = EGGROLL.load(tmp_path / "model")
    assert digest(loaded) == digest(model)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.array_equal(model.predict(obs)[0], loaded.predict(obs)[0])
    with pytest.raises(ConfigError, match="needs an env"):
        loaded.learn(10)


def test_a_loaded_model_continues_as_the_one_that_went_on(tmp_path):
    whole, first = make(), make()
    whole.learn(1000)
    first.learn(1000)
    first.save(tmp_path / "model")
    second = EGGROLL.load(tmp_path / "model", env=toy.make_target)
    for model in (whole, second):
        model.learn(1000, reset_num_timesteps=False)
    assert digest(whole) == digest(second)
    assert whole.num_timesteps == second.num_timesteps


def test_a_second_learn_goes_on_with_new_noise():
    model = make()
    model.learn(100)
    first = model.evolution_strategy.generation
    model.learn(100)
    assert model.evolution_strategy.generation == 2 * first
    assert model.num_timesteps < 250


@pytest.mark.parametrize("n_envs", [1, 3])
def test_load_takes_another_env_and_trains_on_it(n_envs, tmp_path):
    make().save(tmp_path / "model")
    env = make_vec_env(toy.make_target, n_envs, seed=0)
    model = EGGROLL.load(tmp_path / "model", env=env)
    steps = []
    inner, model.env.step_wait = model.env.step_wait, lambda: steps.append(1) or inner()
    model.learn(100)
    assert steps and model.n_envs == n_envs
    model.set_env(toy.make_target)
    model.learn(100)
    assert model.n_envs == 1


def test_an_env_function_that_cannot_be_pickled_is_not_in_the_way_of_saving(tmp_path):
    lock = __import__("threading").Lock()
    make(lambda: toy.make_target() if lock else None).save(tmp_path / "model")
    assert EGGROLL.load(tmp_path / "model", env=toy.make_target).learn(10)


def test_more_changed_settings_on_load(tmp_path):
    make().save(tmp_path / "model")
    model = EGGROLL.load(tmp_path / "model", env=toy.make_target, sigma=0.2, env_kwargs={"offset": 1.0})
    model.learn(1)
    assert model.last_generation["sigma"] == 0.2
    assert model.policy.normalizer.mean.max() > 0.5
    with pytest.raises(ConfigError, match="sigma must be"):
        EGGROLL.load(tmp_path / "model", sigma=-1)
    # What RL Zoo's enjoy does.
    zoo = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    assert EGGROLL.load(tmp_path / "model", custom_objects=zoo, seed=1).predict(np.zeros(3, np.float32))


def test_a_second_learn_starts_its_schedules_again():
    model = make(sigma="lin_0.1")
    sigmas = []

    class Look(GenerationCallback):
        def on_generation_end(self):
            sigmas.append(self.model.last_generation["sigma"])
            return True

    for _ in range(2):
        model.learn(400, callback=Look())
    assert sigmas.count(0.1) == 2


def test_success_is_counted():
    model = make()
    model.learn(200)
    assert set(model.ep_success_buffer) == {True}


def test_a_model_trained_with_a_cap_takes_a_ready_made_env(tmp_path):
    make(max_episode_steps=3).save(tmp_path / "model")
    model = EGGROLL.load(tmp_path / "model", env=DummyVecEnv([toy.make_target]), learning_rate="lin_0.1")
    evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)


def test_changed_settings_on_load(tmp_path):
    make().save(tmp_path / "model")
    model = EGGROLL.load(tmp_path / "model", env=toy.make_target, population_size=4)
    model.learn(1)
    assert len(model.ep_info_buffer) == 4


def test_seeding_does_what_sb3_says_and_nothing_else(rng_state):
    make(seed=None, n_workers=0).learn(200)
    assert rng_state()
    set_random_seed(123)
    expected = torch.get_rng_state(), np.random.get_state()[1].copy()
    model = make(seed=123)
    model.learn(200)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert np.array_equal(np.random.get_state()[1], expected[1])


def test_no_seed_draws_one_and_keeps_it(tmp_path):
    first, second = make(seed=None), make(seed=None)
    assert first.noise_seed != second.noise_seed
    first.learn(300)
    repeated = make(seed=None)
    repeated.noise_seed = first.noise_seed
    repeated._setup_model()
    repeated.learn(300)
    assert digest(first) == digest(repeated)


def test_schedules_follow_the_progress():
    model = make(learning_rate="lin_0.1", sigma=LinearSchedule(0.2, 0.1, 1.0))
    seen = []

    class Look(GenerationCallback):
        def on_generation_end(self):
            seen.append((self.model.last_generation["sigma"], self.model.last_generation["learning_rate"]))
            return True

    model.learn(1000, callback=Look())
    assert seen[0] == (0.2, 0.1)
    assert all(a > b and c > d > 0 for (a, c), (b, d) in itertools.pairwise(seen))


def test_the_usual_keys_are_logged(tmp_path):
    model = make()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(500)
    model.logger.close()
    header = (tmp_path / "progress.csv").read_text().splitlines()[0].split(",")
    usual = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "time/total_timesteps", "time/iterations"}
    assert usual | {"train/learning_rate", "train/n_updates", "train/sigma", "rollout/fitness_max"} <= set(header)


def test_the_progress_bar_needs_nothing_more(capsys):
    make().learn(300, progress_bar=True)
    assert "EGGROLL" in capsys.readouterr().err


# Callbacks -------------------------------------------------------------------------------------------------


class StopAt(BaseCallback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def _on_step(self):
        return self.num_timesteps < self.step


def test_a_callback_that_says_stop_ends_the_run_before_the_update():
    model = make()
    before = digest(model)
    model.learn(10_000, callback=StopAt(40))
    assert model.num_timesteps == 40
    assert digest(model) == before and model.evolution_strategy.generation == 0


def test_function_callbacks_and_max_episodes_stop():
    model = make()
    model.learn(10_000, callback=lambda locals_, globals_: False)
    assert model.num_timesteps == 1
    model = make()
    model.learn(10_000, callback=StopTrainingOnMaxEpisodes(5))
    assert len(model.ep_info_buffer) == 5


def test_eval_and_checkpoint_callbacks_come_when_they_should(tmp_path):
    model = make()
    env = DummyVecEnv([toy.make_target])
    evaluation = EvalCallback(env, None, None, 2, 300, best_model_save_path=tmp_path, verbose=0, warn=False)
    model.learn(1000, callback=[evaluation, CheckpointCallback(400, str(tmp_path), verbose=0)])
    assert evaluation.n_calls == model.num_timesteps >= 1000
    assert (tmp_path / "rl_model_400_steps.zip").exists() and (tmp_path / "rl_model_800_steps.zip").exists()
    assert EGGROLL.load(tmp_path / "best_model").evolution_strategy.generation >= 1


def test_during_callbacks_the_policy_holds_the_mean():
    model = make()
    mean = digest(model)
    seen = set()

    class Look(BaseCallback):
        def _on_step(self):
            seen.add(digest(self.model))
            return self.num_timesteps < 30

    model.learn(1000, callback=Look())
    assert seen == {mean}


def test_replaying_steps_changes_no_result():
    plain, replayed = make(), make()
    plain.learn(1000)
    replayed.learn(1000, callback=StopAt(10**9))
    assert digest(plain) == digest(replayed) and plain.num_timesteps == replayed.num_timesteps


# Envs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3, 8])
def test_a_ready_made_vec_env_trains_in_compatible_mode(n_envs, capsys):
    model = make(make_vec_env(toy.make_target, n_envs, seed=0), verbose=1, population_size=8)
    model.learn(300, log_interval=None)
    assert "compatible mode" in capsys.readouterr().out
    assert model.evolution_strategy.generation >= 1
    assert model.num_timesteps >= sum(e["l"] for e in model.ep_info_buffer)


def test_compatible_mode_evaluates_the_same_members():
    """With an env whose episodes do not depend on the seed, both modes make the same update."""

    class Fixed(toy.TargetEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=42)

    def env():
        from gymnasium.wrappers import TimeLimit

        return TimeLimit(Fixed(), 50)

    native = make(env, population_size=6, slice_size=2)
    native.learn(1)
    for n_envs in (1, 3, 4):
        compatible = make(DummyVecEnv([env] * n_envs), population_size=6, slice_size=2)
        compatible.learn(1)
        for a, b in zip(native.policy.network.parameters(), compatible.policy.network.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_compatible_mode_replays_steps_in_strides_of_its_envs():
    model = make(make_vec_env(toy.make_target, 3, seed=0), population_size=6)
    seen = []

    class Look(BaseCallback):
        def _on_step(self):
            seen.append((self.num_timesteps, len(self.locals["dones"])))
            return True

    model.learn(1, callback=Look())
    assert all(b[0] - a[0] == 3 and a[1] == 3 for a, b in itertools.pairwise(seen[:-1]))
    assert seen[-1] == (model.num_timesteps, 3)
    assert len(model.ep_info_buffer) == 6


def test_compatible_mode_shows_a_policy_what_the_envs_gave():
    seen = []

    class Looking(MlpPolicy):
        def encode(self, obs):
            seen.append(obs.clone())
            return super().encode(obs)

    class Typed(DummyVecEnv):
        def reset(self):
            return np.ones_like(super().reset(), dtype=np.int64)

    settings = {"policy_kwargs": {"net_arch": [8]}, "population_size": 6, "slice_size": 2, "seed": 0}
    EGGROLL(Looking, Typed([toy.make_target] * 3), **settings).learn(1)
    assert not any((obs == 0).all(dim=1).any() for obs in seen)  # no rows of their own making
    assert any((obs != obs.round()).any() for obs in seen)  # nor numbers cut to the type of a reset


@pytest.mark.parametrize(("fault", "what"), [("nan_reward", "reward"), ("nan_obs", "observation")])
def test_compatible_mode_refuses_what_is_not_finite(fault, what):
    model = make(DummyVecEnv([toy.make_fault(fault)] * 2))
    before = digest(model)
    with pytest.raises(EpisodeError, match=f"generation 0, member 0, episode 0, step 3: the env's {what} is not"):
        model.learn(100)
    assert digest(model) == before


def test_a_ready_made_env_takes_no_settings_for_its_making():
    with pytest.raises(ConfigError, match="max_episode_steps needs an env given by id"):
        make(DummyVecEnv([toy.make_target]), max_episode_steps=5)
    with pytest.raises(ConfigError, match="env_kwargs needs an env given by id"):
        make(DummyVecEnv([toy.make_target]), env_kwargs={"offset": 1})


def test_vec_normalize_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="without VecNormalize"):
        make(VecNormalize(DummyVecEnv([toy.make_target])))


def test_env_kwargs_reach_the_env():
    model = make("HalfCheetah-v5", env_kwargs={"exclude_current_positions_from_observation": False})
    assert model.observation_space.shape == (18,)
    with pytest.raises(ConfigError, match="cannot make CartPole-v1.*colour"):
        make("CartPole-v1", env_kwargs={"colour": 1})


def test_set_env_takes_every_form_and_checks_the_spaces():
    model = make()
    model.set_env(lambda: toy.make_target(0.5))
    model.learn(100)
    model.set_env(DummyVecEnv([toy.make_target]))
    model.learn(100)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env("CartPole-v1")
    with pytest.raises(ConfigError, match="without VecNormalize"):
        model.set_env(VecNormalize(DummyVecEnv([toy.make_target])))
    model.learn(100)  # on the env before: what was refused left no trace


def test_an_unsupported_space_is_refused_before_anything_starts():
    class Strange(toy.TargetEnv):
        action_space = spaces.Tuple([spaces.Discrete(3)])

    with pytest.raises(ConfigError, match="action space Tuple"):
        make(Strange, max_episode_steps=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population_size": 7}, "population_size"),
        ({"sigma": -1}, "sigma"),
        ({"sigma": "lin_x"}, "sigma must be a number above 0 or 'lin_<number>', got 'lin_x'"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"rank": 0}, "rank"),
        ({"fitness_shaping": "rank"}, "fitness_shaping"),
        ({"n_eval_episodes": 0}, "n_eval_episodes"),
        ({"n_workers": -1}, "n_workers"),
        ({"optimizer": "adamm"}, "optimizer must be one of .*Adam.*'adamm'"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed must be below"),
        ({"alive_bonus_offset": "x"}, "alive_bonus_offset must be a finite number, got 'x'"),
    ],
)
def test_bad_settings_are_named_before_any_env_is_made(settings, message):
    made = []

    def env():
        made.append(1)
        return toy.make_target()

    with pytest.raises(ConfigError, match=message):
        make(env, **settings)
    assert not made


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ConfigError, match="policy must be one of .*RecurrentPolicy or a class, got 'RnnPolicy'"):
        EGGROLL("RnnPolicy", "CartPole-v1")
    with pytest.raises(ConfigError, match="unknown env 'HalfCheeta-v5'; did you mean HalfCheetah-v5"):
        make("HalfCheeta-v5")


def test_the_first_policy_does_not_depend_on_the_number_of_threads():
    def weights(threads):
        torch.set_num_threads(threads)
        model = EGGROLL("MlpPolicy", "Pendulum-v1", seed=0, n_workers=0, policy_kwargs={"net_arch": [64, 64]})
        return torch.cat([parameter.detach().flatten() for parameter in model.policy.network.parameters()])

    threads = torch.get_num_threads()
    try:
        assert torch.equal(weights(1), weights(2))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cart_pole_is_solved_within_its_budget(seed):
    model = EGGROLL("MlpPolicy", "CartPole-v1", population_size=64, learning_rate=0.03, seed=seed, n_workers=2)
    model.learn(300_000, log_interval=None)
    result = evaluate(acting(model.policy), env_factory("CartPole-v1"), range(1000, 1100))
    assert result.mean >= 475  # Gymnasium's threshold


def test_without_a_progress_bar_nothing_waits_for_the_lock_of_one(monkeypatch):
    def no_bar(**_):
        raise AssertionError("a bar takes a lock of all processes, which a killed one never gives back")

    monkeypatch.setattr("eggroll_rl.eggroll.tqdm", no_bar)
    make().learn(100)
    with pytest.raises(AssertionError, match="a bar takes a lock"):
        make().learn(100, progress_bar=True)
