"""The nodes of a Ray cluster as a crew of :mod:`eggroll_rl.dispatch`: one actor per node, with workers of its own.

To the dispatcher a node is a few idle workers. Its actor is told which tasks to do in the same call in which it says
what has become of earlier ones, so the driver's work grows with the nodes, and hardly with their cores. A job travels
once to each node, through the object store; on the node it goes to the workers as it came, in the same bytes as on one
machine. Ray starts, watches and ends the actors.
"""

import contextlib
import os
import pickle
import re
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from eggroll_rl.dispatch import RETRIES, Done, Lost, Task, logger
from eggroll_rl.errors import ConfigError, EggrollError, WorkerDiedError
from eggroll_rl.machine import machine, versions
from eggroll_rl.processes import ProcessCrew

_LOOK_SECONDS = 1.0  # between looks at the cluster's nodes
_HIRE_SECONDS = 30.0  # that an actor may take to say its first word, before its CPUs count as somebody else's
_PATIENCE = 20.0  # seconds without a node before a word is said: starting workers takes a few
_STRAGGLER = 2.0  # times as long as the slowest task so far, and somebody idle does it too
_CLOSE_SECONDS = 5.0
_SAME = ("eggroll-rl", "torch", "numpy", "gymnasium", "mujoco")  # packages that decide a result


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
        try:
            self._crew = ProcessCrew(n_workers, setup, slice_size, step_timeout)
        except EggrollError as error:
            return error
        return None

    def work(self, job: bytes | None, tasks: list[Task]) -> bytes:
        """Take tasks, wait a little, and say what has happened.

        :param job: what the tasks are of, if it is another than before
        :return: pickled: events of :class:`eggroll_rl.dispatch.Crew` or an error, and how many workers there are
        """
        dropped: list[Done | Lost] = []
        if job is not None:
            dropped = [Lost(task, "unsent", "its job is over") for task in self._waiting]
            self._waiting.clear()
            self._crew.begin(job)
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
class Node:
    """An actor, and the CPUs of a node that are its workers', as the driver sees it.

    :param name: the node's address, and its id, as there may be several nodes at one address
    :param call: that has not returned yet: of ``about``, then ``start``, then ``work``; since when
    :param is_known: it has said which versions it has, and starts its workers
    :param running: tasks that it has, and since when
    :param outbox: tasks to be sent with the next call
    :param has_job: whether the current job was sent
    """

    node_id: str
    name: str
    n_workers: int
    actor: Any
    call: Any = None
    called: float = 0.0
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

    def ask(self, method: str, *args: Any) -> None:
        """Call a method of the actor."""
        self.call, self.called = getattr(self.actor, method).remote(*args), time.monotonic()


class RayCrew:
    """The crew of :func:`eggroll_rl.dispatch.dispatch` on a cluster's nodes.

    :param ray: the package, connected
    :param setup: of :func:`eggroll_rl.processes.pack`
    :param most: workers in all
    :param node_timeout: seconds to wait for a node if none is left, and for a node that does not answer
    :ivar patience: the first of the two
    """

    def __init__(self, ray: Any, setup: bytes, slice_size: int, step_timeout: float, most: int, node_timeout: float):
        self._ray = ray
        self._setup = ray.put(setup)
        self._slice_size, self._step_timeout = slice_size, step_timeout
        self._most, self._node_timeout, self.patience = most, node_timeout, node_timeout
        self._versions = NodeActor().about()
        self.nodes: list[Node] = []
        self._failed: Counter[str] = Counter()  # how often in a row a node's workers ended, by its id
        self._why = ""  # the last of them did
        self._looked = -float("inf")
        self._last_alive = time.monotonic()
        self._is_waiting = False
        self._job, self._n_bytes = None, 0
        self._free: deque[Node] = deque()  # who gets the next tasks
        self._slowest = 0.0  # seconds of a task of this job
        self._open: set[Task] = set()  # tasks of this job that were sent and have no result
        self.bytes_sent = self.bytes_received = 0

    def __len__(self) -> int:
        return sum(node.n_workers for node in self.nodes if node.is_ready)

    def start(self) -> None:
        """Start workers on all nodes that are there, and wait for them.

        :raises ConfigError: a node has other versions, or cannot run our code
        :raises EggrollError: an env cannot be built there
        """
        self._last_alive = time.monotonic()
        self._look()
        while not any(node.is_ready for node in self.nodes) or any(self._is_starting(node) for node in self.nodes):
            self._look()
            for node in self._returned(_LOOK_SECONDS):
                self._go_on(node, at_start=True)
            self._check_alive()
        n_cpus = sum(int(about["Resources"].get("CPU", 0)) for about in self._ray.nodes() if about["Alive"])
        if n_cpus > self._most:
            logger.warning(
                "%d of the cluster's %d CPUs are used: n_workers, or the slices of a generation, are no more",
                self._most, n_cpus,
            )  # fmt: skip

    # The crew of dispatch() -----------------------------------------------------------------------------

    def begin(self, job: bytes) -> None:
        """Put a job in the object store."""
        self._job, self._n_bytes, self._slowest, self._open = self._ray.put(job), len(job), 0.0, set()
        self._last_alive = time.monotonic()  # whatever happened between two jobs
        for node in self.nodes:
            node.has_job = False

    def n_idle(self) -> int:
        """Return how many tasks can be sent at once."""
        idle = [(rank, index) for index, node in enumerate(self.nodes) for rank in range(node.n_idle)]
        self._free = deque(self.nodes[index] for _, index in sorted(idle))  # one for each node, then another
        return len(self._free)

    def send(self, task: Task) -> None:
        """Hand a task to a node that has a worker to spare, after :meth:`n_idle`."""
        self._open.add(task)
        self._free.popleft().add(task)

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
        for node in [node for node in self.nodes if node.call is not None and (node.is_ready or not node.is_known)]:
            if time.monotonic() - node.called > self._node_timeout:  # its workers have limits of their own to start
                events += self._lose(node, f"it gave no answer for {self._node_timeout:g} s")
        self._check_alive()
        return events

    # Nodes ----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Start actors on nodes that have CPUs to spare."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for about in self._ray.nodes():
            node_id = about["NodeID"]
            here = [node for node in self.nodes if node.node_id == node_id]
            cpus = int(about["Resources"].get("CPU", 0)) - sum(node.n_workers for node in here)
            # Who has said nothing for long waits for CPUs that somebody else has.
            others = sum(node.n_workers for node in self.nodes if node.is_known or self._is_starting(node))
            n_workers = min(cpus, self._most - others)
            waits = any(not node.is_known for node in here)
            if about["Alive"] and n_workers > 0 and not waits and self._failed[node_id] <= RETRIES:
                self._hire(node_id, f"{about['NodeManagerAddress']} ({node_id[:8]})", n_workers)

    @staticmethod
    def _is_starting(node: Node) -> bool:
        return not node.is_ready and (node.is_known or time.monotonic() - node.called < _HIRE_SECONDS)

    def _hire(self, node_id: str, name: str, n_workers: int) -> None:
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        options = {"num_cpus": n_workers, "scheduling_strategy": there, "max_restarts": 0}
        node = Node(node_id, name, n_workers, self._ray.remote(NodeActor).options(**options).remote())
        node.ask("about")
        self.nodes.append(node)

    def _go_on(self, node: Node, at_start: bool = False) -> list[Done | Lost]:
        """Take the next step of a node that does not work yet."""
        wrong: EggrollError | None
        try:
            answer = self._ray.get(node.call)
        except self._ray.exceptions.RayTaskError as error:
            wrong = ConfigError(f"node {node.name} cannot run eggroll-rl: {reason(error)}")
        except self._ray.exceptions.RayError as error:
            return self._lose(node, f"its actor cannot start: {reason(error)}")
        else:
            wrong = answer if node.is_known else self._mismatch(node, answer)
        if wrong is None and not node.is_known:
            node.n_workers = min(node.n_workers, self._most - sum(n.n_workers for n in self.nodes if n.is_known))
            if node.n_workers < 1:  # others were faster
                self._dismiss(node)
                return []
            node.is_known = True
            about = (node.n_workers, self._setup, self._slice_size, self._step_timeout)
            node.ask("start", *about, [path or os.getcwd() for path in sys.path])
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

    def _mismatch(self, node: Node, there: dict[str, str]) -> ConfigError | None:
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
        if any(node.is_known for node in self.nodes):
            self._last_alive = time.monotonic()
            self._is_waiting = False
            return
        seconds = time.monotonic() - self._last_alive
        if seconds > _PATIENCE and not self._is_waiting:
            self._is_waiting = True
            logger.warning("waiting for a node with free CPUs, for %g s at most", self.patience)
        if seconds > self.patience:
            why = f"; the last one: {self._why}" if self._why else ""
            raise WorkerDiedError(f"the cluster had no node to work on for {self.patience:g} s{why}")
        if not self.nodes:
            time.sleep(_LOOK_SECONDS / 4)

    def _returned(self, seconds: float) -> list[Node]:
        """Return the nodes whose call has returned, after so many seconds at the most."""
        calls = {node.call: node for node in self.nodes if node.call is not None}
        if not calls:
            return []
        done, _ = self._ray.wait(list(calls), num_returns=1, timeout=seconds, fetch_local=False)
        if done and len(calls) > 1:
            done, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0, fetch_local=False)
        return [calls[call] for call in done]

    def _lose(self, node: Node, why: str) -> list[Done | Lost]:
        """Leave a node, and return the tasks that are lost with it, but for those that another has, too."""
        self._why = why
        self._failed[node.node_id] += 1
        self._dismiss(node)
        logger.warning("node %s is lost: %s", node.name, why)
        unsent, how = set(node.outbox), f"node {node.name} was lost: {why}"
        lost = [task for task in node.running if not self._somebody_has(task)]
        return [Lost(task, "unsent" if task in unsent else "gone", how) for task in lost]

    def _dismiss(self, node: Node) -> None:
        self.nodes.remove(node)
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.kill(node.actor)

    # Tasks ----------------------------------------------------------------------------------------------

    def _somebody_has(self, task: Task) -> bool:
        return any(task in node.running for node in self.nodes)

    def _call(self, node: Node) -> None:
        job = None
        if node.outbox and not node.has_job:
            node.has_job, job = True, self._job
            self.bytes_sent += self._n_bytes
        self.bytes_sent += len(pickle.dumps(node.outbox))
        node.ask("work", job, node.outbox)
        node.outbox = []

    def _receive(self, node: Node) -> list[Done | Lost]:
        """Return what a node says has happened.

        :raises EggrollError: what a worker raised on purpose
        """
        try:
            answer = self._ray.get(node.call)
        except self._ray.exceptions.RayError as error:
            return self._lose(node, reason(error))
        node.call = None
        self.bytes_received += len(answer)
        events, node.n_workers = pickle.loads(answer)
        if isinstance(events, WorkerDiedError):  # of all its workers: another node may do better
            return self._lose(node, str(events))
        if isinstance(events, EggrollError):
            raise events
        kept: list[Done | Lost] = []
        for event in events:
            since = node.running.pop(event.task, None)
            if isinstance(event, Done):
                if since is not None and event.task in self._open:
                    self._slowest = max(self._slowest, time.monotonic() - since)
                self._open.discard(event.task)
            elif self._somebody_has(event.task):
                continue
            kept.append(event)
        return kept

    def _help_stragglers(self) -> None:
        """Give tasks that take far longer than all others to nodes that have nothing to do."""
        idle = [node for node in self.nodes if node.n_idle and not node.outbox]
        if not idle or not self._slowest:
            return
        since = time.monotonic() - max(_STRAGGLER * self._slowest, _LOOK_SECONDS)
        given = Counter(task for node in self.nodes for task in node.running)
        late = [
            (task, node)
            for node in self.nodes
            for task, started in node.running.items()
            if started < since and given[task] == 1 and task in self._open
        ]
        for task, slow in late:
            helper = next((node for node in idle if node is not slow and node.n_idle), None)
            if helper is not None:
                logger.info("a task of node %s is done by %s, too", slow.name, helper.name)
                helper.add(task)

    def close(self) -> None:
        """End the workers on all nodes."""
        calls = []
        for node in self.nodes:
            if node.is_ready and not node.running:
                with contextlib.suppress(Exception):  # of a cluster that is gone
                    calls.append(node.actor.close.remote())
        with contextlib.suppress(Exception):
            self._ray.wait(calls, num_returns=len(calls), timeout=_CLOSE_SECONDS)
        for node in list(self.nodes):
            self._dismiss(node)


def reason(error: Exception) -> str:
    """Return the line of Ray's long messages that says why."""
    text = str(getattr(error, "cause", None) or error)
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", text).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
