"""Evaluate and load trained agents: our run folders, and what SB3's ``save`` wrote."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eggroll_rl.agents import load_policy
from eggroll_rl.config import RunConfig
from eggroll_rl.envs import EnvFactory, check_time_limit, env_factory, global_generators_kept, read_toml, seed_globals
from eggroll_rl.errors import ConfigError, ConsentError, EpisodeError, RunFolderError
from eggroll_rl.es import one_thread
from eggroll_rl.mujoco_vector import mujoco_warnings_silenced
from eggroll_rl.observations import Observations, finite_rows, map_arrays, space_as_policies_see
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.serial_vector import DIVERGED, SerialVectorEnv, SubEnvError

Predict = Callable[[Observations], np.ndarray]
_BATCH = 32  # sub-envs at once


@dataclass(frozen=True)
class Agent:
    """A policy and its task.

    :param predict: observations (n, ...) to actions (n, ...), deterministic, for n up to 32
    :param factory: builds the env it was trained on
    :param policy: as one of ours, if it is
    """

    name: str
    predict: Predict
    factory: EnvFactory
    policy: MlpPolicy | None = None


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of episodes, one per seed."""

    returns: list[float]
    lengths: list[int]
    seeds: list[int]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes (divisor n)."""
        return float(np.std(self.returns))

    def as_dict(self) -> dict[str, Any]:
        """Return what ``evaluate --json`` prints."""
        return {
            "mean_return": self.mean,
            "std_return": self.std,
            "returns": self.returns,
            "lengths": self.lengths,
            "seeds": self.seeds,
        }


def batched(predict: Predict) -> "Acting":
    """Return the actions of a function without memory; see :class:`Acting`."""
    return Acting(lambda obs, state: (predict(obs), None))


def acting(model: Any) -> "Acting":
    """Return the deterministic actions of a policy, or of a model of SB3's."""
    return Acting(lambda obs, state: model.predict(obs, state=state, deterministic=True))


class Acting:
    """Actions for observations (n, ...), n up to 32, of episodes that began together, with a constant number of rows.

    Floating point rounds differently for another batch, and MuJoCo makes another episode of it: this way the
    episode of a seed is the same alone, among others, and in a video. On AMD's CPUs MKL rounds a small layer's rows
    differently by their place in the batch too: there it is the same only in the same place.

    :param predict: observations and the state, None at first, to actions and the next state
    """

    def __init__(self, predict: Callable[[Observations, Any], tuple[np.ndarray, Any]]):
        self._predict = predict
        self._state: Any = None

    def restart(self) -> None:
        """Begin new episodes."""
        self._state = None

    def __call__(self, obs: Observations) -> np.ndarray:
        """Return the actions (n, ...)."""
        n_rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        actions, self._state = self._predict(map_arrays(_pad, obs), self._state)
        return actions[:n_rows]


def _pad(rows: np.ndarray) -> np.ndarray:
    padded = np.zeros((_BATCH, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded


def evaluate(predict: Predict, factory: EnvFactory, seeds: Sequence[int], plain: bool = False) -> Evaluation:
    """Run one episode per reset seed with the env's own reward.

    :param plain: step Gymnasium's own envs where ours would do; the same returns, at a third of the speed
    :raises EpisodeError: an env raised
    """
    returns, lengths = np.zeros(len(seeds)), np.zeros(len(seeds), dtype=np.int64)
    num_envs = min(_BATCH, len(seeds))
    envs = SerialVectorEnv([factory] * num_envs) if plain else factory.vector(num_envs)
    try:
        with one_thread(), mujoco_warnings_silenced(), global_generators_kept():
            seed_globals(seeds[0])  # an env may draw from them
            for first in range(0, len(seeds), envs.num_envs):
                part = list(seeds[first : first + envs.num_envs])
                _episodes(predict, envs, part, returns[first:], lengths[first:])
    except SubEnvError as error:
        raise EpisodeError(f"evaluation, episode {first + error.index}: {error}\n{error.text}") from None
    finally:
        envs.close()
    return Evaluation(returns.tolist(), lengths.tolist(), [int(seed) for seed in seeds])


def _episodes(predict: Predict, envs: Any, seeds: list[int], returns: np.ndarray, lengths: np.ndarray) -> None:
    if isinstance(predict, Acting):
        predict.restart()
    idle = envs.num_envs - len(seeds)
    active = np.arange(envs.num_envs) < len(seeds)
    obs, _ = envs.reset(seed=seeds + [None] * idle, options={"reset_mask": active})
    while active.any():
        obs, rewards, terminations, truncations, infos = envs.step(predict(obs))
        bad = active & ~(np.isfinite(rewards) & finite_rows(obs))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise EpisodeError(
                f"evaluation, seed {seeds[row]}, step {int(lengths[row]) + 1}: "
                f"the env's reward or observation is not finite (reward {rewards[row]})"
            )
        if "diverged" in infos:
            row = int(np.flatnonzero(infos["diverged"])[0])
            raise EpisodeError(f"evaluation, seed {seeds[row]}, step {int(lengths[row]) + 1}: {DIVERGED}")
        returns[: len(seeds)] += rewards[: len(seeds)]
        lengths[: len(seeds)] += active[: len(seeds)]
        active &= ~(terminations | truncations)


def load_agent(
    path: Path,
    which: str = "policy",
    env_id: str | None = None,
    algo: str | None = None,
    trust_pickle: bool = False,
    vec_normalize: Path | None = None,
    gym_packages: tuple[str, ...] = (),
) -> Agent:
    """Load a run folder, which executes nothing, or a model saved by SB3, which may execute anything.

    :param which: ``"policy"`` (final) or ``"best"``, for a run folder
    :param env_id: the env of an SB3 model; another env for a run folder
    :param algo: the algorithm of an SB3 model
    :param trust_pickle: the caller's consent to unpickle an SB3 model
    :param vec_normalize: the model's ``VecNormalize`` file; by default ``vecnormalize.pkl`` beside it
    :raises RunFolderError: nothing that could be loaded is there
    :raises ConsentError: an SB3 model without consent
    """
    if path.suffix == ".zip":
        if not path.exists():
            raise RunFolderError(f"{path} does not exist")
        if env_id is None or algo is None:
            raise ConfigError(
                f"{path} is an SB3 model, which does not name its env or algorithm: give --env and --algo"
            )
        factory = env_factory(env_id) if ":" in env_id else RunConfig(env_id).factory(gym_packages)
        return _load_sb3(path, factory, algo, trust_pickle, vec_normalize)
    if not path.is_dir():
        raise RunFolderError(f"{path} is not there: give a run folder (`eggroll-rl list` shows them) or an SB3 .zip")
    if not (path / "config.toml").exists():
        raise RunFolderError(f"{path} is not a run folder of eggroll-rl: it has no config.toml")
    config = RunConfig.from_dict(read_toml(path / "config.toml"), str(path / "config.toml"))
    if env_id is not None:
        config.env_id = env_id
    if (path / "model.zip").exists():  # a comparison's run whose policy cannot be one of ours
        agent = _load_sb3(path / "model.zip", config.factory(gym_packages), algo, trust_pickle, vec_normalize)
        return replace(agent, name=path.name)
    policy = load_policy(path / f"{which}.safetensors")
    factory = config.factory(gym_packages)
    with closing(factory()) as env:
        check_time_limit(env)
        seen = space_as_policies_see(env.observation_space)
        same = (seen, env.action_space) == (policy.observation_space, policy.action_space)
    if env_id is not None and not same:
        raise ConfigError(f"{env_id} has other spaces than {path} was trained on")
    if not same:
        raise RunFolderError(f"{path} holds a policy for other spaces than those of its env, {config.env_id}")
    return Agent(path.name, acting(policy), factory, policy)


def _load_sb3(
    path: Path, factory: EnvFactory, algo: str | None, trust_pickle: bool, vec_normalize: Path | None
) -> Agent:
    if algo is None:
        raise ConfigError(f"{path} is an SB3 model, which does not name its algorithm: give --algo")
    algorithm = find_algorithm(algo)
    if not trust_pickle:
        raise ConsentError(
            f"{path} is an SB3 model: loading unpickles it and its statistics, which can run any code of its author's; "
            "if you trust them, add --trust-pickle (or trust_pickle=True)"
        )
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    with closing(factory()) as env:
        check_time_limit(env)
    try:
        model = algorithm.load(path, device="cpu")
        if vec_normalize is None:
            # Where SB3's own callback and RL Zoo put it.
            beside = (path.with_name("vecnormalize.pkl"), path.with_suffix("") / "vecnormalize.pkl")
            vec_normalize = next((candidate for candidate in beside if candidate.exists()), None)
        if vec_normalize is None:
            policy = model.policy if isinstance(model.policy, MlpPolicy) else None
            return Agent(path.stem, acting(model), factory, policy)
        statistics = VecNormalize.load(str(vec_normalize), DummyVecEnv([factory]))
    except Exception as error:  # anything can come out of a pickle
        raise RunFolderError(f"cannot load {path} as {algo}: {type(error).__name__}: {error}") from error

    def predict(obs: Observations, state: Any) -> tuple[np.ndarray, Any]:
        return model.predict(statistics.normalize_obs(obs), state=state, deterministic=True)

    return Agent(path.stem, Acting(predict), factory)


def find_algorithm(name: str) -> Any:
    """Look up an SB3 or sb3-contrib algorithm by name, in any case, or ``module:Class``, which imports the module.

    :raises ConfigError: there is none
    """
    import stable_baselines3
    from stable_baselines3.common.base_class import BaseAlgorithm

    from eggroll_rl.eggroll import EGGROLL

    module, _, class_name = name.partition(":")
    if class_name:
        try:
            found = getattr(importlib.import_module(module), class_name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"algorithm {name!r} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, BaseAlgorithm)):
            raise ConfigError(f"algorithm {name!r} is not a subclass of stable_baselines3's BaseAlgorithm")
        return found
    known: dict[str, Any] = {"eggroll": EGGROLL}
    for algorithm in ("A2C", "DDPG", "DQN", "PPO", "SAC", "TD3"):
        known[algorithm.lower()] = getattr(stable_baselines3, algorithm)
    try:
        import sb3_contrib
    except ImportError:
        pass
    else:
        for algorithm in ("ARS", "CrossQ", "QRDQN", "TQC", "TRPO"):
            known[algorithm.lower()] = getattr(sb3_contrib, algorithm)
    if name.lower() not in known:
        raise ConfigError(f"algo must be one of {', '.join(known)}, got {name!r}")
    return known[name.lower()]
