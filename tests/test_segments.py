"""Segments: cloned states against running on, slices against single simulations, advantages by hand."""

import csv

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from stable_baselines3.common.logger import configure
from test_workers import digest, trained

from eggroll_rl import EGGROLL, scoring
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.config import RunConfig
from eggroll_rl.critic import Critic, advantages
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, EpisodeError, NonFiniteError
from eggroll_rl.mujoco_tasks import TASKS
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.rollout import Anchors
from eggroll_rl.segments import evaluate_slice, exploration_noise, reset_seed, segment_rollout
from eggroll_rl.training import train

SETTINGS = {"fitness": "segment", "segment_steps": 5, "n_segments": 12, "slice_size": 4, "population_size": 12}
SETTINGS |= {"sample_reuse": 2}


def vector(env_id, n, **kwargs):
    return env_factory(env_id, kwargs or None).vector(n, AutoresetMode.DISABLED)


def run(envs, actions):
    """Step and return everything that a policy could notice."""
    seen = []
    for action in actions:
        obs, rewards, terminations, truncations, _ = envs.step(action)
        seen.append([obs, rewards, terminations, truncations])
    return [np.array(part) for part in zip(*seen, strict=True)]


@pytest.mark.parametrize("task", list(TASKS))
def test_a_clone_does_what_its_original_does(task):
    rng = np.random.default_rng(0)
    envs, others = vector(task, 3), vector(task, 5)
    low, high = envs.single_action_space.low, envs.single_action_space.high

    def actions(steps, n):
        return rng.uniform(low, high, (steps, n, len(low))).astype(np.float32)

    envs.reset(seed=1)
    run(envs, actions(4, 3))
    states, elapsed = envs.get_states()
    assert elapsed.tolist() == [4, 4, 4]
    # Rows 4, 0, 2 of another vector env take over sub-envs 0, 1, 2.
    rows = [4, 0, 2]
    theirs, ages = np.zeros((5, states.shape[1])), np.zeros(5, dtype=np.int64)
    theirs[rows], ages[rows] = states, elapsed
    mask = np.isin(np.arange(5), rows)
    cloned_obs = others.set_states(mask, theirs, ages)[rows]
    again = envs.set_states(np.ones(3, bool), states, elapsed)
    assert np.array_equal(again, cloned_obs)
    plan = actions(6, 3)
    widened = np.zeros((6, 5, len(low)), np.float32)
    widened[:, rows] = plan
    for mine, other in zip(run(envs, plan), run(others, widened), strict=True):
        assert np.array_equal(mine, other[:, rows])
    assert np.array_equal(envs.get_states()[0], others.get_states()[0][rows])
    # The rest were never reset and stay where they are.
    assert not others.get_states()[1][[1, 3]].any()


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Swimmer-v5", "InvertedPendulum-v5"])
def test_where_nothing_derived_is_observed_a_clone_goes_on_as_if_uncut(task):
    rng = np.random.default_rng(0)
    uncut, cut = vector(task, 2), vector(task, 2)
    plan = rng.uniform(-0.3, 0.3, (12, 2, *uncut.single_action_space.shape)).astype(np.float32)
    uncut.reset(seed=5), cut.reset(seed=5)
    run(cut, plan[:6])
    cut.set_states(np.ones(2, bool), *cut.get_states())
    for whole, half in zip(run(uncut, plan), run(cut, plan[6:]), strict=True):
        assert np.array_equal(whole[6:], half)


def test_the_time_limit_follows_the_clone():
    envs = vector("HalfCheetah-v5", 2)
    envs.reset(seed=0)
    states, _ = envs.get_states()
    envs.set_states(np.ones(2, bool), states, np.array([998, 500]))
    _, _, _, truncations = run(envs, np.zeros((2, 2, 6), np.float32))
    assert truncations.tolist() == [[False, False], [True, False]]


def test_states_of_another_task_are_refused():
    envs = vector("HalfCheetah-v5", 2)
    with pytest.raises(ValueError, match=r"mask, states and elapsed must have shapes \[\(2,\), \(2, "):
        envs.set_states(np.ones(2, bool), np.zeros((2, 3)), np.zeros(2))


# ---------------------------------------------------------------------------------------------------------
# The inner loop


@pytest.fixture
def model():
    made = EGGROLL("MlpPolicy", "Hopper-v5", seed=3, n_workers=0, policy_kwargs={"net_arch": [8]}, **SETTINGS)
    made.set_logger(configure(None, []))
    return made


def generation_of(model, anchors, n_steps=5):
    model.scorer._kept = scoring.replace(model.scorer._kept, anchors=anchors)
    model.segment_steps = n_steps
    return model.next_generation()


@torch.no_grad()
def test_a_slice_is_its_simulations_one_by_one(model):
    """Each alone in an env of its own, with the mean policy's own forward; Hopper falls and begins anew."""
    n_steps, first = 60, 4
    model.policy.network[0].weight.mul_(3)
    model.policy.network[2].weight.normal_(generator=torch.Generator().manual_seed(0))
    envs = vector("Hopper-v5", 4)
    envs.reset(seed=0)
    run(envs, np.zeros((3, 4, 3), np.float32))
    states, _ = envs.get_states()
    ages = np.array([3, 3, 3, 3, 3, 970, 0, 3, 3, 3, 3, 3])
    generation = generation_of(model, Anchors(np.tile(states, (3, 1)), ages, np.arange(12) == 6), n_steps)
    result = segment_rollout(model.policy, generation, first, envs)
    noise = exploration_noise(generation.noise, first, (n_steps, 4, 3), np.full(3, 0.4))
    ends = {tuple(place): i for i, place in enumerate(np.argwhere(result.terminated | result.truncated))}
    for row in range(4):
        alone, resets = vector("Hopper-v5", 1), 0

        def reset():
            return alone.reset(seed=[reset_seed(generation.noise, first + row, resets)])[0]  # noqa: B023

        if row == 2:
            obs, resets = reset(), 1
        else:
            obs = alone.set_states(np.ones(1, bool), states[[row]], ages[[first + row]])
        for t in range(n_steps):
            features = model.policy.features(torch.from_numpy(obs))
            # Another batch shape rounds differently: close, not equal.
            assert np.allclose(result.features[t, row], features[0], atol=2e-2)
            outputs = model.policy.network(features) + torch.from_numpy(noise[t, row])
            assert np.allclose(result.outputs[t, row], outputs[0], atol=5e-2)
            # What was done, not what this policy would do: contacts amplify the last bit.
            actions = model.policy.actions(torch.from_numpy(result.outputs[t, [row]])).numpy()
            obs, rewards, terminations, truncations, _ = alone.step(actions)
            assert rewards[0] == pytest.approx(result.rewards[t, row], abs=1e-2)
            assert terminations[0] == result.terminated[t, row]
            assert (truncations[0] and not terminations[0]) == result.truncated[t, row]
            if terminations[0] or truncations[0]:
                final = model.policy.features(torch.from_numpy(obs))[0]
                assert np.allclose(result.final_features[ends[t, row]], final, atol=2e-2)
                if t < n_steps - 1:
                    obs, resets = reset(), resets + 1
        assert alone.get_states()[1][0] == result.ages[row]
    assert result.terminated.any() and len(ends) == len(result.final_features) >= 3
    assert result.lengths.tolist() == [n_steps] * 4 and result.moments.count.tolist() == [n_steps] * 4


def test_new_episodes_differ_and_noise_does_too(model):
    generation = model.next_generation()
    results = [segment_rollout(model.policy, generation, first, vector("Hopper-v5", 4)) for first in (0, 4, 8)]
    assert len(np.unique(np.concatenate([result.features[0] for result in results]), axis=0)) == 12
    noise = np.concatenate([result.outputs for result in results], axis=1)  # the first policy's mean is zero
    assert len(np.unique(noise)) == noise.size and noise.std() == pytest.approx(0.4, rel=0.2)


def test_a_short_last_slice_has_padding_that_does_not_run():
    # 12 simulations in slices of 8: the second has 4 real ones, in envs that ran 8 before.
    other = EGGROLL("MlpPolicy", "Hopper-v5", seed=3, n_workers=0, **{**SETTINGS, "slice_size": 8})
    generation, envs = other.next_generation(), vector("Hopper-v5", 8)
    segment_rollout(other.policy, generation, 0, envs)
    before, _ = envs.get_states()
    result = segment_rollout(other.policy, generation, 8, envs)
    assert np.array_equal(envs.get_states()[0][4:], before[4:])
    alone = segment_rollout(other.policy, generation, 8, vector("Hopper-v5", 8))
    assert np.array_equal(result.states, alone.states) and np.array_equal(result.features, alone.features)
    assert result.rewards.shape == (5, 4) and result.moments.count.tolist() == [5] * 4


def test_a_new_episode_that_has_an_age_is_cut_short(model):
    anchors = Anchors(np.zeros_like(model.scorer.anchors.states), np.array([998, *[0] * 11]), np.ones(12, bool))
    result = segment_rollout(model.policy, generation_of(model, anchors), 0, vector("Hopper-v5", 4))
    assert np.argwhere(result.truncated).tolist() == [[1, 0]] and result.ages.tolist() == [3, 5, 5, 5]


def test_an_end_at_the_last_step_is_a_new_episode_in_the_next_generation(model):
    anchors = Anchors(np.zeros_like(model.scorer.anchors.states), np.array([995, *[0] * 11]), np.ones(12, bool))
    generation = generation_of(model, anchors)
    results = [segment_rollout(model.policy, generation, first, vector("Hopper-v5", 4)) for first in (0, 4, 8)]
    assert results[0].truncated[-1, 0]
    model.update(results)
    assert model.scorer.anchors.new.tolist() == [True] + [False] * 11
    assert model.scorer.anchors.ages.tolist() == [0] + [5] * 11


def test_a_new_episode_observes_what_a_reset_does():
    """Contact forces are zero after Gymnasium's reset, and computed afresh for a clone."""
    envs = vector("Ant-v5", 2)
    reset, _ = envs.reset(seed=4, options={"reset_mask": np.ones(2, bool), "elapsed": np.array([7, 0])})
    assert np.array_equal(reset, vector("Ant-v5", 2).reset(seed=4)[0])
    assert envs.get_states()[1].tolist() == [7, 0]
    assert not reset[:, -78:].any()
    run(envs, np.zeros((20, 2, 8), np.float32))
    cloned = envs.set_states(np.ones(2, bool), *envs.get_states())
    assert cloned[:, -78:].any(axis=1).all()


# ---------------------------------------------------------------------------------------------------------
# Advantages and the critic


def test_advantages_by_hand():
    """Two steps, gamma 0.5, lambda 0.5: simulation 0 runs on, 1 falls at once, 2 is cut by the time limit."""
    rewards = np.array([[1.0, 3.0, 3.0], [2.0, 1.0, 1.0]])
    values = np.array([[10.0, 10.0, 10.0], [20.0, 4.0, 4.0]])
    following = np.array([[20.0, 0.0, 40.0], [40.0, 8.0, 8.0]])
    ended = np.array([[False, True, True], [False, False, False]])
    # deltas: 1 + 10 - 10 = 1, 2 + 20 - 20 = 2;  3 - 10 = -7;  3 + 20 - 10 = 13;  1 + 4 - 4 = 1
    expected = [[1 + 0.25 * 2, -7, 13], [2, 1, 1]]
    assert advantages(rewards, values, following, ended, 0.5, 0.5).tolist() == expected


class Opinion(Critic):
    """A state is worth ten times its first feature."""

    def values(self, features):
        return 10.0 * features[:, 0].double().numpy()


def test_what_follows_a_step_is_the_final_state_and_not_that_of_the_next_episode(model, monkeypatch):
    """Ends in two slices, at different steps: each gets its own final state's value."""
    recorded = []
    anchors = Anchors(np.zeros_like(model.scorer.anchors.states), np.zeros(12, dtype=int), np.ones(12, bool))
    anchors.ages[[0, 2, 5]] = [998, 997, 999]  # end at steps 1, 2 and 0
    generation = generation_of(model, anchors)
    results = [segment_rollout(model.policy, generation, first, vector("Hopper-v5", 4)) for first in (0, 4, 8)]
    monkeypatch.setattr(scoring, "improve", lambda es, samples, *rest: recorded.append(samples) or ({}, None, samples))
    model.scorer._kept = scoring.replace(model.scorer._kept, critic=Opinion(11, seed=0))
    model.scorer.gae_lambda = 0.0
    model.update(results)
    found = recorded[0].advantages.reshape(5, 12)
    final = {(1, 0): results[0].final_features[0], (2, 2): results[0].final_features[1]}
    final[0, 5] = results[1].final_features[0]
    for t, n in np.ndindex(5, 12):
        result, row = results[n // 4], n % 4
        following = final.get((t, n), result.features[t + 1, row])[0]
        expected = result.rewards[t, row] + 0.99 * 10 * following - 10 * result.features[t, row, 0]
        assert found[t, n] == pytest.approx(expected, abs=1e-4)


def test_the_critic_learns_and_keeps_its_opinion_when_the_scale_moves():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(2000, 3))).float()
    targets = 300 + 50 * np.sin(features[:, 0].numpy()) + 20 * features[:, 1].numpy()
    critic = Critic(3, seed=0)
    assert not critic.values(features).any()
    losses = [critic.fit(features, targets, g) for g in range(30)]
    assert losses[-1] < 0.05 < losses[0]
    assert np.abs(critic.values(features) - targets).mean() < 6
    before = critic.values(features)
    critic._rescale(targets * 7 - 1000)
    assert np.allclose(critic.values(features), before, rtol=1e-4)
    assert critic.scale > 1.2 * targets.std()


def test_the_critic_is_a_function_of_its_seed():
    features, targets = torch.randn(100, 3), np.arange(100.0)

    def opinion(seed):
        critic = Critic(3, seed)
        critic.fit(features, targets, 0)
        return critic.values(features)

    state = torch.get_rng_state()
    assert np.array_equal(opinion(1), opinion(1)) and not np.array_equal(opinion(1), opinion(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_signal_in_the_middle_of_an_update_leaves_everything_as_it_was(monkeypatch):
    model = segments_trained(0)
    policy, scorer, generation = digest(model), scorer_bytes(model), model.evolution_strategy.generation
    results = [evaluate_slice(model.policy, model.next_generation(), n, vector("Hopper-v5", 4)) for n in (0, 4, 8)]
    fit = Critic.fit

    def stopped(*args):
        fit(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Critic, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            model.update(results)
    assert (digest(model), scorer_bytes(model), model.evolution_strategy.generation) == (policy, scorer, generation)
    model.update(results)
    assert digest(model) != policy and scorer_bytes(model) != scorer


def test_a_critic_that_diverges_is_named_and_not_kept():
    settings = {**SETTINGS, "critic_kwargs": {"learning_rate": 1e38}}
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **settings)
    with pytest.raises(NonFiniteError, match="the critic's step after generation .* smaller learning_rate"):
        model.learn(3000)
    assert all(tensor.isfinite().all() for tensor in model.scorer.critic.state_dict().values())


def test_episodes_are_counted_over_segments():
    """Hopper at rest falls: the episodes that ended are those of a policy that runs them whole."""
    still = {"exploration_std": 1e-9, "target_kl": 1e-9, "critic_kwargs": {"n_epochs": 1}}
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **still, **SETTINGS)
    model.learn(5000, log_interval=None)
    others = vector("Hopper-v5", 40)
    others.reset(seed=0)
    _, rewards, terminations, _ = run(others, np.zeros((400, 40, 3), np.float32))
    wholes = terminations.argmax(axis=0) + 1
    episodes = list(model.ep_info_buffer)
    assert len(episodes) > 10 and terminations.any(axis=0).all()
    assert wholes.min() - 10 < min(e["l"] for e in episodes) and max(e["l"] for e in episodes) < wholes.max() + 10
    assert np.median([e["l"] for e in episodes]) == pytest.approx(np.median(wholes), rel=0.1)
    returns = [rewards[:length, n].sum() for n, length in enumerate(wholes)]
    assert np.median([e["r"] for e in episodes]) == pytest.approx(np.median(returns), rel=0.1)


# ---------------------------------------------------------------------------------------------------------
# The algorithm


def segments_trained(n_workers, env="Hopper-v5", **settings):
    return trained(n_workers, env, steps=1200, **{**SETTINGS, **settings})


def scorer_bytes(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.scorer.state_dict().items()}


def test_the_result_is_the_same_to_the_bit_for_any_number_of_workers():
    models = [segments_trained(n, slice_size=8) for n in (0, 1, 2)]  # a short last slice, too
    assert len({digest(model) for model in models}) == 1
    assert scorer_bytes(models[0]) == scorer_bytes(models[2])
    assert digest(segments_trained(0, seed=1)) != digest(models[0])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def config(steps):
        rare = {"eval_freq": 600, "eval_episodes": 1}
        return RunConfig("Hopper-v5", total_timesteps=steps, n_workers=0, eggroll=dict(SETTINGS), **rare)

    train(config(1200), tmp_path / "whole", progress_bar=False)
    train(config(600), tmp_path / "cut", progress_bar=False)
    train(config(1200), tmp_path / "cut", resume=True, progress_bar=False)
    whole, cut = (newest_checkpoint(tmp_path / name)[1] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and any(name.startswith("scorer.critic.") for name in whole)
    for name in whole:
        assert np.array_equal(whole[name], cut[name], equal_nan=True), name
    curves = [list(csv.DictReader((tmp_path / n / "progress.csv").read_text().splitlines())) for n in ("whole", "cut")]
    assert len(curves[0]) > 15
    for row, other in zip(*curves, strict=True):
        assert {**row, "seconds": ""} == {**other, "seconds": ""}


def test_a_saved_model_goes_on_as_if_it_had_not_been(tmp_path):
    def learn(model):
        return model.learn(600, log_interval=None, reset_num_timesteps=False)

    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **SETTINGS)
    learn(model).save(tmp_path / "model")
    loaded = EGGROLL.load(tmp_path / "model", env="Hopper-v5")
    assert len(loaded.scorer_state) > 0 and len(model.scorer._kept.earlier) == 2
    assert digest(learn(loaded)) == digest(learn(model))
    assert scorer_bytes(loaded) == scorer_bytes(model)


def test_a_failed_update_changes_nothing(monkeypatch):
    calls, improve = [], scoring.improve

    def fails_once(es, recorded, *rest):
        calls.append(1)
        if len(calls) == 3:
            recorded.advantages[7] = np.nan
        return improve(es, recorded, *rest)

    monkeypatch.setattr(scoring, "improve", fails_once)
    model, other = (EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **SETTINGS) for _ in range(2))
    with pytest.raises(NonFiniteError, match="generation 2"):
        model.learn(600, log_interval=None)
    assert not model.scorer.anchors.new.all()
    assert model._n_updates == 2
    model.learn(1, log_interval=None, reset_num_timesteps=False)
    for _ in range(3):
        other.learn(1, log_interval=None, reset_num_timesteps=False)
    assert model._n_updates == other._n_updates == 3
    assert digest(model) == digest(other) and scorer_bytes(model) == scorer_bytes(other)


def test_an_episode_that_fails_ends_the_run_and_it_goes_on_from_there(monkeypatch):
    """A NaN reward in the third generation: the error names the member, and nothing of that generation stays."""
    settings = {**SETTINGS, "slice_size": 12}  # one slice: 5 env steps are a generation
    model, other = (EGGROLL("MlpPolicy", "HalfCheetah-v5", seed=0, n_workers=0, **settings) for _ in range(2))
    step, calls = MujocoVectorEnv.step, []

    def fails_once(self, actions):
        obs, rewards, *rest = step(self, actions)
        calls.append(1)
        rewards[7] *= np.nan if len(calls) == 12 else 1
        return obs, rewards, *rest

    with monkeypatch.context() as patch:
        patch.setattr(MujocoVectorEnv, "step", fails_once)
        with pytest.raises(EpisodeError, match="generation 2, simulation 7, step 1 of its segment: "):
            model.learn(600, log_interval=None)
    assert model._n_updates == 2
    model.learn(1, log_interval=None, reset_num_timesteps=False)
    for _ in range(3):
        other.learn(1, log_interval=None, reset_num_timesteps=False)
    assert model._n_updates == other._n_updates == 3
    assert digest(model) == digest(other) and scorer_bytes(model) == scorer_bytes(other)


def test_callbacks_by_step_see_the_episodes():
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **SETTINGS)
    model.learn(50_000, callback=StopTrainingOnMaxEpisodes(4), log_interval=None)
    assert model.num_timesteps < 20_000 and len(model.ep_info_buffer) >= 4
    anchors = model.scorer.anchors
    model.learn(60, log_interval=None, reset_num_timesteps=False)  # goes on
    assert model.scorer.anchors is not anchors


def test_another_env_takes_the_critic_and_starts_new_episodes(tmp_path):
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **SETTINGS).learn(600, log_interval=None)
    assert not model.scorer.anchors.new.all()
    critic = model.scorer.state_dict()["critic.head.weight"].clone()
    model.set_env("Hopper-v5", env_kwargs={"healthy_z_range": (0.9, 9.0)})
    assert model.scorer.anchors.new.all()
    assert torch.equal(model.scorer.state_dict()["critic.head.weight"], critic)
    assert not model.scorer._kept.earlier  # samples of another task
    model.learn(100, log_interval=None)
    model.save(tmp_path / "model")
    same = EGGROLL.load(tmp_path / "model", env="Hopper-v5", env_kwargs={"healthy_z_range": (0.9, 9.0)})
    assert not same.scorer.anchors.new.all() and same.scorer._kept.earlier
    other = EGGROLL.load(tmp_path / "model", env="Hopper-v5")
    assert other.scorer.anchors.new.all() and not other.scorer._kept.earlier
    more = EGGROLL.load(tmp_path / "model", env="Hopper-v5", n_segments=20)
    more.learn(1, log_interval=None, reset_num_timesteps=False)
    assert len(more.scorer.anchors.ages) == 20 and more.num_timesteps > model.num_timesteps
    with pytest.raises(ConfigError, match="critic_kwargs .*do not fit the saved critic"):
        loaded = EGGROLL.load(tmp_path / "model", env="Hopper-v5", critic_kwargs={"net_arch": [8]})
        loaded.learn(60)


def test_what_was_left_open_follows_fitness(tmp_path):
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, sigma=0.02)
    assert (model.population_size, model.slice_size, model.n_rows) == (64, 32, 64)
    model.fitness_shaping = None  # as saved by versions in which that was the default
    model.save(tmp_path / "model")
    loaded = EGGROLL.load(tmp_path / "model", env="Hopper-v5", fitness="segment")
    assert (loaded.population_size, loaded.slice_size, loaded.n_rows) == (16, 16, 32)
    assert loaded.fitness_shaping == "centered_rank"
    own = EGGROLL.load(tmp_path / "model", env="Hopper-v5", fitness="segment", population_size=20)
    assert (own.population_size, own.slice_size) == (20, 16)


def test_the_noise_of_a_loaded_model_can_be_set_anew(tmp_path):
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, policy_kwargs={"net_arch": [8]}, **SETTINGS)
    model.learn(120, log_interval=None)
    model.exploration_std = lambda progress: 0.4  # as saved when it was a schedule
    model.save(tmp_path / "model")
    moved = model.scorer.exploration_std
    same, other = (EGGROLL.load(tmp_path / "model", env="Hopper-v5", **kw) for kw in ({}, {"exploration_std": 0.2}))
    assert np.array_equal(same.scorer.exploration_std, moved) and not np.any(moved == 0.4)
    assert np.all(other.scorer.exploration_std == 0.2) and (same.exploration_std, other.exploration_std) == (0.4, 0.2)


def test_segments_of_an_older_version_are_refused(model):
    state = {name: value for name, value in model.scorer.state_dict().items() if name != "std"}
    with pytest.raises(ConfigError, match="saved by an older version, which kept no deviations"):
        model.scorer.load_state_dict(state)


def test_a_schedule_that_leaves_its_range_is_named():
    model = EGGROLL("MlpPolicy", "Hopper-v5", n_workers=0, **SETTINGS, target_kl=lambda progress: progress - 0.5)
    with pytest.raises(ConfigError, match="target_kl must be a finite number above 0, got 0.0"):
        model.learn(600, log_interval=None)


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ("Hopper-v5", {"fitness": "steps"}, "fitness must be 'episode' or 'segment', got 'steps'"),
        ("Hopper-v5", {"segment_steps": 0}, "segment_steps must be a whole number, at least 1, got 0"),
        ("Hopper-v5", {"sample_reuse": -1}, "sample_reuse must be a whole number, at least 0, got -1"),
        ("Hopper-v5", {"damping": 0}, "damping must be a finite number above 0, got 0"),
        ("Hopper-v5", {"gamma": 1.5}, "gamma must be a number from 0 to 1, got 1.5"),
        ("Hopper-v5", {"critic_kwargs": {"n_epoch": 2}}, "critic_kwargs has no 'n_epoch'; did you mean n_epochs"),
        ("Hopper-v5", {"critic_kwargs": {"net_arch": [0]}}, "critic_kwargs net_arch: a width must be .* got 0"),
        ("Hopper-v5", {"critic_kwargs": {"net_arch": 64}}, "critic_kwargs net_arch must be a list .* got 64"),
        (
            "Hopper-v5",
            {"fitness": "episode", "critic_kwargs": {"n_epochs": 2}},
            "critic_kwargs needs fitness='segment'",
        ),
        ("Hopper-v5", {"n_eval_episodes": 2}, "n_eval_episodes must be 1 with fitness='segment', got 2"),
        ("Hopper-v5", {"n_segments": 0}, "n_segments must be a whole number, at least 1, got 0"),
        ("Hopper-v5", {"exploration_std": "lin_1"}, "exploration_std must be a finite number above 0, got 'lin_1'"),
        ("Hopper-v5", {"target_kl": 0}, "target_kl must be a finite number above 0, got 0"),
        ("Hopper-v5", {"clip_range": "lim_1"}, "clip_range must be a number above 0 or 'lin_<number>'"),
        ("Hopper-v5", {"fitness_shaping": "standardize"}, "fitness_shaping has no effect with .* natural gradient"),
        ("Hopper-v5", {"optimizer": "SGD"}, "optimizer has no effect with"),
        ("Hopper-v5", {"sigma": 0.1}, "sigma has no effect with .* exploration_std .* got 0.1"),
        ("Hopper-v5", {"learning_rate": "lin_0.015"}, "learning_rate has no effect with .* target_kl"),
        ("Hopper-v5", {"max_grad_norm": 1.0}, "max_grad_norm has no effect with .* got 1.0"),
        ("Hopper-v5", {"rank": 2}, "rank has no effect with .* members have rank 1 .* got 2"),
    ],
)
def test_what_cannot_be_is_refused(env, settings, message):
    with pytest.raises(ConfigError, match=message):
        EGGROLL("MlpPolicy", env, **{**SETTINGS, **settings})
