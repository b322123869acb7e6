"""Settings of a training run: a preset in ``envs/``, the flags over it, and ``config.toml`` in the run folder."""

import datetime
import importlib
import inspect
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import tomli_w

from eggroll_rl.checks import check_names, check_whole, is_whole, shown
from eggroll_rl.eggroll import EGGROLL
from eggroll_rl.envs import EnvFactory, env_factory, resolve_wrappers
from eggroll_rl.errors import ConfigError
from eggroll_rl.policies import check_extractor_name, default_policy
from eggroll_rl.settings import check_arguments, check_seed, check_step_timeout
from eggroll_rl.workers import STEP_TIMEOUT

# Constructor arguments that the run itself decides.
_RESERVED = {
    "self",
    "env",
    "env_kwargs",
    "seed",
    "n_workers",
    "step_timeout",
    "evaluator",
    "tensorboard_log",
    "stats_window_size",
    "verbose",
}
EGGROLL_SETTINGS = tuple(
    name
    for name in inspect.signature(EGGROLL.__init__).parameters
    if name not in _RESERVED and not name.startswith("_")
)
# They make an env of gym's, whose id may name a module.
_OF_OLD_GYM = ("GymV21Environment-v0", "GymV26Environment-v0")
# Tables that presets may hold for `eggroll-rl compare` and `tune`, beside those of the user's own algorithms,
# "module:Class".
NOT_OF_A_RUN = (
    "comparison", "tune", "openes", "ppo", "a2c", "sac", "td3", "ddpg", "dqn", "ars", "trpo", "tqc", "crossq", "qrdqn",
)  # fmt: skip


@dataclass
class RunConfig:
    """One training run.

    :param env_id: Gymnasium id
    :param env_kwargs: for the env's constructor
    :param wrappers: tables with ``name = "module.Class"`` and keyword arguments, from the innermost outwards
    :param max_episode_steps: time limit of the task, in place of the registered one
    :param total_timesteps: env steps of all members together
    :param seed: of the whole run
    :param n_workers: worker processes; None takes all cores. Does not change the result
    :param step_timeout: seconds that a worker may take for one step of a slice; does not change the result
    :param eval_freq: env steps between evaluations; None: ten in the run; 0: at the end only
    :param eval_episodes: episodes per evaluation
    :param checkpoint_every: generations between checkpoints
    :param keep_checkpoints: how many of them are kept, the last ones
    :param eggroll: arguments of :class:`eggroll_rl.eggroll.EGGROLL`
    """

    env_id: str
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: list[dict[str, Any]] = field(default_factory=list)
    max_episode_steps: int | None = None
    total_timesteps: int = 1_000_000
    seed: int = 0
    n_workers: int | None = None
    step_timeout: float = STEP_TIMEOUT
    eval_freq: int | None = None
    eval_episodes: int = 10
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    eggroll: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("env_kwargs", "wrappers", "eggroll"):
            setattr(self, name, _as_toml(getattr(self, name), name))
        self.check()

    def check(self) -> None:
        """Refuse a setting that cannot be, before any env is made: for those who changed some.

        :raises ConfigError: naming the field, its value and what would be right
        """
        if not isinstance(self.env_id, str) or not self.env_id:
            raise ConfigError(f"env_id must be the id of a Gymnasium env, got {shown(self.env_id)}")
        _checked_leaf(self.env_id, "env_id")
        if self.seed is not None:  # which is refused below
            check_seed(self.seed)
        for name, least in (
            ("total_timesteps", 1), ("seed", 0), ("eval_episodes", 1), ("checkpoint_every", 1),
            ("keep_checkpoints", 1),
            ("n_workers", 0), ("eval_freq", 0), ("max_episode_steps", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None or name not in {"n_workers", "eval_freq", "max_episode_steps"}:
                check_whole(name, value, least)
                setattr(self, name, int(value))
        check_step_timeout(self.step_timeout)
        self.step_timeout = float(self.step_timeout)
        for name, kind in (("env_kwargs", dict), ("wrappers", list), ("eggroll", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name} must be a {kind.__name__}, got {shown(getattr(self, name))}")
        for entry in self.wrappers:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise ConfigError(f"wrappers must be tables with name = 'module.Class', got {shown(entry)}")
        check_names(self.eggroll, EGGROLL_SETTINGS, "[eggroll]")
        parameters = inspect.signature(EGGROLL.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.name not in ("self", "env", "policy")}
        check_arguments({**defaults, "policy": "MlpPolicy", **self.eggroll})

    @classmethod
    def from_dict(cls, table: dict[str, Any], source: str) -> "RunConfig":
        """Read a parsed TOML file.

        :raises ConfigError: a key is unknown (with the nearest name) or a value is wrong
        """
        if not isinstance(table, dict):
            raise ConfigError(f"{source} must be a table of settings, got {shown(table)}")
        table = {name: v for name, v in table.items() if name not in NOT_OF_A_RUN and ":" not in str(name)}
        check_names(table, [f.name for f in fields(cls)], source)
        try:
            return cls(**{"env_id": None, **table})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error

    def to_toml(self) -> str:
        """Return the file that :meth:`from_dict` reads; settings left open are left out."""
        table = {f.name: getattr(self, f.name) for f in fields(self)}
        return tomli_w.dumps({name: value for name, value in table.items() if value not in (None, {}, [])})

    def factory(self, gym_packages: tuple[str, ...] = ()) -> EnvFactory:
        """Return the env's factory, importing only packages that the caller names.

        :raises ConfigError: the env is unknown, or comes from a package that was not named
        """
        for package in gym_packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigError(f"--gym-packages {package}: {error}") from error
        module, _, env_id = self.env_id.rpartition(":")
        if module and module not in gym_packages:
            raise ConfigError(f"{self.env_id!r} needs code from {module!r}: allow it with --gym-packages {module}")
        if env_id in _OF_OLD_GYM and not {"gym", "shimmy"} & set(gym_packages):
            raise ConfigError(f"{env_id!r} can import what its arguments name: allow it with --gym-packages shimmy")
        wrappers = resolve_wrappers(self.wrappers, gym_packages)
        return env_factory(env_id, self.env_kwargs, self.max_episode_steps, wrappers)

    def resolve(self, model: EGGROLL) -> None:
        """Write down every setting that ``model`` uses, so that a later default changes nothing."""
        defaults = inspect.signature(EGGROLL.__init__).parameters
        settings = {name: self.eggroll.get(name, defaults[name].default) for name in EGGROLL_SETTINGS}
        policy_kwargs = model.policy._get_constructor_parameters()
        policy_kwargs["activation_fn"] = policy_kwargs["activation_fn"].__name__
        check_extractor_name(policy_kwargs.get("features_extractor_class"))
        settings["policy"] = type(model.policy).__name__
        settings["policy_kwargs"] = {
            n: v for n, v in policy_kwargs.items() if not n.endswith("_space") and v is not None
        }
        settings["optimizer"] = model.optimizer.__name__
        settings["device"] = str(settings["device"])
        settings["population_size"], settings["slice_size"] = model.population_size, model.slice_size
        self.eggroll = {name: value for name, value in settings.items() if value is not None}

    @staticmethod
    def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
        """Add what settings of an older version, written down by :meth:`resolve`, did not have yet."""
        defaults = {name: inspect.signature(EGGROLL.__init__).parameters[name].default for name in EGGROLL_SETTINGS}
        plain = {name: value for name, value in defaults.items() if isinstance(value, bool | int | float | str)}
        return {**plain, **settings}

    def of_the_result(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share: all that decide the next generation."""
        names = ("env_id", "env_kwargs", "wrappers", "max_episode_steps", "seed", "eggroll")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def model(self, factory: EnvFactory, bounded: AbstractContextManager[None] | None = None) -> EGGROLL:
        """Return the untrained model.

        :param bounded: in which the policy is built, but not the env
        """
        policy = self.eggroll.get("policy")
        if policy is None:
            with closing(factory()) as env:
                policy = default_policy(env.observation_space)
        settings = {name: value for name, value in self.eggroll.items() if name != "policy"}
        settings |= {"seed": self.seed, "n_workers": self.n_workers, "step_timeout": self.step_timeout}
        model = EGGROLL(policy, factory, **settings, _init_setup_model=False)
        with bounded or nullcontext():
            model._setup_model()
        return model


_OF_ONE_FITNESS = (
    "population_size", "slice_size", "sigma", "rank", "n_eval_episodes", "deterministic", "fitness_shaping",
    "best_fraction",
    "learning_rate", "optimizer", "optimizer_kwargs", "weight_decay", "max_grad_norm",
    "n_segments", "segment_steps", "exploration_std", "gamma", "gae_lambda", "target_kl", "n_epochs", "batch_size",
    "sample_reuse", "clip_range", "damping", "critic_kwargs",
)  # fmt: skip


def without_fitness(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what suits one kind of fitness and not the other: for a change of ``fitness``."""
    return {name: value for name, value in settings.items() if name not in _OF_ONE_FITNESS}


def _as_toml(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy in which everything is what a TOML file gives back: no tuples, no numbers of NumPy.

    :raises ConfigError: naming what a TOML file cannot hold
    """
    if depth > 20:
        raise ConfigError(f"{where[:60]}... is too deep: more than 20 tables and lists in each other")
    if isinstance(value, list | tuple):
        return [_as_toml(part, where, depth + 1) for part in value]
    if not isinstance(value, dict):
        return _checked_leaf(value.item() if isinstance(value, np.generic) else value, where)
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{where} must have names as keys, got {shown(key)}")
        _checked_leaf(key, f"{where}: a key")
    # None is what a setting is by default.
    kept = {key: part for key, part in value.items() if part is not None or where != "eggroll"}
    return {key: _as_toml(part, f"{where}: {key}", depth + 1) for key, part in kept.items()}


def _checked_leaf(value: Any, where: str) -> Any:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{where} must be text that UTF-8 can hold, got {shown(value)}") from None
        return str(value)
    if is_whole(value) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} must be a whole number of 64 bits, got {shown(value)}")
    if not isinstance(value, bool | int | float | datetime.date | datetime.time):
        raise ConfigError(f"{where} must be what a TOML file can hold, got {shown(value)}")
    return value
