"""How a command and the processes that it starts end: by a signal, and with each other."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, in the way of Ctrl-C: whoever cleans up after the one does so after the other."""


def status_of(stop: BaseException | None) -> int:
    """Return the exit status after an interruption, 128 and the signal's number: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Raise :class:`Terminated` at SIGTERM; the handler before comes back at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install handlers
        return
    with handlers({signal.SIGTERM: _raise_terminated}):
        yield


def _raise_terminated(signum: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def handlers(new: dict[signal.Signals, Any]) -> Iterator[None]:
    """Install handlers of signals, and put the old ones back at the end; in the main thread alone."""
    before = {signum: signal.signal(signum, handler) for signum, handler in new.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            # None: somebody else than Python had installed it, and Python cannot put it back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def run_child(words: list[str], env: dict[str, str]) -> int:
    """Run a command that calls :func:`end_with_parent`, and return its status; whatever ends us ends it.

    In a session of its own: Ctrl-C comes to this process alone, which then ends the child and what that started.
    """
    # Its input is held open and never written to: the end of file tells it that we are gone, however we went.
    process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, start_new_session=True)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _kill_group(process.pid)
        if process.stdin is not None:
            process.stdin.close()


def end_with_parent() -> None:
    """End this process, and what it started in its group, as soon as standard input ends.

    On Linux also where Python's lock is held for ever: there the kernel sends the signal. For a group's leader.
    """
    threading.Thread(target=_wait_for_the_end, daemon=True).start()
    if sys.platform == "linux" and os.getpgrp() == os.getpid():
        import fcntl

        fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _wait_for_the_end() -> None:
    # Not sys.stdin: its lock, held here, would stop the interpreter from ending.
    while os.read(0, 4096):
        pass
    if os.name == "posix" and os.getpgrp() == os.getpid():
        _kill_group(os.getpid())
    os._exit(1)


def _kill_group(leader: int) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):  # nobody is left in it; macOS says the latter
            os.killpg(leader, signal.SIGKILL)
