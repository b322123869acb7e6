"""Envs that raise, give NaN or nonsense, or whose physics diverges: an error that says where, or the worst rank."""

import logging
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from chain import chain, make_model, seed_of, state_hash
from faulty import FLAGS, OBSERVATIONS, REWARDS, FaultyEnv, make_faulty
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.vec_env import DummyVecEnv

from eggroll_rl import EGGROLL
from eggroll_rl.config import RunConfig
from eggroll_rl.errors import ConfigError, EggrollError, EpisodeError, TooManyFailuresError
from eggroll_rl.fitness import FITNESS_SHAPING, centered_rank
from eggroll_rl.scoring import _worst_where_missing
from eggroll_rl.training import RunRecorder, load_run_config, replay, train

ERRORS = ("ValueError", "UnpicklableError", "SystemExit")
NONSENSE = (*REWARDS, *OBSERVATIONS, *FLAGS)


def sometimes(values, fast):
    """Mark all but the fast ones as heavy."""
    return [value if value in fast else pytest.param(value, marks=pytest.mark.reliability) for value in values]


# Errors -------------------------------------------------------------------------------------------------


@pytest.mark.promise("R3")
@pytest.mark.parametrize("n_workers", sometimes((0, 1, 2), fast=(0,)))
@pytest.mark.parametrize("fault", ERRORS)
@pytest.mark.parametrize("place", ["reset", "step"])
def test_an_exception_in_an_env_is_named_and_can_be_replayed(place, fault, n_workers):
    model = make_model(make_faulty(fault, place=place, seed=seed_of(6)), n_workers)
    before = state_hash(model)
    with pytest.raises(EpisodeError) as caught:
        model.learn(1000, log_interval=None)
    text = str(caught.value)
    step = 2 if place == "step" else 0
    assert text.startswith(
        f"generation 0, member 6, episode 0, step {step}, seed {seed_of(6)}: the env raised in {place}"
    )
    assert f"{fault}: it broke" in text and "faulty.py" in text
    assert state_hash(model) == before
    with pytest.raises(EpisodeError) as again:
        model.replay_member(6)
    assert str(again.value).splitlines()[0] == text.splitlines()[0]
    assert np.isfinite(model.replay_member(1).returns[1]).all()


@pytest.mark.promise("R3")
@pytest.mark.reliability
@pytest.mark.parametrize("fault", ERRORS)
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_constructor_that_fails_is_named(fault, n_workers):
    with pytest.raises((EggrollError, ValueError, SystemExit, Exception), match="it broke"):
        chain(make_faulty(fault, place="init"), n_workers)


@pytest.mark.promise("R3")
@pytest.mark.parametrize("n_workers", sometimes((0, 2), fast=(0,)))
def test_what_close_raises_in_a_worker_does_no_harm(n_workers):
    env = make_faulty("ValueError", place="close", seed=-1)
    assert chain(env, n_workers) == chain(make_faulty("nothing"), 0)


@pytest.mark.promise("R3")
def test_a_replayed_member_gets_what_it_got_in_its_generation():
    model = make_model(n_workers=0)
    with model._make_evaluator() as evaluator:
        results = evaluator.evaluate(model.next_generation())
    for member in range(12):
        alone = model.replay_member(member)
        row = member - alone.first
        assert (alone.returns[row] == results[member // 4].returns[row]).all()
        assert np.isnan(np.delete(alone.returns, row, axis=0)).all()
    with pytest.raises(ConfigError, match="member must be below 12, got 12"):
        model.replay_member(12)


# Nonsense -----------------------------------------------------------------------------------------------


@pytest.mark.promise("R4")
@pytest.mark.parametrize("n_workers", sometimes((0, 2), fast=(0,)))
@pytest.mark.parametrize("at", [1, -1])
@pytest.mark.parametrize("fault", NONSENSE)
def test_nonsense_from_an_env_is_an_error_and_changes_nothing(fault, at, n_workers):
    model = make_model(make_faulty(fault, at=at, seed=seed_of(6)), n_workers)
    before = state_hash(model)
    what = "reward" if fault in REWARDS else "observation" if fault in OBSERVATIONS else "terminated"
    with pytest.raises(EpisodeError, match=rf"generation 0, member 6, episode 0, step \d+, .*the env's {what}"):
        model.learn(1000, log_interval=None)
    assert state_hash(model) == before


@pytest.mark.promise("R4")
@pytest.mark.parametrize("fault", OBSERVATIONS)
def test_nonsense_from_a_reset_is_an_error(fault):
    with pytest.raises(EpisodeError, match="generation 0, member 6, episode 0, step 0, .*the env's observation"):
        chain(make_faulty(fault, place="reset", seed=seed_of(6)), 0)


class Lowest(FaultyEnv):
    """What the failed members are compared with: members that are by far the worst, and that nobody learns from."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, -1e30 if self.armed else reward, terminated, truncated, info


def network(model):
    return torch.cat([parameter.flatten() for parameter in model.policy.network.parameters()])


@pytest.mark.promise("R4")
@pytest.mark.parametrize("n_workers", sometimes((0, 2), fast=(0,)))
@pytest.mark.parametrize(
    ("fault", "place", "at"),
    [
        *((fault, "step", at) for fault in (*ERRORS, *NONSENSE) for at in (1, -1)),
        *((fault, "reset", 0) for fault in (*ERRORS, *OBSERVATIONS)),
    ],
)
def test_a_bad_member_is_ranked_worst_and_leaves_no_trace(fault, place, at, n_workers):
    seed = seed_of(6)
    bad = make_model(make_faulty(fault, place=place, at=at, seed=seed), n_workers, on_bad_member="worst")
    worst = make_model(lambda: TimeLimit(Lowest("nothing", seed=seed), 50), 0)
    for model in (bad, worst):
        model.learn(1, log_interval=None)
    assert bad._n_updates == worst._n_updates == 1
    assert torch.equal(network(bad), network(worst))
    assert sum(bad.bad_members.values()) == bad.last_generation["bad_members"] == 2
    # Observations of the ten others alone.
    normalizer = bad.policy.normalizer
    assert normalizer.mean.isfinite().all() and normalizer.m2.isfinite().all()
    assert 0 < normalizer.count < worst.policy.normalizer.count


@pytest.mark.promise("R4")
def test_bad_members_are_counted_by_reason_and_said(caplog):
    model = make_model(make_faulty("nan", seed=seed_of(6)), 0, on_bad_member="worst")
    with caplog.at_level(logging.WARNING, logger="eggroll_rl"):
        model.learn(1, log_interval=None)
    assert model.bad_members == {"reward": 2}
    assert "2 of 12 bad in generation 0 (2 reward), ranked worst; the first: generation 0, member 6" in caplog.text


@pytest.mark.promise("R4")
@pytest.mark.parametrize("fraction", [0.5, 1.0, 0.0])
def test_too_many_bad_members_are_an_error_and_change_nothing(fraction):
    model = make_model(make_faulty("nan"), 0, on_bad_member="worst", max_bad_fraction=fraction)
    before = state_hash(model)
    expected = EpisodeError if fraction == 0 else TooManyFailuresError
    with pytest.raises(expected, match="member 0" if fraction == 0 else "12 of 12 bad in generation 0"):
        model.learn(1, log_interval=None)
    assert state_hash(model) == before and model.bad_members == {}


@pytest.mark.promise("R4")
@pytest.mark.parametrize("shaping", [name for name in FITNESS_SHAPING if name != "best_fraction"])
def test_whichever_member_is_bad_it_never_beats_another(shaping, cells):
    generator = np.random.default_rng(0)
    for trial in range(50):
        fitness = generator.normal(size=16) * 10.0 ** generator.integers(-3, 4)
        bad = generator.random(16) < 0.2
        if bad.all():
            continue
        with cells.cell(trial):
            filled = _worst_where_missing(np.where(bad, np.nan, fitness))
            assert (filled[~bad] == fitness[~bad]).all()
            assert not bad.any() or filled[bad].max() < filled[~bad].min()
            assert FITNESS_SHAPING[shaping](torch.from_numpy(filled)).isfinite().all()


@pytest.mark.promise("R4")
def test_a_nan_that_nobody_takes_out_would_be_ranked_best(cells):
    with cells.control("NaN in the ranks"):
        ranks = centered_rank(torch.tensor([1.0, 2.0, float("nan"), 3.0], dtype=torch.float64))
        assert ranks.argmax() == 3


@pytest.mark.promise("R4")
def test_a_ready_made_env_too():
    def model_on(fault, **settings):
        healthy = [make_faulty("nothing")] * 3
        envs = DummyVecEnv([make_faulty(fault, at=3), *healthy])
        return EGGROLL("MlpPolicy", envs, population_size=8, slice_size=4, seed=0, **settings)

    for fault, what in (("nan", "reward"), ("inf_obs", "observation")):
        with pytest.raises(EpisodeError, match=f"member 0, episode 0, step 3: the env's {what} is not finite"):
            model_on(fault).learn(1, log_interval=None)
        model = model_on(fault, on_bad_member="worst")
        model.learn(1, log_interval=None)
        assert model.bad_members == {what: 2}  # members 0 and 4 have the first env
        assert network(model).isfinite().all() and model.policy.normalizer.m2.isfinite().all()


# Segments -----------------------------------------------------------------------------------------------


@pytest.mark.promise("R4")
@pytest.mark.parametrize(
    ("fault", "place"),
    [("nan", "step"), *((fault, place) for fault in ("nan_obs", "ValueError") for place in ("step", "reset"))],
)
def test_in_segments_a_bad_simulation_begins_its_next_episode(fault, place, tmp_path):
    env = make_faulty(fault, place=place, seed="of training", times=2, folder=tmp_path)
    settings = {"fitness": "segment", "n_segments": 8, "segment_steps": 50, "slice_size": 4, "seed": 0}
    model = EGGROLL("MlpPolicy", env, n_workers=0, on_bad_member="worst", **settings)
    model.learn(1, log_interval=None)
    assert sum(model.bad_members.values()) == 2 and network(model).isfinite().all()
    for tensor in model.scorer.state_dict().values():
        assert not tensor.is_floating_point() or tensor.isfinite().all()
    (tmp_path / "0").unlink()
    with pytest.raises(EpisodeError, match="generation 0, simulation 0, step"):
        EGGROLL("MlpPolicy", env, n_workers=0, **settings).learn(1, log_interval=None)


# Physics ------------------------------------------------------------------------------------------------


class Exploding(gym.Wrapper):
    """Puts a huge velocity into the simulation at one step of the episodes that a seed begins."""

    def __init__(self, env, seed, at=3):
        super().__init__(env)
        self.bad_seed, self.at = seed, at

    def reset(self, *, seed=None, options=None):
        self.armed, self.t = seed in (self.bad_seed, -1) or self.bad_seed is None, 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.t += 1
        if self.armed and self.t == self.at:
            self.unwrapped.data.qvel[:] = 1e12
        return super().step(action)


SMALL = {"population_size": 8, "slice_size": 4, "seed": 0, "policy_kwargs": {"net_arch": [8]}}


@pytest.mark.promise("R5")
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", *sometimes(("Hopper-v5", "Ant-v5", "Humanoid-v5"), fast=())])
def test_physics_that_diverges_is_noticed(env_id, cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make():
        return Exploding(gym.make(env_id, max_episode_steps=10), None)

    with cells.cell("raise"), pytest.raises(EpisodeError, match="generation 0, member 0, .*diverged"):
        EGGROLL("MlpPolicy", make, n_workers=0, **SMALL).learn(1, log_interval=None)
    with cells.cell("no file left"):
        assert not list(Path(tmp_path).iterdir())
    with cells.control("nobody looks at MuJoCo's counters"):
        monkeypatch.setattr("eggroll_rl.serial_vector.SerialVectorEnv._has_diverged", staticmethod(lambda env: False))
        try:
            EGGROLL("MlpPolicy", make, n_workers=0, **SMALL).learn(1, log_interval=None)
        except EpisodeError:
            pass
        else:
            raise AssertionError


# On the command line ------------------------------------------------------------------------------------


@pytest.mark.promise("R3")
def test_a_failed_run_says_how_to_replay_the_member_and_that_does(tmp_path, run):
    if "Faulty-v0" not in gym.registry:
        gym.register("Faulty-v0", FaultyEnv, max_episode_steps=50, kwargs={"fault": "ValueError", "seed": seed_of(6)})
    folder = tmp_path / "run"
    settings = ["--population-size", 12, "--slice-size", 4, "--n-workers", 0, "--output", folder]
    code, out, err = run("train", "Faulty-v0", *settings)
    assert code == 1 and "generation 0, member 6" in err
    assert err.splitlines()[-1] == f"replay it: eggroll-rl replay {folder} --member 6"
    code, out, err = run("replay", folder, "--member", 6)
    assert code == 1 and "error: generation 0, member 6" in err
    code, out, err = run("replay", folder, "--member", 1)
    assert code == 0 and out.startswith("generation 0, member 1: return ")
    assert run("replay", folder, "--member", 12)[0] == 2


@pytest.mark.promise("R3")
def test_a_replay_goes_by_the_schedules(tmp_path):
    if "FaultyLater-v0" not in gym.registry:
        kwargs = {"fault": "ValueError", "seed": seed_of(6, generation=3)}
        gym.register("FaultyLater-v0", FaultyEnv, max_episode_steps=50, kwargs=kwargs)
    eggroll = {"population_size": 12, "slice_size": 4, "sigma": "lin_0.3", "policy_kwargs": {"net_arch": [8]}}
    folder = tmp_path / "run"
    config = RunConfig("FaultyLater-v0", total_timesteps=600, n_workers=0, eval_freq=0, eggroll=eggroll)
    with pytest.raises(EpisodeError) as first:
        train(config, folder, progress_bar=False)
    assert "generation 3, member 6" in str(first.value)
    with pytest.raises(EpisodeError) as again:
        replay(folder, 6)
    assert str(again.value).splitlines()[0] == str(first.value).splitlines()[0]
    # Another member, by hand, with the noise of that generation and with that of the start.
    config = load_run_config(folder)
    model = config.model(config.factory())
    _, timesteps = RunRecorder(config, folder, config.factory()).restore_model(model)
    model._update_current_progress_remaining(timesteps, 600)
    assert replay(folder, 1)[1] == model.replay_member(1).returns[1].tolist()
    model._update_current_progress_remaining(0, 600)
    assert replay(folder, 1)[1] != model.replay_member(1).returns[1].tolist()


class ShortEnv(FaultyEnv):
    """Episodes of 4 steps, the fourth of which begins with a NaN, or of 40."""

    def __init__(self, nan_in):
        super().__init__("nothing")
        self.nan_in, self.n_resets = nan_in, 0

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.length = 40 if self.nan_in is None else 4
        self.n_resets += 1
        return (np.full(3, np.nan, np.float32) if self.n_resets == self.nan_in else obs), info


def ready_made(nan_in, **settings):
    long = [lambda: ShortEnv(None)] * 3
    envs = DummyVecEnv([lambda: ShortEnv(nan_in), *long])
    return EGGROLL("MlpPolicy", envs, population_size=4, slice_size=4, seed=0, **settings)


@pytest.mark.promise("R4")
@pytest.mark.parametrize("on_bad_member", ["raise", "worst"])
def test_a_ready_made_env_that_waits_for_the_others_may_hold_nan(on_bad_member):
    model = ready_made(nan_in=4, on_bad_member=on_bad_member)
    model.learn(1, log_interval=None)
    assert model.bad_members == {} and model.policy.normalizer.m2.isfinite().all()
    assert model.policy.normalizer.count == 4 + 3 * 40


@pytest.mark.promise("R4")
def test_a_ready_made_env_whose_first_observation_is_nan():
    with pytest.raises(EpisodeError, match="member 0, episode 0, step 0: the env's observation is not finite"):
        ready_made(nan_in=2).learn(1, log_interval=None)  # SB3 resets once before
