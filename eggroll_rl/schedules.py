"""Schedules of ``sigma`` and ``learning_rate`` by the generation, for :class:`eggroll_rl.es.EvolutionStrategy`.

A constant is just a number. Any function of the generation, from 0, will do.
"""

import math
from collections.abc import Callable

from eggroll_rl.checks import as_finite, shown
from eggroll_rl.errors import ConfigError

GenerationSchedule = Callable[[int], float]


def exponential(start: float, decay: float, least: float = 0.0) -> GenerationSchedule:
    """Return start · decay^generation, but never below ``least``: the paper's ``lr_decay`` and ``sigma_decay``."""
    _check(start=start, decay=decay)
    _check(0.0, least=least)
    return lambda generation: max(start * decay**generation, least)


def linear(start: float, end: float, generations: int) -> GenerationSchedule:
    """Return what goes evenly from ``start`` to ``end`` in that many generations, and stays there."""
    _check(start=start, generations=generations)
    _check(0.0, end=end)
    return lambda generation: start + (end - start) * min(generation / generations, 1.0)


def cosine(start: float, end: float, generations: int) -> GenerationSchedule:
    """Return what goes from ``start`` to ``end`` on half a wave, slow at both ends, and stays there."""
    _check(start=start, generations=generations)
    _check(0.0, end=end)

    def at(generation: int) -> float:
        share = min(generation / generations, 1.0)
        return end + (start - end) * (1 + math.cos(math.pi * share)) / 2

    return at


def _check(lowest: float = math.ulp(0.0), **values: float) -> None:
    for name, value in values.items():
        number = as_finite(value)
        if number is None or number < lowest:
            right = "above 0" if lowest else "of 0 or more"
            raise ConfigError(f"{name} of the schedule must be a finite number {right}, got {shown(value)}")
