"""How a generation's results become an update: by episodes' returns, or by segments' advantages.

Shapes: T steps, N members or simulations, E episodes, B samples, I inputs, S size of a simulation's state.
"""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from eggroll_rl.critic import Critic, advantages
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import EvolutionStrategy, one_thread
from eggroll_rl.lowrank import ContractElsewhere
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import Anchors, RolloutResult
from eggroll_rl.segments import SegmentResult
from eggroll_rl.surrogate import Improvement, Recorded, Samples, improve

_AGES_STREAM = 4  # spawn key of the seed, beside those of eggroll_rl.rollout and eggroll_rl.critic

Infos = dict[int, dict[str, Any]]


class Episodes(NamedTuple):
    """Episodes that ended in a generation, in the order of their last steps.

    :param steps: (D,) the number of the last step, counted over all members, or simulations, from 1
    :param returns: (D,) float64
    :param lengths: (D,) env steps
    :param successes: (D,) 1 or 0, or NaN where nothing was said
    """

    steps: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray
    successes: np.ndarray

    def infos(self, seconds: float, last: int | None = None) -> Infos:
        """Return SB3's infos by the number of the step.

        :param seconds: since the start, for all of them
        :param last: only as many, and as many of those that say whether they succeeded: a dict for each of ten
            thousand takes longer than the update
        """
        kept = np.arange(len(self.steps))
        if last is not None:
            kept = np.union1d(kept[-last:], np.flatnonzero(~np.isnan(self.successes))[-last:])
        infos = {}
        for step, episode_return, length, success in zip(*(part[kept].tolist() for part in self), strict=True):
            known = {} if math.isnan(success) else {"is_success": bool(success)}
            infos[step] = {"episode": {"r": episode_return, "l": length, "t": seconds}, **known}
        return infos


class EpisodeScorer:
    """Scores members by the mean return of their episodes."""

    anchors: Anchors | None = None
    exploration_std: np.ndarray | None = None

    def ended_episodes(self, results: list[RolloutResult]) -> Episodes:
        """Return the episodes that ended, those of members that failed left out."""
        lengths = np.concatenate([result.lengths.ravel() for result in results])
        returns = np.concatenate([result.returns.ravel() for result in results])
        successes = np.concatenate([result.successes.ravel() for result in results])
        whole = ~np.isnan(returns)
        return Episodes(np.cumsum(lengths)[whole], returns[whole], lengths[whole], successes[whole])

    def update(
        self,
        es: EvolutionStrategy,
        results: list[RolloutResult],
        alive_bonus_offset: float,
        improvement: Improvement,
        elsewhere: ContractElsewhere | None = None,
    ) -> dict[str, float]:
        """Tell the core the fitness, and return what there is to log; ``improvement`` is for segments."""
        returns_NE = np.concatenate([result.returns for result in results])
        lengths_NE = np.concatenate([result.lengths for result in results])
        fitness_N = _worst_where_missing((returns_NE + alive_bonus_offset * lengths_NE).mean(axis=1))
        metrics = es.tell(fitness_N, elsewhere=elsewhere)
        del metrics["update_cosine"]  # with a step that a checkpoint does not keep
        return metrics

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what continues a run to the bit: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from :meth:`state_dict`."""


@dataclass(frozen=True)
class _Kept:
    """Everything that a :class:`SegmentScorer` keeps, replaced as a whole: a signal finds the old or the new.

    :param returns: (N,) of the running episodes so far; NaN for those of the start, which the time limit cuts short
    :param lengths: (N,)
    :param std: (O,) of the exploration noise
    :param earlier: samples to be used again, newest first
    """

    anchors: Anchors
    returns: np.ndarray
    lengths: np.ndarray
    std: np.ndarray
    critic: Critic
    earlier: tuple[Samples, ...] = ()


class SegmentScorer:
    """Turns segments into advantages by a critic, and the advantages into an update by the population.

    Simulations go on where they were, if their states can be copied. Advantages are the critic's before it learns from
    the generation, which it does in a thread of its own while the population is evaluated.

    :param n_segments: simulations N
    :param state_size: S; 0 where states cannot be copied, and each segment begins a new episode
    :param time_limit: env steps of an episode, or None. The first episodes begin at random ages, so that not all
        simulations reach it together
    :param n_features: inputs I of the policy's network, which are the critic's too
    :param n_outputs: of the policy's network, O
    :param exploration_std: of the noise on each output at the start
    :param gamma: discount
    :param gae_lambda: of the advantages
    :param seed: of ages and the critic
    :param critic_kwargs: see :class:`eggroll_rl.critic.Critic`
    """

    def __init__(
        self,
        n_segments: int,
        state_size: int,
        time_limit: int | None,
        n_features: int,
        n_outputs: int,
        exploration_std: float,
        gamma: float,
        gae_lambda: float,
        seed: int,
        critic_kwargs: dict[str, Any],
    ):
        self.gamma, self.gae_lambda = gamma, gae_lambda
        ages = np.zeros(n_segments, dtype=np.int64)
        if time_limit is not None:
            generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_AGES_STREAM,)))
            ages = generator.integers(time_limit, size=n_segments)
        anchors = Anchors(np.zeros((n_segments, state_size)), ages, np.ones(n_segments, dtype=bool))
        returns = np.where(ages > 0, math.nan, 0.0)
        critic = Critic(n_features, seed, **critic_kwargs)
        std = np.full(n_outputs, float(exploration_std))
        self._kept = _Kept(anchors, returns, np.zeros(n_segments, dtype=np.int64), std, critic)

    @property
    def anchors(self) -> Anchors:
        """Where the simulations of the next generation start."""
        return self._kept.anchors

    @property
    def exploration_std(self) -> np.ndarray:
        """Deviations (O,) of the noise on the outputs in the next generation."""
        return self._kept.std

    @property
    def critic(self) -> Critic:
        """The value function."""
        return self._kept.critic

    def ended_episodes(self, results: list[SegmentResult]) -> Episodes:
        """As :meth:`EpisodeScorer.ended_episodes`, of episodes that may have begun generations ago."""
        return self._episodes(results)[0]

    def _episodes(self, results: list[SegmentResult]) -> tuple[Episodes, np.ndarray, np.ndarray]:
        """Return those that ended, and returns (N,) and lengths (N,) of those that still run."""
        rewards_TN, ended_TN, successes_TN = _joined(results, "rewards"), _ended(results), _joined(results, "successes")
        returns, lengths = self._kept.returns.copy(), self._kept.lengths.copy()
        ended: list[tuple[int, float, int, float]] = []
        n_steps = len(rewards_TN)
        for n in range(len(returns)):
            start = 0
            for end in (np.flatnonzero(ended_TN[:, n]) + 1).tolist():
                returns[n] += rewards_TN[start:end, n].sum()
                if not math.isnan(returns[n]):
                    ended.append((n * n_steps + end, returns[n], lengths[n] + end - start, successes_TN[end - 1, n]))
                returns[n], lengths[n], start = 0.0, 0, end
            returns[n] += rewards_TN[start:, n].sum()
            lengths[n] += n_steps - start
        columns = zip(*ended, strict=True) if ended else ((),) * 4
        dtypes = (np.int64, np.float64, np.int64, np.float64)
        episodes = Episodes(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))
        return episodes, returns, lengths

    def update(
        self,
        es: EvolutionStrategy,
        results: list[SegmentResult],
        alive_bonus_offset: float,
        improvement: Improvement,
        elsewhere: ContractElsewhere | None = None,
    ) -> dict[str, float]:
        """Update policy and critic, move the anchors on, and return what there is to log.

        If anything goes wrong, nothing has changed.

        :param improvement: how the samples are used
        :param elsewhere: of no use here: the population is evaluated on the samples
        :raises NonFiniteError: the policy's or the critic's parameters would not be finite
        """
        device = next(es.module.parameters()).device
        features_TNI = torch.from_numpy(_joined(results, "features"))
        features_BI = features_TNI[:-1].flatten(0, 1)
        outputs_BO = torch.from_numpy(_joined(results, "outputs")).flatten(0, 1)
        with one_thread(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
            advantages_TN, targets_TN = self._advantages(results, features_TNI, alive_bonus_offset)
            critic = copy.deepcopy(self.critic)
            moved_on = self._moved_on(results, critic)
            learning = thread.submit(critic.fit, features_BI, targets_TN.ravel(), es.generation)
            recorded = Recorded(
                features_BI.to(device), outputs_BO.to(device), advantages_TN.ravel(), self.exploration_std
            )
            kept = self._kept.earlier[: improvement.sample_reuse]
            earlier = tuple(Samples(*(part.to(device) for part in samples)) for samples in kept)
            metrics, std, samples = improve(es, recorded, earlier, improvement, learning)
            self._kept = replace(moved_on, std=std, earlier=(samples, *earlier)[: improvement.sample_reuse])
        variance = targets_TN.var()
        return {
            **metrics,
            "exploration_std": float(recorded.std.mean()),
            "value_loss": learning.result(),
            "explained_variance": float(1 - advantages_TN.var() / variance) if variance > 0 else math.nan,
        }

    def _moved_on(self, results: list[SegmentResult], critic: Critic) -> _Kept:
        _, returns, lengths = self._episodes(results)
        ended_N = _ended(results)[-1]
        if not self.anchors.states.shape[1]:  # nowhere to go on from
            ended_N, returns, lengths = np.ones_like(ended_N), np.zeros_like(returns), np.zeros_like(lengths)
        ages_N = np.where(ended_N, 0, np.concatenate([result.ages for result in results]))
        anchors = Anchors(np.concatenate([result.states for result in results]), ages_N, ended_N)
        return _Kept(anchors, returns, lengths, self._kept.std, critic)

    def _advantages(
        self, results: list[SegmentResult], features_TNI: torch.Tensor, alive_bonus_offset: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return advantages and the critic's targets, both (T, N)."""
        values_TN = self.critic.values(features_TNI.flatten(0, 1)).reshape(features_TNI.shape[:2])
        final_features = torch.from_numpy(np.concatenate([result.final_features for result in results]))
        final_values = self.critic.values(final_features)
        next_TN = values_TN[1:].copy()
        n, d = 0, 0
        for result in results:  # each has its ends in the order of (step, simulation)
            mask_TN = result.terminated | result.truncated
            next_TN[:, n : n + mask_TN.shape[1]][mask_TN] = final_values[d : d + len(result.final_features)]
            n, d = n + mask_TN.shape[1], d + len(result.final_features)
        next_TN[_joined(results, "terminated")] = 0.0
        rewards_TN = _joined(results, "rewards") + alive_bonus_offset
        rewards_TN[np.isnan(rewards_TN)] = 0.0  # where a simulation failed
        ended_TN = _ended(results)
        found_TN = advantages(rewards_TN, values_TN[:-1], next_TN, ended_TN, self.gamma, self.gae_lambda)
        return found_TN, found_TN + values_TN[:-1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what continues a run to the bit, as tensors."""
        kept = self._kept
        arrays = {f"anchors.{name}": value for name, value in vars(kept.anchors).items()}
        arrays |= {"returns": kept.returns, "lengths": kept.lengths, "std": kept.std}
        earlier = {f"earlier.{i}": samples._asdict() for i, samples in enumerate(kept.earlier)}
        optimizer = kept.critic.optimizer.state_dict()["state"]
        return {
            **{name: torch.from_numpy(value.copy()) for name, value in arrays.items()},
            **{f"{prefix}.{name}": value.cpu() for prefix, parts in earlier.items() for name, value in parts.items()},
            **{f"critic.{name}": value for name, value in kept.critic.state_dict().items()},
            **{f"optimizer.{i}.{name}": value for i, entry in optimizer.items() for name, value in entry.items()},
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from :meth:`state_dict`; with new episodes, if it has no anchors or those of other simulations.

        :raises ConfigError: the critic is another one
        """
        if "std" not in state:
            raise ConfigError("these segments were saved by an older version, which kept no deviations of the noise")
        critic = copy.deepcopy(self.critic)
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value
        try:
            critic.load_state_dict({n.removeprefix("critic."): v for n, v in state.items() if n.startswith("critic.")})
        except RuntimeError as error:
            raise ConfigError(f"critic_kwargs {dict(net_arch=critic.net_arch)} do not fit the saved critic") from error
        critic.optimizer.load_state_dict({**critic.optimizer.state_dict(), "state": entries})
        n_earlier = sum(name.endswith(".log_likelihood") for name in state)
        earlier = tuple(Samples(*(state[f"earlier.{i}.{name}"] for name in Samples._fields)) for i in range(n_earlier))
        self._kept = replace(self._kept, critic=critic, std=state["std"].numpy(), earlier=earlier)
        if "anchors.states" in state and state["anchors.states"].shape == self.anchors.states.shape:
            anchors = Anchors(**{name: state[f"anchors.{name}"].numpy() for name in vars(self.anchors)})
            returns, lengths = state["returns"].numpy(), state["lengths"].numpy()
            self._kept = replace(self._kept, anchors=anchors, returns=returns, lengths=lengths)


def check_segment_steps(factory: EnvFactory, limit: int | None, segment_steps: int) -> None:
    """Refuse segments that end before an episode can, where each begins with a new one.

    :param limit: env steps of an episode in training, or None
    """
    if not factory.copies_states and limit is not None and segment_steps < limit:
        raise ConfigError(
            f"segment_steps must be at least {limit}, the time limit, got {segment_steps}: each segment of this env "
            "begins with a new episode, and what comes later would never be seen (max_episode_steps lowers the limit "
            "in training)"
        )


def check_env(fitness: str, factory: EnvFactory | None) -> None:
    """Refuse segments of a ready-made env.

    :param factory: of the env; None for a ready-made one
    """
    if fitness == "segment" and factory is None:
        raise ConfigError(
            "fitness='segment' runs simulations of its own: give the env by id or function, or use fitness='episode' "
            "for this one"
        )


def make_scorer(
    fitness: str, factory: EnvFactory | None, policy: MlpPolicy, n_segments: int, **settings: Any
) -> EpisodeScorer | SegmentScorer:
    """Return the scorer of ``fitness``, ``"episode"`` or ``"segment"``, for an env that :func:`check_env` lets pass.

    :param settings: of a :class:`SegmentScorer`
    """
    if fitness == "episode":
        return EpisodeScorer()
    assert factory is not None
    state_size, time_limit = 0, None
    if factory.copies_states:
        envs = factory.vector(2)
        assert isinstance(envs, MujocoVectorEnv)
        state_size, time_limit = envs.get_states()[0].shape[1], envs.max_episode_steps
        envs.close()
    with torch.no_grad():
        zeros = torch.zeros(1, policy.n_inputs, dtype=torch.float64, device=policy.device)
        n_features = policy.features(zeros).shape[1]
    return SegmentScorer(n_segments, state_size, time_limit, n_features, policy.n_outputs, **settings)


def _joined(results: list[SegmentResult], name: str) -> np.ndarray:
    """Return (T, N, ...) of all slices."""
    return np.concatenate([getattr(result, name) for result in results], axis=1)


def _ended(results: list[SegmentResult]) -> np.ndarray:
    return _joined(results, "terminated") | _joined(results, "truncated")


def _worst_where_missing(fitness: np.ndarray) -> np.ndarray:
    """Put the fitness (N,) of members that failed just below the least of the others."""
    missing = np.isnan(fitness)
    return np.where(missing, np.nextafter(fitness[~missing].min(), -np.inf), fitness) if missing.any() else fitness
