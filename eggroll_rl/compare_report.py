"""What a comparison says: ``comparison.json``, ``comparison.csv``, ``comparison.md`` and ``agents/README.md``."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eggroll_rl import agents
from eggroll_rl.compare_run import Rules
from eggroll_rl.compare_stats import (
    curve_interval,
    first_reached,
    improvement_interval,
    in_words,
    iqm,
    iqm_interval,
    median_reached,
    on_grid,
    probability_of_improvement,
)
from eggroll_rl.training import REPORT_SEED

NAMES = {"eggroll": "EGGROLL", "openes": "OpenES (ours at full rank)"}
_AXES = ("seconds", "timesteps")
_MARK = "<!-- Written by `eggroll-rl compare` from the results beside it: edit those, or the code. -->"


@dataclass(frozen=True)
class Run:
    """A finished run of a comparison.

    :param results: its ``results.json``
    :param evaluations: its curve, with lists of ``timesteps`` and ``seconds`` and of mean ``returns``
    """

    folder: Path
    results: dict[str, Any]
    evaluations: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run folder."""
        results = agents.read_json(folder / "results.json")
        return cls(folder, results, agents.read_evaluations(folder / "evaluations.npz"))

    def curve(self, axis: str) -> tuple[list[float], list[float]]:
        """Return seconds or timesteps, and the mean return at each."""
        return [e[axis] for e in self.evaluations], [statistics.fmean(e["returns"]) for e in self.evaluations]


def display_name(algo: str) -> str:
    """Return an algorithm's name for people."""
    return NAMES.get(algo) or (algo.partition(":")[2] if ":" in algo else algo.upper())


def summarize(
    env_id: str,
    runs: dict[str, list[Run]],
    rules: Rules,
    thresholds: dict[str, float],
    command: str,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what ``comparison.json`` holds.

    :param runs: of each algorithm, one per seed, in the order of the seeds
    :param thresholds: by where each comes from
    :param left_out: finished runs that were not asked for
    """
    finals = {algo: [[run.curve("seconds")[1][-1] for run in its]] for algo, its in runs.items()}  # of the one task
    everyone = [run for its in runs.values() for run in its]
    return {
        "env_id": env_id,
        "command": command,
        "rules": {name: value for name, value in asdict(rules).items() if value not in (None, ())},
        "evaluation": "deterministic policy on Gymnasium's own env, "
        f"reset seeds {rules.reset_seeds[0]} to {rules.reset_seeds[-1]}; its time is not counted",
        "seeds": in_words(min(len(its) for its in runs.values())),
        "thresholds": thresholds,
        "left_out": list(left_out),
        "algorithms": {algo: _algorithm(its, rules, thresholds) for algo, its in runs.items()},
        "probability_of_improvement": {
            a: {
                b: {
                    "probability": probability_of_improvement(finals[a], finals[b]),
                    "interval": improvement_interval(finals[a], finals[b]),
                }
                for b in runs
                if b != a
            }
            for a in runs
        },
        "machines": _distinct({k: v for k, v in run.results["machine"].items() if k != "speed"} for run in everyone),
        "machine_speed": _spread([run.results["machine"]["speed"] for run in everyone]),
        "versions": _distinct(run.results["versions"] for run in everyone),
    }


def _algorithm(runs: list[Run], rules: Rules, thresholds: dict[str, float]) -> dict[str, Any]:
    finals = [run.curve("seconds")[1][-1] for run in runs]
    first = runs[0].results
    return {
        "envs": first["envs"],
        "settings": first["settings"],
        "final": {
            "iqm": float(iqm(finals)),
            "interval": iqm_interval(np.array(finals)[:, None]),
            "median": statistics.median(finals),
        },
        "steps_per_second": statistics.median(run.results["timesteps"] / run.results["seconds"] for run in runs),
        "curves": {axis: _curve(runs, axis, rules) for axis in _AXES},
        "to_threshold": {
            source: {
                "threshold": threshold,
                **{axis: [first_reached(*run.curve(axis), threshold) for run in runs] for axis in _AXES},
                "success_rate": statistics.fmean(max(run.curve("seconds")[1]) >= threshold for run in runs),
                **{
                    f"median_{axis}": median_reached([first_reached(*run.curve(axis), threshold) for run in runs])
                    for axis in _AXES
                },
            }
            for source, threshold in thresholds.items()
        },
        "runs": [
            {
                "seed": run.results["seed"],
                "folder": f"{run.folder.parent.name}/{run.folder.name}",
                "failed": run.results.get("failed"),
                "machine_speed": run.results["machine"]["speed"],
                "timesteps": [e["timesteps"] for e in run.evaluations],
                "seconds": [e["seconds"] for e in run.evaluations],
                "returns": [e["returns"] for e in run.evaluations],
            }
            for run in runs
        ],
    }


def _curve(runs: list[Run], axis: str, rules: Rules) -> dict[str, list[float]]:
    """Interquartile mean and interval over the budget, or as far as all runs came in the other unit."""
    curves = [run.curve(axis) for run in runs]
    # A seed whose last update came early holds its policy until the budget's end.
    end = getattr(rules, axis) or min(xs[-1] for xs, _ in curves)
    if axis == "timesteps" and rules.seconds is not None:
        end = min(end, *(xs[-1] for xs, _ in curves))
    grid_P = np.unique([*(x for xs, _ in curves for x in xs if x < end), end])
    values_RP = np.array([on_grid(xs, returns, grid_P) for xs, returns in curves])
    low, high = curve_interval(values_RP)
    return {"x": grid_P.tolist(), "iqm": iqm(values_RP, axis=0).tolist(), "low": low.tolist(), "high": high.tolist()}


def _distinct(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _spread(speeds: list[list[float]]) -> dict[str, float]:
    """How fast one core was before and after the runs: how far seconds of one run are those of another."""
    each = [speed for pair in speeds for speed in pair]
    return {"lowest": min(each), "median": statistics.median(each), "highest": max(each)}


def csv_rows(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Return ``comparison.csv``: a row per evaluation."""
    return [
        {
            "algorithm": algo,
            "seed": run.results["seed"],
            "timesteps": e["timesteps"],
            "seconds": e["seconds"],
            "mean_return": statistics.fmean(e["returns"]),
            "std_return": statistics.pstdev(e["returns"]),
            "mean_length": statistics.fmean(e["lengths"]),
        }
        for algo, its in runs.items()
        for run in its
        for e in run.evaluations
    ]


# ---------------------------------------------------------------------------------------------------------
# For people


def markdown(comparison: dict[str, Any]) -> str:
    """Return the table and what must be known to read it."""
    thresholds = comparison["thresholds"]
    headings = ["algorithm", "final return: IQM [95 %]", "per seed", "env steps", "env steps/s"]
    headings += [f"to {number(threshold)} ({source})" for source, threshold in thresholds.items()]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for algo, its in comparison["algorithms"].items():
        low, high = its["final"]["interval"]
        finals = [statistics.fmean(run["returns"][-1]) for run in its["runs"]]
        steps = statistics.median(run["timesteps"][-1] for run in its["runs"])
        cells = [
            display_name(algo),
            f"{number(its['final']['iqm'])} [{number(low)}, {number(high)}]",
            " · ".join(map(number, finals)),
            _short(steps),
            f"{its['steps_per_second']:,.0f}",
            *(_reached(its["to_threshold"][source]) for source in thresholds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _notes(comparison)]) + "\n"


def _reached(to_threshold: dict[str, Any]) -> str:
    seeds = len(to_threshold["seconds"])
    successes = f"{round(to_threshold['success_rate'] * seeds)} of {seeds}"
    if to_threshold["median_seconds"] is None:
        return successes
    steps = _short(to_threshold["median_timesteps"])
    return f"{successes}, median {to_threshold['median_seconds']:.0f} s, {steps} steps"


def number(value: float) -> str:
    """Write a return: whole above 100, else to three digits."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def _short(steps: float) -> str:
    return f"{steps / 1e6:.2f}M" if steps >= 1e6 else f"{steps / 1e3:.0f}k"


def budget_in_words(rules: dict[str, Any]) -> str:
    """Say what each run may spend."""
    parts = [f"{rules['seconds']:g} s"] if "seconds" in rules else []
    parts += [f"{rules['timesteps']:,} env steps"] if "timesteps" in rules else []
    return " or ".join(parts) + (", whichever comes first" if len(parts) > 1 else "")


def _notes(comparison: dict[str, Any]) -> str:
    rules, speed = comparison["rules"], comparison["machine_speed"]
    machines = ", ".join(f"{m['processor']} ({rules['n_cores']} of {m['cores']} cores)" for m in comparison["machines"])
    slowest, fastest = (speed[name] / speed["median"] for name in ("lowest", "highest"))
    algorithms = comparison["algorithms"].items()

    def each(what: Callable[[dict[str, Any]], str | None]) -> str:
        said = [(display_name(algo), what(its)) for algo, its in algorithms]
        return "; ".join(f"{name}: {text}" for name, text in said if text)

    failed = [
        f"{display_name(algo)} seed {run['seed']} after {run['seconds'][-1]:.0f} s ({run['failed']})"
        for algo, its in algorithms
        for run in its["runs"]
        if run["failed"]
    ]
    chances = [
        f"{display_name(b)} {p['probability']:.2f} [{p['interval'][0]:.2f}, {p['interval'][1]:.2f}]"
        for b, p in comparison["probability_of_improvement"].get("eggroll", {}).items()
    ]
    notes = {
        "Command": f"`{comparison['command']}`",
        "Budget": f"{budget_in_words(rules)} per run, one run at a time, torch on {rules['torch_threads']} thread(s)",
        "Seeds": comparison["seeds"],
        "Evaluation": f"{rules['eval_episodes']} episodes, {comparison['evaluation']}",
        "Machine": f"{machines}; one core did between {slowest:.2f} and {fastest:.2f} of its median speed before and "
        "after the runs",
        "Envs": each(lambda its: its["envs"]),
        "Settings": each(lambda its: its["settings"].get("source")),
        "Probability that a run of EGGROLL ends above one of": ", ".join(chances),
        "Failed": "; ".join(failed),
        "Not asked for": ", ".join(comparison["left_out"]),
    }
    return "\n".join(f"- {what}: {said}." for what, said in notes.items() if said)


def write_readme(root: Path) -> bool:
    """Write ``README.md`` of the agents' folder from what lies in it; leave one that people wrote alone."""
    path = root / "README.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        return False
    parts = [
        "# Trained agents",
        _MARK,
        "Each folder is one run: `eggroll-rl evaluate FOLDER` evaluates it again, `eggroll-rl record FOLDER` films it."
        + (" What was tried, and what did not work, is in [LOG.md](LOG.md)." if (root / "LOG.md").exists() else ""),
    ]
    compared = {path.parent.name: agents.read_json(path) for path in sorted(root.glob("*/comparison.json"))}
    parts += _over_tasks(list(compared.values()))
    for folder, comparison in compared.items():
        parts += [f"## {comparison['env_id']}, compared", f"![curves of {folder}]({folder}/comparison.png)"]
        parts += [markdown(comparison).rstrip()]
    runs = [(folder, results) for folder, results in agents.list_runs(root) if "evaluation" in results]
    for env_id in sorted({results["env_id"] for _, results in runs}):
        its = [(folder, results) for folder, results in runs if results["env_id"] == env_id]
        parts += [f"## {env_id}, trained", _trained(its, root)]
    agents.write_atomic(path, ("\n\n".join(parts) + "\n").encode())
    return True


def _trained(runs: list[tuple[Path, dict[str, Any]]], root: Path) -> str:
    lines = [
        "Return of the final mean policy and of the best by evaluation, ± the deviation over episodes whose seeds "
        f"neither training nor that choice saw: `eggroll-rl evaluate FOLDER --seed {REPORT_SEED}` repeats the first, "
        "with `--best` the second.",
        "",
        "| agent | env steps | wall-clock | env steps/s | final policy | best by evaluation |",
        "|---|---|---|---|---|---|",
    ]
    for folder, results in runs:
        final, best = results["evaluation"], results["best"]
        lines.append(
            f"| {folder.relative_to(root)} | {results['timesteps']:,} | {results['wall_seconds']:.0f} s "
            f"| {results['env_steps_per_second'] or 0:,.0f} | {final['mean_return']:,.0f} ± {final['std_return']:,.0f} "
            f"| {best['mean_return']:,.0f} ± {best['std_return']:,.0f} (at {best['timesteps']:,}) |"
        )
    median = statistics.median(results["evaluation"]["mean_return"] for _, results in runs)
    processors = ", ".join(_distinct(f"{r['machine']['processor']} ({r['machine']['cores']} cores)" for _, r in runs))
    lines += ["", f"Median of the final policies: {median:,.0f} over {in_words(len(runs))}. Machine: {processors}."]
    return "\n".join(lines)


def _over_tasks(comparisons: list[dict[str, Any]]) -> list[str]:
    """Compare over all tasks: final returns side by side, and the probability of improvement, which needs no scale."""
    if len(comparisons) < 2:
        return []
    everyone = _distinct(algo for c in comparisons for algo in c["algorithms"])
    table = [
        "| task | budget | " + " | ".join(map(display_name, everyone)) + " |",
        "|---|---" + "|---" * len(everyone) + "|",
    ]
    for c in comparisons:
        finals = [c["algorithms"][a]["final"]["iqm"] if a in c["algorithms"] else None for a in everyone]
        cells = [c["env_id"], budget_in_words(c["rules"]), *("" if f is None else number(f) for f in finals)]
        table.append("| " + " | ".join(cells) + " |")
    parts = ["## All tasks compared", "Interquartile mean of the final return over seeds:", "\n".join(table)]
    with_ours = [c for c in comparisons if "eggroll" in c["algorithms"]]
    lines = []
    for algo in everyone:
        tasks = [c for c in with_ours if algo in c["algorithms"]]
        if algo == "eggroll" or len(tasks) < 2:
            continue
        ours, theirs = (
            [[statistics.fmean(run["returns"][-1]) for run in c["algorithms"][a]["runs"]] for c in tasks]
            for a in ("eggroll", algo)
        )
        n_runs = min(len(scores) for scores in (*ours, *theirs))
        low, high = improvement_interval(ours, theirs)
        lines.append(
            f"- {display_name(algo)}: {probability_of_improvement(ours, theirs):.2f} [{low:.2f}, {high:.2f}], "
            f"{len(tasks)} tasks, at least {n_runs} seed{'s' if n_runs > 1 else ''} each"
        )
    if lines:
        about = "Probability that a run of EGGROLL ends above a run of the other, averaged over the tasks"
        parts += [f"{about} [95 %, bootstrap stratified by task]:", "\n".join(lines)]
    return parts
