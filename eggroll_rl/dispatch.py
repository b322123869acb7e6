"""Slices to whoever evaluates them, until each has one result: whatever gets lost, late or doubled on the way.

A slice's result is a pure function of the generation and its place in it. So a slice whose worker was lost is done
again by another, and the result is the same to the bit; of two answers to one slice either will do.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from eggroll_rl.errors import TooManyFailuresError, WorkerDiedError
from eggroll_rl.rollout import Failure, Generation
from eggroll_rl.segments import Result

RETRIES = 3
logger = logging.getLogger("eggroll_rl")


@dataclass(frozen=True)
class Task:
    """One slice to evaluate.

    :param generation: its number
    :param first: first member of the slice
    :param left_out: members that ended their process again and again, with why
    """

    generation: int
    first: int
    left_out: dict[int, Failure] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """An answer."""

    task: Task
    result: Result


@dataclass(frozen=True)
class Lost:
    """No answer will come: the worker is gone.

    :param reason: ``"died"``, ``"stuck"``, or ``"unsent"``: it was gone before it got the task
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
    """Those who evaluate slices."""

    def begin(self, generation: Generation) -> None:
        """Take a generation; the tasks that follow are of it."""

    def n_idle(self) -> int:
        """Return how many tasks can be sent at once."""

    def send(self, task: Task) -> None:
        """Hand a task to one that is idle."""

    def wait(self) -> Sequence[Done | Lost]:
        """Return what has happened; nothing, if nothing has for a while.

        :raises EggrollError: what a worker raised on purpose
        """


def dispatch(generation: Generation, crew: Crew, retries: int = RETRIES) -> list[Result]:
    """Have all slices of a generation evaluated, and return their results in slice order.

    :param retries: how often a slice is done again whose worker was lost
    :raises WorkerDiedError: a slice was lost once more than that, and its generation allows no failures, or nobody
        knows which member did it
    :raises TooManyFailuresError: more members than the generation allows ended their process
    """
    slices = generation.slices()
    waiting = deque(Task(generation.noise.generation, first) for first in slices)
    results: dict[int, Result] = {}
    losses: dict[int, list[Lost]] = defaultdict(list)
    crew.begin(generation)
    while len(results) < len(slices):
        while waiting and crew.n_idle():
            task = waiting.popleft()
            if task.first not in results:
                crew.send(task)
        for event in crew.wait():
            task = event.task
            if task.generation != generation.noise.generation or task.first in results:
                continue
            if isinstance(event, Done):
                failures = (*task.left_out.values(), *event.result.failures)
                results[task.first] = replace(event.result, failures=failures)
            elif event.reason == "unsent":
                waiting.appendleft(task)
            else:
                losses[task.first].append(event)
                waiting.appendleft(_after(losses[task.first], generation, retries))
    return [results[first] for first in slices]


def _after(losses: list[Lost], generation: Generation, retries: int) -> Task:
    """Return what to do after the last of a slice's losses."""
    lost = losses[-1]
    task = lost.task
    what = f"{describe(lost, generation)}: {lost.how}"
    if len(losses) <= retries:
        logger.warning("%s; the slice is done again", what)
        return task
    what = f"{what}, {len(losses)} times" + (f", the last time at\n{lost.trace}" if lost.trace else "")
    blamed = {loss.member for loss in losses[-2:]}
    if not generation.max_failures or generation.anchors is not None or blamed != {lost.member} or lost.member is None:
        error = WorkerDiedError(what)
        error.member = lost.member
        raise error
    losses.clear()
    left_out = {**task.left_out, lost.member: Failure(lost.member, lost.reason, what)}
    if len(left_out) > generation.max_failures:
        raise TooManyFailuresError(f"{len(left_out)} members ended their process, the last in {what}")
    return replace(task, left_out=left_out)


def describe(lost: Lost, generation: Generation) -> str:
    """Say which members a lost worker was evaluating."""
    row = "member" if generation.anchors is None else "simulation"
    last = lost.task.first + generation.noise.slice_size - 1
    who = f"one of {row}s {lost.task.first} to {last}" if lost.member is None else f"{row} {lost.member}"
    return f"generation {lost.task.generation}, {who}"
