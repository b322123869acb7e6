"""Actions as an env's space has them: its dtype, within its bounds."""

from collections.abc import Callable

import numpy as np
from gymnasium import spaces

Cast = Callable[[np.ndarray], np.ndarray]


def make_cast(space: spaces.Space, low: np.ndarray, high: np.ndarray) -> Cast | None:
    """Return a function that brings actions (..., *space.shape) into a space; None where they are in it already.

    Whole numbers are rounded. A float32 may lie beyond a bound by its last bit, or by a bound that float16 rounds.

    :param low: the least action that is computed, of a Box
    :param high: the largest
    """
    dtype = np.dtype(space.dtype)
    if not isinstance(space, spaces.Box):
        # argmax gives int64.
        return None if dtype == (np.int8 if isinstance(space, spaces.MultiBinary) else np.int64) else _astype(dtype)
    if dtype == np.float32 and np.all(low >= space.low) and np.all(high <= space.high):
        return None
    if np.issubdtype(dtype, np.floating):
        return lambda actions: np.clip(actions.astype(dtype), space.low, space.high)
    if dtype == np.bool_:
        return lambda actions: (actions > 0.5) & space.high | space.low
    # Beyond 2**53 the nearest float64 to a bound may lie outside of it.
    least, most = space.low.astype(np.float64), space.high.astype(np.float64)
    least = np.where(np.abs(least) < 2.0**53, least, np.nextafter(least, 0.0))
    most = np.where(np.abs(most) < 2.0**53, most, np.nextafter(most, 0.0))
    return lambda actions: np.clip(np.rint(actions.astype(np.float64)), least, most).astype(dtype)


def _astype(dtype: np.dtype) -> Cast:
    return lambda actions: actions.astype(dtype)
