"""The same evaluator on a Ray cluster: one actor per node, with worker processes of its own.

To the dispatcher a node is a few idle workers. Its actor is told which tasks to do in the same call in which it says
what has become of earlier ones, so the driver's work grows with the nodes, and hardly with their cores. A job travels
once to each node, through the object store; on the node it goes to the workers as it came, in the same bytes as on one
machine. Ray starts, watches and ends the actors; everything else is :mod:`eggroll_rl.dispatch`.

With thousands of members, summing up their noise takes the driver longer than the episodes take the cluster. Blocks
of the sum are then tasks as well.
"""

import contextlib
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from eggroll_rl.checks import check_positive, check_whole, shown
from eggroll_rl.dispatch import RETRIES, Done, Lost, Task, dispatch, logger
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError, EggrollError, WorkerDiedError
from eggroll_rl.lowrank import Contraction, Perturbed
from eggroll_rl.machine import machine, versions
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.processes import STEP_TIMEOUT, ProcessCrew, pack
from eggroll_rl.rollout import Generation
from eggroll_rl.segments import Result

NODE_TIMEOUT = 300.0  # seconds
_LOOK_SECONDS = 1.0  # between looks at the cluster's nodes
_PATIENCE = 20.0  # seconds without a node before a word is said: starting workers takes a few
_STRAGGLER = 2.0  # times as long as the slowest task so far, and somebody idle does it too
_CLOSE_SECONDS = 5.0
_SAME = ("eggroll-rl", "torch", "numpy", "gymnasium", "mujoco")  # packages that decide a result
# On one core a block takes about as long as it takes to send it and to get the sum of its directions back.
_SPLIT_FROM = 2.0


def import_ray(is_local: bool = False) -> Any:
    """Return the package, set up not to call home.

    :param is_local: for a Ray on this machine alone
    :raises ConfigError: it is not installed
    """
    if is_local:
        # Ray's own switch, read at the import: its servers then bind to loopback, which no argument of init() does.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no word about it at every start
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(f"a cluster needs Ray ({error}): pip install 'eggroll-rl[ray]'") from error
    return ray


class RayEvaluator:
    """Evaluate on a Ray cluster; for ``EGGROLL(..., evaluator=RayEvaluator("auto"))``.

    Results are those of any number of workers on one machine, to the bit, if the nodes have the same packages, which is
    checked, and the same kind of processor. A node that is lost, or slow, has its slices done by the others; one that
    joins is used from the next slice on. The connection exists while ``learn()`` runs.

    :param address: ``"auto"`` (the cluster that this machine belongs to), ``"HOST:PORT"`` of its head, or ``"local"``:
        a Ray of its own on this machine, which listens on loopback only. If ``ray.init()`` was called before, that
        connection is used, whatever this says
    :param n_workers: worker processes in all; None takes all CPUs that the nodes have, at most one per slice
    :param node_timeout: seconds to wait for a node if none is left
    :ivar nodes: names of the nodes that work now, or worked at the end, with their workers
    :ivar bytes_sent: payload of jobs and tasks since the start, over all nodes
    :ivar bytes_received: payload of results since the start
    :raises ConfigError: a setting is wrong, or Ray is not installed
    """

    def __init__(self, address: str = "local", n_workers: int | None = None, node_timeout: float = NODE_TIMEOUT):
        if not isinstance(address, str) or not (address in ("auto", "local") or ":" in address):
            raise ConfigError(f"address must be 'auto', 'local' or 'HOST:PORT', got {shown(address)}")
        if n_workers is not None:
            check_whole("n_workers", n_workers, 1)
        check_positive("node_timeout", node_timeout)
        import_ray(address == "local")
        self.address, self.n_workers, self.node_timeout = address, n_workers, node_timeout
        self.nodes: dict[str, int] = {}
        self.bytes_sent = self.bytes_received = 0
        self._crew: _RayCrew | None = None
        self._connected = False

    def start(
        self,
        policy: MlpPolicy,
        factory: EnvFactory,
        slice_size: int,
        n_slices: int,
        step_timeout: float = STEP_TIMEOUT,
    ) -> Self:
        """Connect, and start workers on all nodes that there are.

        :raises ConfigError: there is no such cluster, or a node has other versions of what decides results
        :raises EggrollError: an env cannot be built in a worker, with its traceback
        """
        setup = pack(policy, factory, slice_size)
        most = n_slices if self.n_workers is None else min(self.n_workers, n_slices)
        self._connected = _connect(self.address)
        try:
            self._crew = _RayCrew(setup, slice_size, step_timeout, most, self.node_timeout)
            self._crew.start()
        except BaseException:
            self.close()
            raise
        return self

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per slice, in slice order."""
        results = dispatch(generation, generation.slices(), self._running())
        self._note()
        return results

    def contract(self, contraction: Contraction, parameters: list[Perturbed]) -> list[Tensor] | None:
        """Return a gradient's blocks, computed on the nodes; None if this process is as fast."""
        on_cpu = all(p.parameter.device.type == "cpu" for p in parameters)
        blocks = contraction.blocks(parameters)
        if not on_cpu or len(blocks) < _SPLIT_FROM * len(parameters) or len(self._running()) < 2:
            return None
        parts = dispatch(contraction, range(len(blocks)), self._running())
        return [torch.from_numpy(part) for part in parts]

    def _running(self) -> "_RayCrew":
        if self._crew is None:
            raise RuntimeError("the evaluator is not started")
        return self._crew

    def _note(self) -> None:
        if self._crew is not None:
            self.nodes = {node.name: node.n_workers for node in self._crew.nodes if node.is_ready}
            self.bytes_sent, self.bytes_received = self._crew.bytes_sent, self._crew.bytes_received

    def close(self) -> None:
        """End the workers, and the connection if it was made here."""
        try:
            if self._crew is not None:
                self._note()
                self._crew.close()
        finally:
            self._crew = None
            if self._connected:
                self._connected = False
                import_ray().shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # A model that is saved or copied keeps the settings; the connection stays here.
        return type(self), (self.address, self.n_workers, self.node_timeout)


def _connect(address: str) -> bool:
    """Connect, and say whether that was done here."""
    is_local = address == "local"
    ray = import_ray(is_local)
    if ray.is_initialized():
        return False
    if ":" in address:
        _check_listening(address)  # Ray would try for two minutes
    try:
        with _handlers_kept():
            ray.init(
                address=address, include_dashboard=False if is_local else None, log_to_driver=False,
                logging_level="error",
            )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"there is no Ray cluster at {address!r}: {' '.join(str(error).split())}") from error
    if is_local and ray.util.get_node_ip_address() not in ("127.0.0.1", "::1"):
        logger.warning("Ray listens on all interfaces, because it was imported before RayEvaluator was made")
    return True


def _check_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"there is no Ray cluster at {address!r}: {error}") from error


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back, in whose place ray.init() sets one that ends the process with status 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class NodeActor:
    """What runs on a node: a crew of local workers, and the tasks that wait for them."""

    def about(self) -> dict[str, str]:
        """Return versions of what decides results, and the processor."""
        found = versions()
        # Not the last part of Python's version, nor what comes after a +: builds of torch for CPU and GPU go together.
        about = {package: found[package].partition("+")[0] for package in _SAME if package in found}
        return {**about, "python": found["python"].rpartition(".")[0], "processor": machine()["processor"]}

    def start(
        self, n_workers: int, setup: bytes, slice_size: int, step_timeout: float, paths: list[str]
    ) -> EggrollError | None:
        """Start the workers; an error is returned, for Ray would wrap it in its own.

        :param paths: what the caller imports from; of use where the nodes share a file system
        """
        sys.path += [path for path in paths if path not in sys.path and os.path.isdir(path)]
        self._waiting: deque[Task] = deque()
        self._job: Any = None
        try:
            self._crew = ProcessCrew(n_workers, setup, slice_size, step_timeout)
        except EggrollError as error:
            return error
        return None

    def work(self, job: list[Any], tasks: list[Task]) -> bytes:
        """Take tasks, wait a little, and say what has happened.

        :param job: a reference to it in the object store, which a list keeps from being fetched for every call
        :return: pickled: events of :class:`eggroll_rl.dispatch.Crew` or an error, and how many workers there are
        """
        dropped: list[Done | Lost] = []
        if job[0] != self._job:
            dropped = [Lost(task, "unsent", "its job is over") for task in self._waiting]
            self._waiting.clear()
            self._crew.begin(import_ray().get(job[0]))
            self._job = job[0]
        self._waiting.extend(tasks)
        events: list[Done | Lost] | EggrollError
        try:
            self._send()
            events = [*dropped, *self._crew.wait()]
            self._send()
        except EggrollError as error:
            events = error
        return pickle.dumps((events, len(self._crew)))

    def _send(self) -> None:
        while self._waiting and self._crew.n_idle():
            self._crew.send(self._waiting.popleft())

    def close(self) -> None:
        """End the workers."""
        self._crew.close()


@dataclass(eq=False)
class _Node:
    """A node, as the driver sees it.

    :param name: its address, and its id, as there may be several nodes at one address
    :param call: that has not returned yet: of ``about``, then ``start``, then ``work``
    :param running: tasks that it has, and since when
    :param outbox: tasks to be sent with the next call
    :param has_job: whether the current job was sent
    """

    node_id: str
    name: str
    n_workers: int
    actor: Any
    call: Any
    is_known: bool = False
    is_ready: bool = False
    has_job: bool = False
    running: dict[Task, float] = field(default_factory=dict)
    outbox: list[Task] = field(default_factory=list)

    @property
    def n_idle(self) -> int:
        """How many tasks it can be sent now."""
        return max(0, self.n_workers - len(self.running)) if self.is_ready and self.call is None else 0

    def add(self, task: Task) -> None:
        """Have a task sent with the next call."""
        self.outbox.append(task)
        self.running[task] = time.monotonic()


class _RayCrew:
    """The crew of :func:`eggroll_rl.dispatch.dispatch` on a cluster's nodes."""

    def __init__(self, setup: bytes, slice_size: int, step_timeout: float, most: int, node_timeout: float):
        self._ray = import_ray()
        self._setup = self._ray.put(setup)
        self._slice_size, self._step_timeout = slice_size, step_timeout
        self._most, self._node_timeout = most, node_timeout
        self._versions = NodeActor().about()
        self.nodes: list[_Node] = []
        self._failed: dict[str, int] = {}  # how often in a row a node's workers ended, by its id
        self._why = ""  # the last of them did
        self._looked = self._last_alive = -float("inf")
        self._is_waiting = False
        self._job, self._n_bytes, self._slowest = None, 0, 0.0
        self.bytes_sent = self.bytes_received = 0

    def __len__(self) -> int:
        return sum(node.n_workers for node in self.nodes if node.is_ready)

    def start(self) -> None:
        """Start workers on all nodes that are there, and wait for them.

        :raises ConfigError: a node has other versions
        :raises EggrollError: an env cannot be built there
        """
        self._last_alive = time.monotonic()
        self._look()
        while any(not node.is_ready for node in self.nodes) or not self.nodes:
            self._look()
            for node in self._returned(1.0):
                self._go_on(node, at_start=True)
            self._check_alive()

    # The crew of dispatch() -----------------------------------------------------------------------------

    def begin(self, job: bytes) -> None:
        """Put a job in the object store."""
        self._job, self._n_bytes, self._slowest = self._ray.put(job), len(job), 0.0
        for node in self.nodes:
            node.has_job = False

    def n_idle(self) -> int:
        """Return how many tasks can be sent at once."""
        return sum(node.n_idle for node in self.nodes)

    def send(self, task: Task) -> None:
        """Hand a task to the node that has most to spare."""
        max(self.nodes, key=lambda node: node.n_idle).add(task)

    def wait(self) -> list[Done | Lost]:
        """Return the answers that have come, and what was lost with its node."""
        self._look()
        self._help_stragglers()
        events: list[Done | Lost] = []
        for node in self.nodes:
            if node.is_ready and node.call is None and node.running:
                self._call(node)
        for node in self._returned(_LOOK_SECONDS):
            events += self._receive(node) if node.is_ready else self._go_on(node)
        self._check_alive()
        return events

    # Nodes ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Start actors on nodes that have none."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        known = {node.node_id for node in self.nodes}
        for about in self._ray.nodes():
            node_id, cpus = about["NodeID"], int(about["Resources"].get("CPU", 0))
            n_workers = min(cpus, self._most - sum(node.n_workers for node in self.nodes))
            if about["Alive"] and n_workers > 0 and node_id not in known and self._failed.get(node_id, 0) <= RETRIES:
                self._hire(node_id, f"{about['NodeManagerAddress']} ({node_id[:8]})", n_workers)

    def _hire(self, node_id: str, name: str, n_workers: int) -> None:
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        options = {"num_cpus": n_workers, "scheduling_strategy": there, "max_restarts": 0}
        actor = self._ray.remote(NodeActor).options(**options).remote()
        self.nodes.append(_Node(node_id, name, n_workers, actor, actor.about.remote()))

    def _go_on(self, node: _Node, at_start: bool = False) -> list[Done | Lost]:
        """Take the next step of a node that does not work yet."""
        try:
            answer = self._ray.get(node.call)
        except self._ray.exceptions.RayError as error:
            return self._lose(node, f"its actor cannot start: {_first_line(error)}")
        wrong: EggrollError | None = self._mismatch(node, answer) if not node.is_known else answer
        if wrong is None and not node.is_known:
            node.is_known = True
            about = (node.n_workers, self._setup, self._slice_size, self._step_timeout)
            node.call = node.actor.start.remote(*about, [path or os.getcwd() for path in sys.path])
            return []
        if wrong is None:
            node.is_ready, node.call = True, None
            self._failed.pop(node.node_id, None)
            logger.info("node %s has %d workers", node.name, node.n_workers)
            return []
        if at_start:
            raise wrong
        self._failed[node.node_id] = RETRIES  # no second try
        return self._lose(node, str(wrong))

    def _mismatch(self, node: _Node, there: dict[str, str]) -> ConfigError | None:
        """Compare a node's versions with ours."""
        here = dict(self._versions)
        processors = here.pop("processor"), there.pop("processor")
        if processors[0] != processors[1]:
            logger.warning(
                "node %s has another processor (%s) than this machine (%s): results may differ in their last bits",
                node.name, processors[1], processors[0],
            )  # fmt: skip
        different = [
            f"{package} {there.get(package, 'missing')} (here {here.get(package, 'missing')})"
            for package in sorted(here.keys() | there.keys())
            if here.get(package) != there.get(package)
        ]
        if not different:
            return None
        return ConfigError(f"node {node.name} must have the same versions as this machine, got {', '.join(different)}")

    def _check_alive(self) -> None:
        """Wait for nodes if there are none, and give up in the end.

        :raises WorkerDiedError: there was none for ``node_timeout``
        """
        if any(node.is_ready for node in self.nodes):
            self._last_alive = time.monotonic()
            self._is_waiting = False
            return
        seconds = time.monotonic() - self._last_alive
        if seconds > _PATIENCE and not self._is_waiting:
            self._is_waiting = True
            logger.warning("waiting for a node with free CPUs, for %g s at most", self._node_timeout)
        if seconds > self._node_timeout:
            why = f"; the last one: {self._why}" if self._why else ""
            raise WorkerDiedError(f"the cluster had no node to work on for {self._node_timeout:g} s{why}")
        if not self.nodes:
            time.sleep(_LOOK_SECONDS / 4)

    def _returned(self, seconds: float) -> list[_Node]:
        """Return the nodes whose call has returned, after so many seconds at the most."""
        calls = {node.call: node for node in self.nodes if node.call is not None}
        if not calls:
            return []
        done, _ = self._ray.wait(list(calls), num_returns=1, timeout=seconds, fetch_local=False)
        if done and len(calls) > 1:
            done, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
        return [calls[call] for call in done]

    # Tasks ----------------------------------------------------------------------------------------------

    def _call(self, node: _Node) -> None:
        if node.outbox and not node.has_job:
            node.has_job = True
            self.bytes_sent += self._n_bytes
        self.bytes_sent += len(pickle.dumps(node.outbox))
        node.call, node.outbox = node.actor.work.remote([self._job], node.outbox), []

    def _receive(self, node: _Node) -> list[Done | Lost]:
        """Return what a node says has happened.

        :raises EggrollError: what a worker raised on purpose
        """
        try:
            answer = self._ray.get(node.call)
        except self._ray.exceptions.RayError as error:
            return self._lose(node, _first_line(error))
        node.call = None
        self.bytes_received += len(answer)
        events, node.n_workers = pickle.loads(answer)
        if isinstance(events, WorkerDiedError):  # of all its workers: another node may do better
            return self._lose(node, str(events))
        if isinstance(events, EggrollError):
            raise events
        for event in events:
            since = node.running.pop(event.task, None)
            if isinstance(event, Done) and since is not None:
                self._slowest = max(self._slowest, time.monotonic() - since)
        return events

    def _lose(self, node: _Node, why: str) -> list[Done | Lost]:
        """Leave a node, and return the tasks that are lost with it."""
        self._why = why
        self._failed[node.node_id] = self._failed.get(node.node_id, 0) + 1
        self.nodes.remove(node)
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(node.actor)
        logger.warning("node %s is lost: %s", node.name, why)
        unsent = set(node.outbox)
        return [Lost(t, "unsent" if t in unsent else "died", f"node {node.name} was lost: {why}") for t in node.running]

    def _help_stragglers(self) -> None:
        """Give tasks that take far longer than all others to nodes that have nothing to do."""
        idle = [node for node in self.nodes if node.n_idle and not node.outbox]
        if not idle or not self._slowest:
            return
        since = time.monotonic() - max(_STRAGGLER * self._slowest, _LOOK_SECONDS)
        done_twice = [task for node in self.nodes for task in node.running]
        for node in self.nodes:
            for task, started in node.running.items():
                if started < since and done_twice.count(task) == 1 and idle[0] is not node:
                    logger.info("a task of node %s is done by %s, too", node.name, idle[0].name)
                    idle[0].add(task)
                    return

    def close(self) -> None:
        """End the workers on all nodes."""
        calls = []
        with contextlib.suppress(Exception):  # of a cluster that is gone
            for node in self.nodes:
                if node.is_ready and not node.running:
                    calls.append(node.actor.close.remote())
            if calls:
                self._ray.wait(calls, num_returns=len(calls), timeout=_CLOSE_SECONDS)
            for node in self.nodes:
                self._ray.kill(node.actor)
        self.nodes = []


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
