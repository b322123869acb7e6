"""``eggroll-rl tune``: search EGGROLL's settings for a task with Optuna, and write a preset.

The study is a journal in the output folder: the same command goes on where it stopped.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from eggroll_rl import agents
from eggroll_rl.compare_algorithms import Learner, build, settings_of
from eggroll_rl.compare_run import FOREVER, BudgetRecorder, BudgetSpent, Rules, import_everything
from eggroll_rl.config import RunConfig, check_names, without_fitness
from eggroll_rl.envs import EnvFactory, load_preset
from eggroll_rl.errors import ConfigError, EggrollError
from eggroll_rl.es import check_whole
from eggroll_rl.files import alone_in

OBJECTIVES = ("final", "mean")
_NETWORKS: dict[str, list[int]] = {"linear": [], "8": [8], "16": [16], "32": [32], "64": [64], "64-64": [64, 64]}
# A list is a choice; a table is a number between low and high, on a logarithmic scale.
SPACES: dict[str, dict[str, Any]] = {
    "episode": {
        "sigma": {"low": 0.01, "high": 0.3},
        "learning_rate": {"low": 0.002, "high": 0.1},
        "schedule": ["constant", "linear"],
        "network": list(_NETWORKS),
        "population_size": [8, 16, 32, 64, 128],
    },
    "segment": {
        "exploration_std": {"low": 0.2, "high": 1.2},
        "target_kl": {"low": 0.02, "high": 0.5},
        "schedule": ["constant", "linear"],
        "network": list(_NETWORKS),
        "n_segments": [16, 32, 64],
        "segment_steps": [32, 64, 128],
        "gamma": [0.97, 0.98, 0.99, 0.995],
        "gae_lambda": [0.9, 0.95, 0.98],
        "sample_reuse": [0, 1, 2],
        "damping": [0.1, 1.0, 10.0],
    },
}


@dataclass(frozen=True)
class Search:
    """What a study is about; a study goes on only with the same one.

    :param env: id or preset
    :param fitness: ``"episode"`` or ``"segment"``
    :param objective: ``"final"``, the return at the budget's end, or ``"mean"``, that over all evaluations, which asks
        for speed
    :param seeds: runs per trial, with seeds 0, 1, ...; the trial's value is the mean of theirs
    """

    env: str
    fitness: str
    objective: str
    seeds: int
    rules: Rules

    def __post_init__(self) -> None:
        if self.fitness not in SPACES:
            raise ConfigError(f"fitness must be one of {', '.join(SPACES)}, got {self.fitness!r}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        check_whole("seeds", self.seeds, 1)


def tune(search: Search, n_trials: int, folder: Path) -> dict[str, Any]:
    """Run trials until the study has ``n_trials``, and return the best one's settings, also in ``preset.toml``.

    The space is :data:`SPACES`, with the entries of the preset's ``[tune]`` table in place of its own; settings that
    are not searched are the preset's.

    :param folder: of ``study.log`` (Optuna's journal), ``trials.csv`` and ``preset.toml``
    :raises ConfigError: Optuna is missing, a setting is wrong, or the folder holds another study
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("tune needs Optuna: pip install 'eggroll-rl[tune]'") from error
    preset = load_preset(search.env)
    config = RunConfig.from_dict(preset, search.env)
    factory = config.factory(search.rules.gym_packages)
    base = _base(settings_of(preset, "eggroll", factory().observation_space), search.fitness)
    space = _space(search.fitness, preset.get("tune", {}), f"{search.env} [tune]", factory.copies_states)
    torch.set_num_threads(search.rules.torch_threads)
    import_everything("eggroll")
    _close(build("eggroll", base, replace(config), factory, search.rules.n_cores))  # refuses what cannot be, at once
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with alone_in(folder):
        study = _open(search, base, space, folder)
        while _n_done(study) < n_trials:
            trial = study.ask()
            settings = settings_at(base, {name: suggest(trial, name, space[name]) for name in space})
            print(f"trial {trial.number}: {trial.params}", file=sys.stderr)
            try:
                study.tell(trial, _value(trial, search, settings, config, factory))
            except optuna.TrialPruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            except Exception as error:
                trial.set_user_attr("error", str(error))
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                if not isinstance(error, EggrollError) or isinstance(error, ConfigError):
                    raise
                print(f"  failed: {' '.join(str(error).split())}", file=sys.stderr)
            _write(study, search, base, folder)
        return _write(study, search, base, folder)


def _open(search: Search, base: dict[str, Any], space: dict[str, Any], folder: Path) -> Any:
    """Return the study in ``folder``, or a new one that starts with the preset's own settings."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=search.rules.evaluations // 3),
    )
    # Another seed for what is continued: the same one would try the first trials again.
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=10, seed=len(study.trials))
    told = asdict(search)
    del told["rules"]["n_cores"]
    about = json.loads(json.dumps({"search": told, "space": space, "settings": base}))
    before = study.user_attrs.get("about", about)
    for part, value in about.items():
        if before[part] != value:
            raise ConfigError(f"{folder} holds a search with {part} {before[part]}, not {value}; choose another output")
    study.set_user_attr("about", about)
    for stale in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(stale.number, state=optuna.trial.TrialState.FAIL)  # of a command that was stopped
        study.enqueue_trial(stale.params)
    if not study.trials:
        study.enqueue_trial(_start(base, space))
    return study


def _n_done(study: Any) -> int:
    """Count the trials that ran to an end, be it an error; not those that were cut, which run again."""
    return sum(
        trial.state.is_finished() and (trial.state.name != "FAIL" or "error" in trial.user_attrs)
        for trial in study.trials
    )


def _base(settings: dict[str, Any], fitness: str) -> dict[str, Any]:
    """Return the settings that hold where the space says nothing else."""
    if settings.get("fitness", "episode") != fitness:
        settings = without_fitness(settings)
    return {**settings, "fitness": fitness}


def _space(fitness: str, own: Any, where: str, copies_states: bool = True) -> dict[str, Any]:
    known = {**SPACES["episode"], **SPACES["segment"]}
    check_names(own, list(known), where)
    space = {name: own.get(name, values) for name, values in SPACES[fitness].items()}
    if not copies_states and "segment_steps" not in own:
        space.pop("segment_steps", None)  # episodes of another env have to fit into it: the preset knows
    for name, values in space.items():
        least = 0 if name == "sample_reuse" else math.ulp(0)
        if isinstance(known[name], dict):
            _check_range(f"{where} {name}", values)
        elif not isinstance(values, list) or not values:
            raise ConfigError(f"{where} {name} must be a list of choices, got {values!r}")
        elif isinstance(known[name][0], str) and not set(values) <= set(known[name]):
            raise ConfigError(f"{where} {name} must be some of {', '.join(known[name])}, got {values!r}")
        elif not isinstance(known[name][0], str) and not all(isinstance(v, int | float) and v >= least for v in values):
            kind = "0 or more" if least == 0 else "above 0"
            raise ConfigError(f"{where} {name} must be a list of numbers {kind}, got {values!r}")
    return space


def _check_range(name: str, values: Any) -> None:
    choices = values if isinstance(values, list) else list(values.values()) if isinstance(values, dict) else []
    is_range = isinstance(values, list) or (isinstance(values, dict) and set(values) == {"low", "high"})
    if not choices or not is_range or not all(isinstance(v, int | float) and v > 0 for v in choices):
        raise ConfigError(f"{name} must be a list of numbers or a table with low and high, above 0, got {values!r}")
    if isinstance(values, dict) and values["low"] > values["high"]:
        raise ConfigError(f"{name}: low must not be above high, got {values!r}")


def suggest(trial: Any, name: str, values: Any) -> Any:
    """Ask an Optuna trial for a setting of :data:`SPACES`."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    return trial.suggest_float(name, values["low"], values["high"], log=True)


def _start(base: dict[str, Any], space: dict[str, Any]) -> dict[str, Any]:
    """Return what the preset's own settings are in the space, as far as they lie in it: the first trial."""
    base = RunConfig.with_defaults({"population_size": 64, **base})
    step, linear = _step_of(base), False
    size = base[step]
    if isinstance(size, str):
        linear, size = size.startswith("lin_"), float(size.removeprefix("lin_"))
    named = {**base, "schedule": "linear" if linear else "constant", step: size}
    net_arch = base.get("policy_kwargs", {}).get("net_arch", [64, 64])
    if base.get("policy") != "LinearPolicy" and net_arch in _NETWORKS.values():
        named["network"] = next(name for name, widths in _NETWORKS.items() if widths == net_arch)
    return {name: named[name] for name, values in space.items() if name in named and _lies_in(named[name], values)}


def _step_of(settings: dict[str, Any]) -> str:
    """Return the setting that ``schedule`` is about."""
    return "target_kl" if settings.get("fitness") == "segment" else "learning_rate"


def _lies_in(value: Any, values: Any) -> bool:
    if isinstance(values, list):
        return value in values
    return isinstance(value, int | float) and values["low"] <= value <= values["high"]


def settings_at(base: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Turn a point of the space into EGGROLL's settings."""
    chosen = dict(chosen)
    network, schedule = chosen.pop("network"), chosen.pop("schedule", None)
    settings = {**base, **chosen}
    if base.get("policy") == "LinearPolicy":
        settings["policy"] = "MlpPolicy"  # which has linear networks too
    settings["policy_kwargs"] = {**base.get("policy_kwargs", {}), "net_arch": _NETWORKS[network]}
    if schedule == "linear":
        step = _step_of(settings)
        settings[step] = f"lin_{settings[step]:.6g}"
    # Two slices, for two workers: part of the result, whatever the machine.
    n_rows = settings["n_segments"] if settings.get("fitness") == "segment" else settings["population_size"]
    settings["slice_size"] = max(2, n_rows // 4 * 2)
    return settings


def _value(trial: Any, search: Search, settings: dict[str, Any], config: RunConfig, factory: EnvFactory) -> float:
    """Run a trial's seeds one after the other; prune it in the first if it lags behind the others."""
    import optuna

    values: list[float] = []
    for seed in range(search.seeds):
        returns: list[float] = []

        def report(point: int, mean: float, returns: list[float] = returns) -> None:
            if point == 0:
                return  # nothing is learned yet
            returns.append(mean)
            if not values:
                trial.report(statistics.fmean(returns) if search.objective == "mean" else mean, point)
                if trial.should_prune():
                    raise optuna.TrialPruned

        steps = _run(settings, replace(config, seed=seed), factory, search.rules, report)
        values.append(statistics.fmean(returns) if search.objective == "mean" else returns[-1])
        trial.set_user_attr("timesteps", steps)
    return statistics.fmean(values)


def _run(
    settings: dict[str, Any], config: RunConfig, factory: EnvFactory, rules: Rules, report: Callable[[int, float], None]
) -> int:
    """Train once, and return the env steps made."""
    started = time.perf_counter()
    learner = build("eggroll", settings, config, factory, rules.n_cores)
    recorder = BudgetRecorder(f"  seed {config.seed}", factory, rules, started, on_evaluation=report)
    try:
        learner.learn(rules.timesteps or FOREVER, recorder)
        recorder.between_updates()
    except BudgetSpent:
        pass
    finally:
        _close(learner)
    recorder.finish()
    return recorder.evaluations[-1]["timesteps"]


def _close(learner: Learner) -> None:
    if learner.model.env is not None:
        learner.model.env.close()


def _write(study: Any, search: Search, base: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write all trials and the best one as a preset; return its settings."""
    rows = [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.state.name == "COMPLETE" else "",
            **{name: trial.params.get(name, "") for name in study.user_attrs["about"]["space"]},
        }
        for trial in study.trials
    ]
    agents.write_csv(folder / "trials.csv", rows)
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        return {}
    best = max(complete, key=lambda trial: trial.value)
    settings = settings_at(base, best.params)
    steps = search.rules.timesteps or max(best.user_attrs["timesteps"], 1)
    # The rest, such as the baselines' settings, is the preset's.
    table = {**load_preset(search.env), "total_timesteps": steps, "eggroll": settings}
    value = f"{search.objective} return {best.value:.6g} over {search.seeds} seeds"
    about = f"# eggroll-rl tune {search.env}: trial {best.number} of {len(rows)}, {value}\n"
    agents.write_atomic(folder / "preset.toml", (about + tomli_w.dumps(table)).encode())
    return settings
