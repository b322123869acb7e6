"""RL Zoo's own scripts with EGGROLL among the algorithms."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

# Not imported here: RL Zoo changes Gymnasium's TimeLimit for the whole process.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="RL Zoo is missing")


def zoo(script, *arguments, cwd):
    command = [sys.executable, "-m", "eggroll_rl.zoo", script, "--algo", "eggroll", "--env", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_train(tmp_path):
    zoo("train", "CartPole-v1", "-n", "2000", "--eval-freq", "-1", cwd=tmp_path)
    run = tmp_path / "logs" / "eggroll" / "CartPole-v1_1"
    assert len((run / "0.monitor.csv").read_text().splitlines()) > 32  # episodes are where plot_train looks for them
    assert (run / "CartPole-v1.zip").exists()


@pytest.mark.slow
def test_train_enjoy_and_go_on(tmp_path):
    """Segments of HalfCheetah-v5, which need an env by id: RL Zoo hands over one that is made."""
    small = ["HalfCheetah-v5", "-n", "4096", "--seed", "0"]
    zoo("train", *small, "--eval-freq", "2000", "--save-freq", "3000", "-P", cwd=tmp_path)
    run = tmp_path / "logs" / "eggroll" / "HalfCheetah-v5_1"
    names = {path.name for path in run.iterdir()}
    assert {"HalfCheetah-v5.zip", "best_model.zip", "evaluations.npz", "rl_model_3000_steps.zip"} <= names
    assert np.load(run / "evaluations.npz")["timesteps"].tolist() == [2000, 4000]
    assert "Mean reward" in zoo("enjoy", "HalfCheetah-v5", "-f", "logs", "--no-render", "-n", "1500", cwd=tmp_path)
    zoo("train", *small, "-i", str(run / "HalfCheetah-v5.zip"), "--eval-freq", "-1", cwd=tmp_path)
    assert (tmp_path / "logs" / "eggroll" / "HalfCheetah-v5_2" / "HalfCheetah-v5.zip").exists()


@pytest.mark.slow
def test_record_video_and_optimize(tmp_path):
    zoo("train", "CartPole-v1", "-n", "2000", "--eval-freq", "-1", cwd=tmp_path)
    run = tmp_path / "logs" / "eggroll" / "CartPole-v1_1"
    zoo("record_video", "CartPole-v1", "-f", "logs", "-n", "60", cwd=tmp_path)
    assert list(run.glob("videos/*.mp4"))
    search = ["-optimize", "--n-trials", "5", "--no-optim-plots", "-n", "2000", "--n-evaluations", "2"]
    said = zoo("train", "CartPole-v1", *search, cwd=tmp_path)
    assert "Number of finished trials:  5" in said
    zoo("train", "HalfCheetah-v5", *search[:2], "1", *search[3:], cwd=tmp_path)


def test_an_unknown_script_is_refused_in_words(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "eggroll_rl.zoo", "tarin"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "runs one of train, enjoy" in done.stderr and "Traceback" not in done.stderr
