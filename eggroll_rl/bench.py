"""Throughput: what training reaches of the speed of the physics itself, both measured in one run."""

import statistics
import time
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3.common.logger import configure

from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import EnvFactory, env_factory, load_preset
from eggroll_rl.errors import ConfigError
from eggroll_rl.rollout import episode_seeds, load_generation, rollout
from eggroll_rl.workers import available_cores, count_workers, make_evaluator


def throughput(env_id: str, n_workers: int | None = None, repetitions: int = 5) -> dict[str, Any]:
    """Compare whole training generations with ``mujoco.rollout``, interleaved.

    A generation is everything from ask to tell with the env's preset: noise, parameters to the workers,
    episodes, results back, update, normalizer. The C limit steps the same model from the same reset states with
    the controls that the first generation applied, with one thread per worker and no Python in between.

    :return: env steps per second of both, per repetition, and the median of their ratios
    :raises ConfigError: the env is not one of Gymnasium's MuJoCo tasks
    """
    import mujoco
    from mujoco import rollout as mujoco_rollout

    factory = env_factory(env_id)
    task: Any = factory().unwrapped
    if not isinstance(getattr(task, "model", None), mujoco.MjModel):
        raise ConfigError(f"{env_id} is not a MuJoCo task: there is no C limit to compare with")
    settings = dict(load_preset(env_id).get("eggroll", {}))
    model = EGGROLL(settings.pop("policy", "MlpPolicy"), factory, seed=0, **settings)
    model.set_logger(configure(None, []))
    capped = factory.with_cap(model.max_episode_steps)
    n_workers = count_workers(n_workers or available_cores(), model.population_size, model.slice_size)

    controls, states = _first_generation(model, capped)
    controls = controls.repeat(task.frame_skip, axis=1)
    models, data = [task.model] * len(states), [mujoco.MjData(task.model) for _ in range(n_workers)]
    training, limit = [], []
    evaluator = make_evaluator(n_workers, model.policy, capped, model.slice_size)
    with evaluator, mujoco_rollout.Rollout(nthread=n_workers) as pool:
        for repetition in range(repetitions + 1):
            started = time.perf_counter()
            results = evaluator.evaluate(model.next_generation())
            model.update(results)
            steps = sum(int(result.lengths.sum()) for result in results)
            ours = steps / (time.perf_counter() - started)
            started = time.perf_counter()
            pool.rollout(models, data, states, controls)
            theirs = controls.shape[0] * controls.shape[1] / task.frame_skip / (time.perf_counter() - started)
            if repetition:  # the first one warms up
                training.append(ours)
                limit.append(theirs)
    return {
        "env_id": env_id,
        "n_workers": n_workers,
        "vector_env": capped.describe_vector(),
        "training": training,
        "c_limit": limit,
        "median_ratio": statistics.median(a / b for a, b in zip(training, limit, strict=True)),
    }


class _Recorder:
    """Pass everything on to a vector env and keep the actions."""

    def __init__(self, envs: VectorEnv):
        self.reset = envs.reset
        self._step = envs.step
        self.actions: list[np.ndarray] = []

    def step(self, actions: np.ndarray) -> Any:
        self.actions.append(actions.astype(np.float64))
        return self._step(actions)


def _first_generation(model: EGGROLL, factory: EnvFactory) -> tuple[np.ndarray, np.ndarray]:
    """Return the controls (N, steps, actions) and reset states (N, ...) of a generation of one episode each."""
    import mujoco

    env = factory()
    task: Any = env.unwrapped
    spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
    generation = model.next_generation()
    noise, policy, envs = generation.noise, model.policy.replica(), factory.vector(model.slice_size)
    load_generation(policy, generation)
    controls: list[np.ndarray] = []
    for first in range(0, noise.population_size, noise.slice_size):
        recorder = _Recorder(envs)
        rollout(policy, generation, first, recorder)  # type: ignore[arg-type]
        controls += list(np.stack(recorder.actions, axis=1))
    states = np.empty((noise.population_size, mujoco.mj_stateSize(task.model, spec)))
    for state, seed in zip(states, episode_seeds(noise, 1)[:, 0], strict=True):
        env.reset(seed=int(seed))
        mujoco.mj_getState(task.model, task.data, state, spec)
    steps = max(len(c) for c in controls)
    padded = np.zeros((noise.population_size, steps, task.model.nu))
    for row, c in zip(padded, controls, strict=False):
        row[: len(c)] = c
    return padded, states
