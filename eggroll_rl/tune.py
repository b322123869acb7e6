"""``eggroll-rl tune``: search EGGROLL's settings for a task with Optuna, and write a preset.

The study is a journal in the output folder: the same command goes on where it stopped.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from eggroll_rl import agents
from eggroll_rl.compare_algorithms import build, settings_of
from eggroll_rl.compare_run import FOREVER, BudgetRecorder, BudgetSpent, Rules
from eggroll_rl.config import RunConfig, check_names
from eggroll_rl.envs import EnvFactory, load_preset
from eggroll_rl.errors import ConfigError, EggrollError

OBJECTIVES = ("final", "mean")
_NETWORKS: dict[str, dict[str, Any]] = {
    "linear": {"policy": "LinearPolicy", "policy_kwargs": {"with_bias": True}},
    "16": {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [16]}},
    "32": {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [32]}},
    "64-64": {"policy": "MlpPolicy", "policy_kwargs": {"net_arch": [64, 64]}},
}
# A list is a choice; a table is a number between low and high, on a logarithmic scale.
_SHARED: dict[str, Any] = {
    "sigma": {"low": 0.01, "high": 0.3},
    "learning_rate": {"low": 0.002, "high": 0.1},
    "schedule": ["constant", "linear"],
    "network": list(_NETWORKS),
}
SPACES: dict[str, dict[str, Any]] = {
    "episode": {**_SHARED, "population_size": [8, 16, 32, 64, 128]},
    "segment": {
        **_SHARED,
        "population_size": [32, 64, 128, 256],
        "segment_steps": [8, 16, 32, 64, 128],
        "gamma": [0.97, 0.98, 0.99, 0.995],
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


def tune(search: Search, n_trials: int, folder: Path) -> dict[str, Any]:
    """Run trials until the study has ``n_trials``, and return the best one's settings, also in ``preset.toml``.

    The space is :data:`SPACES`, with the entries of the preset's ``[tune]`` table in place of its own; settings that
    are not searched are the preset's.

    :param folder: of ``study.log`` (Optuna's journal), ``trials.csv`` and ``preset.toml``
    :raises ConfigError: Optuna is missing, a setting is wrong, or the folder holds another study
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise ConfigError("tune needs Optuna: pip install 'eggroll-rl[tune]'") from error
    preset = load_preset(search.env)
    config = RunConfig.from_dict(preset, search.env)
    factory = config.factory(search.rules.gym_packages)
    base = settings_of(preset, "eggroll", factory().observation_space)
    space = _space(search.fitness, preset.get("tune", {}), f"{search.env} [tune]")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name=config.env_id,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=10),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=search.rules.evaluations // 3),
    )
    about = json.loads(json.dumps({"search": asdict(search), "space": space, "settings": base}))
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
    while _n_done(study) < n_trials:
        trial = study.ask()
        settings = _settings(base, search.fitness, {name: _suggest(trial, name, space[name]) for name in space})
        print(f"trial {trial.number}: {trial.params}", file=sys.stderr)
        try:
            study.tell(trial, _value(trial, search, settings, config, factory))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except EggrollError as error:
            print(f"  failed: {' '.join(str(error).split())}", file=sys.stderr)
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        _write(study, search, base, config, folder)
    return _write(study, search, base, config, folder)


def _n_done(study: Any) -> int:
    """Count the trials that ran to an end, be it an error; not those that were cut, which run again."""
    return sum(
        trial.state.is_finished() and (trial.state.name != "FAIL" or "error" in trial.user_attrs)
        for trial in study.trials
    )


def _space(fitness: str, own: Any, where: str) -> dict[str, Any]:
    check_names(own, [*SPACES["episode"], *SPACES["segment"]], where)
    space = {**SPACES[fitness], **own}
    for name, values in space.items():
        if isinstance(values, list) and values:
            continue
        if not isinstance(values, dict) or set(values) != {"low", "high"} or not 0 < values["low"] <= values["high"]:
            raise ConfigError(f"{where}: {name} must be a list or a table with low and high, above 0, got {values!r}")
    return space


def _suggest(trial: Any, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    return trial.suggest_float(name, values["low"], values["high"], log=True)


def _start(base: dict[str, Any], space: dict[str, Any]) -> dict[str, Any]:
    """Return what the preset's own settings are in the space, as far as they lie in it: the first trial."""
    rate = base.get("learning_rate")
    named = {
        **base,
        "schedule": "linear" if isinstance(rate, str) else "constant",
        "learning_rate": float(rate.removeprefix("lin_")) if isinstance(rate, str) else rate,
    }
    for name, network in _NETWORKS.items():
        arch = network["policy_kwargs"].get("net_arch")
        if base.get("policy") == network["policy"] and base.get("policy_kwargs", {}).get("net_arch") == arch:
            named["network"] = name
    return {name: named[name] for name, values in space.items() if name in named and _lies_in(named[name], values)}


def _lies_in(value: Any, values: Any) -> bool:
    if isinstance(values, list):
        return value in values
    return isinstance(value, int | float) and values["low"] <= value <= values["high"]


def _settings(base: dict[str, Any], fitness: str, chosen: dict[str, Any]) -> dict[str, Any]:
    """Turn a point of the space into EGGROLL's settings."""
    chosen = dict(chosen)
    network, schedule = chosen.pop("network", None), chosen.pop("schedule", "constant")
    settings = {**base, "fitness": fitness, **chosen}
    if network is not None:
        own = base.get("policy_kwargs", {})
        kept = {name: own[name] for name in ("normalize_obs", "squash_output") if name in own}
        settings.update(_NETWORKS[network])
        settings["policy_kwargs"] = {**kept, **_NETWORKS[network]["policy_kwargs"]}
    if schedule == "linear":
        settings["learning_rate"] = f"lin_{settings['learning_rate']:.6g}"
    # Two slices, for two workers: part of the result, whatever the machine.
    settings["slice_size"] = max(2, settings.get("population_size", 64) // 4 * 2)
    return settings


def _value(trial: Any, search: Search, settings: dict[str, Any], config: RunConfig, factory: EnvFactory) -> float:
    """Run a trial's seeds one after the other; prune it at an evaluation if it lags behind the others."""
    import optuna

    values: list[float] = []
    for seed in range(search.seeds):
        returns: list[float] = []

        def report(mean: float, returns: list[float] = returns) -> None:
            returns.append(mean)
            so_far = statistics.fmean(returns) if search.objective == "mean" else mean
            trial.report(statistics.fmean([*values, so_far]), len(values) * 1000 + len(returns))
            if trial.should_prune():
                raise optuna.TrialPruned

        steps = _run(settings, replace(config, seed=seed), factory, search.rules, report)
        values.append(statistics.fmean(returns) if search.objective == "mean" else returns[-1])
        trial.set_user_attr("timesteps", steps)
    return statistics.fmean(values)


def _run(
    settings: dict[str, Any], config: RunConfig, factory: EnvFactory, rules: Rules, report: Callable[[float], None]
) -> int:
    """Train once, and return the env steps made."""
    started = time.perf_counter()
    learner = build("eggroll", settings, config, factory, rules.n_cores)
    recorder = BudgetRecorder(f"  seed {config.seed}", factory, rules, started, report)
    try:
        learner.learn(rules.timesteps or FOREVER, recorder)
        recorder.between_updates()
    except BudgetSpent:
        pass
    recorder.finish()
    return recorder.evaluations[-1]["timesteps"]


def _write(study: Any, search: Search, base: dict[str, Any], config: RunConfig, folder: Path) -> dict[str, Any]:
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
    settings = _settings(base, search.fitness, best.params)
    task = {name: getattr(config, name) for name in ("env_id", "env_kwargs", "wrappers", "max_episode_steps")}
    table = {name: value for name, value in task.items() if value not in (None, {}, [])}
    table |= {"total_timesteps": search.rules.timesteps or best.user_attrs["timesteps"], "eggroll": settings}
    value = f"{search.objective} return {best.value:.6g} over {search.seeds} seeds"
    about = f"# eggroll-rl tune {search.env}: trial {best.number} of {len(rows)}, {value}\n"
    agents.write_atomic(folder / "preset.toml", (about + tomli_w.dumps(table)).encode())
    return settings
