"""How long a generation takes on more cores than this machine has: a model, and what it is made of, measured here.

A generation of N members in slices of k on C cores of M nodes takes

    waves(N / k, C) · slice(k)  +  coordinator(N, policy)  +  messages(M)

with waves = ceil(N / k / C). The first term is the physics: all episodes run to the time limit, as HalfCheetah-v5's
do. The coordinator asks, counts and tells, without the sum over the noise, whose blocks are either computed here (their
seconds are added up) or on the nodes (as many at a time as there are cores; their parts come back over the network).
Messages are one call per node that nothing hides, after the last slice and, with blocks on the nodes, after the last
block, and the parameters' way from the driver to each node.
"""

import math
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from stable_baselines3.common.logger import configure

from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import env_factory, time_limit
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import one_thread
from eggroll_rl.lowrank import Contraction, perturbed_parameters
from eggroll_rl.normalization import Moments
from eggroll_rl.ray_workers import handlers_kept, import_ray
from eggroll_rl.rollout import Generation, RolloutResult
from eggroll_rl.workers import available_cores, make_evaluator

BANDWIDTH = 1.25e9  # bytes per second, a network of 10 Gbit/s: assumed
LATENCY = 2e-4  # seconds of a message on it: assumed
CORES_PER_NODE = 64
_CAP = 100  # env steps that are measured of an episode


@dataclass(frozen=True)
class Costs:
    """What was measured for one policy and population; seconds, bytes.

    :param n_blocks: of the sum over the noise
    :param blocks: seconds of all of them, one after the other
    :param block: seconds of the longest
    :param coordinator: seconds from ask to tell, without waiting for slices and blocks
    :param job: bytes of a generation, as a node gets it
    :param result: bytes per slice, as they come back
    :param parts: bytes of all blocks' parts of the gradient
    """

    net_arch: tuple[int, ...]
    population_size: int
    slice_size: int
    n_blocks: int
    blocks: float
    block: float
    coordinator: float
    job: int
    result: int
    parts: int


@dataclass(frozen=True)
class Generated:
    """What the model says of a generation; seconds."""

    cores: int
    physics: float
    coordinator: float
    sum_of_noise: float
    messages: float

    @property
    def total(self) -> float:
        """Seconds of the generation."""
        return self.physics + self.coordinator + self.sum_of_noise + self.messages

    @property
    def share(self) -> float:
        """What is not physics, over the physics."""
        return (self.total - self.physics) / self.physics


def predict(costs: Costs, slice_seconds: float, cores: int, call_seconds: float, on_nodes: bool) -> Generated:
    """Return what the model says.

    :param slice_seconds: of one slice's episodes on one core
    :param cores: one node up to ``CORES_PER_NODE``, then as many nodes as it takes
    :param call_seconds: of the driver, per call to a node
    :param on_nodes: the sum over the noise is split over the cluster
    """
    n_nodes = -(-cores // CORES_PER_NODE)
    waves = math.ceil(costs.population_size / costs.slice_size / cores)
    sums, messages = costs.blocks, 0.0
    if n_nodes > 1:
        messages = n_nodes * (waves * call_seconds + costs.job / BANDWIDTH) + 2 * LATENCY
        messages += costs.result * min(cores, costs.population_size // costs.slice_size) / BANDWIDTH
    if on_nodes:
        sums = math.ceil(costs.n_blocks / cores) * costs.block
        weights = 8 * costs.population_size // 2
        messages += min(n_nodes, costs.n_blocks) * (call_seconds + weights / BANDWIDTH)
        messages += costs.parts / BANDWIDTH + 2 * LATENCY
    return Generated(cores, waves * slice_seconds, costs.coordinator, sums, messages)


def scaling(
    env_id: str = "HalfCheetah-v5",
    populations: tuple[int, ...] = (1_000, 10_000, 100_000),
    nets: tuple[tuple[int, ...], ...] = ((64, 64), (256, 256)),
    slice_size: int = 10,
    repetitions: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what the model is made of, and compare it with generations on the cores of this machine.

    :param slice_size: members per slice (even); the populations are multiples of it
    :param say: told what is measured next
    :return: ``costs`` by policy and population, ``slice_seconds`` by policy and slice size, ``call_seconds`` (None
        without Ray), ``checked``: predicted and measured seconds
    :raises ConfigError: the env has no time limit, or a population is no multiple of the slice size
    """
    if slice_size % 2:
        raise ConfigError(f"--slice-size must be even, got {slice_size}")
    for population in populations:
        if population % slice_size:
            raise ConfigError(f"--populations must be multiples of --slice-size {slice_size}, got {population}")
    limit = time_limit(env_factory(env_id)())
    if limit is None:
        raise ConfigError(f"{env_id} has no time limit: the model needs episodes of known length")
    result: dict[str, Any] = {"env_id": env_id, "episode_steps": limit, "costs": [], "slice_seconds": {}, "checked": []}
    for net in nets:
        name = "-".join(map(str, net))
        sizes = sorted({2, slice_size, 16, 32, 64})
        say(f"seconds per slice, {name}")
        seconds = {size: _slice_seconds(env_id, net, size, repetitions) * limit / _CAP for size in sizes}
        result["slice_seconds"][name] = seconds
        for population in populations:
            say(f"coordinator, {name}, {population:,} members")
            result["costs"].append(asdict(_costs(env_id, net, population, slice_size, repetitions)))
        for cores in sorted({1, 2, available_cores()}):
            if cores <= available_cores():
                say(f"a generation on {cores} cores, {name}")
                result["checked"].append(_checked(env_id, net, cores, repetitions))
    say("calls to an actor")
    result["call_seconds"] = _call_seconds()
    return result


def scaling_table(result: dict[str, Any]) -> str:
    """Write a result as Markdown."""
    env_id, steps = result["env_id"], result["episode_steps"]
    lines = [f"{env_id}, episodes of {steps} steps: seconds per slice on one core, by its members", ""]
    sizes = list(next(iter(result["slice_seconds"].values())))
    lines += ["| policy | " + " | ".join(map(str, sizes)) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name, seconds in result["slice_seconds"].items():
        lines.append(f"| {name} | " + " | ".join(f"{s:.2f}" for s in seconds.values()) + " |")
    lines += ["", "predicted and measured generations on this machine", ""]
    lines += ["| policy | cores | predicted, s | measured, s | measured / predicted |", "|---|---|---|---|---|"]
    for row in result["checked"]:
        ratio = row["measured"] / row["predicted"]
        lines.append(
            f"| {row['policy']} | {row['cores']} | {row['predicted']:.3f} | {row['measured']:.3f} | {ratio:.2f} |"
        )
    call = result["call_seconds"]
    said = "Ray is not installed: 1 ms assumed" if call is None else f"{1000 * call:.2f} ms"
    lines += ["", f"the driver's time per call to a node: {said}", ""]
    lines += [
        "| policy | members | coordinator, ms | all blocks, ms | longest block, ms | blocks | "
        "job, kB | a slice's result, kB | parts, kB |",
        "|---" * 9 + "|",
    ]
    for row in result["costs"]:
        name = "-".join(map(str, row["net_arch"]))
        ms = [f"{1000 * row[key]:.1f}" for key in ("coordinator", "blocks", "block")]
        kb = [f"{row[key] / 1000:.1f}" for key in ("job", "result", "parts")]
        lines.append(
            f"| {name} | {row['population_size']:,} | {' | '.join(ms)} | {row['n_blocks']} | {' | '.join(kb)} |"
        )
    lines += ["", "the model", ""]
    lines += [
        "| policy | members | cores | physics, s | rest with the sum here, s | its share | "
        "rest with the sum on the nodes, s | its share | speed-up |",
        "|---" * 9 + "|",
    ]
    for row in modelled(result):
        here, there = row["here"], row["there"]
        lines.append(
            f"| {row['policy']} | {row['population_size']:,} | {here.cores:,} | {here.physics:.2f} "
            f"| {here.total - here.physics:.3f} | {here.share:.1%} | {there.total - there.physics:.3f} "
            f"| {there.share:.1%} | {row['speedup']:,.0f} |"
        )
    return "\n".join(lines)


def modelled(result: dict[str, Any], cores: tuple[int, ...] = (1, 16, 100, 1_000, 10_000)) -> list[dict[str, Any]]:
    """Return what the model says for every policy and population, on so many cores."""
    call = result["call_seconds"] or 1e-3
    rows = []
    for row in result["costs"]:
        costs = Costs(**{**row, "net_arch": tuple(row["net_arch"])})
        name = "-".join(map(str, costs.net_arch))
        seconds = {int(size): s for size, s in result["slice_seconds"][name].items()}[costs.slice_size]
        one = predict(costs, seconds, 1, call, on_nodes=False)
        for n in cores:
            here, there = (predict(costs, seconds, n, call, on_nodes) for on_nodes in (False, True))
            best = min(here.total, there.total)
            about = {"policy": name, "population_size": costs.population_size, "here": here, "there": there}
            rows.append({**about, "speedup": one.total / best})
    return rows


def _model(env_id: str, net: tuple[int, ...], population: int, slice_size: int, cap: int | None = None) -> EGGROLL:
    model = EGGROLL(
        "MlpPolicy", env_id, population_size=population, slice_size=slice_size, max_episode_steps=cap, seed=0,
        policy_kwargs={"net_arch": list(net)}, n_workers=0,
    )  # fmt: skip
    model.set_logger(configure(None, []))
    return model


def _median(run: Callable[[], object], repetitions: int) -> float:
    run()
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _slice_seconds(env_id: str, net: tuple[int, ...], size: int, repetitions: int) -> float:
    """Return the seconds of one slice of ``_CAP`` steps in one worker process."""
    model = _model(env_id, net, size, size, _CAP)
    assert model._factory is not None
    with make_evaluator(1, model.policy, model._factory, size) as evaluator:
        return _median(lambda: evaluator.evaluate(model.next_generation()), repetitions)


def _checked(env_id: str, net: tuple[int, ...], cores: int, repetitions: int) -> dict[str, Any]:
    """Compare a generation of 8 slices of 16 members, ``_CAP`` steps, with the model."""
    population, size = 128, 16
    seconds = _slice_seconds(env_id, net, size, repetitions)
    costs = _costs(env_id, net, population, size, repetitions)
    predicted = predict(costs, seconds, cores, 0.0, on_nodes=False).total
    model = _model(env_id, net, population, size, _CAP)
    assert model._factory is not None
    callback = GenerationCallback()
    callback.init_callback(model)
    model._setup_learn(10**9, callback)
    with make_evaluator(cores, model.policy, model._factory, size) as evaluator:
        measured = _median(lambda: model._run_generation(evaluator, callback, 10**9), repetitions)
    return {"policy": "-".join(map(str, net)), "cores": cores, "predicted": predicted, "measured": measured}


class _Made:
    """An evaluator that has made-up results at hand, and the seconds that asking it took."""

    def __init__(self, results: list[RolloutResult]):
        self.results, self.seconds = results, 0.0

    def evaluate(self, generation: Generation) -> list[RolloutResult]:
        started = time.perf_counter()
        pickle.dumps(generation)
        self.seconds += time.perf_counter() - started
        return self.results


def _costs(env_id: str, net: tuple[int, ...], population: int, slice_size: int, repetitions: int) -> Costs:
    model = _model(env_id, net, population, slice_size)
    rng = np.random.default_rng(0)
    n_inputs = model.policy.n_inputs
    limit = time_limit(env_factory(env_id)()) or _CAP
    count = np.array([float(limit * slice_size)])
    results = [
        RolloutResult(
            first, rng.normal(size=(slice_size, 1)), np.full((slice_size, 1), limit), np.full((slice_size, 1), np.nan),
            Moments(count, rng.normal(size=(1, n_inputs)), 1.0 + rng.random((1, n_inputs))),
        )
        for first in range(0, population, slice_size)
    ]  # fmt: skip
    parameters = perturbed_parameters(model.policy.network)
    contraction = Contraction(model.next_generation().noise, rng.normal(size=population // 2))
    blocks = contraction.blocks(parameters)
    seconds, parts = [], []
    with one_thread():
        for index in range(len(blocks)):
            started = time.perf_counter()
            parts.append(contraction.contract(parameters, index))
            seconds.append(time.perf_counter() - started)
    callback = GenerationCallback()
    callback.init_callback(model)
    model._setup_learn(10**9, callback)
    made = _Made(results)
    model.evaluator = _Elsewhere(parts)  # type: ignore[assignment]
    total = _median(lambda: model._run_generation(made, callback, 10**9), repetitions)  # type: ignore[arg-type]
    return Costs(
        net, population, slice_size, len(blocks), sum(seconds), max(seconds), total,
        job=len(pickle.dumps(model.next_generation())),
        result=len(pickle.dumps(results[0])),
        parts=sum(part.numel() * 8 for part in parts),
    )  # fmt: skip


class _Elsewhere:
    """Has the parts of the sum over the noise at hand, as if nodes had computed them."""

    def __init__(self, parts: list[Any]):
        self._parts = parts
        self.nodes: dict[str, int] = {}

    def start(self, *_: object) -> "_Elsewhere":
        return self

    def contract(self, contraction: Contraction, parameters: list[Any]) -> list[Any]:
        return self._parts


def _call_seconds(n_actors: int = 4, n_rounds: int = 60, n_bytes: int = 20_000) -> float | None:
    """Return the seconds that a call to a node keeps the driver's thread busy; None without Ray.

    The actors answer at once, and are asked again when all have: what they do is not measured.
    """
    try:
        ray = import_ray(is_local=True)
    except ConfigError:
        return None
    if ray.is_initialized():
        return None
    with handlers_kept():
        ray.init(
            address="local", include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=n_actors
        )
    try:
        # No import of ours: it measures Ray, and starts at once.
        answer = pickle.dumps(bytes(n_bytes))
        echo = ray.remote(type("Echo", (), {"work": lambda self, job, tasks: answer}))
        actors = [echo.options(num_cpus=1).remote() for _ in range(n_actors)]
        ray.get([actor.work.remote(None, []) for actor in actors])
        seconds = []
        for _ in range(n_rounds):
            job, started = ray.put(bytes(n_bytes)), time.thread_time()
            calls = [actor.work.remote(job, []) for actor in actors]
            sent = time.thread_time() - started
            ray.wait(calls, num_returns=n_actors, fetch_local=False)
            started = time.thread_time()
            ray.wait(calls, num_returns=n_actors, timeout=0, fetch_local=False)
            for call in calls:
                pickle.loads(ray.get(call))
            seconds.append((sent + time.thread_time() - started) / n_actors)
        return statistics.median(seconds)
    finally:
        ray.shutdown()
