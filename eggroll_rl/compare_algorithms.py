"""The algorithms that ``eggroll-rl compare`` runs: EGGROLL, OpenES, SB3's, sb3-contrib's, and the user's own."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from eggroll_rl.config import EGGROLL_SETTINGS, RunConfig, check_names, without_fitness
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import check_whole
from eggroll_rl.evaluation import find_algorithm
from eggroll_rl.policies import default_policy, find_activation
from eggroll_rl.sb3_vec_env import Sb3VecEnv
from eggroll_rl.workers import count_workers

EVOLUTION = ("eggroll", "openes")
# Clamped to min(m, n) for each m x n matrix: every perturbation has full rank.
_FULL_RANK = 1_000_000
_RUN_ARGUMENTS = {"self", "env", "seed", "verbose", "tensorboard_log", "stats_window_size", "device", "monitor_wrapper"}
_OUR_ARGUMENTS = ("n_envs", "normalize", "noise_std", "source")
# For tasks whose preset has no table of the algorithm; what is not here is the library's default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": {"n_envs": 8, "normalize": True, "n_steps": 256, "batch_size": 256},
    "a2c": {"n_envs": 8, "normalize": True},
    "trpo": {"n_envs": 2, "normalize": True, "n_steps": 1024},
    "ars": {"policy": "LinearPolicy", "normalize": {"norm_reward": False}},
    "td3": {"noise_std": 0.1},
}


@dataclass
class Learner:
    """An untrained model on its envs, and how it learns.

    :param envs: what it steps, in words
    :param learn: ``learn(total_timesteps, callback)``
    :param settings: every setting, those left to the library included
    """

    model: BaseAlgorithm
    envs: str
    learn: Callable[[int, Any], Any]
    settings: dict[str, Any] = field(default_factory=dict)


def settings_of(preset: dict[str, Any], algo: str, observation_space: spaces.Space) -> dict[str, Any]:
    """Return the settings of an algorithm in a preset, or what is used without.

    ``openes`` is EGGROLL's table at full rank, with the table ``[openes]`` over it. Segments have no full rank: of a
    table for them it takes what whole episodes share.

    :raises ConfigError: the algorithm or a setting is unknown
    """
    own = preset.get(algo, {})
    if algo in EVOLUTION:
        known: Any = EGGROLL_SETTINGS
        settings = dict(preset.get("eggroll", {}))
        if algo == "openes":
            check_names(own, known, "[openes]")
            if settings.get("fitness") == "segment":
                settings = {**without_fitness(settings), "fitness": "episode"}
            settings = {**settings, "rank": _FULL_RANK, **own}
    else:
        known = [*_arguments(algo), *_OUR_ARGUMENTS]
        settings = dict(own)
        if not own:
            settings = dict(_DEFAULTS.get(algo, {}))
            if not isinstance(observation_space, spaces.Box):
                settings.pop("normalize", None)  # VecNormalize takes no other
    check_names(settings, known, f"[{algo}]")
    return settings


def build(algo: str, settings: dict[str, Any], config: RunConfig, factory: EnvFactory, n_cores: int) -> Learner:
    """Make the algorithm on its envs.

    Beside the constructor's arguments, SB3's algorithms take ``n_envs``, ``normalize`` (true, or VecNormalize's
    arguments), ``noise_std`` (normal action noise) and ``source`` (where the figures come from). Several envs are
    our vector env where the task has one, on ``n_cores`` threads. ARS evaluates its candidates on as many processes.

    :param config: gives the seed, and for EGGROLL the env
    :raises ConfigError: a setting is refused
    """
    if algo in EVOLUTION:
        config.eggroll, config.n_workers = dict(settings), n_cores
        ours = config.model(factory)
        workers = count_workers(n_cores, ours.n_rows, ours.slice_size)
        config.resolve(ours)
        return Learner(
            ours,
            f"{workers} worker processes, {factory.describe_vector()}",
            lambda steps, callback: ours.learn(steps, callback, log_interval=None),
            config.eggroll,
        )
    arguments = {name: value for name, value in settings.items() if name not in _OUR_ARGUMENTS}
    n_envs = settings.get("n_envs", 1)
    check_whole("n_envs", n_envs, 1)
    envs, described = _vector(factory, n_envs, n_cores)
    try:
        normalize = settings.get("normalize", False)
        if normalize:
            given = normalize if isinstance(normalize, dict) else {}
            # As RL Zoo does: returns are scaled with the discount that the algorithm sees.
            gamma = {"gamma": arguments["gamma"]} if "gamma" in arguments else {}
            envs = VecNormalize(envs, **{**gamma, **given})
            described += ", VecNormalize"
        if "noise_std" in settings:
            shape = envs.action_space.shape
            if shape is None:
                raise ConfigError("noise_std needs continuous actions")
            arguments["action_noise"] = NormalActionNoise(np.zeros(shape), np.full(shape, settings["noise_std"]))
        policy = arguments.pop("policy", default_policy(envs.observation_space))
        model: Any = find_algorithm(algo)(policy, envs, seed=config.seed, device="cpu", **_translated(arguments))
    except Exception as error:  # constructors of anybody's
        envs.close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"[{algo}] {settings}: {type(error).__name__}: {error}") from error
    learn: Callable[[int, Any], Any] = lambda steps, callback: model.learn(steps, callback, log_interval=None)  # noqa: E731
    if hasattr(model.policy, "lstm_actor"):
        raise ConfigError(f"[{algo}] has a recurrent policy, whose state an evaluation here would lose")
    if algo == "ars":
        described += f"; candidates on {n_cores} processes (AsyncEval)"
        learn = _ars(model, factory, n_cores)
    return Learner(model, described, learn, {**_arguments(algo), **settings})


def _vector(factory: EnvFactory, n_envs: int, n_cores: int) -> tuple[VecEnv, str]:
    if n_envs > 1 and factory.describe_vector() == "MujocoVectorEnv":
        envs = Sb3VecEnv(factory.vector(n_envs, AutoresetMode.SAME_STEP, n_cores))
        return VecMonitor(envs), f"{n_envs} in MujocoVectorEnv on {n_cores} threads"
    return VecMonitor(DummyVecEnv([factory] * n_envs)), f"{n_envs} in DummyVecEnv"


def _ars(model: Any, factory: EnvFactory, n_cores: int) -> Callable[[int, Any], Any]:
    from sb3_contrib.common.vec_env import AsyncEval

    normalizer = model.get_vec_normalize_env()
    if normalizer is not None and not normalizer.norm_obs:
        raise ConfigError("[ars] normalize must normalize observations, or be false")
    kwargs = None if normalizer is None else {name: getattr(normalizer, name) for name in ("clip_obs", "epsilon")}

    def env() -> VecEnv:
        torch.set_num_threads(1)  # one process per core already
        envs = DummyVecEnv([factory])
        return envs if kwargs is None else VecNormalize(envs, norm_reward=False, **kwargs)

    def learn(steps: int, callback: Any) -> None:
        evaluators = AsyncEval([env] * n_cores, model.policy, n_eval_episodes=model.n_eval_episodes)
        evaluators.seed(model.seed)
        try:
            model.learn(steps, callback, log_interval=None, async_eval=evaluators)
        finally:
            evaluators.close()

    return learn


def _arguments(algo: str) -> dict[str, Any]:
    """Return the constructor's arguments that a preset may set, with their defaults where TOML can hold them."""
    arguments: dict[str, Any] = {}
    for base in find_algorithm(algo).__mro__:
        parameters = inspect.signature(base.__init__).parameters
        for name, parameter in parameters.items():
            if name in _RUN_ARGUMENTS or name.startswith("_") or parameter.kind is parameter.VAR_KEYWORD:
                continue
            value = parameter.default
            arguments.setdefault(name, value if isinstance(value, bool | int | float | str) else None)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # what is left over goes nowhere
    return arguments


def _translated(arguments: dict[str, Any]) -> dict[str, Any]:
    """Turn the texts that TOML can hold into what SB3 takes: ``lin_X`` schedules, activations, (n, unit) pairs."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, str) and value.startswith("lin_"):
            try:
                value = LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)
            except ValueError:
                raise ConfigError(f"{name} must be a number or 'lin_<number>', got {value!r}") from None
        elif name == "policy_kwargs" and isinstance(value, dict) and "activation_fn" in value:
            value = {**value, "activation_fn": find_activation(value["activation_fn"])}
        elif name == "train_freq" and isinstance(value, list):
            value = tuple(value)
        result[name] = value
    return result
