"""RL Zoo with EGGROLL among its algorithms: ``python -m eggroll_rl.zoo train --algo eggroll --env HalfCheetah-v5``.

``train``, ``enjoy``, ``record_video``, ``plot_train`` and so on are RL Zoo's own, unchanged, with its own flags. This
module puts EGGROLL into its table of algorithms, with our presets as the hyper-parameters (``-conf eggroll_rl.zoo``,
which is the default here) and the search space of ``eggroll-rl tune`` for ``-optimize``.

RL Zoo makes the envs and hands over a ready-made ``VecEnv``. EGGROLL rebuilds its env from the spec, so that segments,
worker processes and their guarantees are there as without RL Zoo; the episodes still go into its ``monitor.csv`` (not
with ``--vec-env subproc``, whose files other processes hold). Where the spec does not tell the whole env, as with
``frame_stack``, ``vec_env_wrapper`` or wrappers that do not record their arguments, the envs are stepped as they are.
"""

import argparse
import copy
import importlib
import runpy
import sys
from typing import Any, Self

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import list_presets, load_preset
from eggroll_rl.errors import ConfigError, EpisodeError, NonFiniteError
from eggroll_rl.tune import SPACES, settings_at, suggest

_SCRIPTS = {name: f"rl_zoo3.{name}" for name in ("train", "enjoy", "record_video")}
_SCRIPTS |= {name: f"rl_zoo3.plots.{name}" for name in ("plot_train", "all_plots", "plot_from_file")}


class ZooEGGROLL(EGGROLL):
    """EGGROLL that rebuilds the envs of RL Zoo."""

    def __init__(self, policy: Any, env: Any, **settings: Any):
        super().__init__(policy, _rebuildable(env), **settings)
        self._of_zoo = env

    @classmethod
    def load(cls, path: Any, env: Any = None, device: Any = "cpu", **settings: Any) -> Self:  # type: ignore[override]
        """Load as :meth:`EGGROLL.load` does."""
        model = super().load(path, _rebuildable(env), device, **settings)
        model._of_zoo = env
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_of_zoo"]

    def learn(self, total_timesteps: int, callback: Any = None, *args: Any, **kwargs: Any) -> Self:
        """Learn, and write the episodes where RL Zoo's own envs would have.

        :raises ValueError: an episode failed or an update was not finite, which is how RL Zoo's trials are pruned
        """
        given = [] if callback is None else callback if isinstance(callback, list) else [callback]
        callbacks = [part if isinstance(part, BaseCallback) else ConvertCallback(part) for part in given]
        writer = _results_writer(self._of_zoo)
        if writer is not None and self._factory is not None:
            callbacks.append(_EpisodeWriter(writer))
        try:
            return super().learn(total_timesteps, callbacks, *args, **kwargs)
        except (EpisodeError, NonFiniteError) as error:
            raise ValueError(str(error)) from error
        finally:
            if self._factory is not None and self._of_zoo is not None:
                self._of_zoo.close()
                self._of_zoo = None


class _EpisodeWriter(BaseCallback):
    """Writes each episode that ends into a Monitor file."""

    def __init__(self, writer: ResultsWriter):
        super().__init__()
        self.writer = writer

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.writer.write_row({name: info["episode"][name] for name in ("r", "l", "t")})
        return True


def _rebuildable(env: Any) -> Any:
    """Return the spec of RL Zoo's envs if it tells all about them, else the envs."""
    if type(env) not in (DummyVecEnv, SubprocVecEnv):
        return env
    spec: EnvSpec | None = env.get_attr("spec")[0]
    if spec is None:
        return env
    wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.name != "Monitor")
    if any(wrapper.kwargs is None for wrapper in wrappers):
        return env
    spec = copy.deepcopy(spec)
    spec.additional_wrappers = wrappers
    return spec


def _results_writer(env: Any) -> ResultsWriter | None:
    layer = env.envs[0] if type(env) is DummyVecEnv else None
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, Monitor):
            return layer.results_writer
        layer = layer.env
    return None


def _hyperparams() -> dict[str, dict[str, Any]]:
    """Return our presets as RL Zoo's hyper-parameters; ``default`` is for any other env.

    Presets with wrappers or a time limit of their own are left out: RL Zoo has other names for these.
    """
    found: dict[str, dict[str, Any]] = {"default": {"policy": "MlpPolicy", "n_timesteps": 1_000_000}}
    for name in list_presets():
        try:
            preset = load_preset(name)
        except ConfigError:  # of the user's own, and perhaps not meant for this
            continue
        if "env_id" in preset and not preset.get("wrappers") and "max_episode_steps" not in preset:
            table = {**found["default"], "n_timesteps": preset.get("total_timesteps", 1_000_000)}
            kwargs = {"env_kwargs": preset["env_kwargs"]} if preset.get("env_kwargs") else {}
            found[preset["env_id"]] = {**table, **kwargs, **preset.get("eggroll", {})}
    return found


def __getattr__(name: str) -> Any:
    if name == "hyperparams":  # what `-conf eggroll_rl.zoo` looks for
        return _hyperparams()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register(base: dict[str, Any] | None = None) -> None:
    """Put EGGROLL into RL Zoo's tables.

    :param base: settings of the task, which ``-optimize`` keeps where it searches nothing: RL Zoo does not say what env
        a trial is for
    :raises ConfigError: RL Zoo is missing
    """
    try:
        rl_zoo3 = importlib.import_module("rl_zoo3")
        hyperparams_opt = importlib.import_module("rl_zoo3.hyperparams_opt")
    except ImportError as error:
        raise ConfigError(f"RL Zoo is missing ({error}): pip install 'eggroll-rl[zoo]'") from error
    base = {name: value for name, value in (base or {}).items() if name not in ("n_timesteps", "env_kwargs")}
    space = dict(SPACES[base.get("fitness", "episode")])
    if "segment_steps" in base:  # as long as episodes have to be
        space.pop("segment_steps", None)

    def convert(params: dict[str, Any]) -> dict[str, Any]:
        return settings_at(base, params)

    def sample(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        return convert({name: suggest(trial, name, values) for name, values in space.items()})

    rl_zoo3.ALGOS["eggroll"] = ZooEGGROLL
    hyperparams_opt.HYPERPARAMS_SAMPLER["eggroll"] = sample
    hyperparams_opt.HYPERPARAMS_CONVERTER["eggroll"] = convert


def main() -> None:
    """Run one of RL Zoo's scripts."""
    script, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if script not in _SCRIPTS:
        sys.exit(f"python -m eggroll_rl.zoo runs one of {', '.join(_SCRIPTS)}, got {script!r}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flags in (("--env",), ("--algo",), ("-conf", "--conf-file")):
        parser.add_argument(*flags, default="")
    known, _ = parser.parse_known_args(arguments)
    try:
        register(_hyperparams().get(known.env))
    except ConfigError as error:
        sys.exit(str(error))
    if script == "train" and known.algo == "eggroll" and not known.conf_file:
        arguments = [*arguments, "-conf", "eggroll_rl.zoo"]
    sys.argv = [script, *arguments]
    runpy.run_module(_SCRIPTS[script], run_name="__main__")


if __name__ == "__main__":
    importlib.import_module("eggroll_rl.zoo").main()  # RL Zoo imports this module too: one copy of its classes
