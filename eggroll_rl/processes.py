"""Worker processes that own their envs for the whole run: on one machine, the crew of :mod:`eggroll_rl.dispatch`.

A worker is a fresh interpreter, not a fork, that never imports the caller's script: SB3 users write no
``__main__`` guard. Policy and env function travel once, by cloudpickle. Per job, such as a generation, a worker gets
it once (parameters, the normalizer's moments) and bounds of slices, and sends back results.
"""

import contextlib
import faulthandler
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from multiprocessing.connection import Connection, wait
from typing import BinaryIO

import cloudpickle
import numpy as np
import torch
from gymnasium.envs.registration import registry

from eggroll_rl.dispatch import RETRIES, Done, Lost, Task, logger
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError, EggrollError, EpisodeError, WorkerDiedError
from eggroll_rl.lowrank import Contraction, perturbed_parameters
from eggroll_rl.mujoco_vector import mujoco_warnings_silenced
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import Generation, load_generation
from eggroll_rl.segments import evaluate_slice
from eggroll_rl.serial_vector import SerialVectorEnv

STEP_TIMEOUT = 300.0  # seconds
_IMPORT_SECONDS = 60.0  # that a worker may take on top, to start
_CLOSE_SECONDS = 2.0  # that envs may take to close
_PLACE_BYTES = 16
# It ends with us from the first moment on, and not only after the imports.
_START = (
    "from eggroll_rl.signals import end_with_parent; end_with_parent(); "
    "from eggroll_rl.processes import serve; serve(*{fds})"
)


def pack(policy: MlpPolicy, factory: EnvFactory, slice_size: int) -> bytes:
    """Return what workers need to start.

    :param policy: its architecture; its state comes with every generation
    :param factory: builds an env in the worker
    :param slice_size: sub-envs per worker
    :raises ConfigError: the env function cannot be pickled
    """
    try:
        return cloudpickle.dumps((policy, factory, slice_size, registered_specs()))
    except Exception as error:
        raise ConfigError(f"the env cannot be sent to worker processes ({error}); use n_workers=0") from error


class ProcessCrew:
    """Workers, each handed the next task as it becomes free.

    A worker that dies, or makes no step for ``step_timeout``, is replaced, and its task is lost.

    :param n_workers: number of processes, at least 1
    :param setup: of :func:`pack`
    :param slice_size: sub-envs per worker
    :param step_timeout: seconds that one call of an env may take; of ``MujocoVectorEnv``, a step of a slice
    :raises EggrollError: an env cannot be built in the worker, with its traceback
    """

    def __init__(self, n_workers: int, setup: bytes, slice_size: int, step_timeout: float = STEP_TIMEOUT):
        self._setup = _unnamed_file(setup)  # a pipe would make us wait until the worker has started and reads
        self._slice_size, self._step_timeout = slice_size, step_timeout
        self._job = b""
        self._workers: list[_Worker] = []
        self._looked = time.monotonic()
        try:
            for _ in range(n_workers):
                self._start(0)
            while not all(worker.is_ready for worker in self._workers):
                self.wait()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._workers)

    def begin(self, job: bytes) -> None:
        """Keep a job, for the workers that get a task of it."""
        self._job = job
        for worker in self._workers:
            worker.has_job = False

    def n_idle(self) -> int:
        """Return how many workers wait for work."""
        return sum(worker.is_idle for worker in self._workers)

    def send(self, task: Task) -> None:
        """Hand a task to a worker that waits."""
        worker = next(worker for worker in self._workers if worker.is_idle)
        worker.task, worker.silence = task, 0.0
        try:
            if not worker.has_job:
                worker.connection.send_bytes(self._job)
                worker.has_job = True
            worker.connection.send(task)
        except OSError:
            worker.is_broken = worker.is_unsent = True  # wait() sees to it

    def wait(self) -> list[Done | Lost]:
        """Return the answers that have come, and what was lost with its worker, which is replaced."""
        events: list[Done | Lost] = []
        tick = min(1.0, self._step_timeout / 4)
        broken = any(worker.is_broken for worker in self._workers)
        ready = wait([worker.connection for worker in self._workers if worker.is_busy], 0 if broken else tick)
        # Of a pause in which this process was stopped, too, a worker is not to blame for more than two ticks.
        seconds, self._looked = min(time.monotonic() - self._looked, 2 * tick), time.monotonic()
        for worker in list(self._workers):
            if worker.connection in ready and not worker.is_broken:
                events += self._receive(worker)
            if worker.is_broken or worker.is_gone():
                events += self._replace(worker, "died")
            elif worker.is_busy and worker.listen(seconds) > self._step_timeout:
                events += self._replace(worker, "stuck")
        return events

    def _receive(self, worker: "_Worker") -> list[Done]:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            worker.is_broken = True
            return []
        if isinstance(answer, EggrollError):
            raise answer
        task, worker.task, worker.is_ready, worker.failed_starts = worker.task, None, True, 0
        return [] if task is None else [Done(task, answer)]

    def _replace(self, worker: "_Worker", reason: str) -> list[Lost]:
        """End a worker, start another, and return the task that is lost with it."""
        task = None if worker.is_unsent else worker.task
        member = None if task is None or worker.row < 0 else task.first + worker.row
        how, trace = worker.end(reason, self._step_timeout)
        self._workers.remove(worker)
        failed_starts = worker.failed_starts + (not worker.is_ready)
        if failed_starts > RETRIES:
            what = f"a worker ended {failed_starts} times making its envs: {how}"
            if not any(other.is_ready for other in self._workers):
                raise WorkerDiedError(f"{what}\n{trace}")
            logger.warning("%s; the others go on without it", what)
            return []
        if task is None:
            logger.warning("a worker that had no task is replaced: %s", how)
        self._start(failed_starts)
        if worker.is_unsent and worker.task is not None:
            return [Lost(worker.task, "unsent", how)]
        return [] if task is None else [Lost(task, reason, how, member, trace)]

    def _start(self, failed_starts: int) -> None:
        try:
            grace = _IMPORT_SECONDS + (self._slice_size - 1) * min(self._step_timeout, STEP_TIMEOUT)
            self._workers.append(_Worker(self._setup.fileno(), self._step_timeout, grace, failed_starts))
        except OSError as error:
            if not self._workers:
                raise WorkerDiedError(f"no worker process can be started: {error}") from error
            logger.warning("a worker process cannot be started (%s); the others go on", error)

    def close(self) -> None:
        """End the workers: those that wait for work close their envs, the others are killed."""
        for worker in self._workers:
            if worker.is_idle:
                worker.connection.close()
            else:
                worker.kill()
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.kill()
                worker.close()
            self._workers = []
            self._setup.close()


def _unnamed_file(content: bytes) -> BinaryIO:
    """Return a file that nobody else sees, and of which nothing is left whatever happens."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("eggroll_rl"), "w+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (whoever asks for it closes it)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    return file


class _Worker:
    """A process, the connection to it, and a file in which it says where it is, even if it is dead.

    That file begins with two int64, which both map into memory: steps made, and the row whose env is being called, or
    -1. The stack's trace comes after, written by ``faulthandler``.

    :param setup: descriptor of the file that holds what it needs to start
    :param timeout: seconds that sending and receiving may be held up
    :param grace: seconds that it may take to start, beside ``timeout``
    :param failed_starts: of those whose place it takes, in a row
    """

    def __init__(self, setup: int, timeout: float, grace: float, failed_starts: int):
        ours, theirs = socket.socketpair()
        # A worker that was stopped in the middle of a message must not stop us too.
        seconds = min(timeout, 1e6)
        pause = struct.pack("ll", int(seconds), max(1, int(seconds % 1 * 1e6)))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, pause)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, pause)
        self._log = _unnamed_file(np.array([0, -1]).tobytes())
        self._memory = mmap.mmap(self._log.fileno(), _PLACE_BYTES)
        with theirs:
            fds = [theirs.fileno(), setup, self._log.fileno()]
            self.process = subprocess.Popen(
                # -P: the working directory is no place to import from, unless the caller does.
                [sys.executable, "-P", "-c", _START.format(fds=fds)],
                # Held open and never written to: its end-of-file tells the worker that we are gone.
                stdin=subprocess.PIPE,
                pass_fds=fds,
                env={
                    **os.environ,
                    # One core per worker; torch's own setting does not reach NumPy's BLAS.
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    # What the caller can import, modules beside his script included.
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
                # Its own group: Ctrl-C in the terminal reaches us alone, and we end it with what it has started.
                process_group=0,
            )
        self.connection = Connection(ours.detach())
        self.task: Task | None = None
        self.is_ready = self.has_job = self.is_broken = self.is_unsent = False
        self.failed_starts = failed_starts
        self.silence = -grace  # seconds in which it was not seen to do anything
        self._place = self._memory[:_PLACE_BYTES]
        _living.add(self)

    @property
    def is_busy(self) -> bool:
        """Whether an answer is due."""
        return not self.is_ready or self.task is not None

    @property
    def is_idle(self) -> bool:
        """Whether a task can be sent."""
        return not self.is_busy and not self.is_broken

    @property
    def row(self) -> int:
        """The row of the slice whose env is being called, or -1."""
        return struct.unpack("qq", self._memory[:_PLACE_BYTES])[1]

    def is_gone(self) -> bool:
        """Say whether it ended without a word: a process that its env started may keep the connection open."""
        return self.is_busy and self.process.poll() is not None and not self.connection.poll()

    def listen(self, seconds: float) -> float:
        """Return the seconds in which it has not called an env, after another few of them."""
        place = self._memory[:_PLACE_BYTES]
        self.silence = self.silence + seconds if place == self._place else min(self.silence, 0.0)
        self._place = place
        return self.silence

    def end(self, reason: str, timeout: float) -> tuple[str, str]:
        """End the process, and return how it ended and the trace of its stack."""
        if reason == "stuck":
            how = f"its env made no step for {timeout:g} s"
            self.process.send_signal(signal.SIGUSR1)
            deadline = time.monotonic() + 1
            while not self._trace() and time.monotonic() < deadline and self.process.poll() is None:
                time.sleep(0.01)
        else:
            try:
                code = self.process.wait(timeout=1)
                how = f"signal {_signal_name(-code)}" if code < 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                how = "its connection broke"
            how = f"the worker process ended ({how})"
        self.kill()
        trace = self._trace()
        self.close()
        return how, trace

    def _trace(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, _PLACE_BYTES).decode(errors="replace")

    def kill(self) -> None:
        """Kill it and what its envs have started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Release the process, which must be dead or dying, and its files."""
        self.process.wait()
        self.release()
        self._memory.close()
        self._log.close()

    def release(self) -> None:
        """Close our ends of what connects us."""
        self.connection.close()
        if self.process.stdin:
            self.process.stdin.close()


_living: "weakref.WeakSet[_Worker]" = weakref.WeakSet()


def _in_a_fork() -> None:
    # A copy of this process must not keep the workers' inputs open when this one is gone.
    for worker in list(_living):
        worker.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


def registered_specs() -> list[bytes]:
    """Pickle the envs that somebody registered here, for env functions that make them by id."""
    specs = []
    for spec in registry.values():
        if not (isinstance(spec.entry_point, str) and spec.entry_point.startswith("gymnasium.")):
            try:
                specs.append(cloudpickle.dumps(spec))
            except Exception:
                continue
    return specs


def serve(fd: int, setup: int, log: int) -> None:
    """Run a worker: do tasks until the parent closes the connection ``fd``.

    :param setup: descriptor of the file that holds policy, env function, slice size and registered envs
    :param log: descriptor of the file in which :class:`_Worker` looks
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.lseek(log, 0, os.SEEK_END)
    faulthandler.enable(log)  # what a segmentation fault hit
    faulthandler.register(signal.SIGUSR1, log)  # where it is stuck
    place = np.frombuffer(mmap.mmap(log, _PLACE_BYTES), dtype=np.int64)
    torch.set_num_threads(1)
    with Connection(fd) as connection:
        try:
            _work(connection, setup, place)
        except (Exception, SystemExit) as error:
            if not isinstance(error, EggrollError):
                error = EpisodeError(f"a worker failed: {error!r}\n{traceback.format_exc()}")
            with contextlib.suppress(OSError):  # nobody listens any more
                connection.send(error)
    os._exit(0)  # whatever threads an env has left


def _work(connection: Connection, setup: int, place: np.ndarray) -> None:
    with open(setup, "rb", closefd=False) as file:
        policy, factory, slice_size, specs = cloudpickle.loads(os.pread(file.fileno(), os.fstat(setup).st_size, 0))
    for spec in map(cloudpickle.loads, specs):
        registry.setdefault(spec.id, spec)

    def on_step() -> None:
        place[0] += 1

    with mujoco_warnings_silenced():
        envs = factory.vector(slice_size)
        if isinstance(envs, SerialVectorEnv):
            envs.running_row = place[1:]
        connection.send("ready")
        parameters = perturbed_parameters(policy.network)
        job: Generation | Contraction | None = None
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):  # closed: the work is done
                envs.close()
                return
            if not isinstance(message, Task):
                job = message
                if isinstance(job, Generation):
                    load_generation(policy, job)
                continue
            place[1] = -1
            if isinstance(job, Generation):
                connection.send(evaluate_slice(policy, job, message.first, envs, message.left_out, on_step))
            else:
                assert job is not None
                connection.send(job.contract(parameters, message.first).numpy())
                on_step()
