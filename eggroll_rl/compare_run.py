"""One run of a comparison: an algorithm, a seed and a budget, in a process of its own.

``python -m eggroll_rl.compare_run FOLDER`` does what the folder's ``config.toml`` says and writes

    policy.safetensors      final deterministic policy as one of ours (``eggroll-rl evaluate FOLDER``), or
    model.zip               for a policy that cannot be exported, SB3's own file, with vecnormalize.pkl
    evaluations.npz         SB3's keys, with the training seconds beside them
    results.json            written last: a run without it never happened
"""

import contextlib
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from eggroll_rl import agents
from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.compare_algorithms import Learner, build
from eggroll_rl.config import RunConfig, check_names
from eggroll_rl.envs import EnvFactory, read_toml
from eggroll_rl.errors import ConfigError, EggrollError
from eggroll_rl.es import check_positive, check_whole
from eggroll_rl.evaluation import batched, evaluate
from eggroll_rl.sb3_export import export_policy
from eggroll_rl.training import SELECTION_SEED, machine, versions

_FOREVER = 2**62  # env steps


@dataclass(frozen=True)
class Rules:
    """What is the same for every run of a comparison.

    :param timesteps: budget in env steps, or None
    :param seconds: budget in seconds of wall-clock, or None; with both, a run ends with the first
    :param evaluations: evaluations per run, at equal distances in each budget; one more before training
    :param eval_episodes: episodes per evaluation, on the same reset seeds for everyone
    :param torch_threads: threads of torch, in each process
    :param n_cores: worker processes of algorithms that have them
    :param gym_packages: modules to import before the env is made
    """

    timesteps: int | None = None
    seconds: float | None = None
    evaluations: int = 18
    eval_episodes: int = 10
    torch_threads: int = 1
    n_cores: int = 1
    gym_packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.timesteps is None and self.seconds is None:
            raise ConfigError("a comparison needs a budget: timesteps, seconds or both")
        if self.seconds is not None:
            check_positive("seconds", self.seconds)
        if self.timesteps is not None:
            check_whole("timesteps", self.timesteps, 1)
        for name in ("evaluations", "eval_episodes", "torch_threads", "n_cores"):
            check_whole(name, getattr(self, name), 1)

    def progress(self, timesteps: int, seconds: float) -> float:
        """Return the part of the budget that is spent, 1 and more at its end."""
        parts = [0.0]
        if self.timesteps is not None:
            parts.append(timesteps / self.timesteps)
        if self.seconds is not None:
            parts.append(seconds / self.seconds)
        return max(parts)

    @property
    def reset_seeds(self) -> range:
        """Reset seeds of every evaluation."""
        return range(SELECTION_SEED, SELECTION_SEED + self.eval_episodes)


def write_config(path: Path, algo: str, settings: dict[str, Any], config: RunConfig, rules: Rules) -> None:
    """Write what a run will do; the file is a preset, too."""
    path.write_text(_toml(algo, settings, config, rules), encoding="utf-8")


def same_run(path: Path, algo: str, settings: dict[str, Any], config: RunConfig, rules: Rules) -> bool:
    """Say whether a run folder's ``config.toml`` is that of this run."""
    return path.read_text(encoding="utf-8") == _toml(algo, settings, config, rules)


def _toml(algo: str, settings: dict[str, Any], config: RunConfig, rules: Rules) -> str:
    table = {name: getattr(config, name) for name in ("env_id", "seed", "env_kwargs", "wrappers", "max_episode_steps")}
    table = {name: value for name, value in table.items() if value not in (None, {}, [])}
    budget = {name: value for name, value in asdict(rules).items() if value not in (None, ())}
    return tomli_w.dumps({**table, "comparison": {"algo": algo, **budget}, algo: settings})


def read_config(path: Path) -> tuple[str, dict[str, Any], RunConfig, Rules]:
    """Read :func:`write_config` back."""
    table = read_toml(path)
    comparison = dict(table.get("comparison", {}))
    algo = comparison.pop("algo", None)
    if not isinstance(algo, str):
        raise ConfigError(f"{path} is no run of a comparison: it has no [comparison] with algo")
    check_names(comparison, [field.name for field in fields(Rules)], f"{path} [comparison]")
    comparison["gym_packages"] = tuple(comparison.get("gym_packages", ()))
    config = RunConfig.from_dict({n: v for n, v in table.items() if n != "openes"}, str(path))
    return algo, table.get(algo, {}), config, Rules(**comparison)


class _Spent(Exception):
    """The budget is spent. Raised, because sb3-contrib's ARS goes on after a callback that says stop."""


class _Recorder(GenerationCallback):
    """Stops the clock for evaluations and the run at its budget's end.

    SB3's algorithms call it at each step, EGGROLL before each generation: both show the policy as it was when
    the budget was reached, for on-policy algorithms and evolution the one of the last update.
    """

    def __init__(self, name: str, factory: EnvFactory, rules: Rules, started: float):
        super().__init__()
        self.name, self.factory, self.rules = name, factory, rules
        self.evaluations: list[dict[str, Any]] = []
        self._started = started
        self._stopped = 0.0  # seconds that do not count
        self._parent = os.getppid()

    @property
    def seconds(self) -> float:
        """Wall-clock since the first line that makes the algorithm, evaluations left out."""
        return time.perf_counter() - self._started - self._stopped

    def _on_training_start(self) -> None:
        # Schedules follow the budget, in whichever unit it is.
        self.model._update_current_progress_remaining = self._update_progress  # type: ignore[method-assign]
        self.evaluate()

    def _update_progress(self, num_timesteps: int, total_timesteps: int) -> None:
        spent = self.rules.progress(num_timesteps, self.seconds)
        self.model._current_progress_remaining = max(1.0 - spent, 0.0)

    def _on_rollout_start(self) -> None:
        self._check()

    def _on_step(self) -> bool:
        self._check()
        return True

    def _check(self) -> None:
        progress = self.rules.progress(self.model.num_timesteps, self.seconds)
        # The k-th evaluation is due at k / evaluations; several points passed at once need only one.
        if progress >= self._next:
            self.evaluate()
        if progress >= 1.0:
            raise _Spent
        if os.getppid() != self._parent:
            raise SystemExit(1)  # whoever started the comparison is gone

    def evaluate(self) -> None:
        """Evaluate the policy of this moment, with the clock stopped."""
        began, seconds, steps = time.perf_counter(), self.seconds, self.model.num_timesteps
        result = evaluate(deterministic(self.model), self.factory, self.rules.reset_seeds, plain=True)
        self.evaluations.append(
            {"timesteps": steps, "returns": result.returns, "lengths": result.lengths, "seconds": round(seconds, 3)}
        )
        n = self.rules.evaluations
        self._next = (int(self.rules.progress(steps, seconds) * n + 1e-9) + 1) / n
        print(f"  {self.name:<16} {seconds:7.1f} s {steps:>12,} steps   return {result.mean:10.2f} ± {result.std:.2f}",
              file=sys.stderr, flush=True)  # fmt: skip
        self._stopped += time.perf_counter() - began


def deterministic(model: Any) -> Any:
    """Return the model's deterministic policy, from raw observations to actions."""
    try:
        policy = export_policy(model)
    except ConfigError:
        normalizer = model.get_vec_normalize_env()
        if normalizer is None:
            return batched(lambda obs: model.predict(obs, deterministic=True)[0])
        return batched(lambda obs: model.predict(normalizer.normalize_obs(obs), deterministic=True)[0])
    return batched(lambda obs: policy.predict(obs)[0])


def run(folder: Path) -> None:
    """Do the run that ``config.toml`` in ``folder`` describes.

    :raises ConfigError: a setting is wrong
    """
    algo, settings, config, rules = read_config(folder / "config.toml")
    torch.set_num_threads(rules.torch_threads)
    factory = config.factory(rules.gym_packages)
    speed = [machine_speed()]
    started = time.perf_counter()
    learner = build(algo, settings, config, factory, rules.n_cores)
    recorder = _Recorder(f"{algo} seed {config.seed}", factory, rules, started)
    with contextlib.suppress(_Spent):
        learner.learn(rules.timesteps or _FOREVER, recorder)
    if recorder.evaluations[-1]["timesteps"] < learner.model.num_timesteps:
        recorder.evaluate()
    speed.append(machine_speed())
    agents.write_evaluations(folder / "evaluations.npz", recorder.evaluations)
    _save_policy(folder, learner, config)
    last = recorder.evaluations[-1]
    agents.write_json(
        folder / "results.json",
        {
            "env_id": config.env_id,
            "algorithm": algo,
            "seed": config.seed,
            "timesteps": last["timesteps"],
            "seconds": last["seconds"],
            "mean_return": float(np.mean(last["returns"])),
            "std_return": float(np.std(last["returns"])),
            "envs": learner.envs,
            "settings": {name: value for name, value in learner.settings.items() if value is not None},
            "machine": {**machine(), "speed": [round(value, 1) for value in speed]},
            "versions": versions(),
        },
    )
    if learner.model.env is not None:
        learner.model.env.close()


def _save_policy(folder: Path, learner: Learner, config: RunConfig) -> None:
    try:
        policy = export_policy(learner.model)
    except ConfigError:
        learner.model.__dict__.pop("_update_current_progress_remaining", None)
        learner.model.save(folder / "model.zip")
        normalizer = learner.model.get_vec_normalize_env()
        if normalizer is not None:
            normalizer.save(str(folder / "vecnormalize.pkl"))
    else:
        about = {"env_id": config.env_id, "seed": config.seed, "timesteps": learner.model.num_timesteps}
        agents.save_policy(folder / "policy.safetensors", policy, about)


def machine_speed(seconds: float = 0.5) -> float:
    """Return how often per second this core does a fixed piece of work now, so that a slow hour shows."""
    rng = np.random.default_rng(0)
    matrix, vector = rng.normal(size=(64, 64)), rng.normal(size=64)
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        for _ in range(100):
            vector = np.tanh(matrix @ vector)
        count += 1
    return count / spent


def main() -> None:
    """Run the folder named on the command line; one line on stderr for a user's mistake."""
    try:
        run(Path(sys.argv[1]))
    except EggrollError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
