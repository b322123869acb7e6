import csv
import tomllib
from dataclasses import replace

import pytest

from eggroll_rl import cli
from eggroll_rl.compare_run import Rules
from eggroll_rl.config import RunConfig
from eggroll_rl.errors import ConfigError, EpisodeError, RunFolderError
from eggroll_rl.files import alone_in
from eggroll_rl.tune import SPACES, Search, _space, _start, settings_at, tune

optuna = pytest.importorskip("optuna")

PRESET = """
env_id = "Pendulum-v1"
max_episode_steps = 20

[eggroll]
policy = "MlpPolicy"
population_size = 4
sigma = 0.1
learning_rate = "lin_0.05"
policy_kwargs = { net_arch = [16], normalize_obs = false }

[ppo]
n_envs = 4

[tune]
population_size = [4, 8]
sigma = { low = 0.05, high = 0.2 }
network = ["linear", "16"]
"""


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Results are the same, and no process has to start."""
    monkeypatch.setattr("eggroll_rl.eggroll.count_workers", lambda *sizes: 0)


@pytest.fixture
def search(tmp_path):
    (tmp_path / "pendulum.toml").write_text(PRESET)
    rules = Rules(timesteps=320, evaluations=2, eval_episodes=2)
    return Search(str(tmp_path / "pendulum.toml"), "episode", "final", 2, rules)


def rows(folder):
    return list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))


def test_a_search_writes_a_preset_and_goes_on(search, tmp_path):
    folder = tmp_path / "study"
    tune(search, 2, folder)
    first = rows(folder)
    assert len(first) == 2
    # The preset itself comes first.
    started = first[0]
    assert [started[name] for name in ("population_size", "sigma", "network")] == ["4", "0.1", "16"]
    assert started["schedule"] == "linear" and float(started["value"]) < 0
    best = tune(search, 4, folder)
    assert rows(folder)[:2] == first and len(rows(folder)) == 4
    table = tomllib.loads((folder / "preset.toml").read_text())
    assert table["eggroll"] == best
    assert table["env_id"] == "Pendulum-v1" and table["total_timesteps"] == 320
    assert table["eggroll"]["policy_kwargs"]["normalize_obs"] is False  # the preset's, which was not searched
    assert table["ppo"] == {"n_envs": 4} and table["tune"]["population_size"] == [4, 8]  # the rest, too
    config = RunConfig.from_dict(table, "preset")
    assert config.model(config.factory()).population_size == best["population_size"]
    value = max(float(row["value"]) for row in rows(folder) if row["value"])
    assert f"{value:.6g}" in (folder / "preset.toml").read_text()


def test_the_budget_may_be_seconds(search, tmp_path):
    rules = Rules(seconds=0.6, evaluations=3, eval_episodes=1)
    tune(replace(search, rules=rules, seeds=1), 1, tmp_path / "study")
    assert [row["state"] for row in rows(tmp_path / "study")] == ["complete"]
    table = tomllib.loads((tmp_path / "study" / "preset.toml").read_text())
    assert table["total_timesteps"] >= 4 * 20  # at least one generation: 4 members of 20 steps


def test_a_value_is_that_of_its_settings_run_again(search, tmp_path):
    """The same settings in another study get the same value: runs are reproducible."""
    tune(search, 1, tmp_path / "a")
    tune(search, 1, tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_another_search_does_not_go_on_in_the_same_folder(search, tmp_path):
    tune(search, 1, tmp_path / "study")
    other = Search(search.env, "episode", "mean", 2, search.rules)
    with pytest.raises(ConfigError, match="holds a search with search .*final.*choose another output"):
        tune(other, 1, tmp_path / "study")


def test_one_command_at_a_time(search, tmp_path):
    with alone_in(tmp_path / "study"), pytest.raises(RunFolderError, match="study is in use by another process"):
        tune(search, 1, tmp_path / "study")
    assert not list((tmp_path / "study").iterdir())


def test_a_trial_that_was_cut_runs_again(search, tmp_path, monkeypatch):
    from eggroll_rl import tune as module

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(search, 1, tmp_path / "study")
    tune(search, 1, tmp_path / "study")
    cut, again = rows(tmp_path / "study")
    assert (cut.pop("state"), again.pop("state")) == ("fail", "complete")
    assert {**cut, "trial": "1", "value": again["value"]} == again


def test_the_spaces_are_what_a_table_may_say():
    for fitness, space in SPACES.items():
        assert _space(fitness, {}, "x") == space == _space(fitness, space, "x")
    anywhere = _space("segment", {}, "x", copies_states=False)
    assert SPACES["segment"].keys() - anywhere.keys() == {"segment_steps"}


def test_segments_are_searched_on_any_env(search, tmp_path):
    """With the preset's segments, which have to be as long as its episodes, here of 20 steps."""
    found = tune(replace(search, fitness="segment", seeds=1), 1, tmp_path / "study")
    assert found["fitness"] == "segment" and "segment_steps" not in found and found["sample_reuse"] == 0
    assert [row["state"] for row in rows(tmp_path / "study")] == ["complete"]


def test_a_point_of_the_space_becomes_settings():
    policy_kwargs = {"net_arch": [32], "squash_output": True}
    base = {"fitness": "episode", "policy_kwargs": policy_kwargs, "learning_rate": 0.01}
    assert _start(base, SPACES["episode"]) == {
        "population_size": 64, "learning_rate": 0.01, "schedule": "constant", "network": "32", "sigma": 0.05,
    }  # fmt: skip
    chosen = {"population_size": 32, "learning_rate": 0.02, "schedule": "linear", "network": "linear", "sigma": 0.1}
    assert settings_at(base, chosen) == {
        "fitness": "episode",
        "population_size": 32,
        "slice_size": 16,
        "learning_rate": "lin_0.02",
        "sigma": 0.1,
        "policy_kwargs": {"net_arch": [], "squash_output": True},
    }
    assert settings_at({**base, "policy": "LinearPolicy"}, chosen)["policy"] == "MlpPolicy"
    assert settings_at({**base, "policy": "MultiInputPolicy"}, chosen)["policy"] == "MultiInputPolicy"


def test_a_point_of_the_segments_space_becomes_settings():
    base = {"fitness": "segment", "policy_kwargs": {"net_arch": [16]}, "target_kl": "lin_0.5", "gamma": 0.99}
    assert _start(base, SPACES["segment"]) == {
        "exploration_std": 0.4, "target_kl": 0.5, "schedule": "linear", "network": "16", "n_segments": 32,
        "segment_steps": 64, "gamma": 0.99, "gae_lambda": 0.95, "sample_reuse": 0, "damping": 0.1,
    }  # fmt: skip
    chosen = {"exploration_std": 0.3, "target_kl": 0.2, "schedule": "linear", "network": "8", "n_segments": 64}
    assert settings_at(base, chosen) == {
        **base, "exploration_std": 0.3, "target_kl": "lin_0.2", "n_segments": 64, "slice_size": 32,
        "policy_kwargs": {"net_arch": [8]},
    }  # fmt: skip


def test_lagging_trials_are_pruned_in_their_first_seed(search, tmp_path, monkeypatch):
    """Trials 0 to 7 end at their number; later ones report less than the median and are cut at once."""
    from eggroll_rl import tune as module

    runs = []

    def run(settings, config, factory, rules, report):
        runs.append(config.seed)
        good = 10.0 if len(runs) <= 16 else 1.0
        for point in range(3):
            report(point, good + point if point else 1000.0)  # the untrained policy does not count
        return 100

    monkeypatch.setattr(module, "_run", run)
    tune(search, 10, tmp_path / "study")
    states = [row["state"] for row in rows(tmp_path / "study")]
    assert states == ["complete"] * 8 + ["pruned"] * 2
    assert runs == [0, 1] * 8 + [0, 0]
    assert {row["value"] for row in rows(tmp_path / "study")[:8]} == {"12.0"}


def test_the_mean_over_evaluations_asks_for_speed(search, tmp_path, monkeypatch):
    from eggroll_rl import tune as module

    monkeypatch.setattr(module, "_run", lambda *args: [args[-1](point, 6.0 * point) for point in range(3)] and 100)
    tune(replace(search, objective="mean"), 1, tmp_path / "study")
    assert rows(tmp_path / "study")[0]["value"] == "9.0"  # of 6 and 12


def test_a_trial_that_fails_is_counted_and_the_search_goes_on(search, tmp_path, monkeypatch):
    from eggroll_rl import tune as module

    def run(settings, config, *args):
        raise EpisodeError("the physics diverged")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_run", run)
        assert tune(search, 2, tmp_path / "study") == {}
    assert [row["state"] for row in rows(tmp_path / "study")] == ["fail", "fail"]
    assert tune(search, 3, tmp_path / "study")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"sigma": {"low": "a", "high": 1}}, "sigma must be a list of numbers or a table with low and high"),
        ({"sigma": {"low": 2, "high": 1}}, "sigma: low must not be above high"),
        ({"network": ["128"]}, "network must be some of linear, 8, 16, 32, 64, 64-64"),
        ({"schedule": ["cosine"]}, "schedule must be some of constant, linear"),
        ({"population_size": {"low": 8, "high": 64}}, "population_size must be a list of choices"),
        ({"learning_rate": ["lin_0.02"]}, "learning_rate must be a list of numbers or a table"),
        ({"sigmas": [1]}, "unknown setting 'sigmas'; did you mean sigma"),
    ],
)
def test_mistakes_in_the_space(table, message):
    with pytest.raises(ConfigError, match=message):
        _space("episode", table, "test [tune]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fitness", "steps", "--timesteps", "10"], "fitness must be one of episode, segment, got 'steps'"),
        (["--objective", "best", "--timesteps", "10"], "objective must be one of final, mean, got 'best'"),
        ([], "a budget is needed"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eggroll-rl", "tune", "HalfCheetah-v5", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
