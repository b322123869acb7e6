"""Compare algorithms on one task: the same budget, cores and evaluation for everyone, one run at a time."""

import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gymnasium.envs.registration import EnvSpec

from eggroll_rl import agents
from eggroll_rl.compare_algorithms import build, settings_of
from eggroll_rl.compare_plot import plot_comparison
from eggroll_rl.compare_report import Run, csv_rows, display_name, markdown, summarize
from eggroll_rl.compare_run import WITH_PARENT, Rules, read_config, same_run, write_config
from eggroll_rl.compare_stats import iqm
from eggroll_rl.config import RunConfig
from eggroll_rl.envs import EnvFactory, check_time_limit, load_preset
from eggroll_rl.errors import ConfigError, EggrollError, RunFolderError
from eggroll_rl.es import check_whole
from eggroll_rl.files import alone_in
from eggroll_rl.plots import figure_class
from eggroll_rl.signals import run_child

# In the order in which they may go: a folder without results is a run broken off, one without config.toml is nobody's.
_RUN_FILES = ("results.json", "policy.safetensors", "model.zip", "vecnormalize.pkl", "evaluations.npz", "config.toml")


def compare(
    env: str,
    algos: Sequence[str],
    n_seeds: int,
    rules: Rules,
    output: Path,
    thresholds: Sequence[float] = (),
    overwrite: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Run every algorithm with seeds 0 to ``n_seeds`` - 1, and return what ``comparison.json`` holds.

    Seed by seed, so that all algorithms of a seed run in one stretch of time. A finished run is used again, one
    that was broken off starts again.

    :param env: env id or preset file
    :param output: folder for the pictures and tables; the runs lie in its ``compare/``
    :param thresholds: returns to time beside the task's own ``reward_threshold``
    :raises ConfigError: a setting of any algorithm is wrong; before the first run
    :raises RunFolderError: a run of other settings is in the way
    """
    check_whole("n_seeds", n_seeds, 1)
    algos = [algo if ":" in algo else algo.lower() for algo in algos]
    if len(set(algos)) < len(algos) or not algos:
        raise ConfigError(f"algos must be different algorithms, at least one, got {' '.join(algos) or 'none'}")
    iqm([0.0]), figure_class()  # what is missing must not show after hours
    preset = load_preset(env)
    configs = [_config(preset, env, seed) for seed in range(n_seeds)]
    factory = configs[0].factory(rules.gym_packages)
    with closing(factory()) as probe:
        check_time_limit(probe)
        settings = {algo: settings_of(preset, algo, probe.observation_space) for algo in algos}
    named = _thresholds(configs[0], factory, thresholds)
    for algo in algos:
        _try_out(algo, settings[algo], _config(preset, env, 0), factory, rules.n_cores)

    entries = [(_folder(output, algo, config.seed), algo, config) for config in configs for algo in algos]
    with alone_in(output / "compare"):
        _do_runs(entries, settings, rules, overwrite)
    runs = {algo: [Run.read(folder) for folder, its, _ in entries if its == algo] for algo in algos}
    there = {path.parent for path in (output / "compare").glob("*/results.json")}
    left_out = sorted(folder.name for folder in there - {folder for folder, _, _ in entries})
    comparison = summarize(configs[0].env_id, runs, rules, named, command, left_out)
    agents.write_json(output / "comparison.json", comparison)
    agents.write_csv(output / "comparison.csv", csv_rows(runs))
    agents.write_atomic(output / "comparison.md", markdown(comparison).encode())
    plot_comparison(comparison, output / "comparison.png")
    return comparison


def _do_runs(
    entries: list[tuple[Path, str, RunConfig]], settings: dict[str, dict[str, Any]], rules: Rules, overwrite: bool
) -> None:
    """Do the runs that are not finished."""
    todo = [entry for entry in entries if not _finished(*entry, settings[entry[1]], rules, overwrite)]
    _announce(len(entries), len(todo), rules)
    for number, (folder, algo, config) in enumerate(todo, 1):
        _clear(folder)
        write_config(folder / "config.toml", algo, settings[algo], config, rules)
        print(f"[{number}/{len(todo)}] {display_name(algo)}, seed {config.seed}", file=sys.stderr, flush=True)
        _run(folder, rules)


def _folder(output: Path, algo: str, seed: int) -> Path:
    return output / "compare" / f"{algo.replace(':', '-')}-seed{seed}"


def _config(preset: dict[str, Any], env: str, seed: int) -> RunConfig:
    config = RunConfig.from_dict(preset, env)
    config.seed = seed
    return config


def _try_out(algo: str, settings: dict[str, Any], config: RunConfig, factory: EnvFactory, n_cores: int) -> None:
    """Build the algorithm once: a setting that it refuses must not show after hours."""
    learner = build(algo, settings, config, factory, n_cores)
    if learner.model.env is not None:
        learner.model.env.close()


def _finished(
    folder: Path, algo: str, config: RunConfig, settings: dict[str, Any], rules: Rules, overwrite: bool
) -> bool:
    """Say whether a run is there; refuse what is in its way."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        read_config(folder / "config.toml")
    except EggrollError as error:
        raise RunFolderError(f"{folder} holds something else than a run of a comparison ({error})") from error
    if not (folder / "results.json").exists():
        return False
    if same_run(folder / "config.toml", algo, settings, config, rules):
        return True
    if overwrite:
        return False
    raise RunFolderError(
        f"{folder} was run with other settings (its config.toml): --overwrite replaces it, --output goes elsewhere"
    )


def _clear(folder: Path) -> None:
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _run(folder: Path, rules: Rules) -> None:
    """Do one run in a process of its own, whose threads are set before any library starts them."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(rules.torch_threads))
    # The package is found wherever this one was, in a checkout too.
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "eggroll_rl.compare_run", str(folder), WITH_PARENT]
    status = run_child(words, {**os.environ, **threads, "PYTHONPATH": path})
    if status:
        raise EggrollError(f"the run in {folder} failed (status {status}); its error is above, finished runs are kept")


def _thresholds(config: RunConfig, factory: EnvFactory, given: Sequence[float]) -> dict[str, float]:
    changed = config.env_kwargs or config.wrappers or config.max_episode_steps
    own = factory.source.reward_threshold if isinstance(factory.source, EnvSpec) and not changed else None
    if not all(math.isfinite(value) for value in given):
        raise ConfigError(f"thresholds must be finite returns, got {' '.join(map(str, given))}")
    thresholds = {} if own is None else {"Gymnasium's threshold": float(own)}
    for value in given:
        thresholds[f"yours: {value:g}" if len(given) > 1 else "yours"] = float(value)
    return thresholds


def _announce(n_runs: int, n_to_do: int, rules: Rules) -> None:
    text = f"{n_runs - n_to_do} runs are there, {n_to_do} to do"
    if n_to_do and rules.seconds is not None:
        # Building, evaluating and saving take about a fifth of the time.
        seconds = n_to_do * rules.seconds * 1.2
        text += (
            f": about {seconds / 60:.0f} minutes, until {time.strftime('%H:%M', time.localtime(time.time() + seconds))}"
        )
    print(text, file=sys.stderr, flush=True)
