import json

import numpy as np
import pytest
import torch

SMALL = ["--total-timesteps", "600", "--population-size", "4", "--slice-size", "2", "--n-workers", "0"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_evaluate_record_and_list(run, here):
    status, out, err = run("train", "CartPole-v1", *SMALL, "--seed", "3", "--max-episode-steps", "30")
    assert status == 0, err
    folder = here / "agents" / "CartPole-v1" / "eggroll-seed3"
    assert "saved in agents/CartPole-v1/eggroll-seed3" in out
    assert "return" in err and "\r" not in err  # no terminal: lines instead of a bar
    # The preset, with the flags over it.
    config = (folder / "config.toml").read_text()
    assert "population_size = 4" in config and "net_arch" in config and "sigma = 0.1" in config

    status, out, err = run("evaluate", folder, "--n-eval-episodes", "3", "--seed", "7", "--json")
    result = json.loads(out)
    assert status == 0 and {"mean_return", "std_return", "returns", "lengths"} <= result.keys()
    assert len(result["returns"]) == len(result["lengths"]) == 3 and max(result["lengths"]) <= 30
    assert result["mean_return"] == pytest.approx(sum(result["returns"]) / 3)
    assert "over 2 episodes" in run("evaluate", folder, "--n-eval-episodes", "2", "--best")[1]

    status, out, err = run("record", folder, "--output", here / "video.mp4", "--seed", "1")
    assert status == 0, err
    assert (here / "video.mp4").stat().st_size > 1000 and "frames/s" in out
    run("record", folder)
    assert (here / "videos" / "CartPole-v1-eggroll-seed3.mp4").exists()

    status, out, _ = run("list")
    assert "HalfCheetah-v5" in out and "agents/CartPole-v1/eggroll-seed3" in out


def test_export(run, here):
    assert run("train", "CartPole-v1", *SMALL, "--output", "agent", "--max-episode-steps", "30")[0] == 0
    status, out, err = run("export", "agent", "--output", "files/policy.pt2")
    assert status == 0 and "files/policy.pt2" in out, err
    assert torch.export.load(here / "files" / "policy.pt2").module()(torch.zeros(3, 4)).shape == (3,)
    status, _, err = run("export", "agent", "--output", "policy.pth")
    assert status == 2 and "must end in .onnx or .pt2" in err


def test_train_logs_to_tensorboard(run, here):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    small = [*SMALL, "--output", "agent", "--max-episode-steps", "30", "--tensorboard-log", "tb", "--eval-freq", "200"]
    assert run("train", "CartPole-v1", *small)[0] == 0
    events = accumulator.EventAccumulator(str(here / "tb" / "CartPole-v1-agent")).Reload()
    steps = [event.step for event in events.Scalars("eval/mean_reward")]
    assert steps == np.load(here / "agent" / "evaluations.npz")["timesteps"].tolist() and len(steps) >= 3
    assert len(events.Scalars("rollout/ep_rew_mean")) >= 3


def test_resume_and_overwrite(run, here):
    run("train", "CartPole-v1", *SMALL, "--output", "run")
    again = run(
        "train", "CartPole-v1", "--output", "run", "--resume", "--n-workers", "0", "--sigma", "0.1", "--rank", "1"
    )
    assert again[0] == 0, again[2]
    status, _, err = run("train", "CartPole-v1", "--output", "run", "--resume", "--sigma", "0.7")
    assert status == 2 and "--sigma 0.7 differs from the run's sigma (0.1)" in err
    assert "not on Pendulum-v1" in run("train", "Pendulum-v1", "--output", "run", "--resume")[2]
    assert run("train", "CartPole-v1", *SMALL, "--output", "run", "--overwrite")[0] == 0


def test_another_policy_drops_the_presets_policy_settings(run, here):
    status, _, err = run("train", "CartPole-v1", *SMALL, "--policy", "LinearPolicy", "--output", "run")
    assert status == 0, err


def test_the_time_limit_of_the_task_survives_a_resume(run, here):
    limit = ["--max-episode-steps", "30", "--output", "run"]
    run("train", "CartPole-v1", *SMALL, *limit)
    assert run("train", "CartPole-v1", *limit, "--resume", "--n-workers", "0")[0] == 0


def test_schedules_and_modules_on_the_command_line(run, here):
    status, _, err = run("train", "toy_env:Toy-v0", *SMALL, "--output", "run", "--sigma", "lin_0.2")
    assert status == 0, err
    assert 'sigma = "lin_0.2"' in (here / "run" / "config.toml").read_text()
    # Evaluation imports the module only if it is named again.
    status, _, err = run("evaluate", "run")
    assert status == 2 and "--gym-packages toy_env" in err
    assert run("evaluate", "run", "--gym-packages", "toy_env")[0] == 0


MISTAKES = [
    (["train", "HalfCheeta-v5"], "did you mean HalfCheetah-v5"),
    (["train", "CartPole-v1", "--population-size", "7"], "population_size must be an even number.*got 7"),
    (["train", "CartPole-v1", "--population-size", "0"], "population_size.*got 0"),
    (["train", "CartPole-v1", "--sigma", "-1"], "sigma must be a finite number above 0, got -1"),
    (["train", "CartPole-v1", "--sigma", "nan"], "sigma must be a finite number above 0, got nan"),
    (["train", "CartPole-v1", "--sigma", "big"], "sigma must be a number above 0"),
    (["train", "CartPole-v1", "--rank", "0"], "rank must be a whole number, at least 1, got 0"),
    (["train", "CartPole-v1", "--rank", "one"], "'one' is not a valid integer"),
    (["train", "CartPole-v1", "--fitness-shaping", "ranks"], "fitness_shaping must be one of.*'ranks'"),
    (["train", "CartPole-v1", "--policy", "RnnPolicy"], "policy must be one of"),
    (["train", "CartPole-v1", "--policy", "CnnPolicy"], "CnnPolicy is for images"),
    (["train", "CartPole-v1", "--n-workers", "-1"], "n_workers must be a whole number.*got -1"),
    (["train", "CartPole-v1", "--total-timesteps", "0"], "total_timesteps must be.*got 0"),
    (["train", "CartPole-v1", "--seed", "-4"], "seed must be.*got -4"),
    (["train", "CartPole-v1", "--output", "/proc/none/run"], "cannot write /proc/none/run"),
    (["train", "CartPole-v1", "--resume", "--overwrite"], "no run to resume"),
    (["train", "CliffWalking-v1"], "CliffWalking-v1 shows no time limit.*max_episode_steps"),
    (["train", "no_such_module:Env-v0"], "no_such_module"),
    (["train", "none.toml"], "cannot read none.toml"),
    (["train", "CartPole-v1", "--sgima", "1"], "No such option '?--sgima"),
    (["train"], "Missing argument 'ENV'"),
    (["train", "CartPole-v1", "--seed", "5000000000"], "seed must be below"),
    (["fly"], "No such command 'fly'"),
    (["evaluate", "nowhere"], "nowhere is not there"),
    (["evaluate", "."], "not a run folder"),
    (["evaluate", "model.zip"], "model.zip does not exist"),
    (["record", "nowhere"], "nowhere is not there"),
    (["bench", "throughput", "CartPole-v1"], "not a MuJoCo task"),
]


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_gets_status_2_and_one_line(words, message, run, here):
    status, out, err = run(*words)
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert __import__("re").search(message, err), err
    assert out == "" and not list(here.iterdir())  # nothing was written


def test_a_failed_run_has_status_1_and_the_envs_traceback(run, here, monkeypatch):
    status, _, err = run("train", "toy_env:Broken-v0", *SMALL, "--output", "run")
    assert status == 1
    assert "generation 0, member 0" in err and "ZeroDivisionError" in err and "continue" not in err


def test_without_a_word_there_is_help(run, here):
    assert "Commands" in run()[1] and "throughput" in run("bench")[1]


def test_another_env_must_have_the_same_spaces(run, here):
    run("train", "CartPole-v1", *SMALL, "--output", "run")
    status, _, err = run("evaluate", "run", "--env", "Pendulum-v1")
    assert status == 2 and "other spaces" in err


def test_the_listing_survives_what_others_left(run, here):
    (here / "envs").mkdir()
    (here / "envs" / "bad.toml").write_text("=")
    (here / "agents" / "x" / "y").mkdir(parents=True)
    (here / "agents" / "x" / "y" / "results.json").write_text("[1]")
    (here / "agents" / "x" / "compare" / "ppo-seed0").mkdir(parents=True)
    (here / "agents" / "x" / "compare" / "ppo-seed0" / "results.json").write_text('{"mean_return": 7.5}')
    status, out, _ = run("list")
    assert status == 0 and "bad" in out
    assert "agents/x/compare/ppo-seed0" in out and "7.50" in out


def test_help_is_there_for_every_command(run):
    for words in ([], ["train"], ["evaluate"], ["record"], ["enjoy"], ["list"], ["bench"], ["bench", "throughput"]):
        status, out, _ = run(*words, "--help")
        assert status == 0 and "Usage" in out
