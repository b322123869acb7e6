"""How long a generation takes on more cores than this machine has: a model, and what it is made of, measured here.

A generation of N members in slices of k on C cores of M nodes takes

    waves(N / k, C) · slice(k)  +  coordinator(N, policy)  +  messages(M)

with waves = ceil(N / k / C). The first term is the physics: all episodes run to the time limit, as HalfCheetah-v5's
do. The coordinator asks, counts and tells, without the sum over the noise, whose blocks are either computed here (their
seconds are added up) or on the nodes (as many at a time as there are cores; their parts come back over the network).
Messages are what nothing hides: per wave a call to each node, the parameters' way to each node, the results' way back,
and what is left of the driver's work per slice when the last one ends, as slices do not end at one moment; with blocks
on the nodes another call to each, their weights and their parts.
"""

import math
import pickle
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from stable_baselines3.common.logger import configure

from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.dispatch import Done, dispatch
from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import env_factory, time_limit
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import one_thread
from eggroll_rl.lowrank import Contraction, perturbed_parameters
from eggroll_rl.normalization import Moments
from eggroll_rl.ray_crew import NodeActor, RayCrew
from eggroll_rl.ray_workers import handlers_kept, import_ray
from eggroll_rl.rollout import Generation, RolloutResult
from eggroll_rl.workers import Evaluator, available_cores, make_evaluator

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


def left_over(n_results: int, spread: float, each: float) -> float:
    """Return the seconds of handling that are left when the last result is there, on average.

    :param n_results: that come at normally distributed times
    :param spread: standard deviation of these, seconds
    :param each: seconds of handling one
    """
    rng = np.random.default_rng(0)
    left = []
    for _ in range(100):
        arrived, done = np.sort(rng.normal(0.0, spread, n_results)), -math.inf
        for time_of_one in arrived.tolist():
            done = max(done, time_of_one) + each
        left.append(done - arrived[-1])
    return float(np.mean(left))


def predict(
    costs: Costs,
    slice_seconds: float,
    cores: int,
    call_seconds: float,
    on_nodes: bool,
    dispatch_seconds: float = 0.0,
    spread: float = 0.0,
) -> Generated:
    """Return what the model says.

    :param slice_seconds: of one slice's episodes on one core
    :param cores: one node up to ``CORES_PER_NODE``, then as many nodes as it takes
    :param call_seconds: of the driver, per call to a node
    :param on_nodes: the sum over the noise is split over the cluster
    :param dispatch_seconds: of the driver, per slice
    :param spread: standard deviation of a slice's seconds, over their mean
    """
    n_nodes = -(-cores // CORES_PER_NODE)
    n_slices = costs.population_size // costs.slice_size
    waves = math.ceil(n_slices / cores)
    sums, messages = costs.blocks, 0.0
    if n_nodes > 1:
        messages = n_nodes * (waves * call_seconds + costs.job / BANDWIDTH) + 2 * LATENCY
        # Of one wave: the driver is done with the others' while the last one runs.
        n_last = min(cores, n_slices)
        messages += n_last * costs.result / BANDWIDTH + left_over(n_last, spread * slice_seconds, dispatch_seconds)
    if on_nodes:
        sums = math.ceil(costs.n_blocks / cores) * costs.block + costs.n_blocks * dispatch_seconds
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
        without Ray), ``dispatch_seconds``, ``checked``: predicted and measured seconds
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
    say("the spread of slices")
    result["spread"] = _spread(env_id, nets[0], slice_size)
    say("the driver's work per slice, and per call to an actor")
    result["dispatch_seconds"] = _dispatch_seconds(env_id, slice_size, repetitions)
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
    each = 1e6 * result["dispatch_seconds"]
    lines += ["", f"the driver's time per call to a node: {said}; per slice: {each:.0f} microseconds", ""]
    lines += [f"standard deviation of a slice's time, with all cores busy: {result['spread']:.1%}", ""]
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
    call, each, spread = result["call_seconds"] or 1e-3, result["dispatch_seconds"], result["spread"]
    rows = []
    for row in result["costs"]:
        costs = Costs(**{**row, "net_arch": tuple(row["net_arch"])})
        name = "-".join(map(str, costs.net_arch))
        seconds = {int(size): s for size, s in result["slice_seconds"][name].items()}[costs.slice_size]
        one = predict(costs, seconds, 1, call, on_nodes=False)
        for n in cores:
            here, there = (predict(costs, seconds, n, call, split, each, spread) for split in (False, True))
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


def _spread(env_id: str, net: tuple[int, ...], size: int, n_slices: int = 30) -> float:
    """Return the standard deviation of whole slices' seconds over their mean, with all cores busy."""
    model = _model(env_id, net, size, size)
    assert model._factory is not None
    n_workers = available_cores()
    evaluators = [make_evaluator(1, model.policy, model._factory, size) for _ in range(n_workers)]
    generation = model.next_generation()

    def measure(evaluator: Evaluator) -> list[float]:
        seconds = []
        for _ in range(-(-n_slices // n_workers)):
            started = time.perf_counter()
            evaluator.evaluate(generation)
            seconds.append(time.perf_counter() - started)
        return seconds

    with ExitStack() as stack, ThreadPoolExecutor(n_workers) as pool:
        for evaluator in evaluators:
            stack.enter_context(evaluator)
        seconds = [value for values in pool.map(measure, evaluators) for value in values]
    return statistics.stdev(seconds) / statistics.mean(seconds)


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


def _made_up(model: EGGROLL, n_slices: int, length: int) -> list[RolloutResult]:
    """Return results that cost nothing, for slices of whole episodes."""
    rng, size, n_inputs = np.random.default_rng(0), model.slice_size, model.policy.n_inputs
    count = np.array([float(length * size)])
    return [
        RolloutResult(
            index * size, rng.normal(size=(size, 1)), np.full((size, 1), length), np.full((size, 1), np.nan),
            Moments(count, rng.normal(size=(1, n_inputs)), 1.0 + rng.random((1, n_inputs))),
        )
        for index in range(n_slices)
    ]  # fmt: skip


def _costs(env_id: str, net: tuple[int, ...], population: int, slice_size: int, repetitions: int) -> Costs:
    model = _model(env_id, net, population, slice_size)
    rng = np.random.default_rng(0)
    results = _made_up(model, population // slice_size, time_limit(env_factory(env_id)()) or _CAP)
    parameters = perturbed_parameters(model.policy.network)
    contraction = Contraction(model.next_generation().noise, rng.normal(size=population // 2))
    blocks = contraction.blocks(parameters)
    seconds, parts = [], []
    with one_thread():
        for index in range(len(blocks)):
            parts.append(contraction.contract(parameters, index))
            seconds.append(_median(lambda index=index: contraction.contract(parameters, index), 3))  # type: ignore[misc]
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


class _Answered:
    """A call that has returned."""

    def __init__(self, answer: Any):
        self.answer = answer


class _InstantRay:
    """Stands in for Ray: nodes that have every result at hand, so that what is left is the driver's own work.

    :ivar seconds: that the nodes took, which are not the driver's
    """

    exceptions = SimpleNamespace(RayError=OSError, RayTaskError=ValueError)
    util = SimpleNamespace(scheduling_strategies=SimpleNamespace(NodeAffinitySchedulingStrategy=SimpleNamespace))

    def __init__(self, n_nodes: int, results: list[RolloutResult]):
        self._n_nodes, self._results, self.seconds = n_nodes, results, 0.0

    def nodes(self) -> list[dict[str, Any]]:
        about = {"Alive": True, "NodeManagerAddress": "node", "Resources": {"CPU": CORES_PER_NODE}}
        return [{"NodeID": str(index), **about} for index in range(self._n_nodes)]

    def put(self, value: Any) -> Any:
        return value

    def get(self, call: Any) -> Any:
        return call.answer

    def wait(self, calls: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return calls, []

    def kill(self, actor: Any) -> None:
        pass

    def remote(self, kind: type) -> Any:
        def work(job: Any, tasks: list[Any]) -> Any:
            started = time.perf_counter()
            done = [Done(task, result) for task, result in zip(tasks, self._results, strict=False)]
            answer = pickle.dumps((done, CORES_PER_NODE))
            self.seconds += time.perf_counter() - started
            return _Answered(answer)

        def method(answer: Any) -> Any:
            return SimpleNamespace(remote=lambda *_: _Answered(answer))

        about = NodeActor().about()
        actor = SimpleNamespace(
            about=method(about), start=method(None), work=SimpleNamespace(remote=work), close=method(None)
        )
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: actor))


def _dispatch_seconds(env_id: str, slice_size: int, repetitions: int, n_nodes: int = 16) -> float:
    """Return the driver's seconds per slice, beside Ray's: to send it, and to take its result."""
    n_slices = n_nodes * CORES_PER_NODE
    model = _model(env_id, (64, 64), n_slices * slice_size, slice_size)
    generation = model.next_generation()
    ray = _InstantRay(n_nodes, _made_up(model, CORES_PER_NODE, 1000))
    crew = RayCrew(ray, b"", slice_size, 1.0, n_slices, 1.0)
    crew.start()

    def run() -> float:
        before, started = ray.seconds, time.perf_counter()
        dispatch(generation, generation.slices(), crew)
        return time.perf_counter() - started - (ray.seconds - before)

    return statistics.median(run() for _ in range(repetitions + 1)) / n_slices


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
