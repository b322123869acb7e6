"""Envs of other packages: each family is trained until it clearly beats a random policy, and recorded.

Skipped where a package is missing: ``pip install minigrid gymnasium-robotics "shimmy[dm-control]" "mujoco<4"``.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_docs import ROOT, blocks

from eggroll_rl.envs import env_factory

MINIGRID = next(block for block in blocks(ROOT / "docs" / "envs.md", "toml") if "MiniGrid" in block)
SWINGUP = """
env_id = "dm_control/cartpole-swingup-v0"
total_timesteps = 300_000

[eggroll]
fitness = "segment"
segment_steps = 1000
n_segments = 8
slice_size = 4
exploration_std = 1.0
"""
MAZE = """
env_id = "PointMaze_UMazeDense-v3"
total_timesteps = 300_000
"""
FAMILIES = {"minigrid": (MINIGRID, 0.5), "shimmy": (SWINGUP, 300), "gymnasium_robotics": (MAZE, 30)}


def of_random(env_id, episodes=10):
    env, returns = env_factory(env_id)(), []
    env.action_space.seed(0)
    for seed in range(episodes):
        env.reset(seed=seed)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return np.mean(returns)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", FAMILIES)
def test_a_family_is_trained_beyond_random_and_recorded(package, tmp_path):
    for needed in (package, "dm_control") if package == "shimmy" else (package,):
        pytest.importorskip(needed, exc_type=ImportError)
    preset, better = FAMILIES[package]
    (tmp_path / "task.toml").write_text(preset)
    env_id = preset.split('env_id = "')[1].split('"')[0]

    def run(*arguments):
        command = [sys.executable, "-m", "eggroll_rl", *arguments, "--gym-packages", package]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", "task.toml", "--output", "run")
    trained = json.loads(run("evaluate", "run", "--json").splitlines()[-1])["mean_return"]
    assert trained > of_random(env_id) + better
    run("record", "run", "--plain", "--output", "run.mp4")
    assert (tmp_path / "run.mp4").stat().st_size > 1000
