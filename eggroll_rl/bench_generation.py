"""One generation of the core beside torcheggroll's, and beside members that run one after the other.

Everybody has the same MLP, population, rank, batch and loss, on one thread: noise, evaluation of all members on the
same inputs, z-scores, update by plain gradient ascent.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from eggroll_rl.bench_forward import peak_bytes
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import EvolutionStrategy, one_thread

NAMES = ("ours", "torcheggroll", "one_by_one")


def generation(
    widths: tuple[int, ...] = (64, 256),
    batches: tuple[int, ...] = (1, 16, 256),
    population_size: int = 1024,
    repetitions: int = 5,
    names: tuple[str, ...] = NAMES,
) -> list[dict[str, Any]]:
    """Time a generation of two hidden layers, 17 inputs and 6 outputs as HalfCheetah-v5's, in interleaved rounds.

    :param batches: inputs that every member is evaluated on
    :return: one row per setting, with the medians of seconds by name and of each peer's ratio to ours, and
        ``peak_bytes`` by name (None where the system does not tell)
    :raises ConfigError: torcheggroll is missing, or a name is unknown
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown or "ours" not in names:
        raise ConfigError(f"--peers must be some of {', '.join(NAMES[1:])}, got {', '.join(unknown) or 'none of ours'}")
    rows = []
    with one_thread():
        for width in widths:
            for batch in batches:
                x = torch.randn(batch, 17, generator=torch.Generator().manual_seed(0))
                y = torch.randn(batch, 6, generator=torch.Generator().manual_seed(1))
                runs = {name: _RUNS[name](_mlp(width), x, y, population_size) for name in names}
                rows.append({"width": width, "batch": batch, **_measure(runs, repetitions)})
    return rows


def generation_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as text: milliseconds, how many times as long as ours, and peak memory."""
    lines = ["milliseconds of one generation, one thread; (times ours); peak MB beyond the process"]
    for row in rows:
        parts = []
        for name, seconds in row["seconds"].items():
            peak = row["peak_bytes"][name]
            memory = "" if peak is None else f" {peak / 1e6:.0f} MB"
            parts.append(f"{name} {1000 * seconds:.1f} ({row['over_ours'][name]:.1f}){memory}")
        lines.append(f"{row['width']}-{row['width']}, batch {row['batch']:3}:  " + "   ".join(parts))
    return "\n".join(lines)


def _mlp(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(17, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 6)
    ).requires_grad_(True)


def _measure(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, Any]:
    peaks = {name: peak_bytes(run) for name, run in runs.items()}  # a first run, too
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    ratios = {name: [a / b for a, b in zip(s, seconds["ours"], strict=True)] for name, s in seconds.items()}
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "over_ours": {name: statistics.median(values) for name, values in ratios.items()},
        "peak_bytes": peaks,
    }


def _ours(module: nn.Module, x: torch.Tensor, y: torch.Tensor, population_size: int) -> Callable[[], Any]:
    es = EvolutionStrategy(
        module, population_size, seed=0, optimizer=torch.optim.SGD, fitness_shaping="standardize", track_best=False
    )
    return lambda: es.tell(-(es.ask().forward(x) - y).square().mean((1, 2)))


def _torcheggroll(module: nn.Module, x: torch.Tensor, y: torch.Tensor, population_size: int) -> Callable[[], Any]:
    try:
        from torcheggroll import TorchEggrollES
    except ImportError as error:
        raise ConfigError(f"torcheggroll is missing ({error}): pip install 'eggroll-rl[bench]'") from error
    es = TorchEggrollES(module, pop_size=population_size, sigma=0.05, lr=0.03, rank=1)
    return lambda: es.step(x, lambda outputs, targets: (outputs - targets).square().mean(), y)


@torch.no_grad()
def _one_generation(module: nn.Module, x: torch.Tensor, y: torch.Tensor, population_size: int) -> None:
    """Perturb the module itself, run it, put it back, for one member after the other, as the ports with a loop do.

    Each member's noise is drawn from a generator with a seed of its own, and drawn again for the update.
    """
    sigma, rate, generator = 0.05, 0.03, torch.Generator()
    mean = [parameter.clone() for parameter in module.parameters()]

    def draw(member: int) -> list[tuple[torch.Tensor, ...]]:
        generator.manual_seed(member // 2)
        sides = [((p.shape[0], 1), (p.shape[1], 1)) if p.dim() == 2 else (tuple(p.shape),) for p in mean]
        return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for shapes in sides]

    def step(drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return drawn[0] if len(drawn) == 1 else drawn[0] @ drawn[1].t()

    fitness = []
    for member in range(population_size):
        sign = 1 - 2 * (member % 2)
        for parameter, center, drawn in zip(module.parameters(), mean, draw(member), strict=True):
            parameter.copy_(center + sign * sigma * step(drawn))
        fitness.append(-(module(x) - y).square().mean())
    scores = torch.stack(fitness)
    scores = (scores - scores.mean()) / scores.std(correction=0)
    total = [torch.zeros_like(center) for center in mean]
    for member in range(population_size):
        weight = (1 - 2 * (member % 2)) * scores[member] / population_size
        for sum_, drawn in zip(total, draw(member), strict=True):
            sum_.add_(step(drawn) * weight)
    for parameter, center, sum_ in zip(module.parameters(), mean, total, strict=True):
        parameter.copy_(center + rate * sum_)


def _one_by_one(module: nn.Module, x: torch.Tensor, y: torch.Tensor, population_size: int) -> Callable[[], Any]:
    return lambda: _one_generation(module, x, y, population_size)


_RUNS = {"ours": _ours, "torcheggroll": _torcheggroll, "one_by_one": _one_by_one}
