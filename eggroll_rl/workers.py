"""Who evaluates a generation: this process, or worker processes that own their envs for the whole run.

A worker is a fresh interpreter, not a fork, that never imports the caller's script: SB3 users write no
``__main__`` guard. Policy and env function travel once, by cloudpickle. Per generation a worker gets the
parameters, the normalizer's moments and bounds of slices, and sends back results.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

import cloudpickle
import torch
from gymnasium.envs.registration import registry

from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError, EggrollError, EpisodeError, WorkerDiedError
from eggroll_rl.es import one_thread
from eggroll_rl.mujoco_vector import mujoco_warnings_silenced
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import Generation, load_generation
from eggroll_rl.segments import Result, evaluate_slice


class Evaluator(Protocol):
    """Evaluates all members of a generation; results are the same to the bit for every implementation."""

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per slice, in slice order."""

    def close(self) -> None:
        """Release envs and processes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_workers(n_workers: int | None, n_rows: int, slice_size: int) -> int:
    """Return how many processes a run uses: all cores for None, and at most one per slice.

    :param n_rows: members of the population, or simulations that run segments
    """
    if n_workers is None:
        # pass_fds is POSIX; elsewhere the run is the same, in-process.
        n_workers = available_cores() if os.name == "posix" else 0
    return min(n_workers, -(-n_rows // slice_size))


def make_evaluator(n_workers: int, policy: MlpPolicy, factory: EnvFactory, slice_size: int) -> Evaluator:
    """Return an evaluator with ``n_workers`` processes; 0 is this one."""
    if n_workers == 0:
        return InProcessEvaluator(policy.replica(), factory, slice_size)
    return ProcessEvaluator(n_workers, policy.replica(), factory, slice_size)


class InProcessEvaluator:
    """Evaluate slice by slice in this process, with a copy of the policy."""

    def __init__(self, policy: MlpPolicy, factory: EnvFactory, slice_size: int):
        self._policy = policy
        self._envs = factory.vector(slice_size)

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per slice, in slice order."""
        load_generation(self._policy, generation)
        with one_thread(), mujoco_warnings_silenced():
            return [evaluate_slice(self._policy, generation, first, self._envs) for first in generation.slices()]

    def close(self) -> None:
        """Close the envs."""
        self._envs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class ProcessEvaluator:
    """Evaluate slices in worker processes, each handed the next slice as it becomes free.

    :param n_workers: number of processes, at least 1
    :param policy: its architecture; its state comes with every generation
    :param factory: builds an env in the worker
    :param slice_size: sub-envs per worker
    :raises ConfigError: the env function cannot be pickled
    :raises EggrollError: an env cannot be built in the worker, with its traceback
    """

    def __init__(self, n_workers: int, policy: MlpPolicy, factory: EnvFactory, slice_size: int):
        try:
            setup = cloudpickle.dumps((policy, factory, slice_size, registered_specs()))
        except Exception as error:
            raise ConfigError(f"the env cannot be sent to worker processes ({error}); use n_workers=0") from error
        self._processes: list[subprocess.Popen] = []
        self._connections: list[Connection] = []
        try:
            for _ in range(n_workers):
                self._start()
            for connection in self._connections:
                connection.send_bytes(setup)
            for connection in self._connections:
                self._receive(connection)
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                # -P: the working directory is no place to import from, unless the caller does.
                [sys.executable, "-P", "-c", f"from eggroll_rl.workers import serve; serve({theirs.fileno()})"],
                # Held open and never written to: its end-of-file tells the worker that we are gone.
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    # One core per worker; torch's own setting does not reach NumPy's BLAS.
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    # What the caller can import, modules beside his script included.
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
                # Its own group: Ctrl-C in the terminal reaches us alone, and we end the workers.
                process_group=0,
            )
        self._processes.append(process)
        self._connections.append(Connection(ours.detach()))

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per slice, in slice order."""
        waiting = deque(generation.slices())
        results: dict[int, Result] = {}
        busy: set[Connection] = set()
        pickled = pickle.dumps(generation)
        for connection in self._connections:
            self._send(connection, pickled)
            if waiting:
                self._send(connection, pickle.dumps(waiting.popleft()))
                busy.add(connection)
        while busy:
            ready = wait(list(busy))
            for connection in [c for c in self._connections if c in ready]:
                result = self._receive(connection)
                results[result.first] = result
                if waiting:
                    self._send(connection, pickle.dumps(waiting.popleft()))
                else:
                    busy.remove(connection)
        return [results[first] for first in generation.slices()]

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdin:
                process.stdin.close()
        self._connections, self._processes = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _send(self, connection: Connection, pickled: bytes) -> None:
        try:
            connection.send_bytes(pickled)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection) -> Any:
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(connection) from error
        if isinstance(answer, EggrollError):
            raise answer
        return answer

    def _died(self, connection: Connection) -> WorkerDiedError:
        worker_id = self._connections.index(connection)
        code = self._processes[worker_id].wait(timeout=10)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return WorkerDiedError(f"worker {worker_id} ended in the middle of its work ({how}); nothing was updated")


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


def serve(fd: int) -> None:
    """Run a worker: evaluate slices until the parent closes the connection ``fd``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with Connection(fd) as connection:
        try:
            policy, factory, slice_size, specs = cloudpickle.loads(connection.recv_bytes())
            for spec in map(cloudpickle.loads, specs):
                registry.setdefault(spec.id, spec)
            with mujoco_warnings_silenced():
                envs = factory.vector(slice_size)
                connection.send("ready")
                generation: Generation | None = None
                while True:
                    message = connection.recv()
                    if isinstance(message, Generation):
                        generation = message
                        load_generation(policy, generation)
                    else:
                        assert generation is not None
                        connection.send(evaluate_slice(policy, generation, message, envs))
        except EOFError:
            return
        except EggrollError as error:
            connection.send(error)
        except Exception as error:
            connection.send(EpisodeError(f"a worker failed: {error!r}\n{traceback.format_exc()}"))


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
