"""Run folders, in ``agents/`` by default: what a training run leaves behind.

    config.toml             the resolved settings, written before training starts; a preset like any other
    policy.safetensors      final mean policy with its normalizer; loads without the rest
    best.safetensors        the policy with the best evaluation
    training.safetensors    everything that a resume needs
    progress.csv            one row per generation
    evaluations.npz         SB3's keys: timesteps, results, ep_lengths
    results.json            what came out, with seeds, versions and wall-clock

Tensors and JSON: reading them executes nothing and imports nothing. Every file is written whole or not at all,
but for the curve in ``progress.csv``, which grows by a line per generation.
"""

import csv
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from torch import Tensor

from eggroll_rl.errors import EggrollError, RunFolderError
from eggroll_rl.policies import MlpPolicy, check_extractor_name
from eggroll_rl.recurrent import POLICIES

RUN_FILES = {
    "config.toml", "policy.safetensors", "best.safetensors", "training.safetensors", "progress.csv",
    "evaluations.npz", "results.json",
}  # fmt: skip
_FORMAT = "eggroll-rl"
_VERSION = 1


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` if it is not there, and keep other processes out of it as long as this one lives.

    Windows, and file systems that know no locks, keep nobody out.

    :raises RunFolderError: another process is in it, or it cannot be made
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot write {folder}: {error.strerror}") from error
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(f"{folder} is in use by another process: wait for it, or choose another") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and onto the disk before it takes the old one's place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunFolderError(f"cannot write {path}: {error.strerror}") from error
        raise
    if os.name == "posix":  # Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def save_tensors(path: Path, kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON description as one safetensors file."""
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "kind": kind,
        "about": json.dumps(about, allow_nan=False),
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, safetensors.torch.save(contiguous, metadata))


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote.

    :raises RunFolderError: the file is missing, damaged, or something else
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT or metadata.get("kind") != kind:
                raise RunFolderError(f"{path} is a safetensors file, but not a {kind} of eggroll-rl")
            if metadata.get("version") != str(_VERSION):
                raise RunFolderError(
                    f"{path} has format version {metadata.get('version')}; this eggroll-rl reads version {_VERSION}"
                )
            about = json.loads(metadata["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged or not a safetensors file ({_one_line(error)})") from error


def save_policy(path: Path, policy: MlpPolicy, about: dict[str, Any]) -> None:
    """Write a policy so that it can be built again without an env and without running code."""
    kwargs = policy._get_constructor_parameters()
    spaces_ = {name: space_to_json(kwargs.pop(name)) for name in ("observation_space", "action_space")}
    kwargs["activation_fn"] = kwargs["activation_fn"].__name__
    check_extractor_name(kwargs.get("features_extractor_class"))
    description = {"policy": type(policy).__name__, "policy_kwargs": kwargs, **spaces_, **about}
    save_tensors(path, "policy", policy.state_dict(), description)


def load_policy(path: Path) -> MlpPolicy:
    """Read a policy.

    :raises RunFolderError: the file is missing, damaged, or not a policy of ours
    """
    tensors, about = load_tensors(path, "policy")
    try:
        policy_class = POLICIES[about["policy"]]
        observation_space, action_space = (space_from_json(about[n]) for n in ("observation_space", "action_space"))
        # The weights drawn here are overwritten: the global generator is none the wiser.
        with torch.random.fork_rng(devices=[]):
            policy = policy_class(observation_space, action_space, **about["policy_kwargs"])
        policy.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, EggrollError) as error:
        raise RunFolderError(f"{path} does not hold a policy that can be built ({_one_line(error)})") from error
    policy.set_training_mode(False)
    return policy


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a space that policies support."""
    if isinstance(space, spaces.Box):
        bounds = {name: _bound_to_json(getattr(space, name)) for name in ("low", "high")}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        start, dtype = space.start.tolist(), str(space.dtype)
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": start, "dtype": dtype}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: space_to_json(part) for key, part in space.spaces.items()}}
    raise TypeError(f"cannot describe {space}")


def space_from_json(about: dict[str, Any]) -> spaces.Space:
    """Build a space from :func:`space_to_json`."""
    kind = about["type"]
    if kind == "Box":
        dtype, shape = np.dtype(about["dtype"]), tuple(about["shape"])
        low, high = (
            np.broadcast_to(np.array(about[n], dtype=np.float64), shape).astype(dtype) for n in ("low", "high")
        )
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(about["n"], start=about["start"])
    if kind == "MultiDiscrete":
        dtype = np.dtype(about.get("dtype", "int64"))
        return spaces.MultiDiscrete(about["nvec"], dtype=dtype.type, start=about.get("start"))
    if kind == "MultiBinary":
        return spaces.MultiBinary(about["n"])
    if kind == "Dict":
        # Pairs: of a mapping Gymnasium sorts the keys, and their order is that of the network's inputs.
        return spaces.Dict([(key, space_from_json(part)) for key, part in about["spaces"].items()])
    raise ValueError(f"unknown space {kind!r}")


def _bound_to_json(bound: np.ndarray) -> Any:
    # One number where all are equal; infinity as text, for JSON has none.
    values = [x if math.isfinite(x) else str(x) for x in bound.astype(np.float64).ravel().tolist()]
    if len(set(values)) == 1:
        return values[0]
    return np.array(values, dtype=object).reshape(bound.shape).tolist()


# ---------------------------------------------------------------------------------------------------------
# Curves and results


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys; without any, remove the file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Add a row, and the header if the file is new; columns that its header does not have are left out."""
    try:
        with open(path, "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            file.seek(0, os.SEEK_END)
            writer = csv.DictWriter(file, header or list(row), extrasaction="ignore", lineterminator="\n")
            if header is None:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror}") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read rows, or none if there is no file; a last line cut off in the middle is left out."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        return [row for row in reader if None not in row and None not in row.values()]


def write_evaluations(path: Path, evaluations: list[dict[str, Any]]) -> None:
    """Write SB3's ``evaluations.npz``, with the training seconds beside it."""
    content = io.BytesIO()
    np.savez(
        content,
        timesteps=np.array([e["timesteps"] for e in evaluations]),
        results=np.array([e["returns"] for e in evaluations]),
        ep_lengths=np.array([e["lengths"] for e in evaluations]),
        seconds=np.array([e["seconds"] for e in evaluations]),
    )
    write_atomic(path, content.getvalue())


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Read :func:`write_evaluations` back, or nothing if there is no file."""
    if not path.exists():
        return []
    try:
        # NumPy leaves a file open that it opened and could not read.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            columns = [file[name].tolist() for name in ("timesteps", "results", "ep_lengths", "seconds")]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunFolderError(f"{path} is damaged ({_one_line(error)}); without it the run can be resumed") from error
    return [
        dict(zip(("timesteps", "returns", "lengths", "seconds"), row, strict=True))
        for row in zip(*columns, strict=True)
    ]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def list_runs(root: Path = Path("agents")) -> list[tuple[Path, dict[str, Any]]]:
    """Return the finished runs below ``root``, those of comparisons too, with their results."""
    runs = []
    for path in sorted([*root.glob("*/*/results.json"), *root.glob("*/compare/*/results.json")]):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not ours to judge in a listing
        if isinstance(results, dict):
            runs.append((path.parent, results))
    return runs


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
