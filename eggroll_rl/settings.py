"""Settings given as text or numbers: schedules and optimizers."""

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from eggroll_rl.errors import ConfigError
from eggroll_rl.es import check_positive


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
