"""Pictures of what the benchmarks measured."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from eggroll_rl.bench_peers import PEERS
from eggroll_rl.bench_scaling import modelled
from eggroll_rl.errors import ConfigError
from eggroll_rl.plots import COLOURS, figure_class


def _figure(rows: float) -> tuple[Any, Any]:
    figure = figure_class()(figsize=(9, 1.6 + rows), layout="constrained")
    return figure, figure.subplots()


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be written, before the measuring starts.

    :raises ConfigError: matplotlib is missing, or the ending or the folder is wrong
    """
    _figure(0)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"cannot write {path}: the name must end in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")


def plot_throughput(results: list[dict[str, Any]], path: Path) -> None:
    """Draw env steps per second as parts of the raw C limit, one group of bars per env."""
    names = [name for name in ("training", *PEERS) if any(name in r["median_ratio"] for r in results)]
    figure, axes = _figure(0.14 * len(names) * len(results) + 0.2 * len(results))
    height = 0.8 / len(names)
    most, drawn = 1.0, set()
    for i, name in enumerate(names):
        for row, result in enumerate(results):
            ratio = result["median_ratio"].get(name)
            if ratio is None:
                continue
            y = row + (i - (len(names) - 1) / 2) * height
            axes.barh(y, ratio, height, color=COLOURS[i % len(COLOURS)], label=None if name in drawn else name)
            drawn.add(name)
            most = max(most, ratio)
            rate = statistics.median(result["steps_per_second"][name])
            # White behind it: a label may lie on the line of the limit.
            label = axes.text(ratio, y, f" {ratio:.2f} ({rate:,.0f}/s)", va="center", fontsize=7)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(1, color="black", linewidth=1, zorder=0.5)
    axes.set_yticks(range(len(results)), [result["env_id"] for result in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * most)
    axes.set_xlabel(f"part of the raw MuJoCo C limit on {results[0]['n_workers']} cores (env steps per second)")
    if len(names) > 1:
        figure.legend(loc="outside upper center", ncols=5, fontsize=7)
    else:
        axes.set_title("EGGROLL, whole training", fontsize=9)
    figure.savefig(path, dpi=150)


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """Draw the modelled speed-up over cores, with the sum over the noise here and on the nodes."""
    cores = tuple(int(n) for n in np.unique(np.geomspace(1, 10_000, 60).astype(int)))
    rows = modelled(result, cores)
    figure = figure_class()(figsize=(9, 4), layout="constrained")
    groups = dict.fromkeys((row["policy"], row["population_size"]) for row in rows)
    policies = list(dict.fromkeys(policy for policy, _ in groups))
    for axes, policy in zip(figure.subplots(1, len(policies), squeeze=False, sharey=True)[0], policies, strict=True):
        axes.plot(cores, cores, ":", color="black", linewidth=1, label="as many times as cores")
        sizes = sorted({size for name, size in groups if name == policy})
        for colour, size in zip(COLOURS, sizes, strict=False):
            of_size = [row for row in rows if (row["policy"], row["population_size"]) == (policy, size)]
            one = of_size[0]["here"].total
            for where, style in (("there", "-"), ("here", "--")):
                label = f"{size:,} members" if where == "there" else None
                axes.plot(cores, [one / row[where].total for row in of_size], style, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{policy} policy, slices of {result['costs'][0]['slice_size']}", fontsize=9)
        axes.grid(alpha=0.3)
    figure.supxlabel("cores (the noise is summed up on the nodes, or, dashed, by the driver)", fontsize=9)
    figure.axes[0].set_ylabel(f"times as fast as one core ({result['env_id']})")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


def plot_forward(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of a population's forward beside its two bounds."""
    figure, axes = _figure(1 + 0.2 * len(rows))
    labels = [f"{r['width']} wide, rank {r['rank']}, {r['population_size']} members" for r in rows]
    for i, name in enumerate(("plain", "lowrank", "dense", "update")):
        axes.plot([1000 * r[name] for r in rows], range(len(rows)), "o", color=COLOURS[i], label=name)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds for the whole population, one observation per member, one thread")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
