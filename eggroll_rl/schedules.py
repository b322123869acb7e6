"""Schedules of ``sigma`` and ``learning_rate`` by the generation, for :class:`eggroll_rl.es.EvolutionStrategy`.

A constant is just a number. Any function of the generation, from 0, will do.
"""

import math
from collections.abc import Callable

from eggroll_rl.errors import ConfigError

GenerationSchedule = Callable[[int], float]


def exponential(start: float, decay: float, least: float = 0.0) -> GenerationSchedule:
    """Return start · decay^generation, but never below ``least``: the paper's ``lr_decay`` and ``sigma_decay``."""
    _check(start=start, decay=decay)
    return lambda generation: max(start * decay**generation, least)


def linear(start: float, end: float, generations: int) -> GenerationSchedule:
    """Return what goes evenly from ``start`` to ``end`` in that many generations, and stays there."""
    _check(start=start, end=end, generations=generations)
    return lambda generation: start + (end - start) * min(generation / generations, 1.0)


def cosine(start: float, end: float, generations: int) -> GenerationSchedule:
    """Return what goes from ``start`` to ``end`` on half a wave, slow at both ends, and stays there."""
    _check(start=start, end=end, generations=generations)

    def at(generation: int) -> float:
        share = min(generation / generations, 1.0)
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    return at


def _check(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} of the schedule must be a finite number above 0, got {value!r}")
