"""``comparison.png``: return over env steps and over wall-clock, and the time to each threshold."""

import io
from pathlib import Path
from typing import Any

from eggroll_rl import agents
from eggroll_rl.compare_report import budget_in_words, display_name, number
from eggroll_rl.plots import COLOURS, figure_class

# For print, beside the colours.
_LINES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1)),
    (0, (1, 1)),
    (0, (5, 5)),
    (0, (3, 5, 1, 5)),
    (0, (5, 2, 1, 2)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def plot_comparison(comparison: dict[str, Any], path: Path) -> None:
    """Draw what :func:`eggroll_rl.compare_report.summarize` returned.

    :raises ConfigError: matplotlib is missing
    """
    thresholds = comparison["thresholds"]
    figure = figure_class()(figsize=(13 if thresholds else 10, 4.8), layout="constrained")
    panels = figure.subplots(1, 3 if thresholds else 2, width_ratios=[3, 3, 2] if thresholds else [1, 1])
    n_seeds = {len(its["runs"]) for its in comparison["algorithms"].values()}
    _draw_curves(panels[0], comparison, "timesteps")
    _draw_curves(panels[1], comparison, "seconds")
    panels[0].set_xlabel("env steps (log scale)")
    panels[0].set_xscale("symlog", linthresh=10_000, linscale=0.3)
    panels[0].set_xlim(left=0)
    panels[1].set_xlim(left=0)
    for source, threshold in thresholds.items():
        panels[0].annotate(
            f"{number(threshold)} ({source})", (0.02, threshold), xycoords=("axes fraction", "data"), va="bottom",
            fontsize=8,
        )  # fmt: skip
    panels[0].set_ylabel("return of the deterministic policy")
    panels[1].set_xlabel("wall-clock in seconds, evaluation not counted")
    panels[1].sharey(panels[0])
    if thresholds:
        _draw_bars(panels[2], comparison)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    seeds = f"{' or '.join(map(str, sorted(n_seeds)))} {'seed' if n_seeds == {1} else 'seeds'}"
    figure.suptitle(
        f"{comparison['env_id']}: {seeds} each, {budget_in_words(comparison['rules'])} per run on "
        f"{comparison['rules']['n_cores']} cores. Thick: interquartile mean; band: its 95 % bootstrap interval; "
        "thin: seeds",
        fontsize=10,
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, metadata={"Software": None})
    agents.write_atomic(path, picture.getvalue())


def _draw_curves(axes: Any, comparison: dict[str, Any], axis: str) -> None:
    for (algo, its), (colour, line, marker) in zip(comparison["algorithms"].items(), _styles(), strict=False):
        for run in its["runs"]:
            means = [sum(returns) / len(returns) for returns in run["returns"]]
            axes.plot(run[axis], means, color=colour, linewidth=0.6, alpha=0.45)
        curve = its["curves"][axis]
        axes.plot(
            curve["x"], curve["iqm"], color=colour, linestyle=line, marker=marker, markersize=4,
            markevery=max(len(curve["x"]) // 6, 1), linewidth=2, label=display_name(algo),
        )  # fmt: skip
        axes.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)
    for threshold in comparison["thresholds"].values():
        axes.axhline(threshold, color="black", linewidth=0.8, linestyle=(0, (2, 2)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Any, comparison: dict[str, Any]) -> None:
    rows, ticks, row = [], [], 0
    for source in comparison["thresholds"]:
        for (algo, its), (colour, _, marker) in zip(comparison["algorithms"].items(), _styles(), strict=False):
            reached = its["to_threshold"][source]
            times = [seconds for seconds in reached["seconds"] if seconds is not None]
            said = f"{len(times)} of {len(reached['seconds'])}"
            if reached["median_seconds"] is not None:
                axes.barh(row, reached["median_seconds"], color=colour, height=0.6, alpha=0.55)
                said = f"{reached['median_seconds']:.0f} s, {said}"
            axes.plot(times, [row] * len(times), marker, color=colour, markeredgecolor="black", markersize=6)
            end = max([*times, reached["median_seconds"] or 0.0])
            rows.append((row, end, said))
            ticks.append((row, f"{display_name(algo).partition(' (')[0]} to {number(reached['threshold'])}"))
            row += 1
        row += 1  # a gap between thresholds
    longest = comparison["rules"].get("seconds") or max(end for _, end, _ in rows) or 1.0
    for at, end, said in rows:
        axes.annotate(f"  {said}", (end, at), va="center", fontsize=8)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set_xlim(0, longest * 1.35)
    axes.set_ylim(row - 1.4, -0.6)
    axes.set_xlabel("seconds to threshold\nbar: median, marks: seeds")
    axes.spines[["top", "right"]].set_visible(False)


def _styles() -> list[Any]:
    return 3 * list(zip(COLOURS, _LINES, _MARKERS, strict=True))
