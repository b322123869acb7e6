"""Throughput: what training reaches of the speed of the physics itself, both measured in one run."""

import statistics
import time
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import configure

from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import env_factory, load_preset, time_limit
from eggroll_rl.errors import ConfigError
from eggroll_rl.workers import available_cores, count_workers, make_evaluator


def throughput(env_id: str, n_workers: int | None = None, repetitions: int = 5) -> dict[str, Any]:
    """Compare whole training generations with ``mujoco.rollout``, interleaved.

    A generation is everything from ask to tell with the env's preset: noise, parameters to the workers,
    episodes, results back, update, normalizer. The C limit steps the same model from reset states with random
    controls, as many steps, with one thread per worker and no Python in between.

    :return: env steps per second of both, per repetition, and the median of their ratios
    :raises ConfigError: the env is not one of Gymnasium's MuJoCo tasks
    """
    import mujoco
    from mujoco import rollout

    cores = n_workers or available_cores()
    factory = env_factory(env_id)
    env = factory()
    task: Any = env.unwrapped
    if not isinstance(getattr(task, "model", None), mujoco.MjModel):
        raise ConfigError(f"{env_id} is not a MuJoCo task: there is no C limit to compare with")
    settings = dict(load_preset(env_id).get("eggroll", {}))
    model = EGGROLL(settings.pop("policy", "MlpPolicy"), factory, seed=0, **settings)
    model.set_logger(configure(None, []))

    capped = factory if model.max_episode_steps is None else factory.with_cap(model.max_episode_steps)
    size, horizon = model.population_size, time_limit(capped())
    spec = mujoco.mjtState.mjSTATE_FULLPHYSICS
    states = np.empty((size, mujoco.mj_stateSize(task.model, spec)))
    for i, state in enumerate(states):
        env.reset(seed=i)
        mujoco.mj_getState(task.model, task.data, state, spec)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    controls = np.random.default_rng(0).uniform(low, high, (size, horizon, task.model.nu))
    controls = controls.repeat(task.frame_skip, axis=1)
    n_workers = count_workers(cores, size, model.slice_size)
    data = [mujoco.MjData(task.model) for _ in range(n_workers)]

    training, limit = [], []
    evaluator = make_evaluator(n_workers, model.policy, capped, model.slice_size)
    with evaluator, rollout.Rollout(nthread=n_workers) as pool, torch.no_grad():
        for repetition in range(repetitions + 1):
            started = time.perf_counter()
            results = evaluator.evaluate(model.next_generation())
            model.update(results)
            steps = sum(int(result.lengths.sum()) for result in results)
            ours = steps / (time.perf_counter() - started)
            started = time.perf_counter()
            pool.rollout([task.model] * size, data, states, controls)
            theirs = size * horizon / (time.perf_counter() - started)
            if repetition:  # the first one warms up
                training.append(ours)
                limit.append(theirs)
    ratios = [a / b for a, b in zip(training, limit, strict=True)]
    return {
        "env_id": env_id,
        "n_workers": n_workers,
        "vector_env": factory.describe_vector(),
        "training": training,
        "c_limit": limit,
        "median_ratio": statistics.median(ratios),
    }
