"""Spaces as JSON, and back: of a stranger's file too, so that sizes are looked at before anything is allocated."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces

MOST_ENTRIES = 2**22  # of a space: more than any picture that a policy here takes, and 100 MB


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a space that policies support."""
    if isinstance(space, spaces.Box):
        bounds = {name: _bound_to_json(getattr(space, name)) for name in ("low", "high")}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        start, dtype = space.start.tolist(), str(space.dtype)
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": start, "dtype": dtype}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: space_to_json(part) for key, part in space.spaces.items()}}
    raise TypeError(f"cannot describe {space}")


def space_from_json(about: dict[str, Any]) -> spaces.Space:
    """Build a space from :func:`space_to_json`.

    :raises ValueError: it is larger than any that policies take, or not a space
    :raises KeyError: something is missing
    """
    _check_size(count_entries(about))
    kind = about["type"]
    if kind == "Box":
        dtype, shape = _number_type(about["dtype"]), tuple(about["shape"])
        low, high = (np.broadcast_to(_bound(about[n], dtype), shape) for n in ("low", "high"))
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        dtype = _number_type(about.get("dtype", "int64"))
        named: dict[str, Any] = {} if dtype == np.int64 else {"dtype": dtype.type}  # older Gymnasiums know no other
        return spaces.Discrete(about["n"], start=about["start"], **named)
    if kind == "MultiDiscrete":
        dtype = _number_type(about.get("dtype", "int64"))
        return spaces.MultiDiscrete(about["nvec"], dtype=dtype.type, start=about.get("start"))
    if kind == "MultiBinary":
        return spaces.MultiBinary(about["n"])
    # Pairs: of a mapping Gymnasium sorts the keys, and their order is that of the network's inputs.
    return spaces.Dict([(key, space_from_json(part)) for key, part in about["spaces"].items()])


def count_entries(about: Any) -> int:
    """Return how many numbers a network reads or writes for a described space: one-hot for discrete ones."""
    if not isinstance(about, dict):
        raise ValueError("a space is a table")
    kind = about["type"]
    if kind == "Box":
        return math.prod(_sizes(about["shape"]))
    if kind == "Discrete":
        return sum(_sizes([about["n"]]))
    if kind == "MultiDiscrete":
        return sum(_sizes(about["nvec"]))
    if kind == "MultiBinary":
        return math.prod(_sizes(about["n"] if isinstance(about["n"], list) else [about["n"]]))
    if kind == "Dict":
        return sum(count_entries(part) for part in about["spaces"].values())
    raise ValueError(f"unknown space {str(kind)[:80]!r}")


def _sizes(sizes: Any) -> list[int]:
    if not isinstance(sizes, list) or len(sizes) > MOST_ENTRIES:
        raise ValueError("the sizes of a space are a list")
    found: list[int] = []
    for size in sizes:
        if isinstance(size, list):
            found += _sizes(size)
        elif isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MOST_ENTRIES:
            found.append(size)
        else:
            raise ValueError(f"{str(size)[:80]!r} is no size of a space from 1 to {MOST_ENTRIES:,}")
    return found


def _check_size(n_entries: int) -> None:
    if n_entries > MOST_ENTRIES:
        raise ValueError(f"a space of {n_entries:,} entries; at most {MOST_ENTRIES:,} are read")


def _bound(value: Any, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        with np.errstate(over="raise"):
            return np.array(value, dtype=np.float64).astype(dtype)
    # Through no float64, which has no room for the limits of int64; files of version 1 have them as floats.
    least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    values = np.array(value, dtype=object)
    whole = [min(max(int(x), least), most) for x in values.ravel().tolist()]
    return np.array(whole, dtype=dtype).reshape(values.shape)


def _number_type(name: Any) -> np.dtype:
    # Of text alone, and of no text or object type: "S1000000000" is a gigabyte per entry.
    dtype = np.dtype(name) if isinstance(name, str) and len(name) < 20 else None
    if dtype is None or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"{str(name)[:80]!r} is no type of numbers")
    return dtype


def _bound_to_json(bound: np.ndarray) -> Any:
    # One number where all are equal; infinity as text, for JSON has none.
    if bound.dtype.kind == "f":
        bound = bound.astype(np.float64)
    values = [x if isinstance(x, int) or math.isfinite(x) else str(x) for x in bound.ravel().tolist()]
    if len(set(values)) == 1:
        return values[0]
    return np.array(values, dtype=object).reshape(bound.shape).tolist()
