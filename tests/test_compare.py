import json
import os
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch

from eggroll_rl import cli, compare_run
from eggroll_rl.agents import load_tensors, read_evaluations
from eggroll_rl.compare import compare
from eggroll_rl.compare_algorithms import build, settings_of
from eggroll_rl.compare_run import Rules, read_config, run, write_config
from eggroll_rl.config import RunConfig
from eggroll_rl.errors import ConfigError, ConsentError, RunFolderError
from eggroll_rl.evaluation import evaluate, load_agent
from eggroll_rl.files import alone_in

pytest.importorskip("sb3_contrib")
SMALL = {
    "eggroll": {"population_size": 4, "slice_size": 2, "policy_kwargs": {"net_arch": [4]}},
    "ppo": {"n_envs": 2, "normalize": True, "n_steps": 64, "batch_size": 64, "n_epochs": 1},
    "a2c": {"n_envs": 2, "n_steps": 10},
    "sac": {"learning_starts": 100, "train_freq": 50, "policy_kwargs": {"net_arch": [8]}},
    "ars": {"policy": "LinearPolicy", "normalize": {"norm_reward": False}, "n_delta": 2},
}
BOX = gym.spaces.Box(-1, 1, (2,))
PRESET = {"env_id": "Pendulum-v1", "max_episode_steps": 50, **SMALL}


def in_its_own_process(folder):
    subprocess.run([sys.executable, "-m", "eggroll_rl.compare_run", str(folder)], check=True)


def one_run(folder, algo, rules, seed=0, preset=PRESET, run=run):
    folder.mkdir()
    config = RunConfig.from_dict(preset, "test")
    config.seed = seed
    write_config(folder / "config.toml", algo, settings_of(preset, algo, BOX), config, rules)
    run(folder)
    return json.loads((folder / "results.json").read_text()), read_evaluations(folder / "evaluations.npz")


@pytest.mark.parametrize("algo", ["eggroll", "ppo", "sac", "ars"])
def test_a_run_is_evaluated_at_fixed_points_and_can_be_evaluated_again(algo, tmp_path):
    rules = Rules(timesteps=600, evaluations=3, eval_episodes=4)
    # The server from which ARS's processes are forked lives as long as the process that started it.
    runner = in_its_own_process if algo == "ars" else run
    results, evaluations = one_run(tmp_path / "run", algo, rules, run=runner)
    steps = [e["timesteps"] for e in evaluations]
    # Before training, then the last complete update's policy at each third of the budget, where it is a new one:
    # iterations are 4 members x 50 steps, 2 envs x 64, 50, and 2 x 2 candidates x 50.
    assert steps == {
        "eggroll": [0, 200, 400, 600], "ppo": [0, 128, 384, 512], "sac": [0, 200, 400, 600], "ars": [0, 200, 400, 600],
    }[algo]  # fmt: skip
    assert all(len(e["returns"]) == 4 for e in evaluations)
    assert results["algorithm"] == algo and results["timesteps"] == steps[-1]
    assert {"speed", "processor", "cores"} <= results["machine"].keys() and "torch" in results["versions"]
    if algo == "ppo":
        assert results["envs"] == "2 in DummyVecEnv, VecNormalize"
        assert results["settings"]["gamma"] == 0.99  # the library's default, written down

    # The folder loads without unpickling anything and repeats its last evaluation.
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.toml", "evaluations.npz", "policy.safetensors", "results.json",
    ]  # fmt: skip
    agent = load_agent(tmp_path / "run")
    again = evaluate(agent.predict, agent.factory, rules.reset_seeds, plain=True)
    assert again.returns == evaluations[-1]["returns"]
    assert np.mean(again.returns) == pytest.approx(results["mean_return"])


def same_policy(*paths):
    (first, about), (second, about_second) = (load_tensors(path, "policy") for path in paths)
    assert about == about_second and first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_repeats_to_the_bit(tmp_path):
    rules = Rules(timesteps=600, evaluations=2, eval_episodes=2)
    (_, first), (_, second) = (one_run(tmp_path / name, "ppo", rules) for name in "ab")
    assert [e["returns"] for e in first] == [e["returns"] for e in second]
    assert same_policy(tmp_path / "a/policy.safetensors", tmp_path / "b/policy.safetensors")


def test_the_clock_stands_still_while_evaluating(tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.5)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(compare_run, "evaluate", slow)
    results, evaluations = one_run(tmp_path / "run", "ppo", Rules(seconds=1.0, evaluations=4, eval_episodes=1))
    seconds = [e["seconds"] for e in evaluations]
    assert len(evaluations) >= 3 and 0.7 < results["seconds"] <= 1.0 <= results["stopped_after"] < 1.4
    # The policy at each point is a little older than the point.
    assert all(any(0 <= point - s < 0.25 for s in seconds) for point in (0.25, 0.5, 0.75, 1.0) if point > seconds[0])


def test_schedules_follow_the_budget_in_seconds(tmp_path):
    rules, config = Rules(seconds=100.0), RunConfig.from_dict(PRESET, "test")
    settings = {**SMALL["ppo"], "learning_rate": "lin_1e-3"}
    learner = build("ppo", settings, config, config.factory(), 1)
    recorder = compare_run.BudgetRecorder("ppo", config.factory(), rules, time.perf_counter() - 25)
    recorder.init_callback(learner.model)
    recorder._on_training_start()
    learner.model._update_current_progress_remaining(0, 2**62)
    learner.model._setup_lr_schedule()
    rate = learner.model.lr_schedule(learner.model._current_progress_remaining)
    assert rate == pytest.approx(0.75e-3, rel=0.02)
    learner.model.env.close()


def test_openes_is_eggroll_at_full_rank(tmp_path):
    settings = settings_of({**PRESET, "openes": {"sigma": 0.2}}, "openes", BOX)
    config = RunConfig.from_dict(PRESET, "test")
    learner = build("openes", settings, config, config.factory(), 0)
    assert learner.settings["sigma"] == 0.2 and learner.settings["population_size"] == 4
    noise = learner.model.evolution_strategy.ask()
    module = learner.model.policy.network
    before = module[0].weight.detach()
    perturbation = noise.parameters_of(0)["0.weight"] - before  # (4, 3)
    assert np.linalg.matrix_rank(perturbation.detach().numpy()) == 3


def test_openes_of_a_preset_for_segments_runs_whole_episodes():
    eggroll = {"fitness": "segment", "policy_kwargs": {"net_arch": [8]}, "target_kl": 0.2, "alive_bonus_offset": -1.0}
    settings = settings_of({"eggroll": eggroll, "openes": {"sigma": 0.2}}, "openes", BOX)
    assert settings == {
        "fitness": "episode", "policy_kwargs": {"net_arch": [8]}, "alive_bonus_offset": -1.0, "rank": 1_000_000,
        "sigma": 0.2,
    }  # fmt: skip


def test_an_algorithm_of_the_users_own(tmp_path):
    algo = "toy_algorithm:Mine"
    rules = Rules(timesteps=100, evaluations=1, eval_episodes=1)
    preset = {**PRESET, algo: {"n_envs": 2, "normalize": True, "n_steps": 5}}
    results, evaluations = one_run(tmp_path / "run", algo, rules, preset=preset)
    assert results["algorithm"] == algo and results["settings"]["n_steps"] == 5
    # Its policy is none of ours: SB3's own file, which asks for the class and for consent.
    assert {"model.zip", "vecnormalize.pkl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ConfigError, match="--algo"):
        load_agent(tmp_path / "run")
    with pytest.raises(ConsentError):
        load_agent(tmp_path / "run", algo=algo)
    agent = load_agent(tmp_path / "run", algo=algo, trust_pickle=True)
    again = evaluate(agent.predict, agent.factory, rules.reset_seeds, plain=True)
    assert again.returns == evaluations[-1]["returns"] and max(again.lengths) == 50
    with pytest.raises(ConfigError, match=r"toy_algorithm:Missing.*cannot be imported"):
        settings_of({}, "toy_algorithm:Missing", BOX)
    with pytest.raises(ConfigError, match="not a subclass"):
        settings_of({}, "toy_algorithm:NOT_ONE", BOX)


def test_an_algorithm_that_fails_has_a_result(tmp_path, capsys):
    preset = {**PRESET, "toy_algorithm:Failing": {"n_envs": 2, "n_steps": 5}}
    rules = Rules(timesteps=400, evaluations=4, eval_episodes=1)
    results, evaluations = one_run(tmp_path / "run", "toy_algorithm:Failing", rules, preset=preset)
    assert (
        results["failed"] == "ArithmeticError: out of numbers" and "failed: ArithmeticError" in capsys.readouterr().err
    )
    assert [e["timesteps"] for e in evaluations] == [0, 100]


def preset_file(folder):
    import tomli_w

    path = folder / "toy.toml"
    path.write_text(tomli_w.dumps(PRESET))
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Do the runs here, and return the folders in their order."""
    done = []

    def here(folder, rules):
        done.append(folder.name)
        run(folder)

    monkeypatch.setattr("eggroll_rl.compare._run", here)
    return done


def test_finished_runs_are_used_again_and_broken_ones_redone(tmp_path, in_this_process, capsys):
    env, output, rules = str(preset_file(tmp_path)), tmp_path / "out", Rules(timesteps=300, evaluations=2)
    first = compare(env, ["a2c", "ppo"], 2, rules, output, thresholds=[-400.0], command="the command")
    # Seed by seed.
    assert in_this_process == ["a2c-seed0", "ppo-seed0", "a2c-seed1", "ppo-seed1"]
    files = {"comparison.png", "comparison.csv", "comparison.json", "comparison.md", "compare"}
    assert {path.name for path in output.iterdir()} == files
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "comparison.json").read_text())["command"] == "the command"

    # One run was broken off, another seed is asked for: only these are done.
    (output / "compare" / "ppo-seed1" / "results.json").unlink()
    in_this_process.clear()
    second = compare(env, ["a2c", "ppo"], 3, rules, output, thresholds=[-400.0], command="the command")
    assert in_this_process == ["ppo-seed1", "a2c-seed2", "ppo-seed2"]
    for algo in ("a2c", "ppo"):
        for before, after in zip(*(c["algorithms"][algo]["runs"] for c in (first, second)), strict=False):
            assert before["returns"] == after["returns"] and before["timesteps"] == after["timesteps"]
    assert [run["seed"] for run in second["algorithms"]["ppo"]["runs"]] == [0, 1, 2]
    assert "ppo seed 1" in capsys.readouterr().err

    # Other settings never mix with what is there.
    in_this_process.clear()
    with pytest.raises(RunFolderError, match="a2c-seed0 was run with other settings"):
        compare(env, ["a2c"], 1, Rules(timesteps=400, evaluations=2), output)
    assert in_this_process == []
    for _ in range(2):  # the second time it is there
        only = compare(env, ["a2c"], 1, Rules(timesteps=400, evaluations=2), output, overwrite=True)
        assert in_this_process == ["a2c-seed0"]
    # What is there and was not asked for is not passed over in silence.
    assert only["left_out"] == ["a2c-seed1", "a2c-seed2", "ppo-seed0", "ppo-seed1", "ppo-seed2"]
    assert "Not asked for: a2c-seed1" in (output / "comparison.md").read_text()
    # A folder of something else is left alone.
    (output / "compare" / "sac-seed0").mkdir()
    (output / "compare" / "sac-seed0" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="something else"):
        compare(env, ["sac"], 1, rules, output, overwrite=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--algos", "eggroll", "pppo", "--seconds", "1"], "algo must be one of"),
        (["--algos", "eggroll", "eggroll", "--seconds", "1"], "must be different"),
        (["--algos", "eggroll", "--seconds", "1", "--threshold", "nan"], "thresholds must be finite"),
        (["--algos", "eggroll"], "a budget is needed"),
        (["--algos", "eggroll", "--seconds", "-1"], "seconds must be"),
        (["--algos", "eggroll", "--timesteps", "0"], "timesteps must be"),
        (["--algos", "eggroll", "--seconds", "1", "--evaluations", "0"], "evaluations must be"),
        (["--seconds", "1"], "Missing option '--algos'"),
        (["--algos", "ppo", "sac", "--seconds", "1", "--seeds", "0"], "--seeds"),
    ],
)
def test_a_mistake_is_answered_before_the_first_run(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["eggroll-rl", "compare", "Pendulum-v1", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "agents").exists()


def test_a_refused_setting_is_named_before_the_first_run(tmp_path, in_this_process):
    for table, message in [
        ({"ppo": {"n_stepps": 3}}, "did you mean n_steps"),
        ({"ppo": {"n_envs": 0}}, "n_envs must be"),
        ({"ppo": {"learning_rate": "lin_fast"}}, "lin_<number>"),
        ({"ppo": {"policy_kwargs": {"activation_fn": "tan"}}}, "activation_fn must be one of"),
        ({"ppo": {"batch_size": "large"}}, r"\[ppo\]"),
        ({"sac": {"noise_std": 0.1, "policy": "CnnPolicy"}}, r"\[sac\]"),
    ]:
        import tomli_w

        path = tmp_path / "bad.toml"
        path.write_text(tomli_w.dumps({**PRESET, **table}))
        with pytest.raises(ConfigError, match=message):
            compare(str(path), [*table], 1, Rules(seconds=1.0), tmp_path / "out")
    assert in_this_process == [] and not (tmp_path / "out").exists()


def test_one_comparison_at_a_time_in_a_folder(tmp_path, in_this_process):
    with alone_in(tmp_path / "out" / "compare"), pytest.raises(RunFolderError, match="in use by another process"):
        compare(str(preset_file(tmp_path)), ["a2c"], 1, Rules(timesteps=300), tmp_path / "out")
    assert not in_this_process


def test_a_runs_folder_says_what_it_does(tmp_path):
    rules = Rules(seconds=2.5, timesteps=10, torch_threads=2, n_cores=3, gym_packages=("toy_env",))
    config = RunConfig("Toy-v0", env_kwargs={"a": 1}, seed=7)
    write_config(tmp_path / "config.toml", "openes", {"sigma": 0.5}, config, rules)
    algo, settings, config_again, rules_again = read_config(tmp_path / "config.toml")
    assert (algo, settings, rules_again) == ("openes", {"sigma": 0.5}, rules)
    assert (config_again.env_id, config_again.env_kwargs, config_again.seed) == ("Toy-v0", {"a": 1}, 7)
    with pytest.raises(ConfigError, match=r"no \[comparison\]"):
        (tmp_path / "other.toml").write_text('env_id = "Toy-v0"')
        read_config(tmp_path / "other.toml")


def start(folder, preset, output):
    words = [sys.executable, "-m", "eggroll_rl", "compare", str(preset), "--algos", "eggroll", "ppo", "sac",
             "--seeds", "2", "--timesteps", "600", "--evaluations", "3", "--eval-episodes", "2",
             "--output", str(output)]  # fmt: skip
    return subprocess.Popen(words, cwd=folder, start_new_session=True, stderr=subprocess.PIPE, text=True)


def timeless(comparison):
    """Leave out what a clock measured, and the command."""
    if isinstance(comparison, dict):
        clocks = {"seconds", "steps_per_second", "machine_speed", "command", "median_seconds"}
        return {name: timeless(value) for name, value in comparison.items() if name not in clocks}
    return [timeless(value) for value in comparison] if isinstance(comparison, list) else comparison


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_resumed_gives_the_same_files(signum, tmp_path):
    preset = preset_file(tmp_path)
    whole = start(tmp_path, preset, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    whole.stderr.close()

    broken = start(tmp_path, preset, tmp_path / "broken")
    runs = tmp_path / "broken" / "compare"
    while not ((runs / "ppo-seed0" / "results.json").exists() and (runs / "sac-seed0" / "config.toml").exists()):
        assert broken.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    if signum == signal.SIGKILL:
        broken.kill()  # the child notices by itself that it is alone
    else:
        os.killpg(broken.pid, signum)  # as a terminal does
    assert broken.wait() == (130 if signum == signal.SIGINT else -9)
    assert "Traceback" not in broken.stderr.read()  # read to the end: the child is gone, too
    broken.stderr.close()
    assert not (tmp_path / "broken" / "comparison.json").exists()
    finished = (runs / "ppo-seed0" / "results.json").stat().st_mtime_ns

    resumed = start(tmp_path, preset, tmp_path / "broken")
    assert resumed.wait() == 0, resumed.stderr.read()
    resumed.stderr.close()
    assert (runs / "ppo-seed0" / "results.json").stat().st_mtime_ns == finished
    one, other = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("whole", "broken"))
    assert one == other and len(one) > 20
    for path in one:
        if path.suffix == ".safetensors":
            assert same_policy(tmp_path / "whole" / path, tmp_path / "broken" / path), path
        if path.suffix == ".toml":
            assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "broken" / path).read_bytes(), path
    first, second = (json.loads((tmp_path / n / "comparison.json").read_text()) for n in ("whole", "broken"))
    assert timeless(first) == timeless(second)
