"""EGGROLL's settings: schedules and optimizers given as text, and what cannot be."""

import math
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from eggroll_rl.checks import (
    check_arguments_table,
    check_flag,
    check_fraction,
    check_number,
    check_population,
    check_positive,
    check_whole,
    nearest,
    shown,
)
from eggroll_rl.critic import check_critic
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import check_optimizer
from eggroll_rl.fitness import make_fitness_shaping
from eggroll_rl.policies import MlpPolicy, check_policy_kwargs
from eggroll_rl.recurrent import POLICIES

DEFAULT_SIZES = {"episode": (64, 32), "segment": (16, 16)}  # population_size and slice_size by kind of fitness


def make_schedule(name: str, value: float | str | Schedule) -> Schedule:
    """Return an SB3 schedule for a number, ``"lin_<number>"`` or a function of the progress remaining."""
    if isinstance(value, str):
        kind, _, number = value.partition("_")
        try:
            start = float(number if kind == "lin" else value)
        except ValueError:
            raise ConfigError(f"{name} must be a number above 0 or 'lin_<number>', got {shown(value)}") from None
        check_positive(name, start)
        return LinearSchedule(start, 0.0, 1.0) if kind == "lin" else FloatSchedule(start)
    if callable(value):
        return FloatSchedule(value)
    check_positive(name, value)
    return FloatSchedule(float(value))


def find_optimizer(optimizer: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Look up a ``torch.optim`` class by name, in any case; a class passes through."""
    known = {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    if isinstance(optimizer, str):
        for name, value in known.items():
            if name.lower() == optimizer.lower():
                return value
    elif isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        return optimizer
    raise ConfigError(f"optimizer must be one of {', '.join(known)}, or a class of torch.optim, got {shown(optimizer)}")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of :class:`~eggroll_rl.eggroll.EGGROLL` that cannot be. No env, process or network is made.

    :param given: all arguments of the constructor by name, but for ``env``
    :raises ConfigError: a setting is wrong
    """
    settings = SimpleNamespace(**given)
    _check_fitness(settings.fitness)
    for name in ("sigma", "learning_rate", "target_kl", "clip_range"):
        make_schedule(name, getattr(settings, name))
    check_given(settings.fitness, {name: getattr(settings, name) for name in ("sigma", "learning_rate")})
    fill_in_sizes(settings)
    settings.noise_seed = settings.seed
    settings.optimizer = find_optimizer(settings.optimizer)
    check_settings(settings)
    check_policy(settings.policy, settings.policy_kwargs)
    check_arguments_table("env_kwargs", settings.env_kwargs)
    _check_of_sb3(settings)


def check_policy(policy: object, policy_kwargs: dict[str, Any] | None) -> None:
    """Refuse a policy by an unknown name, or no policy of ours, or arguments that it does not take."""
    check_arguments_table("policy_kwargs", policy_kwargs)
    if isinstance(policy, str):
        if policy not in POLICIES:
            known = ", ".join(POLICIES)
            raise ConfigError(
                f"policy must be one of {known} or a class, got {shown(policy)}{nearest(policy, POLICIES)}"
            )
        policy = POLICIES[policy]
    if not (isinstance(policy, type) and issubclass(policy, MlpPolicy)):
        what = f"one of {', '.join(POLICIES)} or a class, a subclass of eggroll_rl.policies.MlpPolicy"
        raise ConfigError(f"policy must be {what}, got {shown(policy)}")
    check_policy_kwargs(policy, policy_kwargs or {})


def fill_in_sizes(model: Any) -> None:
    """Give sizes that were left open what suits the kind of fitness."""
    population_size, slice_size = DEFAULT_SIZES[model.fitness]
    if model.population_size is None:
        model.population_size = population_size
    if model.slice_size is None:
        model.slice_size = slice_size


def check_settings(model: Any) -> None:
    """Refuse settings of an ``EGGROLL`` that cannot be, naming the field, its value and what would be right."""
    check_population(model.population_size, model.rank, model.slice_size)
    check_whole("n_eval_episodes", model.n_eval_episodes, 1)
    if model.n_workers is not None:
        check_whole("n_workers", model.n_workers, 0)
    if model.max_episode_steps is not None:
        check_whole("max_episode_steps", model.max_episode_steps, 1)
    if model.max_grad_norm is not None:
        check_positive("max_grad_norm", model.max_grad_norm)
    if model.noise_seed is not None:
        check_whole("seed", model.noise_seed, 0, most=None)
    check_seed(model.seed)
    check_number("alive_bonus_offset", model.alive_bonus_offset)
    check_flag("deterministic", model.deterministic)
    if not isinstance(model.on_bad_member, str) or model.on_bad_member not in ("raise", "worst"):
        raise ConfigError(f"on_bad_member must be 'raise' or 'worst', got {shown(model.on_bad_member)}")
    check_fraction("max_bad_fraction", model.max_bad_fraction)
    check_step_timeout(model.step_timeout)
    check_evaluator(model.evaluator)
    make_fitness_shaping(model.fitness_shaping, model.best_fraction)
    check_optimizer(model.optimizer, model.optimizer_kwargs, model.weight_decay)
    _check_segments(model)


def check_seed(seed: int | None) -> None:
    """Refuse a seed of a run that SB3 could not take."""
    if seed is not None:
        check_whole("seed", seed, 0, most=None)
        if seed >= 2**32:
            raise ConfigError(f"seed must be below 2**32, as SB3 seeds NumPy with it, got {shown(seed)}")


def _check_of_sb3(settings: Any) -> None:
    check_whole("stats_window_size", settings.stats_window_size, 1)
    check_whole("verbose", settings.verbose, 0)
    log = settings.tensorboard_log
    if log is not None and not (isinstance(log, str | os.PathLike) and str(log)):
        raise ConfigError(f"tensorboard_log must be a folder or None, got {shown(log)}")
    device = settings.device
    if isinstance(device, str | torch.device) and str(device) != "meta":  # which holds no numbers
        try:
            torch.device("cpu" if device == "auto" else device)
            return
        except RuntimeError:
            pass
    raise ConfigError(f"device must be 'cpu', 'cuda', 'cuda:<number>', 'auto' or torch's like, got {shown(device)}")


def check_step_timeout(value: object) -> None:
    """Refuse what is not a number of seconds above 0; infinity is one."""
    if not (isinstance(value, float) and value == math.inf):
        check_positive("step_timeout", value)


def check_evaluator(value: object) -> None:
    """Refuse what is no evaluator for a cluster."""
    if value is not None and not all(callable(getattr(value, name, None)) for name in ("start", "contract")):
        raise ConfigError(f"evaluator must be a RayEvaluator or the like, or None, got {shown(value)}")


def check_given(fitness: str, given: dict[str, Any]) -> None:
    """Refuse ``sigma`` and ``learning_rate`` of the user's own where they would be ignored."""
    for name, default in {"sigma": 0.05, "learning_rate": 0.015}.items():
        if fitness == "segment" and given.get(name, default) != default:
            raise ConfigError(
                f"{name} has no effect with fitness='segment', whose noise is exploration_std and whose steps are as "
                f"long as target_kl says, got {shown(given[name])}"
            )


def _check_fitness(fitness: object) -> None:
    if not isinstance(fitness, str) or fitness not in DEFAULT_SIZES:
        raise ConfigError(f"fitness must be 'episode' or 'segment', got {shown(fitness)}")


def _check_segments(model: Any) -> None:
    _check_fitness(model.fitness)
    for name in ("n_segments", "segment_steps", "n_epochs", "batch_size"):
        check_whole(name, getattr(model, name), 1)
    check_whole("sample_reuse", model.sample_reuse, 0)
    for name in ("exploration_std", "damping"):
        check_positive(name, getattr(model, name))
    for name in ("gamma", "gae_lambda"):
        check_fraction(name, getattr(model, name))
    check_critic({} if model.critic_kwargs is None else model.critic_kwargs)
    if model.fitness == "episode":
        if model.critic_kwargs:
            raise ConfigError(f"critic_kwargs needs fitness='segment', got {shown(model.critic_kwargs)} with 'episode'")
        return
    if model.n_eval_episodes != 1:
        raise ConfigError(f"n_eval_episodes must be 1 with fitness='segment', got {model.n_eval_episodes}")
    of_episodes: dict[str, Any] = {
        "rank": 1,
        "fitness_shaping": "centered_rank",
        "best_fraction": None,
        "optimizer": torch.optim.Adam,
    }
    of_episodes |= {"deterministic": True, "optimizer_kwargs": None, "weight_decay": 0.0, "max_grad_norm": None}
    for name, default in of_episodes.items():
        value = getattr(model, name)
        if value != default:
            raise ConfigError(
                f"{name} has no effect with fitness='segment', whose members have rank 1 and whose steps follow the "
                f"natural gradient, got {shown(value)}"
            )
