"""Who evaluates a generation: this process, or worker processes of this machine."""

import os
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from eggroll_rl.dispatch import dispatch
from eggroll_rl.envs import EnvFactory
from eggroll_rl.es import one_thread
from eggroll_rl.lowrank import Contraction, Perturbed
from eggroll_rl.mujoco_vector import mujoco_warnings_silenced
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.processes import STEP_TIMEOUT, ProcessCrew, pack
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


class ClusterEvaluator(Evaluator, Protocol):
    """An evaluator for many machines: made by the user, started by the run.

    :ivar nodes: names of the nodes that work now, or worked at the end, with their workers
    """

    nodes: dict[str, int]

    def start(
        self, policy: MlpPolicy, factory: EnvFactory, slice_size: int, n_slices: int, step_timeout: float
    ) -> Evaluator:
        """Start workers.

        :param policy: its architecture; its state comes with every generation
        :param factory: builds an env in the worker
        :param slice_size: sub-envs per worker
        :param n_slices: of a generation: more workers than these have nothing to do
        :param step_timeout: seconds that one call of an env may take
        """

    def contract(self, contraction: Contraction, parameters: list[Perturbed]) -> list[Tensor] | None:
        """Return the parts of all blocks in their order, or None where this process is as fast."""


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


def make_evaluator(
    n_workers: int, policy: MlpPolicy, factory: EnvFactory, slice_size: int, step_timeout: float = STEP_TIMEOUT
) -> Evaluator:
    """Return an evaluator with ``n_workers`` processes; 0 is this one, which no ``step_timeout`` ends."""
    if n_workers == 0:
        return InProcessEvaluator(policy.replica(), factory, slice_size)
    return ProcessEvaluator(n_workers, policy.replica(), factory, slice_size, step_timeout)


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

    A worker that dies, or makes no step for ``step_timeout``, is replaced, and its slice is done again.

    :param n_workers: number of processes, at least 1
    :param policy: its architecture; its state comes with every generation
    :param factory: builds an env in the worker
    :param slice_size: sub-envs per worker
    :param step_timeout: seconds that one call of an env may take; of ``MujocoVectorEnv``, a step of a slice
    :raises ConfigError: the env function cannot be pickled
    :raises EggrollError: an env cannot be built in the worker, with its traceback
    """

    def __init__(
        self,
        n_workers: int,
        policy: MlpPolicy,
        factory: EnvFactory,
        slice_size: int,
        step_timeout: float = STEP_TIMEOUT,
    ):
        self._crew = ProcessCrew(n_workers, pack(policy, factory, slice_size), slice_size, step_timeout)

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per slice, in slice order."""
        return dispatch(generation, generation.slices(), self._crew)

    def close(self) -> None:
        """End the workers."""
        self._crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
