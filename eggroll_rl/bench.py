"""Throughput: what training reaches of the speed of the physics itself, everything measured in one run.

A figure is env steps per second, frame skip included once. Who is measured takes turns, so that a machine that slows
down slows all of them.
"""

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from gymnasium.vector import VectorEnv
from mujoco.rollout import rollout as mujoco_rollout
from stable_baselines3.common.logger import configure

from eggroll_rl.bench_peers import PEERS, Skipped, training
from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import EnvFactory, env_factory, time_limit
from eggroll_rl.errors import ConfigError
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.rollout import episode_seeds, load_generation, rollout
from eggroll_rl.workers import available_cores, count_workers

POPULATION_SIZE, SLICE_SIZE, NET_ARCH = 128, 64, [64, 64]
_WARM_UP_GENERATIONS = 200


@dataclass
class Workload:
    """One generation to be measured: a 64-64 policy at rank 1 and 64 pairs in two slices.

    :param model: the algorithm, in the generation that is measured
    :param factory: builds the env, with the cap on episodes
    :param controls: (N, steps, actions) what the members did
    :param states: (N, state) the simulations' states after their resets
    :param lengths: (N,) steps of their episodes
    """

    model: EGGROLL
    factory: EnvFactory
    n_workers: int
    controls: np.ndarray
    states: np.ndarray
    lengths: np.ndarray


def throughput(
    env_id: str,
    n_workers: int | None = None,
    repetitions: int = 5,
    episode_steps: int = 200,
    real_ends: bool = False,
    peers: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Compare whole training generations with the raw C limit and with peers, interleaved.

    A generation is everything from ask to tell: noise, parameters to the workers, episodes, results back, update,
    normalizer. The C limit steps the same model from the same reset states with the controls that these episodes
    applied, one thread per worker and no Python within an episode.

    :param n_workers: worker processes, and threads of the C limit; None takes all cores. At most 2, as
        there are two slices
    :param repetitions: rounds, after one to warm up
    :param episode_steps: cap on the episodes
    :param real_ends: let episodes end where the task ends them. Otherwise termination is switched off, or, for the
        two pendulums, where it cannot be, a policy that was trained first keeps all members standing
    :param peers: names in :data:`eggroll_rl.bench_peers.PEERS`
    :return: env steps per second of each, per round (a string where a peer could not run), and the medians of the
        rounds' ratios to the C limit
    :raises ConfigError: the env is not a MuJoCo task, or a peer is not known
    """
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ConfigError(f"unknown peer {unknown[0]!r}; known are {', '.join(PEERS)}")
    work = prepare(env_id, n_workers or available_cores(), episode_steps, real_ends)
    rates: dict[str, Any] = {}
    with ExitStack() as stack:
        measured = [("training", training), *((name, PEERS[name]) for name in peers)]
        runs: dict[str, Iterator[float]] = {"c_limit": _c_limit(work)}
        runs |= {name: run(work.model, work.factory, work.n_workers) for name, run in measured}
        for run in runs.values():
            stack.enter_context(closing(run))  # type: ignore[type-var]
        for _ in range(repetitions + 1):  # the first one warms up
            for name, run in runs.items():
                if isinstance(rates.get(name), str):
                    continue
                try:
                    rates.setdefault(name, []).append(next(run))
                except Exception as error:
                    if name in ("c_limit", "training"):
                        raise
                    rates[name] = str(error) if isinstance(error, Skipped) else f"{type(error).__name__}: {error}"
    rates = {name: values if isinstance(values, str) else values[1:] for name, values in rates.items()}
    ratios = {
        name: float(statistics.median(a / b for a, b in zip(values, rates["c_limit"], strict=True)))
        for name, values in rates.items()
        if not isinstance(values, str)
    }
    return {
        "env_id": env_id,
        "n_workers": work.n_workers,
        "vector_env": work.factory.describe_vector(),
        "mean_episode_steps": float(work.lengths.mean()),
        "real_ends": real_ends,
        "steps_per_second": rates,
        "median_ratio": ratios,
    }


def throughput_table(result: dict[str, Any]) -> str:
    """Write a result as lines of text, saying what each figure is."""
    ends = "real ends" if result["real_ends"] else "all members running"
    cores = result["n_workers"]
    lines = [
        f"{result['env_id']}, env steps per second, {cores} workers, {ends}, "
        f"{result['mean_episode_steps']:.0f} steps an episode",
        "     median       range           of C limit",
    ]
    for name, rates in result["steps_per_second"].items():
        about = f"raw MuJoCo in C, {cores} threads"
        if name != "c_limit":
            about = ({"training": training, **PEERS}[name].__doc__ or "").splitlines()[0]
        if isinstance(rates, str):
            lines.append(f"  {'-':>9}  {rates}: {name}")
            continue
        span = f"{min(rates):,.0f} to {max(rates):,.0f}"
        ratio = result["median_ratio"][name]
        lines.append(f"  {statistics.median(rates):9,.0f}  {span:>17}  {ratio:6.3f}  {about}")
    return "\n".join(lines)


def prepare(env_id: str, n_workers: int, episode_steps: int, real_ends: bool) -> Workload:
    """Make the workload: the first generation, or for the pendulums one of a policy that was trained to stand."""
    env = env_factory(env_id)()
    task: Any = env.unwrapped
    if not isinstance(getattr(task, "model", None), mujoco.MjModel):
        raise ConfigError(f"{env_id} is not a MuJoCo task: there is no C limit to compare with")
    kwargs: dict[str, Any] = {}
    if not real_ends:
        if hasattr(task, "_terminate_when_unhealthy"):
            kwargs["terminate_when_unhealthy"] = False
        elif task.spec.id == "InvertedDoublePendulum-v5":
            kwargs["reset_noise_scale"] = 0.01  # some of its start states cannot be saved
    factory = env_factory(env_id, kwargs)
    capped = factory.with_cap(episode_steps)
    limit = min(episode_steps, time_limit(env) or episode_steps)
    model = _algorithm(factory, episode_steps)
    with closing(capped.vector(SLICE_SIZE)) as envs:
        controls, results = _generation(model, envs)
        if not real_ends and _lengths(results).min() < limit:
            model = _standing(env_id, factory, episode_steps, envs, limit)
            controls, results = _generation(model, envs)
    n_workers = count_workers(n_workers, POPULATION_SIZE, SLICE_SIZE)
    return Workload(model, capped, n_workers, controls, _reset_states(model, capped), _lengths(results))


def _algorithm(factory: EnvFactory, episode_steps: int, **settings: Any) -> EGGROLL:
    model = EGGROLL(
        "MlpPolicy",
        factory,
        population_size=POPULATION_SIZE,
        slice_size=SLICE_SIZE,
        policy_kwargs={"net_arch": NET_ARCH},
        max_episode_steps=episode_steps,
        seed=0,
        **settings,
    )
    model.set_logger(configure(None, []))
    return model


def _standing(env_id: str, factory: EnvFactory, episode_steps: int, envs: VectorEnv, limit: int) -> EGGROLL:
    """Return the algorithm with a trained policy and a sigma so small that its members stand as the mean does."""
    learner = _algorithm(factory, episode_steps, sigma=0.02, learning_rate=0.01)
    steady = _algorithm(factory, episode_steps, sigma=1e-4)
    for generation in range(1, _WARM_UP_GENERATIONS + 1):
        learner.update(_generation(learner, envs)[1])
        if generation % 10 == 0:
            steady.policy.load_state_dict(learner.policy.state_dict())
            if _lengths(_generation(steady, envs)[1]).min() == limit:
                return steady
    raise ConfigError(
        f"{env_id}: after {_WARM_UP_GENERATIONS} generations some members still end before step {limit}, "
        "so that no slice stays full: measure with --real-ends"
    )


def _lengths(results: list[Any]) -> np.ndarray:
    return np.concatenate([result.lengths for result in results])[:, 0]


def _c_limit(work: Workload) -> Iterator[float]:
    """Step all episodes with ``mujoco.rollout``, which holds no lock, on as many threads as training has workers."""
    task: Any = work.factory().unwrapped
    controls = work.controls.repeat(task.frame_skip, axis=1)
    episodes = list(enumerate((work.lengths * task.frame_skip).tolist()))
    n_states = mujoco.mj_stateSize(task.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)

    def simulate(thread: int) -> None:
        data = mujoco.MjData(task.model)
        for i, steps in episodes[thread :: work.n_workers]:
            # Its results land in the same memory each time: fresh pages would cost it time.
            mujoco_rollout(
                task.model, data, work.states[i : i + 1], controls[i : i + 1, :steps], state=memory[thread][:, :steps]
            )

    memory = [np.empty((1, max(steps for _, steps in episodes), n_states)) for _ in range(work.n_workers)]
    with ThreadPoolExecutor(work.n_workers) as pool:
        while True:
            started = time.perf_counter()
            list(pool.map(simulate, range(work.n_workers)))
            yield float(work.lengths.sum()) / (time.perf_counter() - started)


class _Recorder:
    """Pass everything on to a vector env and keep the actions."""

    def __init__(self, envs: VectorEnv):
        self.reset = envs.reset
        self._step = envs.step
        self.actions: list[np.ndarray] = []

    def step(self, actions: np.ndarray) -> Any:
        self.actions.append(actions.astype(np.float64))
        return self._step(actions)


def _generation(model: EGGROLL, envs: VectorEnv | MujocoVectorEnv) -> tuple[np.ndarray, list[Any]]:
    """Return the controls (N, steps, actions) and the results of the current generation."""
    generation, policy = model.next_generation(), model.policy.replica()
    load_generation(policy, generation)
    controls: list[np.ndarray] = []
    results = []
    for first in range(0, POPULATION_SIZE, SLICE_SIZE):
        recorder = _Recorder(envs)
        results.append(rollout(policy, generation, first, recorder))  # type: ignore[arg-type]
        controls += list(np.stack(recorder.actions, axis=1))
    padded = np.zeros((POPULATION_SIZE, max(len(c) for c in controls), controls[0].shape[1]))
    for row, c in zip(padded, controls, strict=True):
        row[: len(c)] = c
    return padded, results


def _reset_states(model: EGGROLL, factory: EnvFactory) -> np.ndarray:
    env = factory()
    task: Any = env.unwrapped
    spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
    states = np.empty((POPULATION_SIZE, mujoco.mj_stateSize(task.model, spec)))
    seeds = episode_seeds(model.next_generation().noise, 1)[:, 0]
    for state, seed in zip(states, seeds, strict=True):
        env.reset(seed=int(seed))
        mujoco.mj_getState(task.model, task.data, state, spec)
    return states
