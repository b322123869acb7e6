"""Checks of settings. Each refuses a value with a ``ConfigError`` that names the field, the value and what is right."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from eggroll_rl.errors import ConfigError

MOST = 2**63 - 1  # what arrays, torch and files hold


def shown(value: object) -> str:
    """Return a value for a message: of any object, in at most 200 characters."""
    try:
        text = repr(value)
    except Exception:  # of anybody's; Python's own for a whole number of over 4300 digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def nearest(name: object, known: Iterable[str]) -> str:
    """Return what to say after a name that is not known: the nearest one, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(names)}"


def is_whole(value: object) -> bool:
    """Say whether a value is a whole number, of Python or NumPy; True and False are not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_finite(value: object) -> float | None:
    """Return a number of Python or NumPy as a float; None if it is not finite or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number above 1.8e308
        return None
    return number if math.isfinite(number) else None


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number."""
    if as_finite(value) is None:
        raise ConfigError(f"{name} must be a finite number, got {shown(value)}")


def check_positive(name: str, value: object) -> None:
    """Refuse a number that is not finite and above zero."""
    number = as_finite(value)
    if number is None or number <= 0:
        raise ConfigError(f"{name} must be a finite number above 0, got {shown(value)}")


def check_not_negative(name: str, value: object) -> None:
    """Refuse a number that is not finite, or below zero."""
    number = as_finite(value)
    if number is None or number < 0:
        raise ConfigError(f"{name} must be a finite number of 0 or more, got {shown(value)}")


def check_fraction(name: str, value: object) -> None:
    """Refuse what is not a number from 0 to 1."""
    number = as_finite(value)
    if number is None or not 0 <= number <= 1:
        raise ConfigError(f"{name} must be a number from 0 to 1, got {shown(value)}")


def check_whole(name: str, value: object, least: int, most: int | None = MOST) -> None:
    """Refuse what is not a whole number, or below ``least``, or above ``most``."""
    if not is_whole(value) or value < least:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a whole number, at least {least}, got {shown(value)}")
    if most is not None and value > most:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a whole number, at most {most}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {shown(value)}")


def check_population(population_size: object, rank: object, slice_size: object) -> None:
    """Refuse sizes that cannot be."""
    for name, value in (("population_size", population_size), ("slice_size", slice_size)):
        if not is_whole(value) or not 2 <= value <= MOST or value % 2:  # type: ignore[operator]
            raise ConfigError(
                f"{name} must be an even number of members, at least 2 (antithetic pairs), got {shown(value)}"
            )
    check_whole("rank", rank, 1)


def check_arguments_table(name: str, value: object) -> None:
    """Refuse what is neither None nor a dict of keyword arguments."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a dict of arguments, got {shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{name} must have names as keys, got {shown(key)}")


def check_names(table: Any, known: Iterable[str], where: str) -> None:
    """Refuse a name that is not known, with the nearest one.

    :raises ConfigError: a name is unknown, or ``table`` is not a table
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table of settings, got {shown(table)}")
    names = list(known)
    for name in table:
        if name not in names:
            raise ConfigError(f"{where}: unknown setting {shown(name)}{nearest(name, names)}")
