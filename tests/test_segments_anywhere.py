"""Segments of envs whose states cannot be copied: each begins with a new episode."""

import gymnasium as gym
import numpy as np
import pytest
import toy
from test_segments import scorer_bytes
from test_workers import digest

from eggroll_rl import EGGROLL, scoring
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.config import RunConfig
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, EpisodeError
from eggroll_rl.evaluation import batched, evaluate
from eggroll_rl.segments import evaluate_slice, exploration_noise, reset_seed
from eggroll_rl.training import train

SETTINGS = {"fitness": "segment", "segment_steps": 12, "n_segments": 6, "slice_size": 4, "population_size": 8}
SETTINGS |= {"sample_reuse": 2, "max_episode_steps": 12}


def made(env=toy.make_target, n_workers=0, seed=0, **settings):
    return EGGROLL("MlpPolicy", env, seed=seed, n_workers=n_workers, **{**SETTINGS, **settings})


def test_a_segment_begins_with_a_new_episode_and_goes_on_to_the_next():
    """The second slice is short: its padding does not run, though other simulations left its sub-envs running."""
    model = made()
    generation, envs = model.next_generation(), env_factory(toy.make_target).vector(4)
    first = evaluate_slice(model.policy, generation, 0, envs)
    steps = [env.unwrapped.t for env in envs.envs]
    assert not envs._done[2:].all()
    result = evaluate_slice(model.policy, generation, 4, envs)
    assert first.rewards.shape == (12, 4) and result.rewards.shape == (12, 2)
    assert [env.unwrapped.t for env in envs.envs][2:] == steps[2:]
    noise = exploration_noise(generation.noise, 4, (12, 4, 2), np.full(2, 0.4))
    for row in range(2):
        env, resets = toy.make_target(), 0
        obs, _ = env.reset(seed=reset_seed(generation.noise, 4 + row, resets))
        for t in range(12):
            assert np.allclose(result.outputs[t, row], noise[t, row])  # the first policy's mean is zero
            action = np.clip(noise[t, row], -1, 1) * [2, 0.5] + [0, 0.5]
            assert np.allclose(result.features[t, row], obs.clip(-10, 10), atol=1e-5)
            obs, reward, terminated, truncated, _ = env.step(action)
            assert result.rewards[t, row] == pytest.approx(reward, abs=1e-5)
            assert (result.terminated[t, row], result.truncated[t, row]) == (terminated, truncated)
            if terminated:
                resets += 1
                obs, _ = env.reset(seed=reset_seed(generation.noise, 4 + row, resets))
    assert result.terminated.any() and result.states.shape == (2, 0)


def test_episodes_that_a_segment_cuts_are_not_counted():
    model = made()
    model.learn(72 * 5, log_interval=None)  # 6 simulations x 12 steps
    assert all(4 <= episode["l"] <= 10 for episode in model.ep_info_buffer) and len(model.ep_info_buffer) > 20
    assert len(model.ep_success_buffer) == len(model.ep_info_buffer) and all(model.ep_success_buffer)
    kept = model.scorer._kept
    assert kept.anchors.new.all() and not kept.lengths.any() and not kept.returns.any()


@pytest.mark.parametrize("env", [toy.make_target, toy.make_sloppy])
def test_the_result_is_the_same_for_any_number_of_workers_and_goes_on_when_loaded(env, tmp_path):
    models = [made(env, n_workers=n).learn(300, log_interval=None) for n in (0, 2)]
    assert digest(models[0]) == digest(models[1]) and scorer_bytes(models[0]) == scorer_bytes(models[1])
    models[0].save(tmp_path / "model")
    loaded = EGGROLL.load(tmp_path / "model", env=env)
    for model in (loaded, models[0]):
        model.learn(300, log_interval=None, reset_num_timesteps=False)
    assert digest(loaded) == digest(models[0]) and scorer_bytes(loaded) == scorer_bytes(models[0])


def test_a_run_of_pendulum_goes_on_to_the_bit(tmp_path):
    def config(steps):
        settings = {**SETTINGS, "segment_steps": 250, "max_episode_steps": None}
        return RunConfig("Pendulum-v1", total_timesteps=steps, n_workers=0, eggroll=settings, eval_episodes=1)

    train(config(4500), tmp_path / "whole", progress_bar=False)
    train(config(1500), tmp_path / "cut", progress_bar=False)
    train(config(4500), tmp_path / "cut", resume=True, progress_bar=False)
    whole, cut = (newest_checkpoint(tmp_path / name)[1] for name in ("whole", "cut"))
    assert any(name.startswith("scorer.earlier.1.") for name in whole)
    assert whole.keys() == cut.keys()
    assert all(whole[name].numpy().tobytes() == cut[name].numpy().tobytes() for name in whole)


def test_cart_pole_is_learned_with_noise_on_the_scores_of_its_actions():
    model = made("CartPole-v1", n_segments=8, segment_steps=256, max_episode_steps=256, slice_size=8, gamma=0.98)
    model.learn(60_000, log_interval=None)
    found = evaluate(
        batched(lambda obs: model.predict(obs, deterministic=True)[0]), env_factory("CartPole-v1"), range(10)
    )
    assert found.mean > 400


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "generation 0, simulation 0, step 2 of its segment: the env raised in step.*broken step"),
        ("reset", "simulation 0, step 0 of its segment: the env raised in reset.*broken reset"),
        ("nan_reward", "simulation 0, step 2 of its segment: the env's reward is not finite"),
    ],
)
def test_a_broken_env_is_named(fault, message):
    model = made(toy.make_fault(fault))
    generation, envs = model.next_generation(), env_factory(toy.make_fault(fault)).vector(4)
    with pytest.raises(EpisodeError, match=message):
        evaluate_slice(model.policy, generation, 0, envs)


def test_fewer_generations_are_used_again_from_the_first_update_on(tmp_path, monkeypatch):
    model = made().learn(300, log_interval=None)
    model.save(tmp_path / "model")
    counts, improve = [], scoring.improve
    monkeypatch.setattr(scoring, "improve", lambda *args: counts.append(len(args[2])) or improve(*args))
    for sample_reuse in (2, 1, 0):
        loaded = EGGROLL.load(tmp_path / "model", env=toy.make_target, sample_reuse=sample_reuse)
        loaded.learn(1, log_interval=None, reset_num_timesteps=False)
    assert counts == [2, 1, 0]


def test_segments_that_end_before_an_episode_can_are_refused():
    with pytest.raises(ConfigError, match="segment_steps must be at least 50, the time limit, got 12"):
        made(max_episode_steps=None)
    made("Hopper-v5", max_episode_steps=None)  # goes on in the next generation


def test_a_ready_made_env_is_refused():
    with pytest.raises(ConfigError, match="runs simulations of its own: give the env by id or function"):
        made(gym.make("Pendulum-v1"))
