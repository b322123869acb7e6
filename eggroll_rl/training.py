"""One training run from configuration to run folder: evaluation, checkpoints, signals, resume."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
from torch import Tensor
from tqdm.auto import tqdm

from eggroll_rl import agents
from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.checkpoints import list_checkpoints, newest_checkpoint, remove_checkpoints, save_checkpoint
from eggroll_rl.checks import check_not_negative, check_whole
from eggroll_rl.config import RunConfig
from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import EnvFactory, check_time_limit, read_toml
from eggroll_rl.errors import ConfigError, EggrollError, RunFolderError
from eggroll_rl.evaluation import Evaluation, acting, evaluate
from eggroll_rl.files import alone_in, cannot_write, is_temporary, one_line, parse_toml, sync, write_atomic
from eggroll_rl.machine import machine, versions
from eggroll_rl.rollout import RolloutResult
from eggroll_rl.signals import handlers
from eggroll_rl.tracking import tracked
from eggroll_rl.workers import ClusterEvaluator, count_workers

# Reset seeds of evaluations: the best policy is chosen on one set and reported on the other. Training draws its
# seeds from the whole 32-bit range.
SELECTION_SEED = 1_000_000
REPORT_SEED = 2_000_000
REPORT_EPISODES = 20
_LAST_EPISODES = ("ep_rew_mean", "ep_len_mean")
_MOST_INPUTS = 2**20  # of a policy's normalizer and the like, when its network is bounded by a checkpoint


class Interrupted(BaseException):
    """A signal ended the run at a generation's boundary; everything is saved."""

    def __init__(self, signum: int):
        self.signum = signum
        super().__init__(signum)


def train(
    config: RunConfig,
    folder: Path,
    resume: bool = False,
    overwrite: bool = False,
    gym_packages: tuple[str, ...] = (),
    progress_bar: bool = True,
    tensorboard_log: Path | None = None,
    track: str | None = None,
    evaluator: ClusterEvaluator | None = None,
) -> dict[str, Any]:
    """Train, and return what ``results.json`` holds.

    :param folder: run folder; refused if it exists, unless ``resume`` or ``overwrite``
    :param tensorboard_log: folder for TensorBoard's files
    :param track: project of W&B
    :param evaluator: of a cluster, where the run is not to stay on this machine
    :raises ConfigError: a setting is wrong; nothing was written
    :raises RunFolderError: the folder is in the way, or holds nothing to resume
    :raises Interrupted: by SIGINT or SIGTERM, after saving
    """
    _check_folder(folder, resume, overwrite)
    factory = config.factory(gym_packages)
    check_time_limit(factory())  # the training cap does not end an evaluation
    model = _model(config, factory, folder if resume else None)
    model.evaluator = evaluator
    config.resolve(model)
    about = {**config.of_the_result(), "total_timesteps": config.total_timesteps}
    with alone_in(folder):
        _check_folder(folder, resume, overwrite)  # again: somebody may have been there meanwhile
        with tracked(model, f"{config.env_id}-{folder.name}", about, tensorboard_log, track) as logging:
            return _train(config, model, factory, folder, resume, progress_bar, 1 if logging else None)


def _model(config: RunConfig, factory: EnvFactory, resumed: Path | None) -> EGGROLL:
    bounded: AbstractContextManager[None] = nullcontext()
    if resumed is not None:  # the run may be a stranger's, and ask for any size
        bounded = agents.no_larger_than(newest_checkpoint(resumed)[1], _MOST_INPUTS)
    try:
        return config.model(factory, bounded)
    except EggrollError:
        raise
    except (RuntimeError, MemoryError) as error:  # torch's, of a device that is not there or a network of any size
        raise ConfigError(f"the model cannot be made: {one_line(error) or type(error).__name__}") from error


def _train(
    config: RunConfig,
    model: EGGROLL,
    factory: EnvFactory,
    folder: Path,
    resume: bool,
    progress_bar: bool,
    log_interval: int | None,
) -> dict[str, Any]:
    recorder = RunRecorder(config, folder, factory, logs=log_interval is not None)
    recorder.init_callback(model)
    with recorder.signals():
        if resume:
            recorder.restore(model)
        else:
            _clear(folder)
        write_atomic(folder / "config.toml", config.to_toml().encode())
        load_run_config(folder)  # what cannot be read back is better known before the training than after
        if not resume:
            recorder.checkpoint()  # from here on there is something to resume
        remaining = config.total_timesteps - model.num_timesteps
        if remaining > 0:
            try:
                model.learn(
                    remaining, callback=recorder, log_interval=log_interval, reset_num_timesteps=not resume,
                    progress_bar=progress_bar,
                )  # fmt: skip
            except BaseException as error:
                recorder.checkpoint_after(error)
                raise
            recorder.checkpoint()
        return recorder.finish()


class RunRecorder(GenerationCallback):
    """Writes the run folder while :class:`EGGROLL` learns, and turns signals into a clean end."""

    def __init__(self, config: RunConfig, folder: Path, factory: EnvFactory, logs: bool = False):
        super().__init__()
        self.logs = logs
        self.config = config
        self.folder = folder
        self.factory = factory
        self.row: dict[str, Any] = {}  # of the last generation; a list of all would grow for ever
        self.evaluations: list[dict[str, Any]] = []
        self.eval_freq = config.total_timesteps // 10 if config.eval_freq is None else config.eval_freq
        self.seconds_before = 0.0  # of training, before a resume
        self._started: float | None = None
        self._ended = 0.0
        self._evaluating = 0.0
        # The last generation's boundary: what a checkpoint holds, whenever it is written.
        self._boundary = {"generation": 0, "timesteps": 0}
        self._interruptible = False
        self._pending: int | None = None
        self._said = 0.0

    # Called by EGGROLL.learn ----------------------------------------------------------------------------

    def _on_training_start(self) -> None:
        # Until the first generation ends, the last checkpoint is all there is: starting the workers takes seconds.
        self._interruptible = True
        self._stop_if_asked()

    def _on_rollout_start(self) -> None:
        if self._started is None:
            self._started = self._ended = time.perf_counter()
        # From here to the end of the evaluation nothing changes that a checkpoint holds.
        self._boundary = {
            "generation": self._model.evolution_strategy.generation,
            "timesteps": self.num_steps,
        }
        self._interruptible = True
        self._stop_if_asked()

    def _on_rollout_end(self) -> None:
        self._interruptible = False

    def on_generation_end(self) -> bool:
        """Record the generation; evaluate and save when it is time."""
        self._ended = time.perf_counter()
        es = self._model.evolution_strategy
        self._boundary = {"generation": es.generation, "timesteps": self.num_steps}
        self.row = {
            "generation": es.generation,
            "timesteps": self.num_steps,
            "seconds": round(self.training_seconds, 3),
            **self._model.last_generation,
        }
        agents.append_csv(self.folder / "progress.csv", self.row)
        done = self.num_steps >= self.config.total_timesteps
        if done or (self.eval_freq and self.num_steps // self.eval_freq > self._evaluated_steps() // self.eval_freq):
            self.evaluate()
        if es.generation % self.config.checkpoint_every == 0:
            self.checkpoint()
        self._say_progress()
        self._stop_if_asked()
        return True

    @property
    def _model(self) -> EGGROLL:
        assert isinstance(self.model, EGGROLL)
        return self.model

    @property
    def num_steps(self) -> int:
        """Env steps of all members so far."""
        return self._model.num_timesteps

    @property
    def training_seconds(self) -> float:
        """Wall-clock from the first ask to the last tell, evaluations left out."""
        running = 0.0 if self._started is None else self._ended - self._started - self._evaluating
        return self.seconds_before + running

    # Evaluation -----------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate the mean policy on the selection seeds, and keep it if it is the best so far."""
        started = time.perf_counter()
        result = self._evaluate(self._model.policy, SELECTION_SEED, self.config.eval_episodes)
        best = max((sum(e["returns"]) / len(e["returns"]) for e in self.evaluations), default=float("-inf"))
        self.evaluations.append(
            {
                "timesteps": self.num_steps,
                "returns": result.returns,
                "lengths": result.lengths,
                "seconds": round(self.training_seconds, 3),
            }
        )
        agents.write_evaluations(self.folder / "evaluations.npz", self.evaluations)
        if self.logs:
            self._model.logger.record("eval/mean_reward", result.mean)
            self._model.logger.dump(self.num_steps)
        if result.mean > best:
            agents.save_policy(self.folder / "best.safetensors", self._model.policy, self._about())
        self._say(
            f"{self.num_steps:>12,} steps {self.training_seconds:7.1f} s   "
            f"return {result.mean:9.2f} ± {result.std:.2f}{'   best' if result.mean > best else ''}"
        )
        # Neither the evaluation nor its writing is training time.
        self._evaluating += time.perf_counter() - started
        self._ended += time.perf_counter() - started

    def _evaluate(self, policy: Any, first_seed: int, n_episodes: int) -> Evaluation:
        seeds = range(first_seed, first_seed + n_episodes)
        return evaluate(acting(policy), self.factory, seeds)

    def _evaluated_steps(self) -> int:
        return self.evaluations[-1]["timesteps"] if self.evaluations else 0

    def finish(self) -> dict[str, Any]:
        """Save the final policy, evaluate it and the best one on fresh seeds, and write the results."""
        model = self._model
        self._interruptible = True  # the last checkpoint is written: a resume comes here again
        self._stop_if_asked()
        agents.save_policy(self.folder / "policy.safetensors", model.policy, self._about())
        final = self._evaluate(model.policy, REPORT_SEED, REPORT_EPISODES)
        best_path = self.folder / "best.safetensors"
        if not best_path.exists():
            agents.save_policy(best_path, model.policy, self._about())
        _, about = agents.load_tensors(best_path, "policy")
        best = self._evaluate(agents.load_policy(best_path), REPORT_SEED, REPORT_EPISODES)
        seconds = self.training_seconds
        results = {
            "env_id": self.config.env_id,
            "algorithm": "eggroll",
            "seed": self.config.seed,
            "timesteps": self.num_steps,
            "generations": model.evolution_strategy.generation,
            "wall_seconds": round(seconds, 3),
            "env_steps_per_second": round(self.num_steps / seconds, 1) if seconds else None,
            "n_workers": self._n_workers(),
            "vector_env": self.factory.describe_vector(),
            "evaluation": final.as_dict(),
            "best": {"timesteps": about["timesteps"], **best.as_dict()},
            "machine": machine(),
            "versions": versions(),
        }
        agents.write_json(self.folder / "results.json", results)
        return results

    def _n_workers(self) -> int:
        if self._model.evaluator is not None:
            return sum(self._model.evaluator.nodes.values())
        return count_workers(self.config.n_workers, self._model.n_rows, self._model.slice_size)

    def _about(self) -> dict[str, Any]:
        return {"env_id": self.config.env_id, "seed": self.config.seed, **self._boundary}

    # Checkpoints ----------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write everything that a resume needs, as of the last generation's boundary."""
        model = self._model
        tensors = {f"policy.{name}": tensor for name, tensor in model.policy.state_dict().items()}
        tensors |= {f"scorer.{name}": tensor for name, tensor in model.scorer.state_dict().items()}
        numbers = {}
        for index, state in model.evolution_strategy.optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                elif value is not None:
                    numbers[f"{index}.{name}"] = value
        last = model.last_generation
        about = {
            **self._about(),
            "training_seconds": self.training_seconds,
            "optimizer_numbers": numbers,
            "bad_members": model.bad_members,
            "last_episodes": {name: last[name] for name in _LAST_EPISODES if math.isfinite(last[name])},
            "settings": tomli_w.dumps(self.config.of_the_result()),
        }
        if (self.folder / "progress.csv").exists():
            sync(self.folder / "progress.csv")  # its rows up to this generation come before the checkpoint
        save_checkpoint(self.folder, tensors, about, self.config.keep_checkpoints)

    def checkpoint_after(self, error: BaseException) -> None:
        """Keep the last generation's boundary, which is intact whatever ended the training.

        :raises RunFolderError: it cannot be written, and that is the worse news: the user believed it to be saved
        """
        if isinstance(error, RunFolderError):
            return  # the disk is full already
        done = self._model._n_updates
        if self._model.evolution_strategy.generation != done:
            return  # in the middle of an update
        if done != self._boundary["generation"]:  # after an update, and before on_generation_end()
            self._boundary = {"generation": done, "timesteps": self.num_steps}
        try:
            self.checkpoint()
        except RunFolderError as failed:
            if isinstance(error, Interrupted | KeyboardInterrupt):
                raise
            self._say(f"nothing was saved of the last generations: {failed}")

    def restore(self, model: EGGROLL) -> None:
        """Bring a new model to the state of the last checkpoint, and cut the curves there.

        :raises RunFolderError: the checkpoint is missing, damaged, or of another configuration
        """
        generation, timesteps = self.restore_model(model)
        self._boundary = {"generation": generation, "timesteps": timesteps}
        agents.cut_csv(self.folder / "progress.csv", "generation", generation)
        evaluations = agents.read_evaluations(self.folder / "evaluations.npz")
        self.evaluations = [e for e in evaluations if e["timesteps"] <= timesteps]

    def restore_model(self, model: EGGROLL) -> tuple[int, int]:
        """Bring a new model to the state of the last checkpoint, write nothing, and return generation and timesteps.

        :raises RunFolderError: as :meth:`restore`
        """
        path, tensors, about, skipped = newest_checkpoint(self.folder)
        for reason in skipped:
            self._say(f"skipped: {reason}")
        try:
            before, now = parse_toml(about["settings"]), parse_toml(tomli_w.dumps(self.config.of_the_result()))
            for table in (before, now):
                settings = RunConfig.with_defaults(table.pop("eggroll", {}))
                table |= {f"[eggroll] {name}": value for name, value in settings.items()}
            for name in {*before, *now}:
                if before.get(name) != now.get(name):
                    raise ValueError(f"{name} was {before.get(name)}")
            policy = {n.removeprefix("policy."): t for n, t in tensors.items() if n.startswith("policy.")}
            entries = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
            state = _by_index({**entries, **about["optimizer_numbers"]})
            es = model.evolution_strategy
            optimizer = {**es.optimizer.state_dict(), "state": state}
            model.policy.load_state_dict(policy)
            scorer = {n.removeprefix("scorer."): t for n, t in tensors.items() if n.startswith("scorer.")}
            _check_complete(state, [parameter.dim() for parameter in es.parameters.values()], "optimizer")
            moments = _by_index(scorer, "optimizer.")
            _check_complete(moments, [0] * len(moments), "scorer.optimizer")
            if scorer:
                with agents.no_larger_than(tensors, _MOST_INPUTS):
                    model.scorer.load_state_dict(scorer)
            es.load_state_dict({"seed": es.seed, "generation": about["generation"], "optimizer": optimizer})
            check_whole("timesteps", about["timesteps"], 0)
            check_not_negative("training_seconds", about["training_seconds"])
            model.last_generation |= {str(name): float(mean) for name, mean in about.get("last_episodes", {}).items()}
            model.bad_members = {str(reason): int(count) for reason, count in about.get("bad_members", {}).items()}
            model._n_updates, model.num_timesteps = about["generation"], about["timesteps"]
            self.seconds_before = about["training_seconds"]
        except Exception as error:  # of whatever a stranger wrote there
            what = one_line(error)
            raise RunFolderError(f"{path} does not fit {self.folder / 'config.toml'}: {what}") from error
        return about["generation"], about["timesteps"]

    # Signals --------------------------------------------------------------------------------------------

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into :class:`Interrupted` at a safe point; the second ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may install handlers
            return

        def handle(signum: int, frame: FrameType | None) -> None:
            if self._pending is not None:
                os._exit(128 + signum)
            self._pending = signum
            if self._interruptible:
                self._stop_if_asked()

        with handlers(dict.fromkeys((signal.SIGINT, signal.SIGTERM), handle)):
            yield

    def _stop_if_asked(self) -> None:
        if self._pending is not None:
            self._interruptible = False
            raise Interrupted(self._pending)

    # Output ---------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)
        self._said = time.perf_counter()

    def _say_progress(self) -> None:
        # A terminal has the bar.
        if sys.stderr.isatty() or time.perf_counter() - self._said < 10:
            return
        row, rate = self.row, self.num_steps / max(self.training_seconds, 1e-9)
        left = max(self.config.total_timesteps - self.num_steps, 0) / rate
        self._say(
            f"{self.num_steps:>12,} steps {self.training_seconds:7.1f} s   ep_rew_mean {row['ep_rew_mean']:.2f}   "
            f"{rate:,.0f} steps/s   about {left:.0f} s left"
        )


def replay(folder: Path, member: int, gym_packages: tuple[str, ...] = ()) -> tuple[int, list[float], list[int]]:
    """Evaluate one member of a run's next generation again, alone and in this process; the run stays as it is.

    :param member: its number, or that of a simulation where segments run
    :return: the generation, and returns and lengths of the member's episodes; of a simulation the sum of its rewards
    :raises EpisodeError: it fails
    :raises RunFolderError: the folder holds no run
    :raises ConfigError: there is no such member
    """
    config = load_run_config(folder)
    factory = config.factory(gym_packages)
    model = _model(config, factory, folder)
    config.resolve(model)
    generation, timesteps = RunRecorder(config, folder, factory).restore_model(model)
    model._update_current_progress_remaining(timesteps, config.total_timesteps)  # which sigma may go by
    result = model.replay_member(member)
    row = member - result.first
    if isinstance(result, RolloutResult):
        return generation, result.returns[row].tolist(), result.lengths[row].tolist()
    return generation, [float(result.rewards[:, row].sum())], [int(result.lengths[row])]


def load_run_config(folder: Path) -> RunConfig:
    """Read the configuration of a run folder."""
    path = folder / "config.toml"
    if not path.exists():
        raise RunFolderError(f"{folder} holds no run to resume: it has no config.toml")
    return RunConfig.from_dict(read_toml(path), str(path))


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other")
    if resume:
        if not list_checkpoints(folder):
            raise RunFolderError(f"{folder} holds no run to resume: it has no checkpoint")
    elif folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file, not a run folder")
    elif folder.exists() and not all(map(is_temporary, folder.iterdir())):
        if not overwrite:
            raise RunFolderError(f"{folder} exists: continue it with --resume, replace it with --overwrite")
        try:
            load_run_config(folder)
        except (ConfigError, RunFolderError) as error:
            raise RunFolderError(f"{folder} is not a run folder: --overwrite leaves it alone ({error})") from error


def _clear(folder: Path) -> None:
    """Remove the run that is to be replaced, and nothing else that lies there."""
    remove_checkpoints(folder)
    for name in agents.RUN_FILES:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error


def _by_index(entries: dict[str, Any], prefix: str = "") -> dict[int, dict[str, Any]]:
    """Return an optimizer's entries of ``"0.exp_avg"`` and so on by parameter and name."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in entries.items():
        if name.startswith(prefix):
            index, _, key = name.removeprefix(prefix).partition(".")
            state.setdefault(int(index), {})[key] = value
    return state


def _check_complete(state: dict[int, dict[str, Any]], dims: list[int], where: str) -> None:
    """Refuse an optimizer's state with gaps: torch would start there anew, or stop in the middle of the run.

    :param dims: of each parameter; Adafactor keeps other things of a matrix than of a vector
    """
    kinds = {(dims[index], frozenset(entry)) for index, entry in state.items()}
    if len(kinds) > len({dim for dim, _ in kinds}) or (state and len(state) != len(dims)):
        raise ValueError(f"{where} has entries for some of its parameters and not for others")
