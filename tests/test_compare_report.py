import json
import math

import imageio.v3 as imageio
import numpy as np
import pytest

from eggroll_rl.agents import write_evaluations, write_json
from eggroll_rl.compare_plot import plot_comparison
from eggroll_rl.compare_report import Run, csv_rows, markdown, summarize, write_readme
from eggroll_rl.compare_run import Rules

RULES = Rules(seconds=20.0, evaluations=2, eval_episodes=2)


def made_run(root, algo, seed, curve):
    """A run's folder; ``curve`` holds (timesteps, seconds, mean return)."""
    folder = root / "Toy-v0" / "compare" / f"{algo}-seed{seed}"
    folder.mkdir(parents=True)
    evaluations = [
        {"timesteps": steps, "seconds": seconds, "returns": [mean - 1, mean + 1], "lengths": [10, 20]}
        for steps, seconds, mean in curve
    ]
    write_evaluations(folder / "evaluations.npz", evaluations)
    steps, seconds, mean = curve[-1]
    results = {
        "env_id": "Toy-v0", "algorithm": algo, "seed": seed, "timesteps": steps, "seconds": seconds,
        "mean_return": mean, "std_return": 1.0, "envs": "2 in DummyVecEnv", "settings": {"source": "a table"},
        "machine": {"processor": "A CPU", "cores": 2, "platform": "Linux", "speed": [100.0, 80.0 + 10 * seed]},
        "versions": {"torch": "1"},
    }  # fmt: skip
    write_json(folder / "results.json", results)
    return Run.read(folder)


@pytest.fixture
def runs(tmp_path):
    return {
        "eggroll": [
            made_run(tmp_path, "eggroll", 0, [(0, 0.0, 0), (1000, 10.0, 100), (2000, 20.0, 300)]),
            made_run(tmp_path, "eggroll", 1, [(0, 0.0, 0), (1000, 10.0, 60), (2200, 19.0, 200)]),
            made_run(tmp_path, "eggroll", 2, [(0, 0.0, 0), (1000, 10.0, 50), (2000, 20.0, 100)]),
        ],
        "ppo": [
            made_run(tmp_path, "ppo", 0, [(0, 0.0, 0), (100, 10.0, 10), (210, 20.0, 250)]),
            made_run(tmp_path, "ppo", 1, [(0, 0.0, 0), (100, 10.0, 10), (200, 20.0, 20)]),
            made_run(tmp_path, "ppo", 2, [(0, 0.0, 0), (100, 10.0, 10), (190, 20.0, 30)]),
        ],
    }


def test_the_summary_by_hand(runs):
    comparison = summarize("Toy-v0", runs, RULES, {"yours": 100.0}, "the command")
    ours, ppo = comparison["algorithms"]["eggroll"], comparison["algorithms"]["ppo"]
    assert ours["final"]["iqm"] == pytest.approx(200) and ours["final"]["median"] == 200
    assert 100 <= ours["final"]["interval"][0] < 200 < ours["final"]["interval"][1] <= 300
    # 2000/20, 2200/19, 2000/20
    assert ours["steps_per_second"] == 100
    reached = ours["to_threshold"]["yours"]
    assert reached["seconds"] == [10.0, 19.0, 20.0] and reached["timesteps"] == [1000, 2200, 2000]
    assert reached["success_rate"] == 1 and reached["median_seconds"] == 19.0 and reached["median_timesteps"] == 2000
    assert ppo["to_threshold"]["yours"]["seconds"] == [20.0, None, None]
    assert ppo["to_threshold"]["yours"]["median_seconds"] is None
    assert ppo["to_threshold"]["yours"]["success_rate"] == pytest.approx(1 / 3)
    # 300, 200, 100 against 250, 20, 30: seven of nine pairs.
    chance = comparison["probability_of_improvement"]
    assert chance["eggroll"]["ppo"]["probability"] == pytest.approx(7 / 9)
    assert chance["ppo"]["eggroll"]["probability"] == pytest.approx(2 / 9)
    # Curves: at 0, 10 and 20 s; over env steps to where all seeds have come.
    seconds, steps = (ours["curves"][axis] for axis in ("seconds", "timesteps"))
    assert seconds["x"] == [0, 10, 19, 20] and seconds["iqm"][:2] == pytest.approx([0, 70])
    assert steps["x"] == [0, 1000, 2000] and steps["iqm"][1] == pytest.approx(70)
    # The second seed is on its way from 60 at 1,000 to 200 at 2,200.
    assert steps["iqm"][2] == pytest.approx((300 + 60 + 140 * 1000 / 1200 + 100) / 3)
    assert comparison["machine_speed"] == {"lowest": 80.0, "median": 100.0, "highest": 100.0}
    assert len(comparison["machines"]) == 1 and "which is few" in comparison["seeds"]
    json.dumps(comparison, allow_nan=False)  # nothing infinite


def test_every_evaluation_is_a_row(runs):
    rows = csv_rows(runs)
    assert len(rows) == 18
    assert rows[2] == {
        "algorithm": "eggroll", "seed": 0, "timesteps": 2000, "seconds": 20.0, "mean_return": 300.0,
        "std_return": 1.0, "mean_length": 15.0,
    }  # fmt: skip


def test_the_table_leaves_nobody_out(runs):
    text = markdown(summarize("Toy-v0", runs, RULES, {"yours": 100.0}, "the command"))
    ours, ppo = text.splitlines()[2:4]
    assert ours.startswith("| EGGROLL | 200 [") and "| 300 · 200 · 100 |" in ours and "3 of 3, median 19 s" in ours
    assert ppo.startswith("| PPO | 100 [") and "| 250 · 20 · 30 |" in ppo and ppo.endswith("| 1 of 3 |")
    for said in ("the command", "20 s per run", "A CPU (1 of 2 cores)", "3 seeds, which is few",
                 "0.80 and 1.00 of its median",
                 "PPO 0.78 [", "PPO: a table", "PPO: 2 in DummyVecEnv"):  # fmt: skip
        assert said in text, said


@pytest.mark.parametrize("thresholds", [{}, {"yours": 100.0}, {"yours: 100": 100.0, "yours: 9999": 9999.0}])
def test_the_picture(runs, thresholds, tmp_path):
    plot_comparison(summarize("Toy-v0", runs, RULES, thresholds, "the command"), tmp_path / "a.png")
    picture = imageio.imread(tmp_path / "a.png")[:, :, :3].reshape(-1, 3).astype(int)
    assert picture.shape[0] > 1000 * 500
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # each algorithm's line
        assert (np.abs(picture - colour).sum(1) < 6).sum() > 500


def test_the_readme_is_rebuilt_from_what_is_there(runs, tmp_path):
    for task in ("Toy-v0", "Other-v0"):
        (tmp_path / task).mkdir(exist_ok=True)
        comparison = summarize(task, runs, RULES, {}, "the command")
        write_json(tmp_path / task / "comparison.json", comparison)
    evaluation = {"mean_return": 5.4, "std_return": 1.0}
    for seed in (0, 1):
        (tmp_path / "Toy-v0" / f"eggroll-seed{seed}").mkdir()
        results = {
            "env_id": "Toy-v0", "timesteps": 1000, "wall_seconds": 2.0, "env_steps_per_second": 500.0,
            "evaluation": evaluation, "best": {"timesteps": 900, **evaluation},
            "machine": {"processor": "A CPU", "cores": 2},
        }  # fmt: skip
        write_json(tmp_path / "Toy-v0" / f"eggroll-seed{seed}" / "results.json", results)
    assert write_readme(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "(Toy-v0/comparison.png)" in text and "(Other-v0/comparison.png)" in text
    assert "| Toy-v0/eggroll-seed1 | 1,000 | 2 s | 500 | 5 ± 1 | 5 ± 1 (at 900) |" in text
    assert "| Toy-v0 | 20 s | 200 | 100 |" in text and text.index("All tasks compared") < text.index("Toy-v0, compared")
    # Both tasks are the same runs: 7 of 9 pairs on average.
    assert "- PPO: 0.78 [" in text and "2 tasks, at least 3 seeds each" in text
    assert write_readme(tmp_path)  # again, over its own
    (tmp_path / "README.md").write_text("# My thesis")
    assert not write_readme(tmp_path) and (tmp_path / "README.md").read_text() == "# My thesis"


def test_a_step_budget_is_said(runs):
    both = summarize("Toy-v0", runs, Rules(timesteps=2000, seconds=20.0, evaluations=2), {}, "")
    assert "20 s or 2,000 env steps, whichever comes first per run" in markdown(both)
    assert not math.isnan(both["algorithms"]["ppo"]["curves"]["timesteps"]["iqm"][-1])
