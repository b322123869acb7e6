"""``EvolutionStrategy``: EGGROLL for an ``nn.Module`` and any fitness. We maximise.

One update convention, used everywhere. With shaped fitness u, sign s and perturbation E of :mod:`eggroll_rl.lowrank`,

    g = (1/N) sum_n u_n s_n E_n,    p.grad = -g,    optimizer.step()

which is the paper's Eq. 6 with 1/sigma absorbed in the learning rate. HyperscaleES's step with SGD,
``lr · sigma · sqrt(N) · g``, is therefore ``learning_rate = lr · sigma · sqrt(N)`` here.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.fitness import FitnessShaping, make_fitness_shaping
from eggroll_rl.lowrank import Noise, Population, estimate_gradient, perturbed_parameters

GenerationSchedule = Callable[[int], float]


def check_population(population_size: int, rank: int, slice_size: int) -> None:
    """Refuse sizes that cannot be, naming the field, its value and what would be right."""
    for name, value in (("population_size", population_size), ("slice_size", slice_size)):
        if not _is_int(value) or value < 2 or value % 2:
            raise ConfigError(f"{name} must be an even number of members, at least 2 (antithetic pairs), got {value!r}")
    check_whole("rank", rank, 1)


def check_positive(name: str, value: object) -> None:
    """Refuse a number that is not finite and above zero."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number, or below ``least``."""
    if not _is_int(value) or value < least:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}")


def check_fraction(name: str, value: object) -> None:
    """Refuse what is not a number from 0 to 1."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a number from 0 to 1, got {value!r}")


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values.values()])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()  # looks through all loaded libraries: milliseconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch and NumPy's BLAS on one thread: sums do not depend on the number of cores. Settings are put back.

    The settings are the process's: not for several threads of the caller at once.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _thread_pools().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


class EvolutionStrategy:
    """Low-rank evolution strategy over the parameters of a module (EGGROLL, arXiv 2511.16652).

    >>> es = EvolutionStrategy(module, population_size=256, sigma=0.1, seed=0)
    >>> population = es.ask()
    >>> outputs = population.forward(inputs)  # (256, batch, ...), one call
    >>> metrics = es.tell(fitness)  # (256,), higher is better

    :param module: Linear layers and activations, in any arrangement. Parameters that do not require grad stay
        as they are. Its parameters always hold the mean, except inside :meth:`step`'s calls of ``fitness_fn``;
        ``self.parameters`` are those that are perturbed, by name
    :param population_size: members N per generation, even; not pairs
    :param sigma: scale of the perturbation, or a function of the generation
    :param rank: rank of each weight matrix's perturbation, clamped to its smaller side
    :param learning_rate: the optimizer's step size, or a function of the generation
    :param seed: determines all noise; None draws one, kept in ``self.seed``
    :param optimizer: any ``torch.optim`` class
    :param optimizer_kwargs: more arguments for the optimizer
    :param weight_decay: passed to the optimizer
    :param max_grad_norm: clip the gradient's global norm
    :param fitness_shaping: a name in :data:`eggroll_rl.fitness.FITNESS_SHAPING` or a function of fitness (N,)
    :param best_fraction: share of pairs that ``fitness_shaping="best_fraction"`` keeps
    :param slice_size: members per slice (even), for those who evaluate slice by slice
    :raises ConfigError: a setting is wrong
    :raises UnsupportedModuleError: a layer cannot be perturbed exactly
    """

    def __init__(
        self,
        module: nn.Module,
        population_size: int = 64,
        sigma: float | GenerationSchedule = 0.05,
        rank: int = 1,
        learning_rate: float | GenerationSchedule = 0.03,
        seed: int | None = None,
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        fitness_shaping: str | FitnessShaping = "centered_rank",
        best_fraction: float | None = None,
        slice_size: int = 64,
    ):
        check_population(population_size, rank, slice_size)
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        check_whole("seed", seed, 0)
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        self.module = module
        self.population_size = population_size
        self.rank = rank
        self.seed = seed
        self.slice_size = slice_size
        self.max_grad_norm = max_grad_norm
        self.fitness_shaping = make_fitness_shaping(fitness_shaping, best_fraction)
        self.generation = 0
        self._sigma = sigma
        self._learning_rate = learning_rate
        self.parameters = {p.name: p.parameter for p in perturbed_parameters(module)}
        self._population: Population | None = None
        for name, value in (("sigma", sigma), ("learning_rate", learning_rate)):
            if not callable(value):
                check_positive(name, value)
        kwargs = {"lr": self.learning_rate, **(optimizer_kwargs or {})}
        if "weight_decay" in inspect.signature(optimizer).parameters:
            kwargs.setdefault("weight_decay", weight_decay)
        elif weight_decay:
            raise ConfigError(f"weight_decay={weight_decay!r}: {optimizer.__name__} has no weight decay")
        if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
            raise ConfigError(f"optimizer {optimizer.__name__} evaluates a loss itself, which evolution has not")
        try:
            self.optimizer = optimizer(list(self.parameters.values()), **kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer {optimizer.__name__} refuses its settings: {error}") from error

    @property
    def sigma(self) -> float:
        """Noise scale of the current generation."""
        return self._sigma(self.generation) if callable(self._sigma) else self._sigma

    @property
    def learning_rate(self) -> float:
        """Step size of the current generation."""
        return self._learning_rate(self.generation) if callable(self._learning_rate) else self._learning_rate

    def ask(self) -> Population:
        """Return the current generation's members; the same ones until :meth:`tell`."""
        sigma = self.sigma
        check_positive("sigma", sigma)
        noise = Noise(self.seed, self.generation, self.population_size, sigma, self.rank, self.slice_size)
        if self._population is None or self._population.noise != noise:
            self._population = Population(self.module, noise)
        return self._population

    def tell(self, fitness: Tensor | np.ndarray | list[float]) -> dict[str, float]:
        """Update the mean from the fitness (N,) of the members of :meth:`ask`, higher is better.

        The update is transactional: if anything in it is not finite, parameters and optimizer stay as they were.

        :return: fitness_mean, fitness_std, fitness_max, grad_norm (before clipping), update_ratio
            (norm of the step over the norm of the parameters), sigma, learning_rate
        :raises NonFiniteError: a fitness or the update is NaN or infinite
        """
        if self._population is None:
            raise RuntimeError("tell() without ask(): there is no generation to update from")
        fitness = torch.as_tensor(fitness, dtype=torch.float64).detach().cpu()
        if fitness.shape != (self.population_size,):
            raise ValueError(f"fitness must have shape ({self.population_size},), got {tuple(fitness.shape)}")
        if not fitness.isfinite().all():
            member = int((~fitness.isfinite()).nonzero()[0])
            raise NonFiniteError(
                f"fitness of member {member} in generation {self.generation} is {fitness[member].item()}: "
                "nothing was updated"
            )
        with one_thread():
            utilities = self.fitness_shaping(fitness).to(torch.float64)
            gradient = estimate_gradient(self.module, self._population.noise, utilities)
            grad_norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
            update_ratio = self._step(gradient, grad_norm)
        metrics = {
            "fitness_mean": fitness.mean().item(),
            "fitness_std": fitness.std(correction=0).item(),
            "fitness_max": fitness.max().item(),
            "grad_norm": grad_norm,
            "update_ratio": update_ratio,
            "sigma": self._population.noise.sigma,
            "learning_rate": self.learning_rate,
        }
        self.end_generation()
        return metrics

    def step(self, fitness_fn: Callable[[nn.Module], float]) -> dict[str, float]:
        """Run one generation, one member at a time: ``fitness_fn(module)`` sees the member's parameters.

        The mean is put back exactly, whatever ``fitness_fn`` raises. :meth:`ask` with
        ``population.forward`` evaluates all members in one call and is much faster.

        :return: as :meth:`tell`
        """
        population = self.ask()
        mean = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        fitness = []
        try:
            for member in range(len(population)):
                # parameters_of reads the module, which must hold the mean.
                self.set_parameters(mean)
                self.set_parameters(population.parameters_of(member))
                fitness.append(float(fitness_fn(self.module)))
        finally:
            self.set_parameters(mean)
        return self.tell(fitness)

    def end_generation(self) -> None:
        """Go on to the next generation, for those who update the parameters themselves."""
        self.generation += 1
        self._population = None

    def state_dict(self) -> dict[str, Any]:
        """Return what, beside the module's own state, continues the run to the bit."""
        return {"seed": self.seed, "generation": self.generation, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.seed, self.generation = state["seed"], state["generation"]
        self._population = None

    @torch.no_grad()
    def _step(self, gradient: dict[str, Tensor], grad_norm: float) -> float:
        """Apply the gradient or raise and change nothing; return the update ratio."""
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the update of generation {self.generation} is not finite: nothing was updated")
        clip = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / (grad_norm + 1e-12))
        before = {name: parameter.clone() for name, parameter in self.parameters.items()}
        was = _flat(before)
        # As a deepcopy of its state_dict() would, at half the cost.
        groups_before = [{k: _copy(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        state_before = {p: {k: _copy(v) for k, v in entry.items()} for p, entry in self.optimizer.state.items()}
        for name, parameter in self.parameters.items():
            # torch minimises, we maximise.
            parameter.grad = gradient[name].mul(-clip).to(parameter.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        now = _flat(self.parameters)
        changed = [now]
        for entry in self.optimizer.state.values():
            changed += [value for value in entry.values() if isinstance(value, Tensor)]
        if not all(tensor.isfinite().all() for tensor in changed):
            self.set_parameters(before)
            self.optimizer.state.clear()
            self.optimizer.state.update(state_before)
            for group, kept in zip(self.optimizer.param_groups, groups_before, strict=True):
                for key in group.keys() - kept.keys() - {"params"}:
                    del group[key]
                group.update(kept)
            raise NonFiniteError(f"the step of generation {self.generation} is not finite: nothing was updated")
        step, size = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (now - was, was))
        return step / size if size > 0 else math.inf

    @torch.no_grad()
    def set_parameters(self, values: dict[str, Tensor]) -> None:
        """Copy the mean from tensors by name."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
