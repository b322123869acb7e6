"""Who else steps these envs: each peer is a generator of env steps per second, one round at each ``next``.

A generator even where it only hands on another: nothing is built, and nothing can fail, before its first turn.

What a figure counts is in the peer's docstring, whose first line the benchmark prints.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from eggroll_rl.actor import Actor
from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import one_thread
from eggroll_rl.lowrank import ContractElsewhere
from eggroll_rl.population import Population
from eggroll_rl.ray_workers import RayEvaluator
from eggroll_rl.rollout import load_generation
from eggroll_rl.sb3_vec_env import Sb3VecEnv
from eggroll_rl.workers import Evaluator, make_evaluator

Peer = Callable[[EGGROLL, EnvFactory, int], Iterator[float]]
Act = Callable[[np.ndarray], np.ndarray]
_ROUND_SECONDS = 2.0


class Skipped(Exception):
    """A peer cannot run here; says why."""


def _members(model: EGGROLL, n_envs: int) -> Act:
    """Return the population's policy: what training computes for a slice of this many members."""
    generation, policy = model.next_generation(), model.policy.replica()
    load_generation(policy, generation)
    actor = Actor(policy, generation.noise, 0, n_envs)
    return lambda obs: actor.act(actor.encode(obs))


def _drive(envs: Any, act: Act) -> Iterator[float]:
    try:
        obs = envs.reset()[0]
        while True:
            # Within a round: a peer that waits for its next turn must not change torch's settings for the others.
            with one_thread():
                steps, started = 0, time.perf_counter()
                while (seconds := time.perf_counter() - started) < _ROUND_SECONDS:
                    obs = envs.step(act(obs))[0]
                    steps += len(obs)
            yield steps / seconds
    finally:
        envs.close()


def training(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """Ours, whole training: 64 pairs of a 64-64 policy in two slices, a process for each worker.

    The same generation again and again, with its update, which is then taken back.
    """
    with make_evaluator(n_workers, model.policy, factory, model.slice_size) as evaluator:
        yield from _one_generation(model, evaluator, None)


def _one_generation(model: EGGROLL, evaluator: Evaluator, elsewhere: ContractElsewhere | None) -> Iterator[float]:
    core = model.evolution_strategy
    before = copy.deepcopy((model.policy.state_dict(), core.state_dict()))
    while True:
        started = time.perf_counter()
        results = evaluator.evaluate(model.next_generation())
        model.update(results, elsewhere)
        seconds = time.perf_counter() - started
        state, core_state = copy.deepcopy(before)
        model.policy.load_state_dict(state)
        core.load_state_dict(core_state)
        yield sum(int(result.lengths.sum()) for result in results) / seconds


def one_worker(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """Ours, whole training, one process."""
    yield from training(model, factory, 1)


def ray(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """Ours, whole training, as many workers on a Ray cluster: this machine, unless ray.init() was called before."""
    try:
        evaluator = RayEvaluator("local", n_workers)
    except ConfigError as error:
        raise Skipped(str(error)) from error
    n_slices = -(-model.n_rows // model.slice_size)
    with evaluator.start(model.policy.replica(), factory, model.slice_size, n_slices):
        yield from _one_generation(model, evaluator, evaluator.contract)


def segments(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """Ours, whole training by segments, with critic and updates, 64-64: the same workers."""
    algorithm = EGGROLL(
        "MlpPolicy",
        factory,
        policy_kwargs={"zero_last_layer": False},  # else there is nothing to solve
        fitness="segment",
        target_kl=1e-12,  # all rounds see one policy
        seed=0,
    )
    algorithm.set_logger(configure(None, []))
    with make_evaluator(n_workers, algorithm.policy, factory, algorithm.slice_size) as evaluator:
        while True:
            steps, started = 0, time.perf_counter()
            while (seconds := time.perf_counter() - started) < _ROUND_SECONDS:
                results = evaluator.evaluate(algorithm.next_generation())
                algorithm.update(results)
                steps += sum(int(result.lengths.sum()) for result in results)
            yield steps / seconds


def sync(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """SyncVectorEnv of 64 envs, 1 process, driven by the population's forward."""
    yield from _drive(SyncVectorEnv([factory] * 64, autoreset_mode=AutoresetMode.SAME_STEP), _members(model, 64))


def async_(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """AsyncVectorEnv of 16 envs, 16 processes, driven by the population's forward."""
    yield from _drive(AsyncVectorEnv([factory] * 16, autoreset_mode=AutoresetMode.SAME_STEP), _members(model, 16))


def envpool(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """EnvPool of 64 envs, synchronous, as many threads as workers, driven by the population's forward."""
    try:
        import envpool as library
    except ImportError as error:
        raise Skipped("not installed: pip install envpool") from error
    settings = {"max_episode_steps": factory.episode_cap, **factory.kwargs}
    envs = library.make(_id(factory), env_type="gymnasium", num_envs=64, num_threads=n_workers, seed=0, **settings)
    act = _members(model, 64)
    yield from _drive(envs, lambda obs: act(obs).astype(np.float64))


def ppo(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """SB3 PPO, whole training: 8 envs in DummyVecEnv, VecNormalize, 64-64, 10 epochs of batches of 256."""
    yield from _ppo(DummyVecEnv([factory] * 8))


def ppo_on_ours(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """SB3 PPO, whole training, the same settings on 8 envs of our vector env."""
    yield from _ppo(Sb3VecEnv(factory.vector(8, AutoresetMode.SAME_STEP)))


def _ppo(envs: VecEnv) -> Iterator[float]:
    algorithm = PPO("MlpPolicy", VecNormalize(envs), n_steps=256, batch_size=256, n_epochs=10, seed=0, device="cpu")
    try:
        yield from _learn(algorithm, 4096)
    finally:
        envs.close()


def _learn(algorithm: Any, steps: int) -> Iterator[float]:
    while True:
        before, started = algorithm.num_timesteps, time.perf_counter()
        algorithm.learn(steps, reset_num_timesteps=False)
        yield (algorithm.num_timesteps - before) / (time.perf_counter() - started)


def ars(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """sb3-contrib ARS, whole training: linear policy, 32 directions, AsyncEval on as many processes as workers."""
    try:
        from sb3_contrib import ARS
        from sb3_contrib.common.vec_env import AsyncEval
    except ImportError as error:
        raise Skipped("not installed: pip install sb3-contrib") from error
    algorithm = ARS("LinearPolicy", VecNormalize(DummyVecEnv([factory])), n_delta=32, n_top=4, seed=0, device="cpu")
    while True:
        # learn() closes them when it ends.
        evaluators = AsyncEval([lambda: VecNormalize(DummyVecEnv([factory]))] * n_workers, algorithm.policy)
        before, started = algorithm.num_timesteps, time.perf_counter()
        algorithm.learn(12_800, reset_num_timesteps=False, async_eval=evaluators)
        yield (algorithm.num_timesteps - before) / (time.perf_counter() - started)


def evotorch(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """EvoTorch GymNE, whole generations of PGPE: 64-64, population 128, as many Ray actors as workers."""
    try:
        from evotorch.algorithms import PGPE
        from evotorch.neuroevolution import GymNE
    except ImportError as error:
        raise Skipped("not installed: pip install evotorch") from error
    problem = GymNE(
        factory,
        "Linear(obs_length, 64) >> Tanh() >> Linear(64, 64) >> Tanh() >> Linear(64, act_length)",
        observation_normalization=True,
        num_actors=n_workers,
    )
    searcher = PGPE(
        problem, popsize=128, center_learning_rate=0.01, stdev_learning_rate=0.1, stdev_init=0.05, optimizer="adam"
    )
    try:
        while True:
            before, started = int(problem.status.get("total_interaction_count", 0)), time.perf_counter()
            searcher.step()
            yield (int(problem.status["total_interaction_count"]) - before) / (time.perf_counter() - started)
    finally:
        problem.kill_actors()


def one_member(model: EGGROLL, factory: EnvFactory, n_workers: int) -> Iterator[float]:
    """The usual loop, 1 process: one member after the other, its weights copied into a torch module, one env."""
    env: gym.Env = factory()
    policy, noise = model.policy.replica(), model.next_generation().noise
    population = Population(policy.network, noise)
    parameters = dict(policy.network.named_parameters())
    mean = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    member = 0
    while True:
        with torch.no_grad(), one_thread():
            steps, started = 0, time.perf_counter()
            while (seconds := time.perf_counter() - started) < _ROUND_SECONDS:
                for name, value in mean.items():
                    parameters[name].copy_(value)
                for name, value in population.parameters_of(member).items():
                    parameters[name].copy_(value)
                member = (member + 1) % len(population)
                obs, ended = env.reset(seed=member)[0], False
                while not ended:
                    action = policy(torch.from_numpy(obs)[None]).numpy()[0]
                    obs, _, terminated, truncated, _ = env.step(action)
                    ended = terminated or truncated
                    steps += 1
        yield steps / seconds


def _id(factory: EnvFactory) -> str:
    spec: Any = factory.source
    return spec.id


PEERS: dict[str, Peer] = {
    "one_worker": one_worker,
    "ray": ray,
    "segments": segments,
    "sync": sync,
    "async": async_,
    "envpool": envpool,
    "ppo": ppo,
    "ppo_on_ours": ppo_on_ours,
    "ars": ars,
    "evotorch": evotorch,
    "one_member": one_member,
}
