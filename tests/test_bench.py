"""The benchmarks measure what they say; how fast anything is, no test can tell."""

import sys

import imageio.v3 as iio
import mujoco
import numpy as np
import pytest
import torch
from mujoco.rollout import rollout as mujoco_rollout
from torch import nn

from eggroll_rl import bench, bench_forward, bench_generation, bench_peers, bench_scaling
from eggroll_rl.bench_plot import check_plot, plot_forward, plot_scaling, plot_throughput
from eggroll_rl.errors import ConfigError
from eggroll_rl.noise import LowRank, Noise
from eggroll_rl.population import Population


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "POPULATION_SIZE", 8)
    monkeypatch.setattr(bench, "SLICE_SIZE", 4)
    monkeypatch.setattr(bench_peers, "_ROUND_SECONDS", 0.05)


@pytest.mark.parametrize(("env_id", "real_ends"), [("Hopper-v5", True), ("HalfCheetah-v5", False)])
def test_the_c_limit_replays_trainings_own_episodes(small, env_id, real_ends):
    work = bench.prepare(env_id, 1, 60, real_ends)
    assert (work.lengths < 60).any() == real_ends
    env = work.factory()
    task = env.unwrapped
    seeds = bench.episode_seeds(work.model.next_generation().noise, 1)[:, 0]
    for i in range(8):
        env.reset(seed=int(seeds[i]))
        for t in range(work.lengths[i]):
            *_, terminated, truncated, _ = env.step(work.controls[i, t].astype(np.float32))
        assert terminated or truncated
        controls = work.controls[i : i + 1, : work.lengths[i]].repeat(task.frame_skip, axis=1)
        states, _ = mujoco_rollout(task.model, mujoco.MjData(task.model), work.states[i : i + 1], controls)
        # rollout starts without the warm start that Gymnasium's reset leaves behind.
        assert np.allclose(states[0, -1, 1 : 1 + task.model.nq], task.data.qpos, atol=1e-3)


def test_tasks_that_would_end_run_on_unless_real_ends_are_asked_for(small):
    assert bench.prepare("Hopper-v5", 1, 40, real_ends=False).lengths.tolist() == [40] * 8
    # Untrained poles fall within 25 steps or so: this one was trained first.
    assert bench.prepare("InvertedPendulum-v5", 1, 40, real_ends=False).lengths.tolist() == [40] * 8


def test_a_slice_that_does_not_stay_full_is_no_figure(small, monkeypatch):
    monkeypatch.setattr(bench, "_WARM_UP_GENERATIONS", 2)
    with pytest.raises(ConfigError, match="InvertedDoublePendulum-v5: after 2 generations.*--real-ends"):
        bench.prepare("InvertedDoublePendulum-v5", 1, 200, real_ends=False)


def test_throughput_measures_all_in_turn(small, monkeypatch, tmp_path):
    for library in ("envpool", "evotorch", "ray"):
        monkeypatch.setitem(sys.modules, library, None)
    peers = ("one_worker", "segments", "sync", "one_member", "envpool", "evotorch", "ray")
    result = bench.throughput("Hopper-v5", 1, repetitions=2, episode_steps=10, peers=peers)
    rates = result["steps_per_second"]
    assert list(rates) == ["c_limit", "training", *peers]
    for name in ("c_limit", "training", "one_worker", "segments", "sync", "one_member"):
        assert len(rates[name]) == 2 and min(rates[name]) > 0
    assert result["median_ratio"]["c_limit"] == 1 and "envpool" not in result["median_ratio"]
    assert result["mean_episode_steps"] == 10 and result["vector_env"] == "MujocoVectorEnv"
    text = bench.throughput_table(result)
    assert "pip install envpool" in text and "Ours, whole training" in text and "1 workers" in text
    plot_throughput([result, result], tmp_path / "speed.png")
    assert iio.imread(tmp_path / "speed.png").std() > 0


def test_the_measured_generation_stays_the_same(small):
    work = bench.prepare("HalfCheetah-v5", 1, 10, False)
    before = {name: value.clone() for name, value in work.model.policy.state_dict().items()}
    run = bench_peers.training(work.model, work.factory, 1)
    next(run), next(run)
    run.close()
    after = work.model.policy.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert work.model.next_generation().noise.generation == 0


def test_an_unknown_peer_and_an_unwritable_picture_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown peer 'sb4'; known are one_worker"):
        bench.throughput("HalfCheetah-v5", peers=("sb4",))
    with pytest.raises(ConfigError, match="must end in .png"):
        check_plot(tmp_path / "speed.docx")
    with pytest.raises(ConfigError, match="there is no folder"):
        check_plot(tmp_path / "nowhere" / "speed.png")


def test_the_forward_is_compared_with_the_same_members(tmp_path):
    network = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    noise, x = Noise(0, 0, 6, 0.1, LowRank(2), 6), torch.randn(6, 5)
    with torch.no_grad():
        assert torch.allclose(bench_forward._dense(network, noise, x), Population(network, noise).members(x), atol=1e-6)
    rows = bench_forward.forward((8, 16), (1, 2), (300,), repetitions=2)
    assert [(r["width"], r["rank"]) for r in rows] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert all(r[name] > 0 for r in rows for name in ("plain", "lowrank", "dense", "update", "make_noise"))
    assert len(bench_forward.forward_table(rows).splitlines()) == 6
    plot_forward(rows, tmp_path / "forward.png")
    assert iio.imread(tmp_path / "forward.png").std() > 0


@pytest.mark.skipif(not bench_forward._CLEAR.exists(), reason="only Linux tells the peak of memory")
def test_memory_grows_with_the_factors_and_not_with_the_matrices():
    rank_1, rank_8 = bench_forward.forward((512,), (1, 8), (512,), repetitions=1)
    factors = 4 * 256 * (512 + 512)  # of one of the two layers, for a slice's 256 members
    assert rank_1["dense_bytes"] > 1e9
    assert factors < rank_1["peak_bytes"] < rank_1["dense_bytes"] / 20
    assert 8 * factors < rank_8["peak_bytes"] < rank_8["dense_bytes"] / 4


def test_a_generation_is_compared_with_the_same_update_one_by_one():
    rows = bench_generation.generation((8,), (1, 3), 6, repetitions=2, names=("ours", "one_by_one"))
    assert [(row["width"], row["batch"]) for row in rows] == [(8, 1), (8, 3)]
    assert all(set(row["seconds"]) == {"ours", "one_by_one"} and row["over_ours"]["ours"] == 1 for row in rows)
    assert len(bench_generation.generation_table(rows).splitlines()) == 3
    with pytest.raises(ConfigError, match="--peers must be some of torcheggroll, one_by_one, got evox"):
        bench_generation.generation((8,), names=("ours", "evox"))


@pytest.mark.parametrize("name", ["ours", "one_by_one"])
def test_both_generations_learn(name):
    module, x = bench_generation._mlp(8), torch.randn(32, 17, generator=torch.Generator().manual_seed(0))
    y = torch.ones(32, 6)
    before = (module(x) - y).square().mean().item()
    run = bench_generation._RUNS[name](module, x, y, 256)
    for _ in range(60):
        run()
    assert (module(x) - y).square().mean().item() < 0.9 * before


def test_the_model_of_scaling_by_hand(monkeypatch):
    costs = bench_scaling.Costs(
        (64, 64), population_size=1000, slice_size=10, n_blocks=24, blocks=0.5, block=0.05, coordinator=0.02,
        job=50_000, result=1_000, parts=2_500_000,
    )  # fmt: skip
    one = bench_scaling.predict(costs, 2.0, 1, 1e-3, on_nodes=False)
    assert (one.physics, one.messages, one.total) == (200.0, 0.0, pytest.approx(200.52))
    assert one.share == pytest.approx(0.52 / 200)
    # 40 cores on 3 nodes: 3 waves of 100 slices; 3 calls, the job and two messages' latency; 40 results.
    monkeypatch.setattr(bench_scaling, "CORES_PER_NODE", 16)
    some = bench_scaling.predict(costs, 2.0, 40, 1e-3, on_nodes=False)
    assert some.physics == 6.0 and some.sum_of_noise == 0.5
    assert some.messages == pytest.approx(3 * (3e-3 + 50_000 / 1.25e9) + 4e-4 + 40_000 / 1.25e9)
    # One wave of blocks; weights to 3 nodes, the parts back.
    assert bench_scaling.left_over(50, 0.0, 1e-3) == pytest.approx(0.05)  # all at once
    assert bench_scaling.left_over(50, 1e3, 1e-3) == pytest.approx(0.001, rel=0.01)  # far apart
    split = bench_scaling.predict(costs, 2.0, 40, 1e-3, on_nodes=True)
    assert split.sum_of_noise == 0.05
    assert split.messages == pytest.approx(some.messages + 3 * (1e-3 + 4_000 / 1.25e9) + 2_500_000 / 1.25e9 + 4e-4)


def test_scaling_measures_what_the_model_is_made_of(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_scaling, "_CAP", 5)
    monkeypatch.setattr(bench_scaling, "_call_seconds", lambda: None)
    monkeypatch.setattr(bench_scaling, "CORES_PER_NODE", 2)
    in_process = bench_scaling.make_evaluator
    monkeypatch.setattr(bench_scaling, "make_evaluator", lambda n, *args: in_process(0, *args))
    said = []
    result = bench_scaling.scaling("Hopper-v5", (20, 40), ((8, 8),), 10, repetitions=1, say=said.append)
    assert (
        set(result["slice_seconds"]["8-8"]) == {2, 10, 16, 32, 64} and min(result["slice_seconds"]["8-8"].values()) > 0
    )
    assert [row["population_size"] for row in result["costs"]] == [20, 40]
    assert all(row["coordinator"] > 0 and row["n_blocks"] == 6 for row in result["costs"])
    # Weights and biases, each once, in float64.
    assert result["costs"][0]["parts"] == 8 * (11 * 8 + 8 + 8 * 8 + 8 + 8 * 3 + 3)
    assert "| 8-8 | 40 | 10,000 |" in bench_scaling.scaling_table(result)
    plot_scaling(result, tmp_path / "scaling.png")
    assert iio.imread(tmp_path / "scaling.png").std() > 5
    with pytest.raises(ConfigError, match="multiples of --slice-size 10, got 24"):
        bench_scaling.scaling("Hopper-v5", (24,), ((8, 8),), 10)
