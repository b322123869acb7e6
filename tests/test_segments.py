"""Segments: cloned states against running on, slices against single members, scores against hand calculations."""

import csv

import numpy as np
import pytest
import torch
import toy
from gymnasium.vector import AutoresetMode
from safetensors.numpy import load_file
from stable_baselines3.common.callbacks import StopTrainingOnMaxEpisodes
from test_workers import digest, trained

from eggroll_rl import EGGROLL
from eggroll_rl.config import RunConfig
from eggroll_rl.critic import Critic, discounted_differences
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, EpisodeError, NonFiniteError
from eggroll_rl.fitness import pair_rank
from eggroll_rl.mujoco_tasks import TASKS
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.rollout import Anchors, Generation
from eggroll_rl.segments import segment_rollout
from eggroll_rl.training import train

SETTINGS = {"fitness": "segment", "segment_steps": 5, "population_size": 12, "slice_size": 4}


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


@pytest.fixture(scope="module")
def model():
    policy_kwargs = {"net_arch": [8]}
    return EGGROLL("MlpPolicy", "Hopper-v5", seed=3, n_workers=0, policy_kwargs=policy_kwargs, sigma=0.5, **SETTINGS)


def generation_of(model, anchors, n_steps):
    state = {name: tensor.numpy() for name, tensor in model.policy.state_dict().items()}
    return Generation(model.evolution_strategy.ask().noise, state, 1, anchors, n_steps)


@torch.no_grad()
def test_a_slice_is_its_members_one_by_one(model):
    """Against the members' explicit parameters, each alone in an env of its own."""
    n_steps, first = 9, 4
    envs = vector("Hopper-v5", 4)
    envs.reset(seed=0)
    run(envs, np.zeros((3, 4, 3), np.float32))
    states, _ = envs.get_states()
    anchors = Anchors(np.concatenate([states, states[:2]]), np.array([3, 3, 3, 995, 3, 3]), np.zeros(6, bool))
    result = segment_rollout(model.policy, generation_of(model, anchors, n_steps), first, envs)
    population = model.evolution_strategy.ask()
    for row in range(4):
        pair = (first + row) // 2
        alone = vector("Hopper-v5", 1)
        obs = alone.set_states(np.ones(1, bool), anchors.states[[pair]], anchors.ages[[pair]])
        parameters = population.parameters_of(first + row)
        ended = False
        for t in range(result.lengths[row]):
            # Another batch shape rounds differently: close, not equal.
            assert not ended and np.allclose(result.obs[t, row], obs[0], atol=1e-3)
            features = model.policy.features(torch.from_numpy(obs))
            outputs = torch.func.functional_call(model.policy.network, parameters, features)
            obs, rewards, terminations, truncations, _ = alone.step(model.policy.actions(outputs).numpy())
            assert rewards[0] == pytest.approx(result.rewards[t, row], abs=1e-3)
            ended = bool(terminations[0] or truncations[0])
        assert np.allclose(result.obs[t + 1 :, row], obs[0], atol=1e-3)
        assert ended == (result.terminated | result.truncated)[row]
        assert np.allclose(alone.get_states()[0][0], result.states[row], atol=1e-2)
    assert result.truncated[2:].all() and result.lengths[2:].tolist() == [5, 5]
    assert not result.rewards[np.arange(n_steps)[:, None] >= result.lengths].any()
    assert result.moments.count.tolist() == result.lengths.tolist()


def test_members_of_a_pair_start_alike_and_new_episodes_differ(model):
    generation = generation_of(model, model.scorer.anchors, 5)
    results = [segment_rollout(model.policy, generation, first, vector("Hopper-v5", 4)) for first in (0, 4, 8)]
    starts = np.concatenate([result.obs[0] for result in results])
    assert np.array_equal(starts[0::2], starts[1::2])
    assert len(np.unique(starts, axis=0)) == 6


def test_a_short_last_slice_has_padding_that_does_not_run(model):
    # 6 pairs in slices of 8 members: the second has 4 real ones, in envs that ran 8 before.
    other = EGGROLL("MlpPolicy", "Hopper-v5", seed=3, policy_kwargs={"net_arch": [8]}, **{**SETTINGS, "slice_size": 8})
    generation, envs = generation_of(other, other.scorer.anchors, 5), vector("Hopper-v5", 8)
    segment_rollout(other.policy, generation, 0, envs)
    before, _ = envs.get_states()
    result = segment_rollout(other.policy, generation, 8, envs)
    assert np.array_equal(envs.get_states()[0][4:], before[4:])
    alone = segment_rollout(other.policy, generation, 8, vector("Hopper-v5", 8))
    assert np.array_equal(result.states, alone.states) and np.array_equal(result.obs, alone.obs)
    assert result.lengths.shape == (4,) and result.moments.count.tolist() == result.lengths.tolist()


def test_a_new_episode_that_has_an_age_is_cut_short(model):
    anchors = Anchors(np.zeros_like(model.scorer.anchors.states), np.array([998, 0, 0, 0, 0, 0]), np.ones(6, bool))
    result = segment_rollout(model.policy, generation_of(model, anchors, 5), 0, vector("Hopper-v5", 4))
    assert result.lengths.tolist() == [2, 2, 5, 5] and result.truncated.tolist() == [True, True, False, False]


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
# Scores


def test_discounted_differences_by_hand():
    """Two steps, gamma 0.5, lambda 0.5: member 0 runs on, member 1 falls at once, member 2 is cut by the time limit."""
    rewards = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 0.0]])
    values = np.array([[10.0, 10.0, 10.0], [20.0, 99.0, 40.0], [40.0, 99.0, 40.0]])
    lengths, terminated = np.array([2, 1, 1]), np.array([False, True, False])
    # deltas: 1 + 10 - 10 = 1, 2 + 20 - 20 = 2;  3 - 10 = -7;  3 + 20 - 10 = 13
    advantages = discounted_differences(rewards, values, lengths, terminated, 0.5, 0.5)
    assert advantages.tolist() == [[1 + 0.25 * 2, -7, 13], [2, 0, 0]]
    whole = discounted_differences(rewards, values, lengths, terminated, 0.5, 1.0)[0] + values[0]
    # reward + discounted value of where it ended: 1 + 1 + 40/4;  3;  3 + 40/2
    assert whole.tolist() == [12, 3, 23]


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


def test_a_pair_goes_on_from_one_of_its_members():
    model = EGGROLL("MlpPolicy", "HalfCheetah-v5", seed=0, n_workers=0, **SETTINGS)
    started = model.scorer.anchors
    started.ages[:] = [0, 100, 200, 300, 400, 997]  # the last one ends after 3 steps
    generation, envs = model.next_generation(), vector("HalfCheetah-v5", 4)
    results = [segment_rollout(model.policy, generation, first, envs) for first in (0, 4, 8)]
    model.scorer.score(results, 0.0, 0)
    assert model.scorer.anchors is started  # nothing has changed yet
    model.scorer.advance()
    anchors, ends = model.scorer.anchors, np.concatenate([result.states for result in results])
    for pair in range(6):
        assert any(np.array_equal(anchors.states[pair], ends[2 * pair + i]) for i in (0, 1))
    assert anchors.new.tolist() == [False] * 5 + [True]
    assert anchors.ages.tolist() == [5, 105, 205, 305, 405, 0]


def test_a_signal_in_the_middle_of_learning_leaves_the_critic_as_it_was(monkeypatch):
    model = segments_trained(0)
    before = {name: tensor.clone() for name, tensor in model.scorer.critic.state_dict().items()}
    assert model.scorer._kept.samples is not None

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.scorer.critic.optimizer.__class__, "zero_grad", stopped)
        with pytest.raises(KeyboardInterrupt):
            model.scorer.learn()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.scorer.critic.state_dict().items())
    assert scorer_bytes(model) == scorer_bytes(segments_trained(0))


def test_a_critic_that_diverges_is_named_and_not_kept():
    settings = {**SETTINGS, "critic_kwargs": {"learning_rate": 1e38}}
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **settings)
    with pytest.raises(NonFiniteError, match="the critic's step after generation .* smaller learning_rate"):
        model.learn(3000)
    assert all(tensor.isfinite().all() for tensor in model.scorer.critic.state_dict().values())


def test_episodes_are_counted_over_segments():
    """Hopper at rest falls: the episodes that ended are those of a policy that runs them whole."""
    still = {"sigma": 1e-9, "learning_rate": 1e-9, "critic_kwargs": {"n_epochs": 1}}
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, **still, **SETTINGS)
    model.learn(5000, log_interval=None)
    alone = vector("Hopper-v5", 1)
    alone.reset(seed=0)
    _, rewards, terminations, _ = run(alone, np.zeros((200, 1, 3), np.float32))
    length = int(terminations[:, 0].argmax()) + 1
    lengths = [episode["l"] for episode in model.ep_info_buffer]
    assert len(lengths) > 5
    assert np.median(lengths) == pytest.approx(length, abs=6)
    assert np.median([e["r"] for e in model.ep_info_buffer]) == pytest.approx(rewards[:length].sum(), rel=0.15)


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
    whole, cut = (load_file(tmp_path / name / "training.safetensors") for name in ("whole", "cut"))
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
    assert digest(learn(loaded)) == digest(learn(model))
    assert scorer_bytes(loaded) == scorer_bytes(model)


def test_a_failed_update_changes_nothing():
    calls = []

    def fails_once(fitness):
        calls.append(1)
        return fitness * (np.nan if len(calls) == 3 else 1)

    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, fitness_shaping=fails_once, **SETTINGS)
    with pytest.raises(NonFiniteError):
        model.learn(600, log_interval=None)
    assert model.scorer.anchors.new.sum() < 6  # two generations were made
    assert model._n_updates == 2
    model.learn(1, log_interval=None, reset_num_timesteps=False)
    other = EGGROLL("MlpPolicy", "Hopper-v5", seed=0, n_workers=0, fitness_shaping=lambda f: f * 1, **SETTINGS)
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
        with pytest.raises(EpisodeError, match="generation 2, member 7, step 2 of its segment: "):
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
    model.save(tmp_path / "model")
    more = EGGROLL.load(tmp_path / "model", env="Hopper-v5", population_size=20)
    more.learn(1, log_interval=None, reset_num_timesteps=False)
    assert len(more.scorer.anchors.ages) == 10 and more.num_timesteps > model.num_timesteps
    with pytest.raises(ConfigError, match="critic_kwargs .*do not fit the saved critic"):
        loaded = EGGROLL.load(tmp_path / "model", env="Hopper-v5", critic_kwargs={"net_arch": [8]})
        loaded.learn(60)


def test_fitness_shaping_follows_fitness(tmp_path):
    model = EGGROLL("MlpPolicy", "Hopper-v5", seed=0)
    assert model.shaping == "centered_rank"
    model.save(tmp_path / "model")
    loaded = EGGROLL.load(tmp_path / "model", env="Hopper-v5", fitness="segment")
    assert loaded.shaping == "pair_rank" and loaded.evolution_strategy.fitness_shaping is pair_rank


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ("CartPole-v1", {}, "fitness='segment' copies states .* use fitness='episode'"),
        (toy.make_target, {}, "fitness='segment' copies states"),
        ("Hopper-v5", {"fitness": "steps"}, "fitness must be 'episode' or 'segment', got 'steps'"),
        ("Hopper-v5", {"segment_steps": 0}, "segment_steps must be a whole number, at least 1, got 0"),
        ("Hopper-v5", {"gamma": 1.5}, "gamma must be a number from 0 to 1, got 1.5"),
        ("Hopper-v5", {"critic_kwargs": {"n_epoch": 2}}, "critic_kwargs has no 'n_epoch'; known are net_arch"),
        ("Hopper-v5", {"critic_kwargs": {"net_arch": [0]}}, "critic_kwargs net_arch: a width must be .* got 0"),
        ("Hopper-v5", {"critic_kwargs": {"net_arch": 64}}, "critic_kwargs net_arch must be a list .* got 64"),
        (
            "Hopper-v5",
            {"fitness": "episode", "critic_kwargs": {"n_epochs": 2}},
            "critic_kwargs needs fitness='segment'",
        ),
        ("Hopper-v5", {"n_eval_episodes": 2}, "n_eval_episodes must be 1 with fitness='segment', got 2"),
    ],
)
def test_what_cannot_be_is_refused(env, settings, message):
    with pytest.raises(ConfigError, match=message):
        EGGROLL("MlpPolicy", env, **{**SETTINGS, **settings})
