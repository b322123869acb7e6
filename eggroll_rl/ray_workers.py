"""The same evaluator on a Ray cluster.

With thousands of members, summing up their noise takes the driver longer than the episodes take the cluster: blocks of
the sum are then tasks of the nodes as well.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from eggroll_rl.checks import check_positive, check_whole, shown
from eggroll_rl.dispatch import Job, dispatch, logger
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError, WorkerDiedError
from eggroll_rl.lowrank import Contraction, Perturbed
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.processes import STEP_TIMEOUT, pack
from eggroll_rl.ray_crew import RayCrew, reason
from eggroll_rl.rollout import Generation
from eggroll_rl.segments import Result

NODE_TIMEOUT = 300.0  # seconds
_CONNECT_SECONDS = 20.0
# Of a sum over the noise on one core: to draw a number, to multiply and add it; and from where on a few calls to
# the nodes take less than the sum here.
_NUMBER_SECONDS, _PRODUCT_SECONDS, _SPLIT_SECONDS = 1.2e-8, 2e-10, 0.01


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
    :param node_timeout: seconds to wait for a node if none is left, and for one that does not answer
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
        self._crew: RayCrew | None = None
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
            self._crew = RayCrew(import_ray(), setup, slice_size, step_timeout, most, self.node_timeout)
            self._crew.start()
        except BaseException:
            self.close()
            raise
        return self

    def evaluate(self, generation: Generation) -> list[Result]:
        """Return one result per slice, in slice order."""
        results = self._dispatch(generation, generation.slices())
        self._note()
        return results

    def contract(self, contraction: Contraction, parameters: list[Perturbed]) -> list[Tensor] | None:
        """Return a gradient's blocks, computed on the nodes; None if this process is as fast."""
        on_cpu = all(p.parameter.device.type == "cpu" for p in parameters)
        each = sum(
            _NUMBER_SECONDS * contraction.noise.family.count(p.shape, p.is_matrix)
            + _PRODUCT_SECONDS * p.parameter.numel()
            for p in parameters
        )
        if not on_cpu or len(self._crew or ()) < 2 or each * len(contraction.weights) < _SPLIT_SECONDS:
            return None
        assert self._crew is not None
        self._crew.patience = 0.0  # no waiting for nodes: it can be done here
        try:
            parts = self._dispatch(contraction, range(len(contraction.blocks(parameters))))
        except WorkerDiedError as error:
            logger.warning("the update is computed here: %s", error)
            return None
        finally:
            self._crew.patience = self.node_timeout
        return [torch.from_numpy(part) for part in parts]

    def _dispatch(self, job: Job, parts: Sequence[int]) -> list[Any]:
        if self._crew is None:
            raise RuntimeError("the evaluator is not started")
        try:
            return dispatch(job, parts, self._crew)
        except import_ray().exceptions.RayError as error:
            raise WorkerDiedError(f"the cluster failed: {reason(error)}") from error

    def _note(self) -> None:
        if self._crew is not None:
            self.nodes = {}
            for node in self._crew.nodes:
                if node.is_ready:
                    self.nodes[node.name] = self.nodes.get(node.name, 0) + node.n_workers
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
        with handlers_kept():
            ray.init(
                address=address, include_dashboard=False if is_local else None, log_to_driver=False,
                logging_level="error",
            )  # fmt: skip
    except Exception as error:  # Ray has no common class for what goes wrong here
        raise ConfigError(f"cannot connect to a Ray cluster at {address!r}: {' '.join(str(error).split())}") from error
    if is_local and ray.util.get_node_ip_address() not in ("127.0.0.1", "::1"):
        logger.warning("Ray listens on all interfaces, because it was imported before RayEvaluator was made")
    return True


def _check_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"there is no Ray cluster at {address!r}: {error}") from error


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back, in whose place ray.init() sets one that ends the process with status 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:  # else it was not set from Python
            signal.signal(signal.SIGTERM, before)
