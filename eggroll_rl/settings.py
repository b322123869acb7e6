"""EGGROLL's settings: schedules and optimizers given as text, and what cannot be."""

import math
from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from eggroll_rl.critic import check_critic
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import check_fraction, check_population, check_positive, check_whole
from eggroll_rl.fitness import make_fitness_shaping


def make_schedule(name: str, value: float | str | Schedule) -> Schedule:
    """Return an SB3 schedule for a number, ``"lin_<number>"`` or a function of the progress remaining."""
    if isinstance(value, str):
        kind, _, number = value.partition("_")
        try:
            start = float(number if kind == "lin" else value)
        except ValueError:
            raise ConfigError(f"{name} must be a number above 0 or 'lin_<number>', got {value!r}") from None
        check_positive(name, start)
        return LinearSchedule(start, 0.0, 1.0) if kind == "lin" else FloatSchedule(start)
    if not callable(value):
        check_positive(name, value)
    return FloatSchedule(value)


def find_optimizer(optimizer: str | type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Look up a ``torch.optim`` class by name, in any case."""
    if not isinstance(optimizer, str):
        return optimizer
    known = {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    }
    for name, value in known.items():
        if name.lower() == optimizer.lower():
            return value
    raise ConfigError(f"optimizer must be one of {', '.join(known)}, got {optimizer!r}")


def check_settings(model: Any) -> None:
    """Refuse settings of an ``EGGROLL`` that cannot be, naming the field, its value and what would be right."""
    check_population(model.population_size, model.rank, model.slice_size)
    _check_segments(model)
    check_whole("n_eval_episodes", model.n_eval_episodes, 1)
    if model.n_workers is not None:
        check_whole("n_workers", model.n_workers, 0)
    if model.max_episode_steps is not None:
        check_whole("max_episode_steps", model.max_episode_steps, 1)
    if model.max_grad_norm is not None:
        check_positive("max_grad_norm", model.max_grad_norm)
    if model.noise_seed is not None:
        check_whole("seed", model.noise_seed, 0)
    if model.seed is not None and model.seed >= 2**32:
        raise ConfigError(f"seed must be below 2**32, as SB3 seeds NumPy with it, got {model.seed}")
    number = isinstance(model.alive_bonus_offset, int | float) and not isinstance(model.alive_bonus_offset, bool)
    if not number or not math.isfinite(model.alive_bonus_offset):
        raise ConfigError(f"alive_bonus_offset must be a finite number, got {model.alive_bonus_offset!r}")
    if not isinstance(model.deterministic, bool):
        raise ConfigError(f"deterministic must be true or false, got {model.deterministic!r}")
    if model.on_bad_member not in ("raise", "worst"):
        raise ConfigError(f"on_bad_member must be 'raise' or 'worst', got {model.on_bad_member!r}")
    check_fraction("max_bad_fraction", model.max_bad_fraction)
    check_step_timeout(model.step_timeout)
    make_fitness_shaping(model.fitness_shaping, model.best_fraction)


def check_step_timeout(value: object) -> None:
    """Refuse what is not a number of seconds above 0; infinity is one."""
    if value != math.inf:
        check_positive("step_timeout", value)


def check_given(fitness: str, given: dict[str, Any]) -> None:
    """Refuse ``sigma`` and ``learning_rate`` of the user's own where they would be ignored."""
    for name, default in {"sigma": 0.05, "learning_rate": 0.015}.items():
        if fitness == "segment" and given.get(name, default) != default:
            raise ConfigError(
                f"{name} has no effect with fitness='segment', whose noise is exploration_std and whose steps are as "
                f"long as target_kl says, got {given[name]!r}"
            )


def _check_segments(model: Any) -> None:
    if model.fitness not in ("episode", "segment"):
        raise ConfigError(f"fitness must be 'episode' or 'segment', got {model.fitness!r}")
    for name in ("n_segments", "segment_steps", "n_epochs", "batch_size"):
        check_whole(name, getattr(model, name), 1)
    check_whole("sample_reuse", model.sample_reuse, 0)
    for name in ("exploration_std", "damping"):
        check_positive(name, getattr(model, name))
    for name in ("gamma", "gae_lambda"):
        check_fraction(name, getattr(model, name))
    check_critic(model.critic_kwargs or {})
    if model.fitness == "episode":
        if model.critic_kwargs:
            raise ConfigError(f"critic_kwargs needs fitness='segment', got {model.critic_kwargs} with 'episode'")
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
                f"natural gradient, got {value!r}"
            )
