"""Tensors and a JSON description in one safetensors file, with a checksum over all of it.

Version 2 has the SHA-256 of the whole file in its metadata, taken with 64 zeros in the checksum's place: no bit can
change and no byte can be missing without being noticed. Version 1 had none, and is still read.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from eggroll_rl.errors import RunFolderError
from eggroll_rl.files import one_line, parse_json, read_bounded, write_atomic

MOST_BYTES = 2**31
_MOST_HEADER = 2**23
_MOST_TENSORS = 10_000
_FORMAT = "eggroll-rl"
_VERSIONS = ("1", "2")
_NO_CHECKSUM = "0" * 64


def save_tensors(path: Path, kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON description as one file.

    :param kind: what the file is, which :func:`load_tensors` asks for
    :raises RunFolderError: it cannot be written, or is larger than what is read back
    """
    metadata = {
        "format": _FORMAT,
        "version": _VERSIONS[-1],
        "kind": kind,
        "about": json.dumps(about, allow_nan=False),
        "sha256": _NO_CHECKSUM,
    }
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(contiguous, metadata)
    if len(content) > MOST_BYTES or _header_size(content) > _MOST_HEADER or len(tensors) > _MOST_TENSORS:
        raise RunFolderError(
            f"{path} would have {len(content):,} bytes, {_header_size(content):,} of them to describe {len(tensors):,} "
            f"tensors; at most {MOST_BYTES:,}, {_MOST_HEADER:,} and {_MOST_TENSORS:,} are read back"
        )
    place = _checksum_at(content, _NO_CHECKSUM)
    write_atomic(path, content[:place] + _checksum(content, place).encode() + content[place + 64 :])


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote. Nothing is executed, and at most twice the file's size is allocated.

    :raises RunFolderError: the file is missing, damaged, or something else
    """
    try:
        content = read_bounded(path, MOST_BYTES)
        metadata = _metadata(content)
        if metadata.get("format") != _FORMAT or metadata.get("kind") != kind:
            raise RunFolderError(f"{path} is a safetensors file, but not a {kind} of eggroll-rl")
        if metadata.get("version") not in _VERSIONS:
            raise RunFolderError(
                f"{path} has format version {str(metadata.get('version'))[:20]}; this eggroll-rl reads versions "
                f"{' and '.join(_VERSIONS)}"
            )
        if metadata["version"] != "1":
            check(content, metadata["sha256"])
        about = parse_json(metadata["about"])
        if not isinstance(about, dict):
            raise ValueError("its description is no table")
        return safetensors.torch.load(content), about
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist") from None
    except MemoryError:
        raise RunFolderError(f"{path} does not fit into the memory that is free") from None
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise RunFolderError(f"{path} is damaged or not a safetensors file ({one_line(error)})") from error


def check(content: bytes, checksum: str) -> None:
    """Compare a file's bytes with the checksum that it holds.

    :raises ValueError: it is another
    """
    if _checksum(content, _checksum_at(content, checksum)) != checksum:
        raise ValueError("its checksum does not fit its content")


def _checksum_at(content: bytes, checksum: str) -> int:
    # In a text of the metadata its quotes would have backslashes.
    entry = f'"sha256":"{checksum}"'.encode()
    place = content.find(entry, 0, 8 + _header_size(content))
    if len(checksum) != 64 or place < 0:
        raise ValueError("it has no checksum")
    return place + len(entry) - 65


def _checksum(content: bytes, place: int) -> str:
    digest, view = hashlib.sha256(), memoryview(content)
    for part in (view[:place], _NO_CHECKSUM.encode(), view[place + 64 :]):
        digest.update(part)
    return digest.hexdigest()


def _header_size(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def _metadata(content: bytes) -> dict[str, Any]:
    """Return the metadata of a file whose header says what the file holds; safetensors checks the rest."""
    size = _header_size(content)
    if len(content) < 8 or size > min(_MOST_HEADER, len(content) - 8):
        raise ValueError("its header is cut off or too large")
    header = parse_json(content[8 : 8 + size])
    if not isinstance(header, dict) or len(header) > _MOST_TENSORS + 1:
        raise ValueError(f"its header is no table of at most {_MOST_TENSORS:,} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    return metadata


def refuse_non_finite(tensors: dict[str, Tensor], where: Path) -> None:
    """Refuse tensors with NaN or infinite entries.

    :raises RunFolderError: there is one; the text names the tensor
    """
    for name, tensor in tensors.items():
        if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
            raise RunFolderError(f"{where}: {name[:80]!r} has entries that are not finite")


def n_entries(tensors: dict[str, Tensor]) -> int:
    """Return the entries of all tensors together."""
    return sum(tensor.numel() for tensor in tensors.values())
