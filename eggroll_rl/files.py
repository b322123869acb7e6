"""Files that are written whole or not at all, folders for one process, and reading what a stranger wrote.

A run folder may come from anybody. Whatever is read from one is read by :func:`read_bounded` and parsed by
:func:`parse_json` or a parser that builds nothing but numbers, text, lists and tables.
"""

import contextlib
import errno
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eggroll_rl.errors import RunFolderError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
# What file systems say that know no fsync of a folder, many of networks among them.
_NOT_FOR_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP)
_DIGITS = 40  # of an integer in JSON; ours have 20 at most
_MOST_LEVELS = 64
_MOST_OF_A_LINE = 2**12
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'[^\']*\'')


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and onto the disk before it takes the old one's place.

    :raises RunFolderError: it cannot be written; an old file of that name is as it was, or has been replaced as a
        whole, if all that failed is to bring its name onto the disk
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)  # the rename itself
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def sync(path: Path) -> None:
    """See to it that a file, as it is now, and its name are on the disk.

    :raises RunFolderError: they cannot be brought there
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there.

    :raises RunFolderError: it cannot be made
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> RunFolderError:
    """Return the error for a path that cannot be written, with the system's reason."""
    return RunFolderError(f"cannot write {path}: {error.strerror or error}")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk."""
    if os.name != "posix":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------
# Folders


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make ``folder`` if it is not there, and keep other processes out of it as long as this one lives.

    What processes that were killed left unfinished there, and in the folders in it, is removed. Windows, and file
    systems that know no locks, keep nobody out.

    :raises RunFolderError: another process is in it, or it cannot be made
    """
    make_folder(folder)
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(os.fstat(descriptor).st_ino)
            named = "" if owner is None else f" (pid {owner})"
            raise RunFolderError(
                f"{folder} is in use by another process{named}: wait for it, or choose another"
            ) from error
        except OSError:
            pass  # a file system without locks: nobody knows whose the unfinished files are
        else:
            _remove_temporaries(folder)
        yield
    finally:
        os.close(descriptor)


def _owner(inode: int) -> int | None:
    """Return the process that holds the lock of a file, where the system says (Linux)."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 4711 fd:00:131842 0 EOF
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
            return int(words[4]) if int(words[4]) > 0 else None  # of another container
    return None


def is_temporary(path: Path) -> bool:
    """Say whether a file is what :func:`write_atomic` left when it was killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def _remove_temporaries(folder: Path) -> None:
    # Links are not followed: what lies behind them is not locked.
    inner = [Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    for path in [path for place in (folder, *inner) for path in place.glob(".*.tmp")]:
        if is_temporary(path):
            with contextlib.suppress(OSError):
                path.unlink()


# ---------------------------------------------------------------------------------------------------------
# Reading what a stranger wrote


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes: no device, no pipe that never ends or never begins.

    :raises OSError: it cannot be read
    :raises ValueError: it is something else than a regular file, or larger
    """
    # Opening a pipe would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a regular file")
        if about.st_size > most:
            raise ValueError(f"more than {most:,} bytes")
    except BaseException:
        os.close(descriptor)
        raise
    with open(descriptor, "rb") as file:
        content = file.read(about.st_size + 1)
        # Files of /proc have no size, and others grow.
        while len(content) <= most and (more := file.read(2**16)):
            content += more
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return content


def check_depth(value: Any) -> None:
    """Refuse what is nested so deeply that comparing or printing it would exhaust Python's stack.

    :raises ValueError: it is
    """
    level = [value]
    for _ in range(_MOST_LEVELS):
        if not level:
            return
        parts = [list(part.values()) if isinstance(part, dict) else part for part in level]
        level = [inner for part in parts if isinstance(part, list) for inner in part]
    raise ValueError(f"nested more than {_MOST_LEVELS} deep")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as the standard has it: no NaN or Infinity, no key twice, no integer of more digits than any of ours.

    :raises ValueError: the text is something else, or nested too deeply
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    :raises ValueError: the text is something else, nested too deeply, or has a name of thousands of parts, of which
        tomllib takes the square
    """
    if any(len(line) > _MOST_OF_A_LINE and len(_QUOTED.sub("", line)) > _MOST_OF_A_LINE for line in text.split("\n")):
        raise ValueError(f"a line of more than {_MOST_OF_A_LINE:,} characters outside of quotes")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check_depth(table)
    return table


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"key {name[:80]!r} is there twice")
        table[name] = value
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:80]} is too large a number")
    return value


def one_line(error: BaseException) -> str:
    """Return an error's text as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
