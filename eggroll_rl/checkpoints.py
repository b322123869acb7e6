"""Checkpoints of a run, ``checkpoints/generation-00000120.safetensors``: the last few, each valid by itself.

An older one goes only after the new one is on the disk and was read back. A resume takes the newest that is valid.
Runs of version 0.1 have one file, ``training.safetensors``, which is read as the oldest.
"""

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from eggroll_rl.errors import RunFolderError
from eggroll_rl.files import cannot_write, make_folder, sync_folder
from eggroll_rl.tensor_files import load_tensors, refuse_non_finite, save_tensors

_KIND = "training"
_OLD = "training.safetensors"
_NAME = re.compile(r"generation-(\d{8,18})\.safetensors")


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of generation ``about["generation"]``, then remove all but the last ``keep``.

    :param folder: run folder
    :raises RunFolderError: it cannot be written, or does not read back; all older ones are still there
    """
    place = _place(folder)
    if not place.is_dir():
        make_folder(place)
        try:
            sync_folder(folder)
        except OSError as error:
            raise cannot_write(place, error) from error
    path = place / f"generation-{about['generation']:08d}.safetensors"
    save_tensors(path, _KIND, tensors, about)
    _load(path)
    _prune(folder, about["generation"], keep)
    return path


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the path of the newest valid checkpoint, its tensors and description, and why newer ones were skipped.

    :raises RunFolderError: there is none; the text names each file and what is wrong with it
    """
    skipped: list[str] = []
    for path in list_checkpoints(folder):
        try:
            return path, *_load(path), skipped
        except RunFolderError as error:
            skipped.append(str(error))
    if skipped:
        raise RunFolderError(f"{folder} holds no valid checkpoint: {'; '.join(skipped)}")
    raise RunFolderError(f"{folder} holds no run to resume: it has no checkpoint")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, newest first, valid or not."""
    place = _place(folder)
    try:
        found = [path for path in place.iterdir() if _NAME.fullmatch(path.name)] if place.is_dir() else []
    except OSError as error:
        raise RunFolderError(f"cannot read {place}: {error.strerror}") from error
    found.sort(key=_generation, reverse=True)
    return [*found, *(path for path in [folder / _OLD] if os.path.lexists(path))]


def remove_checkpoints(folder: Path) -> None:
    """Remove all of them, and their folder unless something else lies there.

    :raises RunFolderError: one cannot be removed
    """
    for path in list_checkpoints(folder):
        _remove(path)
    place = _place(folder)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def _place(folder: Path) -> Path:
    place = folder / "checkpoints"
    if os.path.islink(place):  # behind which another run's may lie
        raise RunFolderError(f"{place} is a link: checkpoints are written into the run folder alone")
    return place


def _generation(path: Path) -> int:
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named else -1


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, about = load_tensors(path, _KIND)
    if _generation(path) not in (-1, about.get("generation")):
        raise RunFolderError(f"{path} holds generation {str(about.get('generation'))[:20]}")
    # What is not a number may be one of the returns of episodes that are not counted; everything else is finite.
    refuse_non_finite({name: tensor for name, tensor in tensors.items() if name != "scorer.returns"}, path)
    return tensors, about


def _prune(folder: Path, generation: int, keep: int) -> None:
    # Files of later generations were skipped by the resume: they stay until the run gets there.
    for path in [path for path in list_checkpoints(folder) if _generation(path) <= generation][keep:]:
        _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
