"""What the low-rank population costs beside its two bounds: no perturbation at all, and one dense matrix per member.

Timed: one observation per member through the whole population, and the update. Memory: the peak of a generation
beyond what the process held before it.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eggroll_rl.es import one_thread
from eggroll_rl.lowrank import estimate_gradient, perturbed_parameters
from eggroll_rl.noise import LowRank, Noise
from eggroll_rl.population import Population

_DENSE_MEMBERS = 64
_HWM, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def forward(
    widths: tuple[int, ...] = (64, 256, 1024),
    ranks: tuple[int, ...] = (1, 4),
    populations: tuple[int, ...] = (64, 1024),
    n_layers: int = 2,
    repetitions: int = 7,
) -> list[dict[str, Any]]:
    """Time square MLPs (``n_layers`` Linear layers with bias, tanh between), on one thread; medians.

    :return: one row per setting, with seconds of ``plain`` (the unperturbed network on the same rows), ``lowrank``
        (the population's forward), ``make_noise`` (once per generation), ``dense`` (one member after the other as a
        dense module, its matrices made from its noise; timed for at most 64 members), ``update``, and
        ``peak_bytes`` of noise, forward and update (None where the system does not tell)
    """
    rows = []
    with one_thread(), torch.no_grad():
        for width in widths:
            for rank in ranks:
                for population_size in populations:
                    rows.append(_measure(width, rank, population_size, n_layers, repetitions))
    return rows


def forward_table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as text: milliseconds for the whole population, and memory."""
    lines = [
        "milliseconds for one observation per member, one thread; of plain: plain's time over low-rank's",
        " width rank members |    plain  low-rank  of plain |     dense  factor |  noise  update |  peak MB  dense MB",
    ]
    for r in rows:
        plain, lowrank, dense, noise, update = (
            1000 * r[name] for name in ("plain", "lowrank", "dense", "make_noise", "update")
        )
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.1f}"
        lines.append(
            f"{r['width']:6} {r['rank']:4} {r['population_size']:7} | {plain:8.3f}  {lowrank:8.3f}  "
            f"{r['plain_over_lowrank']:8.2f} | {dense:9.1f} {r['dense_over_lowrank']:7.0f} | "
            f"{noise:6.1f}  {update:6.1f} | {peak:>8}  {r['dense_bytes'] / 1e6:8.1f}"
        )
    return "\n".join(lines)


def _measure(width: int, rank: int, population_size: int, n_layers: int, repetitions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    layers = [layer for _ in range(n_layers) for layer in (nn.Linear(width, width), nn.Tanh())][:-1]
    network = nn.Sequential(*layers)
    noise = Noise(0, 0, population_size, 0.05, LowRank(rank), min(population_size, 256))
    parameters = perturbed_parameters(network)
    x = torch.randn(population_size, width)
    utilities = torch.randn(population_size, dtype=torch.float64)

    def generation() -> None:
        for first in range(0, population_size, noise.slice_size):
            rows = x[first : first + noise.slice_size]
            Population(network, noise, first, len(rows)).members(rows)
        estimate_gradient(parameters, noise, utilities)

    peak = peak_bytes(generation)
    population = Population(network, noise)
    started = time.perf_counter()
    members = population.members
    make_noise = time.perf_counter() - started
    n_dense = min(population_size, _DENSE_MEMBERS)
    timed: dict[str, Callable[[], object]] = {
        "plain": lambda: network(x),
        "lowrank": lambda: members(x),
        "dense": lambda: _dense(network, noise, x[:n_dense]),
        "update": lambda: estimate_gradient(parameters, noise, utilities),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repetition in range(repetitions + 1):
        for name, run in timed.items():
            if repetition > 2 and name in ("dense", "update"):
                continue  # much slower, and far from any bound
            started = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    result = {name: statistics.median(values) for name, values in seconds.items()}
    result["dense"] *= population_size / n_dense
    return {
        "width": width,
        "rank": rank,
        "population_size": population_size,
        "n_layers": n_layers,
        **result,
        "make_noise": make_noise,
        "plain_over_lowrank": statistics.median(
            a / b for a, b in zip(seconds["plain"], seconds["lowrank"], strict=True)
        ),
        "dense_over_lowrank": result["dense"] / result["lowrank"],
        "peak_bytes": peak,
        "dense_bytes": 4 * population_size * sum(p.numel() for p in network.parameters()),
    }


def _dense(network: nn.Sequential, noise: Noise, x: torch.Tensor) -> torch.Tensor:
    """Evaluate members one by one as dense modules."""
    population = Population(network, noise, 0, len(x))
    outputs = []
    for member in range(len(x)):
        parameters = population.parameters_of(member)
        outputs.append(torch.func.functional_call(network, parameters, (x[member : member + 1],)))
    return torch.cat(outputs)


def peak_bytes(run: Callable[[], None]) -> int | None:
    """Return how far the process's memory rises in ``run``; Linux with glibc only."""
    run()  # allocators and libraries warm up
    try:
        # What was freed must be given back first, or it hides what is taken next.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # put the high-water mark back to what is held now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _status(name: str) -> int:
    line = next(line for line in _HWM.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
