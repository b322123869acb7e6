"""Run folders, in ``agents/`` by default: what a training run leaves behind.

    config.toml             the resolved settings, written before training starts; a preset like any other
    policy.safetensors      final mean policy with its normalizer; loads without the rest
    best.safetensors        the policy with the best evaluation
    checkpoints/            everything that a resume needs, as of the last generations; see eggroll_rl.checkpoints
    progress.csv            one row per generation
    evaluations.npz         SB3's keys: timesteps, results, ep_lengths
    results.json            what came out, with seeds, versions and wall-clock

Tensors and JSON: reading them executes nothing and imports nothing, and allocates no more than a few times what lies
on the disk. Every file is written whole or not at all, but for the curve in ``progress.csv``, which grows by a line
per generation.
"""

import csv
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eggroll_rl.errors import ConfigError, RunFolderError
from eggroll_rl.files import cannot_write, one_line, parse_json, read_bounded, write_atomic
from eggroll_rl.policies import MlpPolicy, check_extractor_name
from eggroll_rl.recurrent import POLICIES
from eggroll_rl.space_files import MOST_ENTRIES, count_entries, space_from_json, space_to_json
from eggroll_rl.tensor_files import load_tensors, n_entries, refuse_non_finite, save_tensors

# config.toml goes last where they are removed: it is what shows that this is a run folder.
RUN_FILES = (
    "policy.safetensors", "best.safetensors", "progress.csv", "evaluations.npz", "results.json", "config.toml",
)  # fmt: skip
_MOST_CSV = 2**28  # bytes
_MOST_JSON = 2**24
_MOST_EVALUATIONS = 2**26  # of the file, and of each array in it


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
    refuse_non_finite(tensors, path)
    try:
        policy = _build(tensors, about)
    except Exception as error:  # of whatever a stranger wrote there
        raise RunFolderError(f"{path} does not hold a policy that can be built ({one_line(error)})") from error
    policy.set_training_mode(False)
    return policy


def _build(tensors: dict[str, Tensor], about: dict[str, Any]) -> MlpPolicy:
    policy_class = POLICIES[about["policy"]]
    described = [about[name] for name in ("observation_space", "action_space")]
    if sum(map(count_entries, described)) > MOST_ENTRIES:
        raise ValueError(f"its spaces have more than {MOST_ENTRIES:,} entries")
    observation_space, action_space = map(space_from_json, described)
    # The weights drawn here are overwritten: the global generator is none the wiser.
    with torch.random.fork_rng(devices=[]), no_larger_than(tensors, sum(map(count_entries, described))):
        policy = policy_class(observation_space, action_space, **about["policy_kwargs"])
    for name, tensor in policy.state_dict().items():
        if name in tensors and tensors[name].dtype != tensor.dtype:
            raise ValueError(f"{name} is of {tensors[name].dtype}, not {tensor.dtype}")
    policy.load_state_dict(tensors)
    return policy


@contextmanager
def no_larger_than(tensors: dict[str, Tensor], n_others: int) -> Iterator[None]:
    """Let a policy be built only if it can be the one whose tensors these are, before it takes memory or time.

    :param n_others: entries of tensors that the policy has besides and a file does not
    :raises ConfigError: a network is larger
    """
    with _Budget(2 * n_entries(tensors) + 16 * n_others + 2**16, 8 * len(tensors) + 256):
        yield


class _Budget(TorchFunctionMode):
    """Counts what ``torch.empty`` and its like are asked for, as ``torch.device`` does to move it elsewhere."""

    _MAKERS = (torch.empty, torch.zeros, torch.ones, torch.full)

    def __init__(self, n_entries: int, n_tensors: int):
        super().__init__()
        self.n_entries, self.n_tensors = n_entries, n_tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._MAKERS:
            size = kwargs.get("size", args)
            if func is torch.full:
                size = kwargs.get("size", args[0] if args else ())
            elif len(args) == 1 and not isinstance(args[0], int):
                size = args[0]
            self.n_entries -= math.prod(size)
            self.n_tensors -= 1
            if min(self.n_entries, self.n_tensors) < 0:
                raise ConfigError("the settings describe a larger network than that whose tensors were saved")
        return func(*args, **kwargs)


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
        raise cannot_write(path, error) from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read rows, or none if there is no file; a last line cut off in the middle is left out.

    :raises RunFolderError: it cannot be read
    """
    if not path.exists():
        return []
    try:
        text = read_bounded(path, _MOST_CSV).decode()
        whole = text[: text.rfind("\n") + 1]  # a cut number would look like one
        rows = list(csv.DictReader(io.StringIO(whole, newline="")))
    except (OSError, ValueError, csv.Error) as error:
        raise RunFolderError(f"{path} cannot be read ({one_line(error)})") from error
    return [row for row in rows if None not in row and None not in row.values()]


def cut_csv(path: Path, column: str, last: int) -> None:
    """Keep the rows whose number in ``column`` is at most ``last``, and no line that was cut off in the middle.

    :raises RunFolderError: it cannot be read, or a row has no such number
    """
    if not path.exists():
        return
    kept = io.StringIO()  # and no list: a row is a line, and may be two characters long
    try:
        lines = io.StringIO(read_bounded(path, _MOST_CSV).decode())
        header = next(lines, "")
        place, width = header.rstrip("\n").split(",").index(column), header.count(",")
        kept.write(header)
        for line in lines:
            if line.endswith("\n") and line.count(",") == width and int(line.split(",")[place]) <= last:
                kept.write(line)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({one_line(error)})") from error
    write_atomic(path, kept.getvalue().encode())


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
    """Read :func:`write_evaluations` back, or nothing if there is no file.

    :raises RunFolderError: it is damaged or something else
    """
    if not path.exists():
        return []
    try:
        with zipfile.ZipFile(io.BytesIO(read_bounded(path, _MOST_EVALUATIONS))) as archive:
            names = ("timesteps", "results", "ep_lengths", "seconds")
            steps, results, lengths, seconds = (_array(archive, f"{name}.npy") for name in names)
        shapes = (steps.shape, seconds.shape, results.shape[:1], lengths.shape[:1])
        if steps.ndim != 1 or len(set(shapes)) > 1 or results.ndim != 2 or lengths.shape != results.shape:
            raise ValueError("its arrays do not belong together")
        columns = [column.tolist() for column in (steps, results, lengths, seconds)]
    except (
        OSError,
        KeyError,
        ValueError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise RunFolderError(f"{path} is damaged ({one_line(error)}); without it the run can be resumed") from error
    return [
        dict(zip(("timesteps", "returns", "lengths", "seconds"), row, strict=True))
        for row in zip(*columns, strict=True)
    ]


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Read an array of finite numbers, no larger than it may be, whatever the archive says of its size."""
    with archive.open(name) as file:
        content = file.read(_MOST_EVALUATIONS + 1)
    if len(content) > _MOST_EVALUATIONS:
        raise ValueError(f"{name} has more than {_MOST_EVALUATIONS:,} bytes")
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is not an array of this format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "iuf" or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"{name} does not hold the numbers that it says")
    stream.seek(0)
    array = np.lib.format.read_array(stream, allow_pickle=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has entries that are not finite")
    return array


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read :func:`write_json` back.

    :raises RunFolderError: it is missing, damaged or something else
    """
    try:
        value = parse_json(read_bounded(path, _MOST_JSON).decode())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} cannot be read (it is no table)")
    return value


def list_runs(root: Path = Path("agents")) -> list[tuple[Path, dict[str, Any]]]:
    """Return the finished runs below ``root``, those of comparisons too, with their results."""
    runs = []
    for path in sorted([*root.glob("*/*/results.json"), *root.glob("*/compare/*/results.json")]):
        try:
            runs.append((path.parent, read_json(path)))
        except RunFolderError:
            continue  # not ours to judge in a listing
    return runs
