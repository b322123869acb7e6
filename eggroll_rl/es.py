"""``EvolutionStrategy``: EGGROLL for an ``nn.Module`` and any fitness. We maximise.

One update convention, used everywhere. With shaped fitness u, sign s and perturbation E of :mod:`eggroll_rl.lowrank`,

    g = (1/N) sum_n u_n s_n E_n,    p.grad = -g,    optimizer.step()

which is the paper's Eq. 6 with 1/sigma absorbed in the learning rate. HyperscaleES's step with SGD,
``lr · sigma · sqrt(N) · g``, is therefore ``learning_rate = lr · sigma · sqrt(N)`` here.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from eggroll_rl.checks import (
    check_arguments_table,
    check_flag,
    check_not_negative,
    check_population,
    check_positive,
    check_whole,
    is_whole,
    shown,
)
from eggroll_rl.errors import ConfigError, NonFiniteError
from eggroll_rl.fitness import (
    FITNESS_SHAPING,
    FitnessShaping,
    in_range,
    make_fitness_shaping,
    pair_rank,
    sign_of_pair,
    standardize_groups,
)
from eggroll_rl.fitness import best_fraction as best_fraction_
from eggroll_rl.lowrank import ContractElsewhere, ParamFilter, estimate_gradient, perturbed_parameters
from eggroll_rl.noise import LowRank, Noise, NoiseFamily, make_family
from eggroll_rl.population import Population
from eggroll_rl.schedules import GenerationSchedule


@dataclass(frozen=True)
class BestMember:
    """The member with the highest fitness of all generations so far, by its own score, which luck is part of.

    :param parameters: its perturbed parameters, by name
    """

    fitness: float
    generation: int
    member: int
    parameters: dict[str, Tensor]


def _flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values.values()])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


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


def check_optimizer(
    optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer,
    optimizer_kwargs: dict[str, Any] | None,
    weight_decay: float,
) -> dict[str, Any]:
    """Refuse an optimizer, or settings of it, that cannot update; a class is tried on a parameter of its own.

    :return: the arguments of a class, but for the parameters and ``lr``
    :raises ConfigError: it is none, needs a loss, refuses its settings, or the step fails
    """
    made = isinstance(optimizer, torch.optim.Optimizer)
    kind: Any = type(optimizer) if made else optimizer
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer must be a torch.optim class, or an optimizer, got {shown(optimizer)}")
    check_not_negative("weight_decay", weight_decay)
    check_arguments_table("optimizer_kwargs", optimizer_kwargs)
    kwargs = dict(optimizer_kwargs or {})
    has_decay = "weight_decay" in inspect.signature(kind).parameters
    if weight_decay and not has_decay:
        raise ConfigError(f"weight_decay={weight_decay!r}: {kind.__name__} has no weight decay")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(f"optimizer {kind.__name__} evaluates a loss itself, which evolution has not")
    if made:
        if kwargs or weight_decay:
            raise ConfigError("optimizer_kwargs and weight_decay are for an optimizer class; this one is made already")
        return {}
    _check_optimizer_kwargs(kwargs, weight_decay)
    if has_decay:
        kwargs.setdefault("weight_decay", weight_decay)
    # Of two dimensions, as Muon takes no other. Nothing is drawn from a generator.
    trial = torch.ones(2, 2, requires_grad=True)
    tried = _built(kind, [trial], {"lr": 0.01, **kwargs})
    trial.grad = torch.ones(2, 2)
    try:
        tried.step()
    except Exception as error:  # of anybody's optimizer
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"optimizer {kind.__name__} with optimizer_kwargs={shown(kwargs)} fails: {what}") from error
    if not trial.isfinite().all():
        raise ConfigError(f"optimizer {kind.__name__} with optimizer_kwargs={shown(kwargs)} makes a step of NaN")
    return kwargs


def _check_optimizer_kwargs(kwargs: dict[str, Any], weight_decay: float) -> None:
    if "lr" in kwargs:
        raise ConfigError(f"optimizer_kwargs must leave lr to learning_rate, got {shown(kwargs['lr'])}")
    if kwargs.get("maximize"):
        raise ConfigError("optimizer_kwargs must leave maximize alone: the fitness is maximised as it is")
    if weight_decay and "weight_decay" in kwargs:
        raise ConfigError(
            f"weight_decay={weight_decay!r}, but optimizer_kwargs has {shown(kwargs['weight_decay'])}: give one"
        )
    for name, value in kwargs.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"optimizer_kwargs {name} must be finite, got {shown(value)}")


def _built(kind: Any, parameters: list[Tensor], kwargs: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        return kind(parameters, **kwargs)
    except Exception as error:  # of anybody's optimizer
        given = {name: value for name, value in kwargs.items() if name != "lr"}
        raise ConfigError(
            f"optimizer {kind.__name__} refuses its settings, optimizer_kwargs={shown(given)}: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ConfigError(f"module must be a torch.nn.Module, got {shown(module)}")


def _check_function(name: str, function: object) -> None:
    if function is not None and not callable(function):
        raise ConfigError(f"{name} must be a function or None, got {shown(function)}")


def _rank_of(family: NoiseFamily, rank: int) -> int:
    if isinstance(family, LowRank):
        return family.rank
    if rank != 1:
        raise ConfigError(f"rank={rank!r} has no effect with noise={family!r}, which is not of low rank")
    return rank


def _constant_or_function(name: str, value: Any) -> Any:
    if callable(value):
        return value
    check_positive(name, value)
    return float(value)


class EvolutionStrategy:
    """Low-rank evolution strategy over the parameters of a module (EGGROLL, arXiv 2511.16652).

    >>> es = EvolutionStrategy(module, population_size=256, sigma=0.1, seed=0)
    >>> population = es.ask()
    >>> outputs = population.forward(inputs)  # (256, batch, ...), one call
    >>> metrics = es.tell(fitness)  # (256,), higher is better

    Linear, convolution, embedding, recurrent and attention layers are perturbed by factors; all other parameters, of
    any module, by noise of their own shape. Frozen parameters stay, tied ones stay tied.

    :param module: anything whose forward is a function of its inputs and parameters; see
        :mod:`eggroll_rl.population`. Its parameters always hold the mean, except inside :meth:`step`'s calls of
        ``fitness_fn``; ``self.parameters`` are those that are perturbed, by name
    :param population_size: members N per generation, even; not pairs
    :param sigma: scale of the perturbation, or a function of the generation (:mod:`eggroll_rl.schedules`)
    :param rank: rank of each weight matrix's perturbation, clamped to its smaller side
    :param learning_rate: the optimizer's step size, or a function of the generation; not with an optimizer that is
        made already, nor with ``lr_scheduler``: they have their own
    :param seed: determines all noise; None draws one, kept in ``self.seed``
    :param optimizer: any ``torch.optim`` class, or an optimizer of the module's parameters
    :param optimizer_kwargs: more arguments for the optimizer
    :param weight_decay: passed to the optimizer
    :param max_grad_norm: clip the gradient's global norm
    :param fitness_shaping: a name in :data:`eggroll_rl.fitness.FITNESS_SHAPING` or a function of fitness (N,)
    :param best_fraction: share of pairs that ``fitness_shaping="best_fraction"`` keeps
    :param group_size: members per group, even, for ``fitness_shaping="standardize"``: each is compared with the mean of
        its group, in units of the deviation of all
    :param baseline: evaluate the first two members of each group, or of the population, at the mean itself, and compare
        the others with these; as ``group_size`` for ``"standardize"``
    :param noise: a name in :data:`eggroll_rl.noise.FAMILIES` or a :class:`eggroll_rl.noise.NoiseFamily`
    :param antithetic: evaluate each direction forwards and backwards, as members 2k and 2k + 1; else each member has a
        direction of its own
    :param noise_reuse: generations that share the same noise: 1 is new noise each time, 0 the same for ever
    :param param_filter: ``param_filter(name, parameter)`` says what is perturbed, of what requires grad
    :param freeze_nonmatrix: perturb weight matrices alone
    :param lr_scheduler: function that makes a torch scheduler of the optimizer; it is stepped after each update
    :param track_best: keep the best member of all generations in ``self.best``
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
        learning_rate: float | GenerationSchedule | None = None,
        seed: int | None = None,
        optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        fitness_shaping: str | FitnessShaping = "centered_rank",
        best_fraction: float | None = None,
        group_size: int | None = None,
        baseline: bool = False,
        noise: str | NoiseFamily = "lowrank",
        antithetic: bool = True,
        noise_reuse: int = 1,
        param_filter: ParamFilter | None = None,
        freeze_nonmatrix: bool = False,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        track_best: bool = True,
        slice_size: int = 64,
    ):
        _check_module(module)
        check_population(population_size, rank, slice_size)
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        check_whole("seed", seed, 0, most=None)
        check_whole("noise_reuse", noise_reuse, 0)
        for name, flag in (
            ("baseline", baseline), ("antithetic", antithetic), ("freeze_nonmatrix", freeze_nonmatrix),
            ("track_best", track_best),
        ):  # fmt: skip
            check_flag(name, flag)
        _check_function("param_filter", param_filter)
        _check_function("lr_scheduler", lr_scheduler)
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        # torch.compile's wrapper computes the module that it wraps, whatever stands in it.
        self.module: nn.Module = getattr(module, "_orig_mod", module)
        self.population_size = int(population_size)
        self.rank = int(rank)
        self.seed = int(seed)
        self.slice_size = int(slice_size)
        self.max_grad_norm = max_grad_norm
        self.antithetic = antithetic
        self.noise_reuse = int(noise_reuse)
        self.family = make_family(noise, self.rank)
        self.rank = _rank_of(self.family, self.rank)
        self.fitness_shaping = self._shaping(fitness_shaping, best_fraction, group_size, baseline)
        self._in_groups = baseline or group_size is not None
        self.baseline_group = (group_size or population_size) if baseline else 0
        self.generation = 0
        self.best: BestMember | None = None
        self.missing: list[int] = []
        self.track_best = track_best
        self._perturbed = perturbed_parameters(self.module, param_filter, freeze_nonmatrix)
        self.parameters = {p.name: p.parameter for p in self._perturbed}
        self._population: Population | None = None
        self._last_step: Tensor | None = None
        own_rate = isinstance(optimizer, torch.optim.Optimizer)
        if learning_rate is not None and own_rate:
            raise ConfigError(f"learning_rate={shown(learning_rate)}: the optimizer that was given has its own")
        if callable(learning_rate) and lr_scheduler is not None:
            raise ConfigError("learning_rate must be a number where lr_scheduler changes it")
        self._sigma = _constant_or_function("sigma", sigma)
        self._learning_rate = _constant_or_function("learning_rate", 0.03 if learning_rate is None else learning_rate)
        self.optimizer = self._make_optimizer(optimizer, optimizer_kwargs, weight_decay)
        self._sets_rate = not own_rate and lr_scheduler is None
        self.lr_scheduler = None if lr_scheduler is None else lr_scheduler(self.optimizer)
        if isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError("lr_scheduler ReduceLROnPlateau waits for a metric: step it yourself, with tell()'s")

    def _shaping(
        self, shaping: str | FitnessShaping, best_fraction: float | None, group_size: int | None, baseline: bool
    ) -> FitnessShaping:
        made = make_fitness_shaping(shaping, best_fraction)
        if not self.antithetic and getattr(made, "func", made) in (best_fraction_, pair_rank, sign_of_pair):
            raise ConfigError(
                f"fitness_shaping={shown(shaping)} compares the members of pairs: it needs antithetic=True"
            )
        if group_size is None and not baseline:
            return made
        if group_size is not None:
            check_whole("group_size", group_size, 4 if baseline else 2)
        for name, value in (("group_size", group_size), ("baseline", baseline)):
            if value and made is not FITNESS_SHAPING["standardize"]:
                raise ConfigError(f"{name}={value!r} needs fitness_shaping='standardize', got {shown(shaping)}")
        if group_size is not None:
            if group_size % 2 or self.population_size % group_size:
                raise ConfigError(
                    f"group_size must be even and divide population_size {self.population_size}, got {group_size}"
                )
        elif self.population_size < 4:
            raise ConfigError(f"baseline needs a population_size of at least 4, got {self.population_size}")
        return functools.partial(standardize_groups, group_size=group_size or self.population_size, baseline=baseline)

    def _make_optimizer(
        self, optimizer: Any, optimizer_kwargs: dict[str, Any] | None, weight_decay: float
    ) -> torch.optim.Optimizer:
        kwargs = check_optimizer(optimizer, optimizer_kwargs, weight_decay)
        if not isinstance(optimizer, torch.optim.Optimizer):
            return _built(optimizer, list(self.parameters.values()), {"lr": self.learning_rate, **kwargs})
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        lacking = [name for name, parameter in self.parameters.items() if id(parameter) not in held]
        if lacking:
            raise ConfigError(f"the optimizer that was given lacks the parameters {', '.join(lacking)}")
        return optimizer

    @property
    def sigma(self) -> float:
        """Noise scale of the current generation."""
        return self._sigma(self.generation) if callable(self._sigma) else self._sigma

    @property
    def learning_rate(self) -> float:
        """Step size of the current generation; the first group's, where optimizer or scheduler have their own."""
        if not getattr(self, "_sets_rate", True):
            return float(self.optimizer.param_groups[0]["lr"])
        return self._learning_rate(self.generation) if callable(self._learning_rate) else self._learning_rate

    def ask(self) -> Population:
        """Return the current generation's members; the same ones until :meth:`tell`."""
        sigma = self.sigma
        check_positive("sigma", sigma)
        of_noise = self.generation // self.noise_reuse if self.noise_reuse else 0
        noise = Noise(
            self.seed, of_noise, self.population_size, sigma, self.family, self.slice_size, self.antithetic,
            self.baseline_group,
        )  # fmt: skip
        if self._population is None or self._population.noise != noise:
            self._population = Population(self.module, noise, parameters=self._perturbed)
        return self._population

    def tell(
        self,
        fitness: Tensor | np.ndarray | list[float] | Mapping[int, float],
        partial: bool = False,
        elsewhere: ContractElsewhere | None = None,
    ) -> dict[str, float]:
        """Update the mean from the fitness (N,) of the members of :meth:`ask`, higher is better.

        The update is transactional: if anything in it is not finite, parameters and optimizer stay as they were.

        :param fitness: of all members, or by member where some gave none
        :param partial: go on without the members whose fitness is missing or not finite, and without those that
            they are a pair with; ``self.missing`` names them. Else they are an error
        :param elsewhere: who may sum up the perturbations in place of this process: a cluster, for large populations
        :return: fitness_mean, fitness_std, fitness_max, grad_norm (before clipping), update_ratio (norm of the step
            over the norm of the parameters), update_cosine (with the step before; 0 for the first), sigma,
            learning_rate; with antithetic pairs pair_snr, the variance of the difference within pairs over the one
            that independent scores would have: 1 is noise alone
        :raises NonFiniteError: a fitness or the update is NaN or infinite
        """
        if self._population is None:
            raise RuntimeError("tell() without ask(): there is no generation to update from")
        fitness = self._as_vector(fitness)
        used = fitness.isfinite()
        self.missing = (~used).nonzero().flatten().tolist()
        if self.missing:
            member = self.missing[0]
            what = f"fitness of member {member} in generation {self.generation} is {fitness[member].item()}"
            if not partial:
                raise NonFiniteError(f"{what}: nothing was updated")
            if self._in_groups:
                raise NonFiniteError(f"{what}, and its group cannot be compared without it: nothing was updated")
            if self.antithetic:
                used = used.view(-1, 2).all(1).repeat_interleave(2)
            if used.sum() < 2:
                raise NonFiniteError(f"{what}, and too few others are left: nothing was updated")
        with one_thread():
            utilities = torch.zeros_like(fitness)
            shaped = self._shaped(fitness[used])
            # The update is a mean over members: over those that are there.
            utilities[used] = shaped if not self.missing else shaped * (len(fitness) / len(shaped))
            noise = self._population.noise
            gradient = estimate_gradient(self._perturbed, noise, utilities, self._population.draw, elsewhere)
            grad_norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
            best = self._best_of(fitness, used)  # before the mean moves
            rate = self.learning_rate
            if not (math.isfinite(rate) and rate >= 0):
                raise ConfigError(f"learning_rate must be 0 or more, got {rate!r} in generation {self.generation}")
            update_ratio, cosine = self._step(gradient, grad_norm)
        self.best = best
        fitness = fitness[used]
        metrics = {
            "fitness_mean": fitness.mean().item(),
            "fitness_std": fitness.std(correction=0).item(),
            "fitness_max": fitness.max().item(),
            "grad_norm": grad_norm,
            "update_ratio": update_ratio,
            "update_cosine": cosine,
            "sigma": noise.sigma,
            "learning_rate": rate,
        }
        if self.antithetic:
            metrics["pair_snr"] = _pair_snr(fitness)
        self.end_generation()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return metrics

    def _shaped(self, fitness: Tensor) -> Tensor:
        shaped = self.fitness_shaping(fitness.clone())
        if not isinstance(shaped, Tensor) or shaped.shape != fitness.shape:
            what = tuple(shaped.shape) if isinstance(shaped, Tensor) else shown(shaped)
            raise ConfigError(f"fitness_shaping must return a tensor of shape {tuple(fitness.shape)}, got {what}")
        return shaped.detach().to(torch.float64)

    def _as_vector(self, fitness: Any) -> Tensor:
        if isinstance(fitness, Mapping):
            outside = [member for member in fitness if not (is_whole(member) and 0 <= member < self.population_size)]
            if outside:
                raise ValueError(f"fitness names member {outside[0]!r}; members are 0 .. {self.population_size - 1}")
            fitness = [fitness.get(member, math.nan) for member in range(self.population_size)]
        try:
            given = torch.as_tensor(fitness, dtype=None if hasattr(fitness, "dtype") else torch.float64)
            if given.is_complex():
                raise ValueError("complex numbers have no order")
            # Its own memory: a caller's array may change before the update.
            vector = given.detach().to("cpu", torch.float64, copy=True)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"fitness must be {self.population_size} numbers, got {shown(fitness)}: {error}"
            ) from error
        if vector.shape != (self.population_size,):
            raise ValueError(f"fitness must have shape ({self.population_size},), got {tuple(vector.shape)}")
        return vector

    def _best_of(self, fitness: Tensor, used: Tensor) -> BestMember | None:
        if not self.track_best:
            return None
        member = int(torch.where(used, fitness, -math.inf).argmax())
        score = fitness[member].item()
        if self.best is not None and score <= self.best.fitness:
            return self.best
        assert self._population is not None
        return BestMember(score, self.generation, member, self._population.parameters_of(member))

    def step(self, fitness_fn: Callable[[nn.Module], float], evaluate_mean: bool = False) -> dict[str, float]:
        """Run one generation, one member at a time: ``fitness_fn(module)`` sees the member's parameters.

        The mean is put back exactly, whatever ``fitness_fn`` raises. :meth:`ask` with
        ``population.forward`` evaluates all members in one call and is much faster.

        :param evaluate_mean: call it once more after the update
        :return: as :meth:`tell`; with ``evaluate_mean`` also fitness_of_mean
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
        metrics = self.tell(fitness)
        if evaluate_mean:
            metrics["fitness_of_mean"] = float(fitness_fn(self.module))
        return metrics

    def end_generation(self) -> None:
        """Go on to the next generation, for those who update the parameters themselves."""
        self.generation += 1
        self._population = None

    def state_dict(self) -> dict[str, Any]:
        """Return what, beside the module's own state, continues the run to the bit: a copy, which later updates leave.

        The module's state is not in it: ``module.state_dict()`` has it, by reference.
        """
        state = {"seed": self.seed, "generation": self.generation, "optimizer": self.optimizer.state_dict()}
        state |= {"best": None if self.best is None else dict(vars(self.best)), "last_step": self._last_step}
        if self.lr_scheduler is not None:
            state["lr_scheduler"] = self.lr_scheduler.state_dict()
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, which stays as it is.

        :raises ConfigError: something is missing or does not fit; nothing was loaded
        """
        state = copy.deepcopy(self._checked_state(state))
        best = state.get("best")
        before = copy.deepcopy(self.optimizer.state_dict())
        try:
            best = None if best is None else BestMember(**best)
            self.optimizer.load_state_dict(state["optimizer"])
            if self.lr_scheduler is not None:
                self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        except Exception as error:  # of anybody's optimizer and scheduler
            self.optimizer.load_state_dict(before)
            raise ConfigError(f"the state does not fit: {type(error).__name__}: {error}") from error
        self.seed, self.generation = state["seed"], state["generation"]
        self.best, self._last_step = best, state.get("last_step")
        self._population = None

    def _checked_state(self, state: dict[str, Any]) -> dict[str, Any]:
        needed = ["seed", "generation", "optimizer"] + ["lr_scheduler"] * (self.lr_scheduler is not None)
        if not isinstance(state, dict) or not all(name in state for name in needed):
            raise ConfigError(f"a state must be a dict with {', '.join(needed)}, got {shown(state)}")
        check_whole("seed of the state", state["seed"], 0, most=None)
        check_whole("generation of the state", state["generation"], 0)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = state["optimizer"].get("state") if isinstance(state["optimizer"], dict) else None
        if not isinstance(moments, dict):
            raise ConfigError(f"optimizer of the state must be that of an optimizer, got {shown(state['optimizer'])}")
        for index, entry in moments.items():
            for name, value in entry.items():
                fits = index in range(len(parameters)) and _fits(value, parameters[index])
                if not fits:
                    raise ConfigError(f"optimizer of the state: {name} of parameter {index} is of another module")
        last = state.get("last_step")
        size = sum(parameter.numel() for parameter in self.parameters.values())
        if last is not None and (not isinstance(last, Tensor) or last.shape != (size,)):
            raise ConfigError(f"last_step of the state must have the shape ({size},), got {shown(last)}")
        return state

    @torch.no_grad()
    def _step(self, gradient: dict[str, Tensor], grad_norm: float) -> tuple[float, float]:
        """Apply the gradient or raise and change nothing; return the update ratio and the cosine with the last step."""
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
        if self._sets_rate:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate
        failed = self._try_step()
        now = _flat(self.parameters)
        changed = [now]
        for entry in self.optimizer.state.values():
            changed += [value for value in entry.values() if isinstance(value, Tensor)]
        if failed is not None or not all(tensor.isfinite().all() for tensor in changed):
            self.set_parameters(before)
            self._put_back(groups_before, state_before)
            if failed is not None and "overflow" not in str(failed):  # torch's word for a rate beyond float32
                raise failed
            raise NonFiniteError(
                f"the step of generation {self.generation} is not finite: nothing was updated"
            ) from failed
        moved = now - was
        step, size = (torch.linalg.vector_norm(v, dtype=torch.float64).item() for v in (moved, was))
        cosine = 0.0
        if self._last_step is not None:
            cosine = torch.cosine_similarity(moved.double(), self._last_step.double(), dim=0).item()
        self._last_step = moved
        return (step / size if size > 0 else math.inf), cosine

    def _try_step(self) -> Exception | None:
        try:
            self.optimizer.step()
        except Exception as error:  # of anybody's optimizer, in the middle of its step
            return error
        finally:
            self.optimizer.zero_grad()
        return None

    def _put_back(self, groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> None:
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        for group, kept in zip(self.optimizer.param_groups, groups, strict=True):
            for key in group.keys() - kept.keys() - {"params"}:
                del group[key]
            group.update(kept)

    @torch.no_grad()
    def set_parameters(self, values: dict[str, Tensor]) -> None:
        """Copy the mean from tensors by name."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def _fits(value: object, parameter: Tensor) -> bool:
    """Say whether a value of an optimizer's state can belong to a parameter. torch would not look."""
    if not isinstance(value, Tensor):
        return True
    # A counter is a number; a moment has the parameter's shape, or Adafactor's that of its rows or columns.
    try:
        return torch.broadcast_shapes(value.shape, parameter.shape) == parameter.shape
    except RuntimeError:
        return False


def _pair_snr(fitness: Tensor) -> float:
    pairs = in_range(fitness).view(-1, 2)
    # Of independent scores of variance v, the differences have 2v, and the means v/2.
    difference, mean = ((pairs[:, 0] - pairs[:, 1]).square().mean(), pairs.mean(1).var(correction=0))
    if difference == 0:
        return 0.0
    return (difference / (4 * mean)).item() if mean > 0 else math.inf
