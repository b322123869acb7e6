"""Statistics of a comparison, after Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (NeurIPS 2021, arXiv 2108.13264), whose reference implementation is ``rliable``.

Shapes: R runs (seeds), T tasks, P points of a curve. A score is one run's mean return over its evaluation episodes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eggroll_rl.errors import ConfigError

# Below this many runs nothing is trimmed on one side or the bootstrap has few distinct samples.
FEW_RUNS = 5
_REPETITIONS = 2000


def iqm(scores: Any, axis: int | None = None) -> Any:
    """Return the interquartile mean: the mean of what is left without the lowest and the highest quarter.

    As ``scipy.stats.trim_mean(scores, 0.25)``, a quarter is rounded down to whole runs: with three runs it is
    their mean.
    """
    try:
        from scipy.stats import trim_mean
    except ImportError as error:
        raise ConfigError("a comparison's statistics need scipy: pip install 'eggroll-rl[compare]'") from error
    return trim_mean(np.asarray(scores, dtype=np.float64), 0.25, axis=axis)


def resample(rng: np.random.Generator, n_runs: int, n_tasks: int = 1, repetitions: int = _REPETITIONS) -> np.ndarray:
    """Return indices of runs (repetitions, R, T), drawn with replacement for each task by itself (the strata)."""
    return rng.integers(n_runs, size=(repetitions, n_runs, n_tasks))


def iqm_interval(scores_RT: Any, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the interquartile mean over runs and tasks by stratified bootstrap."""
    scores_RT = np.asarray(scores_RT, dtype=np.float64)
    index_BRT = resample(np.random.default_rng(seed), *scores_RT.shape)
    drawn_BRT = np.take_along_axis(scores_RT[None], index_BRT, axis=1)
    return _percentiles(iqm(drawn_BRT.reshape(len(drawn_BRT), -1), axis=1), confidence)


def curve_interval(scores_RP: Any, confidence: float = 0.95, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval (P,), (P,) of the interquartile mean at each point of a curve; whole runs are drawn."""
    scores_RP = np.asarray(scores_RP, dtype=np.float64)
    index_BR = resample(np.random.default_rng(seed), len(scores_RP))[:, :, 0]
    low, high = np.percentile(iqm(scores_RP[index_BR], axis=1), _bounds(confidence), axis=0)
    return low, high


def probability_of_improvement(x_T: Sequence[Any], y_T: Sequence[Any]) -> float:
    """Return the probability that a run of X scores higher than one of Y, ties counted half, averaged over tasks.

    Within a task it is the Mann-Whitney statistic divided by the number of pairs.

    :param x_T: scores of X's runs (R,), for each task; R may differ between tasks, and from Y's
    """
    chances = []
    for x_R, y_R in zip(x_T, y_T, strict=True):
        difference = np.asarray(x_R, dtype=np.float64)[:, None] - np.asarray(y_R, dtype=np.float64)[None]
        chances.append(((difference > 0) + 0.5 * (difference == 0)).mean())
    return float(np.mean(chances))


def improvement_interval(
    x_T: Sequence[Any], y_T: Sequence[Any], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of :func:`probability_of_improvement`, both sides' runs drawn for each task."""
    rng = np.random.default_rng(seed)
    drawn = []
    for scores_T in (x_T, y_T):
        each = [np.asarray(scores_R, dtype=np.float64) for scores_R in scores_T]
        drawn.append([scores_R[resample(rng, len(scores_R))[:, :, 0]] for scores_R in each])
    chances = []
    for repetition in range(_REPETITIONS):
        x, y = ([scores_BR[repetition] for scores_BR in side] for side in drawn)
        chances.append(probability_of_improvement(x, y))
    return _percentiles(chances, confidence)


def first_reached(xs: Sequence[float], returns: Sequence[float], threshold: float) -> float | None:
    """Return the first x (seconds or env steps) whose evaluation is at least the threshold, or None.

    Between evaluations nothing is known: it is when the first policy that was seen above was complete, never earlier.
    """
    return next((x for x, value in zip(xs, returns, strict=True) if value >= threshold), None)


def median_reached(values: Sequence[float | None]) -> float | None:
    """Return the median over all runs of the time to a threshold, or None where it lies with the unsuccessful."""
    median = float(np.median([np.inf if value is None else value for value in values]))
    return median if np.isfinite(median) else None


def on_grid(xs: Sequence[float], returns: Sequence[float], grid_P: np.ndarray) -> np.ndarray:
    """Return a run's curve (P,) at common points: on straight lines between evaluations, held before and after.

    (Holding every value to the next evaluation would make cliffs in the mean, for runs pass a point of the budget some
    tenths of a second apart.)
    """
    return np.interp(grid_P, xs, returns)


def in_words(n_runs: int) -> str:
    """Say what the number of runs is good for."""
    if n_runs >= FEW_RUNS:
        return f"{n_runs} seeds"
    which = "the interquartile mean is their mean, " if n_runs < 4 else ""
    return f"{n_runs} {'seed' if n_runs == 1 else 'seeds'}, which is few: {which}and the intervals are rough"


def _bounds(confidence: float) -> list[float]:
    return [50 * (1 - confidence), 50 * (1 + confidence)]


def _percentiles(values: Any, confidence: float) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(values), _bounds(confidence))
    return float(low), float(high)
