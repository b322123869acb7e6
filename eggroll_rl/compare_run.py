"""One run of a comparison: an algorithm, a seed and a budget, in a process of its own.

``python -m eggroll_rl.compare_run FOLDER`` does what the folder's ``config.toml`` says and writes

    policy.safetensors      deterministic policy of the budget's end, as one of ours: ``eggroll-rl evaluate FOLDER``
    model.zip               instead, for one that cannot be exported: SB3's own file, with vecnormalize.pkl
    evaluations.npz         SB3's keys, with the training seconds beside them
    results.json            written last: a run without it never happened
"""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from eggroll_rl import agents
from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.compare_algorithms import EVOLUTION, Learner, build
from eggroll_rl.config import RunConfig, check_names
from eggroll_rl.envs import EnvFactory, read_toml
from eggroll_rl.errors import ConfigError, EggrollError
from eggroll_rl.es import check_positive, check_whole
from eggroll_rl.evaluation import acting, batched, evaluate, find_algorithm
from eggroll_rl.machine import machine, versions
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.sb3_export import export_policy
from eggroll_rl.signals import end_with_parent
from eggroll_rl.training import SELECTION_SEED

FOREVER = 2**62  # env steps
WITH_PARENT = "--with-parent"  # of main(): end when standard input does


@dataclass(frozen=True)
class Rules:
    """What is the same for every run of a comparison.

    :param timesteps: budget in env steps, or None
    :param seconds: budget in seconds of wall-clock, or None; with both, a run ends with the first
    :param evaluations: points of the budget, at equal distances, at which the policy of that moment is evaluated;
        one more before training
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
            raise ConfigError("a budget is needed: timesteps, seconds or both")
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
    agents.write_atomic(path, _toml(algo, settings, config, rules).encode())


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
    settings = table.pop(algo, {})
    return algo, settings, RunConfig.from_dict(table, str(path)), Rules(**comparison)


class BudgetSpent(Exception):
    """The budget is spent. Raised, because sb3-contrib's ARS goes on after a callback that says stop."""


@dataclass(frozen=True)
class _Held:
    """The policy between two updates.

    :param policy: as one of ours, or SB3's own where it cannot be exported
    :param obs_rms: the statistics that go with SB3's own
    """

    timesteps: int
    seconds: float
    policy: Any
    predict: Any
    obs_rms: Any = None


class BudgetRecorder(GenerationCallback):
    """Evaluates at fixed points of the budget, with the clock stopped, and ends the run.

    What counts at a point is the policy that one would have had by stopping there: the last complete update's. An
    iteration of EGGROLL or ARS takes seconds, and what it learns belongs to the time after it. All algorithms pass
    through ``on_rollout_start`` between two updates, SB3's off-policy ones at every ``train_freq``.

    :param started: ``time.perf_counter()`` from which on time counts
    :param on_evaluation: called at each point with its number and the mean return; what it raises ends the run
    """

    def __init__(
        self,
        name: str,
        factory: EnvFactory,
        rules: Rules,
        started: float,
        on_evaluation: Callable[[int, float], None] | None = None,
    ):
        super().__init__()
        self.on_evaluation = on_evaluation
        self.name, self.factory, self.rules = name, factory, rules
        self.evaluations: list[dict[str, Any]] = []
        self.held: _Held | None = None
        self._started = started
        self._stopped = 0.0  # seconds that do not count
        self._next = 0  # point
        self._held_progress = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock since the first line that makes the algorithm, evaluations left out."""
        return time.perf_counter() - self._started - self._stopped

    def _on_training_start(self) -> None:
        # Schedules follow the budget, in whichever unit it is.
        self.model._update_current_progress_remaining = self._update_progress  # type: ignore[method-assign]
        self.between_updates()

    def _update_progress(self, num_timesteps: int, total_timesteps: int) -> None:
        spent = self.rules.progress(num_timesteps, self.seconds)
        self.model._current_progress_remaining = max(1.0 - spent, 0.0)

    def _on_rollout_start(self) -> None:
        self.between_updates()

    def between_updates(self) -> None:
        """Evaluate the policy so far at the points that the last iteration passed, then hold the new one."""
        began, seconds, steps = time.perf_counter(), self.seconds, self.model.num_timesteps
        progress = self.rules.progress(steps, seconds)
        if self.held is not None:
            self._evaluate_points_before(progress)
        if progress > 1.0:
            if self.held is None:  # all of the budget went into making the algorithm
                self.held = hold(self.model, steps, seconds)
            self._stopped += time.perf_counter() - began
            raise BudgetSpent
        # A thousandth of the budget is near enough: off-policy algorithms come here at every step.
        if self.held is None or progress - self._held_progress >= 0.001 or progress == 1.0:
            self.held, self._held_progress = hold(self.model, steps, seconds), progress
        self._stopped += time.perf_counter() - began

    def finish(self) -> None:
        """Evaluate the last policy at the points that are left."""
        self._evaluate_points_before(np.inf)

    def _evaluate_points_before(self, progress: float) -> None:
        while self._next <= self.rules.evaluations and self._next / self.rules.evaluations < progress:
            self._next += 1
            self._evaluate()
            if self.on_evaluation is not None:
                self.on_evaluation(self._next - 1, float(np.mean(self.evaluations[-1]["returns"])))

    def _evaluate(self) -> None:
        held = self.held
        assert held is not None
        if self.evaluations and self.evaluations[-1]["timesteps"] == held.timesteps:
            return  # still the same policy
        result = evaluate(held.predict, self.factory, self.rules.reset_seeds, plain=True)
        about = {"timesteps": held.timesteps, "seconds": round(held.seconds, 3)}
        self.evaluations.append({**about, "returns": result.returns, "lengths": result.lengths})
        print(f"  {self.name:<16} {held.seconds:7.1f} s {held.timesteps:>12,} steps   "
              f"return {result.mean:10.2f} ± {result.std:.2f}", file=sys.stderr, flush=True)  # fmt: skip


def hold(model: Any, timesteps: int = 0, seconds: float = 0.0) -> _Held:
    """Return a copy of the model's deterministic policy, which takes raw observations."""
    try:
        policy = export_policy(model)
    except ConfigError:
        pass
    else:
        if policy is model.policy:
            policy = policy.replica()
        return _Held(timesteps, seconds, policy, acting(policy))
    own, normalizer = copy.deepcopy(model.policy), model.get_vec_normalize_env()
    obs_rms = copy.deepcopy(getattr(normalizer, "obs_rms", None))

    def predict(obs: Any) -> np.ndarray:
        if normalizer is not None and normalizer.norm_obs:
            now, normalizer.obs_rms = normalizer.obs_rms, obs_rms
            obs, normalizer.obs_rms = normalizer.normalize_obs(obs), now
        return own.predict(obs, deterministic=True)[0]

    return _Held(timesteps, seconds, own, batched(predict), obs_rms)


def run(folder: Path) -> None:
    """Do the run that ``config.toml`` in ``folder`` describes.

    :raises ConfigError: a setting is wrong
    """
    algo, settings, config, rules = read_config(folder / "config.toml")
    torch.set_num_threads(rules.torch_threads)
    factory = config.factory(rules.gym_packages)
    speed = [machine_speed()]
    import_everything(algo)
    started = time.perf_counter()
    learner = build(algo, settings, config, factory, rules.n_cores)
    recorder = BudgetRecorder(f"{algo} seed {config.seed}", factory, rules, started)
    failed = None
    try:
        learner.learn(rules.timesteps or FOREVER, recorder)
        recorder.between_updates()
    except BudgetSpent:
        pass
    except Exception as error:  # an algorithm that fails has a result, too: what it had until then
        if not recorder.evaluations:
            raise
        failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"  failed: {failed}", file=sys.stderr)
    seconds = recorder.seconds
    try:
        recorder.finish()
    except EggrollError as error:  # its last policy cannot be evaluated
        failed = failed or " ".join(str(error).split())[:300]
    held = recorder.held
    speed.append(machine_speed())
    agents.write_evaluations(folder / "evaluations.npz", recorder.evaluations)
    _save_policy(folder, learner, held, config)
    last = recorder.evaluations[-1]
    agents.write_json(
        folder / "results.json",
        {
            "env_id": config.env_id,
            "algorithm": algo,
            "seed": config.seed,
            "timesteps": last["timesteps"],
            "seconds": last["seconds"],
            "stopped_after": round(seconds, 3),
            "failed": failed,
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


def import_everything(algo: str) -> None:
    """Import before the clock starts: the first optimizer of a process loads torch's compiler, for one."""
    if algo not in EVOLUTION:
        find_algorithm(algo)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def _save_policy(folder: Path, learner: Learner, held: Any, config: RunConfig) -> None:
    if isinstance(held.policy, MlpPolicy):
        about = {"env_id": config.env_id, "seed": config.seed, "timesteps": held.timesteps}
        agents.save_policy(folder / "policy.safetensors", held.policy, about)
        return
    model = learner.model
    model.policy.load_state_dict(held.policy.state_dict())
    model.__dict__.pop("_update_current_progress_remaining", None)  # the recorder's
    model.save(folder / "model.zip")
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        normalizer.obs_rms = held.obs_rms
        normalizer.save(str(folder / "vecnormalize.pkl"))


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
    if sys.argv[2:] == [WITH_PARENT]:
        end_with_parent()
    try:
        run(Path(sys.argv[1]))
    except EggrollError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
