"""On a Ray cluster of three logical nodes on this machine: pip install ray==2.60.0, then pytest -m ray."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch
import toy
from test_workers import digest

from eggroll_rl import EGGROLL
from eggroll_rl.errors import ConfigError, EpisodeError, WorkerDiedError
from eggroll_rl.lowrank import estimate_gradient, perturbed_parameters
from eggroll_rl.ray_crew import RayCrew
from eggroll_rl.ray_workers import RayEvaluator, import_ray
from eggroll_rl.rollout import episode_seeds

pytestmark = pytest.mark.ray
SEGMENTS = {"fitness": "segment", "n_segments": 12, "segment_steps": 16, "steps": 600, "population_size": 8}
SMALL = {"population_size": 24, "slice_size": 4, "policy_kwargs": {"net_arch": [8]}, "seed": 0}


@pytest.fixture
def cluster():
    """Three nodes of one CPU each, on loopback."""
    try:
        import_ray(is_local=True)
    except ConfigError:
        pytest.skip("Ray is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    yield made
    import_ray().shutdown()
    made.shutdown()


def model_on(evaluator, env=toy.make_target, **settings):
    return EGGROLL("MlpPolicy", env, evaluator=evaluator, n_workers=0, **{**SMALL, **settings})


def learned(evaluator, env=toy.make_target, steps=1500, callback=None, **settings):
    return model_on(evaluator, env, **settings).learn(steps, callback, log_interval=None)


@pytest.fixture
def meanwhile(monkeypatch):
    """Have a function called with the crew whenever it waits: in the middle of a generation, in this thread."""

    def meanwhile(disturb):
        original = RayCrew.wait

        def wait(crew):
            disturb(crew)
            return original(crew)

        monkeypatch.setattr(RayCrew, "wait", wait)

    return meanwhile


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_busy(crew, ray_node):
    """Say whether a node of the cluster has tasks."""
    return any(node.node_id == ray_node.node_id and node.is_ready and node.running for node in crew.nodes)


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        (toy.make_target, {}),
        ("HalfCheetah-v5", {"max_episode_steps": 60, "steps": 3000}),
        ("Hopper-v5", SEGMENTS),
    ],
    ids=["toy", "HalfCheetah-v5", "segments"],
)
def test_the_results_are_those_of_one_machine(cluster, env, settings):
    evaluator = RayEvaluator(cluster.address)
    there, here = learned(evaluator, env, **settings), learned(None, env, **settings)
    assert list(evaluator.nodes.values()) == [1, 1, 1]
    assert digest(there) == digest(here)
    assert evaluator.bytes_sent > 0 and evaluator.bytes_received > 0


def test_a_node_that_goes_and_one_that_comes_change_nothing(cluster, meanwhile):
    evaluator = RayEvaluator(cluster.address)
    lost = next(iter(cluster.worker_nodes))
    came, worked = [], []

    def disturb(crew):
        if not came and is_busy(crew, lost):
            cluster.remove_node(lost, allow_graceful=False)
            came.append(cluster.add_node(num_cpus=1))
        worked.extend(node for node in came if is_busy(crew, node))

    meanwhile(disturb)
    there = learned(evaluator, toy.make_slow_target, steps=8_000)
    assert worked and not any(lost.node_id[:8] in name for name in evaluator.nodes)
    assert digest(there) == digest(learned(None, steps=8_000))


def test_a_node_that_stands_still_is_helped(cluster, meanwhile, caplog):
    caplog.set_level("INFO", "eggroll_rl")
    evaluator = RayEvaluator(cluster.address)
    slow = next(iter(cluster.worker_nodes))
    stopped = []

    def disturb(crew):
        if not stopped and crew._slowest and is_busy(crew, slow):
            for process in psutil.Process().children(recursive=True):
                of_node = any(slow.raylet_socket_name in " ".join(p.cmdline()) for p in process.parents())
                if of_node and "NodeActor" in process.cmdline()[0]:
                    process.suspend()
                    stopped.append(process)

    meanwhile(disturb)
    there = learned(evaluator, toy.make_slow_target, steps=2_000)
    assert stopped and "too" in caplog.text
    assert digest(there) == digest(learned(None, steps=2_000))


def test_workers_killed_on_a_node_are_replaced(cluster, meanwhile):
    killed = []

    def disturb(crew):
        if len(killed) < 3 and crew.bytes_received > 2000 * len(killed):
            found = [p for p in psutil.Process().children(recursive=True) if "eggroll_rl.processes" in str(p.cmdline())]
            found[0].kill()
            killed.append(found[0])

    meanwhile(disturb)
    there = learned(RayEvaluator(cluster.address), toy.make_slow_target, steps=4_000)
    assert len(set(killed)) == 3
    assert digest(there) == digest(learned(None, steps=4_000))


def test_what_an_env_raises_is_named_and_can_be_replayed(cluster):
    seed = int(episode_seeds(model_on(None).next_generation().noise, 1)[5, 0])
    model = model_on(RayEvaluator(cluster.address), toy.make_fault("raise", seed=seed))
    with pytest.raises(EpisodeError, match="generation 0, member [45], .*broken step") as caught:
        model.learn(1500)
    with pytest.raises(EpisodeError, match="generation 0, member [45], .*broken step"):
        model.replay_member(caught.value.member)


def test_an_env_that_cannot_be_made_is_named(cluster):
    with pytest.raises(EpisodeError, match="ZeroDivisionError.*broken elsewhere"):
        learned(RayEvaluator(cluster.address), toy.make_only_here())


def test_other_versions_are_refused(cluster, monkeypatch):
    monkeypatch.setattr("eggroll_rl.ray_crew.versions", lambda: {"python": "3.11.7", "torch": "0.1"})
    with pytest.raises(
        ConfigError, match=r"must have the same versions as this machine, got .*torch 2\S* \(here 0\.1\)"
    ):
        learned(RayEvaluator(cluster.address))


def test_a_large_populations_noise_is_summed_up_by_the_nodes(cluster):
    model = model_on(evaluator := RayEvaluator(cluster.address), population_size=8192, slice_size=512,
                     policy_kwargs={"net_arch": [128, 128]})  # fmt: skip
    es = model.evolution_strategy
    noise, parameters = es.ask().noise, perturbed_parameters(es.module)
    utilities = torch.randn(8192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    asked = []

    def elsewhere(contraction, parameters):
        asked.append(evaluator.contract(contraction, parameters))
        return asked[-1]

    with model._make_evaluator():
        there = estimate_gradient(parameters, noise, utilities, elsewhere=elsewhere)
    here = estimate_gradient(parameters, noise, utilities)
    assert asked[0] is not None
    assert all(here[name].equal(there[name]) for name in here)


def test_no_node_left_ends_the_run(cluster):
    evaluator = RayEvaluator(cluster.address, node_timeout=3)
    evaluator.n_workers = 1  # on one node, whichever comes first

    with pytest.raises(WorkerDiedError, match="no node to work on for 3 s"):
        crew_without_nodes(evaluator)


def crew_without_nodes(evaluator):
    model = model_on(evaluator)
    with model._make_evaluator():
        evaluator._crew._failed = {about["NodeID"]: 9 for about in import_ray().nodes()}
        evaluator._crew._lose(evaluator._crew.nodes[0], "it was switched off")
        evaluator.evaluate(model.next_generation())


def command(folder, *words):
    settings = [
        "--fitness",
        "episode",
        "--population-size",
        "16",
        "--slice-size",
        "4",
        "--max-episode-steps",
        "100",
        "--eval-episodes",
        "1",
    ]
    words = [sys.executable, "-m", "eggroll_rl", "train", "Hopper-v5", "-o", folder, *settings, *words]
    return [str(word) for word in words]


def test_the_head_is_lost_and_the_run_resumed(cluster, tmp_path):
    always = ["--checkpoint-every", "1", "--eval-freq", "0"]
    lost = subprocess.Popen(
        command(tmp_path / "lost", *always, "--total-timesteps", "1000000000", "--cluster", cluster.address),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"},  # seconds; 60 by default
    )
    wait_for(lambda: progress(tmp_path / "lost") >= 3)
    for node in (*cluster.worker_nodes, cluster.head_node):
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    assert lost.wait(timeout=120) == 1
    done = int((tmp_path / "lost" / "progress.csv").read_text().splitlines()[-1].split(",")[1])
    steps = [*always, "--total-timesteps", str(done + 2000)]
    for words in ([tmp_path / "lost", *steps, "--cluster", "local", "--resume"], [tmp_path / "whole", *steps]):
        subprocess.run(command(*words), check=True, capture_output=True)
    for name in ("policy.safetensors", "best.safetensors"):
        whole, resumed = (safetensors.torch.load_file(tmp_path / run / name) for run in ("whole", "lost"))
        assert whole.keys() == resumed.keys() and all(whole[key].equal(resumed[key]) for key in whole)


def progress(folder):
    path = folder / "progress.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_ray_of_our_own_listens_on_loopback_and_leaves_with_us(tmp_path, signum):
    import_ray(is_local=True)
    run = subprocess.Popen(
        command(tmp_path / "run", "--total-timesteps", "10000000", "--cluster", "local"),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: progress(tmp_path / "run") >= 3)
    ours = psutil.Process(run.pid)
    family = [ours, *ours.children(recursive=True)]
    addresses = {c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    run.send_signal(signum)
    _, said = run.communicate(timeout=60)
    assert run.returncode == (-9 if signum == signal.SIGKILL else 128 + signum), said
    # Two of Ray's own, which listen no more, take a minute to notice that the rest is gone.
    _, alive = psutil.wait_procs(family, timeout=20)
    assert {process.name() for process in alive} <= {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    assert not alive or signum == signal.SIGKILL
    for process in alive:
        process.kill()
    if signum != signal.SIGKILL:
        assert "--resume --cluster local" in said


def test_an_address_without_a_cluster_is_named(tmp_path):
    import_ray(is_local=True)
    done = subprocess.run(
        command(tmp_path / "run", "--cluster", "127.0.0.1:9"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr


def test_what_the_guide_says_runs(cluster):
    page = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text()
    first, second = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for code in (first, second + first):
        code = code.replace('"auto"', repr(cluster.address)).replace("10_000_000", "1")
        code = code.replace("population_size=1000", "max_episode_steps=20, population_size=40")
        with contextlib.chdir(Path(__file__).parent):
            exec(code, {"__name__": "__main__"})
        import_ray().shutdown()


def test_a_connection_of_the_callers_is_used_and_stays(cluster):
    ray = import_ray()
    ray.init(address=cluster.address, log_to_driver=False)
    here = digest(learned(None))
    assert digest(learned(RayEvaluator())) == here
    assert ray.is_initialized()
    assert digest(learned(RayEvaluator(n_workers=2))) == here
