"""Tasks to whoever does them, until each has one result: whatever gets lost, late or doubled on the way.

A job is a generation, whose tasks are its slices, or the contraction of its noise, whose tasks are blocks. A task's
result is a pure function of its job and its place in it. So a task whose worker was lost is done again by another, and
the result is the same to the bit; of two answers to one task either will do.
"""

import logging
import pickle
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Protocol

from eggroll_rl.errors import TooManyFailuresError, WorkerDiedError
from eggroll_rl.lowrank import Contraction
from eggroll_rl.rollout import Failure, Generation

RETRIES = 3
logger = logging.getLogger("eggroll_rl")
_numbers = count()

Job = Generation | Contraction


@dataclass(frozen=True)
class Task:
    """One part of a job.

    :param job: its number, which no other job in this process has
    :param first: first member of a slice; index of a block
    :param left_out: members that ended their process again and again, with why
    """

    job: int
    first: int
    left_out: dict[int, Failure] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Done:
    """An answer."""

    task: Task
    result: Any


@dataclass(frozen=True)
class Lost:
    """No answer will come: the worker is gone.

    :param reason: ``"died"``, ``"stuck"``, ``"gone"``: with its node, or ``"unsent"``: it never got the task
    :param how: what is known about it, for the user: its signal, or how long it was stuck
    :param member: whose env was being called; None if nobody knows
    :param trace: of the worker's stack, or nothing
    """

    task: Task
    reason: str
    how: str
    member: int | None = None
    trace: str = ""


class Crew(Protocol):
    """Those who do tasks."""

    def begin(self, job: bytes) -> None:
        """Take a pickled job; the tasks that follow are of it."""

    def n_idle(self) -> int:
        """Return how many tasks can be sent at once."""

    def send(self, task: Task) -> None:
        """Hand a task to one that is idle."""

    def wait(self) -> Sequence[Done | Lost]:
        """Return what has happened; nothing, if nothing has for a while.

        :raises EggrollError: what a worker raised on purpose
        """


def dispatch(job: Job, parts: Sequence[int], crew: Crew, retries: int = RETRIES) -> list[Any]:
    """Have all parts of a job done, and return their results in this order.

    :param parts: first members of slices, or indices of blocks
    :param retries: how often a task is done again whose worker was lost
    :raises WorkerDiedError: a task was lost once more than that, and its generation allows no failures, or nobody
        knows which member did it
    :raises TooManyFailuresError: more members than the generation allows ended their process
    """
    number = next(_numbers)
    waiting = deque(Task(number, first) for first in parts)
    results: dict[int, Any] = {}
    losses: dict[tuple[int, bool], list[Lost]] = defaultdict(list)
    crew.begin(pickle.dumps(job))
    while len(results) < len(parts):
        for _ in range(crew.n_idle() if waiting else 0):
            while waiting and waiting[0].first in results:
                waiting.popleft()
            if not waiting:
                break
            crew.send(waiting.popleft())
        for event in crew.wait():
            task = event.task
            if task.job != number or task.first in results:
                continue
            if isinstance(event, Done):
                results[task.first] = event.result
                if task.left_out:
                    failures = (*task.left_out.values(), *event.result.failures)
                    results[task.first] = replace(event.result, failures=failures)
            elif event.reason == "unsent":
                waiting.appendleft(task)
            else:
                # A node that is lost says nothing about the members whose slice it had.
                of_task = losses[task.first, event.reason == "gone"]
                of_task.append(event)
                waiting.appendleft(_after(of_task, job, retries))
    return [results[first] for first in parts]


def _after(losses: list[Lost], job: Job, retries: int) -> Task:
    """Return what to do after the last of a task's losses."""
    lost = losses[-1]
    task = lost.task
    what = f"{describe(lost, job)}: {lost.how}"
    if len(losses) <= retries:
        logger.warning("%s; it is done again", what)
        return task
    what = f"{what}, {len(losses)} times" + (f", the last time at\n{lost.trace}" if lost.trace else "")
    blamed = {loss.member for loss in losses[-2:]}
    allowed = job.max_failures if isinstance(job, Generation) and job.anchors is None else 0
    if not allowed or blamed != {lost.member} or lost.member is None:
        error = WorkerDiedError(what)
        error.member = lost.member
        raise error
    losses.clear()
    left_out = {**task.left_out, lost.member: Failure(lost.member, lost.reason, what)}
    if len(left_out) > allowed:
        raise TooManyFailuresError(f"{len(left_out)} members ended their process, the last in {what}")
    return replace(task, left_out=left_out)


def describe(lost: Lost, job: Job) -> str:
    """Say what a lost worker was doing."""
    noise = job.noise
    if isinstance(job, Contraction):
        return f"generation {noise.generation}, block {lost.task.first} of its update"
    row = "member" if job.anchors is None else "simulation"
    last = lost.task.first + noise.slice_size - 1
    who = f"one of {row}s {lost.task.first} to {last}" if lost.member is None else f"{row} {lost.member}"
    return f"generation {noise.generation}, {who}"
