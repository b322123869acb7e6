"""What to train on: presets from ``envs/``, and functions that build Gymnasium environments."""

import difflib
import functools
import importlib
import inspect
import random
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import gymnasium.wrappers as gym_wrappers
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, registry
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import TimeLimit

from eggroll_rl.box2d import with_fresh_world
from eggroll_rl.checks import check_whole, shown
from eggroll_rl.errors import ConfigError, EggrollError, EpisodeError
from eggroll_rl.files import parse_toml, read_bounded
from eggroll_rl.mujoco_tasks import vector_task
from eggroll_rl.mujoco_vector import MujocoVectorEnv, mujoco_warnings_silenced
from eggroll_rl.serial_vector import SerialVectorEnv

_PURE_WRAPPERS = (
    gym.ObservationWrapper, gym.ActionWrapper, gym.RewardWrapper,
    gym_wrappers.FrameStackObservation, gym_wrappers.MaxAndSkipObservation, TimeLimit,
)  # fmt: skip
_MOST_TOML = 2**18  # bytes
EnvSource = str | EnvSpec | Callable[[], gym.Env]


@dataclass(frozen=True)
class EnvFactory:
    """Build one environment, here or in a worker process.

    :param source: a resolved ``EnvSpec``, or a function that returns a new env
    :param kwargs: for the env's constructor
    :param max_episode_steps: time limit of the task, in place of the registered one
    :param wrappers: (class, keyword arguments) from the innermost outwards
    :param episode_cap: a further limit, for training only
    """

    source: EnvSpec | Callable[..., gym.Env]
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    wrappers: tuple[tuple[type[gym.Wrapper], dict[str, Any]], ...] = ()
    episode_cap: int | None = None

    def __call__(self, render_mode: str | None = None) -> gym.Env:
        """Make the env.

        :raises ConfigError: the env refuses its arguments
        """
        kwargs = self.kwargs if render_mode is None else {**self.kwargs, "render_mode": render_mode}
        with mujoco_warnings_silenced():
            if isinstance(self.source, EnvSpec):
                try:
                    env = gym.make(
                        self.source,
                        max_episode_steps=self.max_episode_steps,
                        disable_env_checker=True,
                        **kwargs,
                    )
                except Exception as error:  # a constructor of anybody's
                    what = f"{type(error).__name__}: {_one_line(error)}"
                    raise ConfigError(f"cannot make {self.source.id} with {kwargs}: {what}") from error
            else:
                env = self.source(**kwargs)
                if not isinstance(env, gym.Env):
                    raise ConfigError(f"the env function must return a gymnasium.Env, got {type(env).__name__}")
                if self.max_episode_steps is not None:
                    env = TimeLimit(env, self.max_episode_steps)
        env = with_fresh_world(env)
        for wrapper, wrapper_kwargs in self.wrappers:
            try:
                env = wrapper(env, **wrapper_kwargs)
            except Exception as error:
                raise ConfigError(f"wrapper {wrapper.__name__} refuses {wrapper_kwargs}: {_one_line(error)}") from error
        return env if self.episode_cap is None else TimeLimit(env, self.episode_cap)

    def vector(
        self, num_envs: int, autoreset_mode: AutoresetMode = AutoresetMode.DISABLED, num_threads: int = 1
    ) -> VectorEnv:
        """Make ``num_envs`` of them as one vector env, on ``mujoco.batch`` where the task qualifies.

        :param num_threads: of ``mujoco.batch``

        :raises ConfigError: the env refuses its arguments, or has no vector env that resets by itself
        """
        task = self._vector_task()
        if task is None:
            if autoreset_mode is not AutoresetMode.DISABLED:
                raise ConfigError(f"only the MuJoCo tasks have a vector env with {autoreset_mode}")
            return SerialVectorEnv([self] * num_envs)
        assert isinstance(self.source, EnvSpec)
        limits = [self.max_episode_steps or self.source.max_episode_steps, self.episode_cap]
        limit = min((limit for limit in limits if limit is not None), default=None)
        kwargs = {**self.source.kwargs, **self.kwargs}
        try:
            return task(num_envs, limit, autoreset_mode, num_threads, **kwargs)
        except Exception as error:  # a constructor of anybody's
            what = f"{type(error).__name__}: {_one_line(error)}"
            raise ConfigError(f"cannot make {self.source.id} with {kwargs}: {what}") from error

    def describe_vector(self) -> str:
        """Name the vector env that :meth:`vector` makes, for the log."""
        return "SerialVectorEnv" if self._vector_task() is None else "MujocoVectorEnv"

    def describe(self) -> str:
        """Say which env it is: the same words for the same env, in another process too, as far as names tell."""
        source: Any = self.source
        if isinstance(source, EnvSpec):
            name = f"{source.id} {source.kwargs} {source.max_episode_steps} {source.additional_wrappers}"
        elif isinstance(source, functools.partial):
            name = f"{_name(source.func)} {source.args} {source.keywords}"
        else:
            name = _name(source)
        wrappers = [(_name(wrapper), kwargs) for wrapper, kwargs in self.wrappers]
        return f"{name} {self.kwargs} {wrappers} {self.max_episode_steps} {self.episode_cap}"

    @property
    def copies_states(self) -> bool:
        """Whether simulations of :meth:`vector` can be put into each other's states."""
        return self._vector_task() is not None

    def _vector_task(self) -> type[MujocoVectorEnv] | None:
        return vector_task(self.source) if isinstance(self.source, EnvSpec) and not self.wrappers else None

    def with_cap(self, episode_cap: int | None) -> "EnvFactory":
        """Return this factory with another training cap."""
        return replace(self, episode_cap=episode_cap)


def _name(thing: Any) -> str:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def env_factory(
    source: EnvSource | EnvFactory,
    kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: tuple[tuple[type[gym.Wrapper], dict[str, Any]], ...] = (),
) -> EnvFactory:
    """Resolve an env id (``"module:Id-v0"`` imports the module first), an ``EnvSpec`` or a function.

    :raises ConfigError: unknown id (with the nearest names) or bad limit
    """
    if isinstance(source, EnvFactory):
        return source
    if max_episode_steps is not None:
        check_whole("max_episode_steps", max_episode_steps, 1)
    if isinstance(source, str):
        source = find_spec(source)
    elif not isinstance(source, EnvSpec) and not callable(source):
        raise ConfigError(f"env must be an id, an EnvSpec or a function that returns an env, got {source!r}")
    if kwargs and not isinstance(source, EnvSpec):
        _check_takes(source, kwargs)
    return EnvFactory(source, dict(kwargs or {}), max_episode_steps, wrappers)


def _check_takes(function: Callable[..., gym.Env], kwargs: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise ConfigError(f"env_kwargs {shown(kwargs)} do not fit {_name(function)}: {_one_line(error)}") from error
    except ValueError:  # a function of C without a signature
        return


def find_spec(env_id: str) -> EnvSpec:
    """Look up an env id; an unknown one is answered with the nearest names.

    :raises ConfigError: the id, or the module before its colon, does not exist
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"env {env_id!r}: cannot import {module!r} ({_one_line(error)})") from error
    if name in registry:
        return registry[name]
    # Same name with another version first, then whatever is spelled alike.
    stem = re.sub(r"-v\d+$", "", name)
    near = sorted((i for i in registry if re.sub(r"-v\d+$", "", i).lower() == stem.lower()), reverse=True)
    near += [i for i in difflib.get_close_matches(name, registry, n=3, cutoff=0.5) if i not in near]
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else "; `eggroll-rl list` shows what has a preset"
    raise ConfigError(f"unknown env {env_id!r}{hint}")


def time_limit(env: gym.Env) -> int | None:
    """Return the least limit of the env's ``TimeLimit`` wrappers, in steps."""
    limits = []
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, TimeLimit):
            limits.append(layer._max_episode_steps)
        layer = layer.env
    return min(limits, default=None)


def check_time_limit(env: gym.Env) -> None:
    """Refuse an env whose episodes may never end.

    An env without ``TimeLimit`` that truncates by itself is recognised by running it with random actions.

    :raises ConfigError: no limit is there, and none showed in 5,000 steps
    """
    if time_limit(env) is not None:
        return
    with resets_named():
        truncates = _truncates(env, 5000)
    if not truncates:
        name = env.spec.id if env.spec else type(env.unwrapped).__name__
        raise ConfigError(
            f"{name} shows no time limit, so an episode might never end: set max_episode_steps, "
            "or wrap it in gymnasium.wrappers.TimeLimit"
        )


def _truncates(env: gym.Env, steps: int) -> bool:
    with global_generators_kept():
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(steps):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if truncated:
                return True
            if terminated:
                env.reset()
    return False


@contextmanager
def resets_named() -> Iterator[None]:
    """Say that it was an env's ``reset()`` that failed, where a library resets it among other things.

    :raises EpisodeError: it raised, or did not return an observation and an info dict
    """
    try:
        yield
    except EggrollError:
        raise
    except Exception as error:
        if not any(frame.name == "reset" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise EpisodeError(
            f"the env's reset() failed, which has to take seed and options, and to return an observation of its space "
            f"and a dict: {type(error).__name__}: {_one_line(error)}"
        ) from error


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Put the global generators of random, numpy and torch back: an env may draw from them."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


def seed_globals(seed: int) -> None:
    """Seed the global generators, for envs that draw from them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch accelerators too


# ---------------------------------------------------------------------------------------------------------
# Presets


def preset_folders() -> list[Path]:
    """Return where presets are looked for: ``./envs``, then those of the wheel or of the checkout."""
    here = Path(__file__).parent
    packaged = here / "presets"
    return [Path("envs"), packaged if packaged.is_dir() else here.parent / "envs"]


def list_presets() -> dict[str, Path]:
    """Return all presets by name, the user's own before ours."""
    found: dict[str, Path] = {}
    for folder in preset_folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return found


def load_preset(name: str) -> dict[str, Any]:
    """Read the preset of an env id or a ``.toml`` file; an id without one gives just its id."""
    if name.endswith(".toml"):
        return read_toml(Path(name))
    path = list_presets().get(name)
    return read_toml(path) if path else {"env_id": name}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    :raises ConfigError: it is not there, not TOML, or too large or too deeply nested to be anybody's settings
    """
    try:
        return parse_toml(read_bounded(path, _MOST_TOML).decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # TOML's, UTF-8's, and Python's for an integer of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {_one_line(error)[:200]}") from error


def resolve_wrappers(
    entries: list[dict[str, Any]], gym_packages: tuple[str, ...] = ()
) -> tuple[tuple[type[gym.Wrapper], dict[str, Any]], ...]:
    """Turn ``[[wrappers]]`` tables (``name`` and keyword arguments) into classes.

    Only Gymnasium's wrappers of observations, actions and rewards are allowed, and what lies in packages that
    the caller names: a run folder may come from a stranger, and ``RecordVideo``, say, writes where it is told.

    :raises ConfigError: a wrapper is not there, or its package was not named
    """
    wrappers = []
    named = {package.split(".")[0] for package in gym_packages}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ConfigError(f"wrappers must be tables with name = 'module.Class', got {entry!r}")
        kwargs = dict(entry)
        dotted = kwargs.pop("name", None)
        if not isinstance(dotted, str) or "." not in dotted:
            raise ConfigError(f"a wrapper needs name = 'module.Class', got {entry!r}")
        module, _, name = dotted.rpartition(".")
        if module.split(".")[0] not in {"gymnasium", *named}:
            raise ConfigError(f"wrapper {dotted!r} is outside Gymnasium: allow it with --gym-packages {module}")
        try:
            wrapper = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"wrapper {dotted!r} does not exist ({_one_line(error)})") from error
        if not (isinstance(wrapper, type) and issubclass(wrapper, gym.Wrapper)):
            raise ConfigError(f"wrapper {dotted!r} is not a gymnasium.Wrapper")
        if not issubclass(wrapper, _PURE_WRAPPERS) and module.split(".")[0] not in named:
            raise ConfigError(f"wrapper {dotted!r} may do more than transform: allow it with --gym-packages gymnasium")
        wrappers.append((wrapper, kwargs))
    return tuple(wrappers)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
