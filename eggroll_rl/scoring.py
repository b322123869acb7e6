"""How members are scored: by whole episodes, or by segments with a critic's opinion of where they end.

Shapes: T steps, N members, E episodes, P pairs, B samples, I inputs, S size of a simulation's state.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eggroll_rl.critic import Critic, discounted_differences
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import one_thread
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.rollout import Anchors, RolloutResult
from eggroll_rl.segments import SegmentResult

_AGES_STREAM = 4  # spawn keys of the seed, beside those of eggroll_rl.rollout and eggroll_rl.critic
_BRANCH_STREAM = 5

Infos = dict[int, dict[str, Any]]


class EpisodeScorer:
    """Scores members by the mean return of their episodes."""

    anchors: Anchors | None = None

    def learn(self) -> None:
        """Do nothing: episodes need no critic."""

    def ended_episodes(self, results: list[RolloutResult], generation: int) -> Infos:
        """Return SB3's infos of the episodes that ended, by the number of the step, counted over all members."""
        lengths = np.concatenate([result.lengths.ravel() for result in results])
        returns = np.concatenate([result.returns.ravel() for result in results])
        successes = np.concatenate([result.successes.ravel() for result in results])
        infos = {}
        each = zip(np.cumsum(lengths).tolist(), returns.tolist(), lengths.tolist(), successes.tolist(), strict=True)
        for step, episode_return, length, success in each:
            known = {} if math.isnan(success) else {"is_success": bool(success)}
            infos[step] = {"episode": {"r": episode_return, "l": length}, **known}
        return infos

    def score(self, results: list[RolloutResult], alive_bonus_offset: float, generation: int) -> np.ndarray:
        """Return the fitness (N,)."""
        returns_NE = np.concatenate([result.returns for result in results])
        lengths_NE = np.concatenate([result.lengths for result in results])
        return (returns_NE + alive_bonus_offset * lengths_NE).mean(axis=1)

    def advance(self) -> dict[str, float]:
        """Go on to the next generation, and return what there is to log."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what continues a run to the bit: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""


@dataclass(frozen=True)
class _Kept:
    """Everything that a :class:`SegmentScorer` keeps, replaced as a whole: a signal finds the old or the new.

    :param returns: (P,) of the running episodes so far; NaN for those of the start, which the time limit cuts short
    :param lengths: (P,)
    :param samples: encoded observations (B, I), targets (B,) and generation, that the critic has still to learn from
    :param value_loss: of the critic's last generation
    """

    anchors: Anchors
    returns: np.ndarray
    lengths: np.ndarray
    critic: Critic
    samples: tuple[np.ndarray, np.ndarray, int] | None = None
    value_loss: float = math.nan


class SegmentScorer:
    """Scores members by their discounted reward and the value of the state where their segment ended.

    A pair goes on from where one of its members ended, drawn by lot, and from a new episode if that member's has
    ended. The critic learns from a generation's segments while the next ones are simulated.

    :param n_pairs: P
    :param state_size: S
    :param time_limit: env steps of an episode, or None. The first episodes begin at random ages, so that not all pairs
        reach it together
    :param features: from encoded observations (B, I) to what the critic sees, on the CPU
    :param n_features: size of that
    :param gamma: discount
    :param gae_lambda: of the critic's targets
    :param seed: of ages, branches and the critic
    :param critic_kwargs: see :class:`eggroll_rl.critic.Critic`
    """

    def __init__(
        self,
        n_pairs: int,
        state_size: int,
        time_limit: int | None,
        features: Callable[[Tensor], Tensor],
        n_features: int,
        gamma: float,
        gae_lambda: float,
        seed: int,
        critic_kwargs: dict[str, Any],
    ):
        self.gamma, self.gae_lambda, self.seed = gamma, gae_lambda, seed
        self._features = features
        ages = np.zeros(n_pairs, dtype=np.int64)
        if time_limit is not None:
            ages = self._generator(_AGES_STREAM, 0).integers(time_limit, size=n_pairs)
        anchors = Anchors(np.zeros((n_pairs, state_size)), ages, np.ones(n_pairs, dtype=bool))
        returns = np.where(ages > 0, math.nan, 0.0)
        critic = Critic(n_features, seed, **critic_kwargs)
        self._kept = _Kept(anchors, returns, np.zeros(n_pairs, dtype=np.int64), critic)
        self._next: _Kept | None = None  # after the generation that was scored

    @property
    def anchors(self) -> Anchors:
        """Where the pairs of the next generation start."""
        return self._kept.anchors

    @property
    def critic(self) -> Critic:
        """The value function."""
        return self._kept.critic

    def _generator(self, stream: int, generation: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, generation)))

    def _chosen(self, generation: int) -> np.ndarray:
        """Return the member (P,) of each pair from which the pair goes on."""
        n_pairs = len(self.anchors.ages)
        return 2 * np.arange(n_pairs) + self._generator(_BRANCH_STREAM, generation).integers(2, size=n_pairs)

    def learn(self) -> None:
        """Let the critic learn from the last generation, if it has not yet.

        :raises NonFiniteError: the critic's parameters would not be finite; it stays as it was
        """
        if self._kept.samples is None:
            return
        obs, targets, generation = self._kept.samples
        critic = copy.deepcopy(self._kept.critic)
        with one_thread():
            loss = critic.fit(self._seen(obs), targets, generation)
        self._kept = replace(self._kept, critic=critic, value_loss=loss, samples=None)

    def _seen(self, obs: np.ndarray) -> Tensor:
        with torch.no_grad():
            return self._features(torch.from_numpy(obs))

    def ended_episodes(self, results: list[SegmentResult], generation: int) -> Infos:
        """As :meth:`EpisodeScorer.ended_episodes`, of the episodes that the pairs go on with."""
        lengths_N, returns_N, ended_N = _lengths(results), _rewards(results).sum(axis=0), _ended(results)
        steps_N, infos = np.cumsum(lengths_N), {}
        for pair, n in enumerate(self._chosen(generation).tolist()):
            r, length = self._kept.returns[pair] + returns_N[n], self._kept.lengths[pair] + lengths_N[n]
            if ended_N[n] and not math.isnan(r):
                infos[int(steps_N[n])] = {"episode": {"r": float(r), "l": int(length)}}
        return infos

    def score(self, results: list[SegmentResult], alive_bonus_offset: float, generation: int) -> np.ndarray:
        """Return the fitness (N,). Nothing changes until :meth:`advance`."""
        self.learn()
        obs_TNI = np.concatenate([result.obs for result in results], axis=1)
        rewards_TN, lengths_N = _rewards(results), _lengths(results)
        terminated_N = np.concatenate([result.terminated for result in results])
        n_steps, n_members = rewards_TN.shape
        active_TN = np.arange(n_steps)[:, None] < lengths_N
        with one_thread():
            seen = self._seen(obs_TNI.reshape(-1, obs_TNI.shape[-1]))
            values_TN = self.critic.values(seen).reshape(n_steps + 1, n_members)
        segments = (rewards_TN + alive_bonus_offset * active_TN, values_TN, lengths_N, terminated_N, self.gamma)
        fitness_N = discounted_differences(*segments, lam=1.0)[0] + values_TN[0]
        targets_TN = discounted_differences(*segments, lam=self.gae_lambda) + values_TN[:-1]
        self._next = self._moved_on(results, generation, (obs_TNI[:-1][active_TN], targets_TN[active_TN], generation))
        return fitness_N

    def _moved_on(self, results: list[SegmentResult], generation: int, samples: Any) -> _Kept:
        chosen_P = self._chosen(generation)
        states_PS = np.concatenate([result.states for result in results])[chosen_P]
        lengths_P, returns_P = _lengths(results)[chosen_P], _rewards(results).sum(axis=0)[chosen_P]
        new_P = _ended(results)[chosen_P]
        return replace(
            self._kept,
            anchors=Anchors(states_PS, np.where(new_P, 0, self.anchors.ages + lengths_P), new_P),
            returns=np.where(new_P, 0.0, self._kept.returns + returns_P),
            lengths=np.where(new_P, 0, self._kept.lengths + lengths_P),
            samples=samples,
        )

    def advance(self) -> dict[str, float]:
        """Move the anchors on, have samples ready for :meth:`learn`, and return what there is to log."""
        assert self._next is not None
        self._kept, self._next = self._next, None
        return {"value_loss": self._kept.value_loss}  # of the generation before

    def state_dict(self) -> dict[str, Tensor]:
        """Return what continues a run to the bit, as tensors."""
        self.learn()
        kept = self._kept
        arrays = {f"anchors.{name}": value for name, value in vars(kept.anchors).items()}
        arrays |= {"returns": kept.returns, "lengths": kept.lengths, "value_loss": np.array(kept.value_loss)}
        optimizer = kept.critic.optimizer.state_dict()["state"]
        return {
            **{name: torch.from_numpy(value.copy()) for name, value in arrays.items()},
            **{f"critic.{name}": value for name, value in kept.critic.state_dict().items()},
            **{f"optimizer.{i}.{name}": value for i, entry in optimizer.items() for name, value in entry.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`; with new episodes, if it has no anchors or those of other pairs or states.

        :raises ConfigError: the critic is another one
        """
        critic = copy.deepcopy(self.critic)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value
        try:
            critic.load_state_dict({n.removeprefix("critic."): v for n, v in state.items() if n.startswith("critic.")})
        except RuntimeError as error:
            raise ConfigError(f"critic_kwargs {dict(net_arch=critic.net_arch)} do not fit the saved critic") from error
        critic.optimizer.load_state_dict({**critic.optimizer.state_dict(), "state": entries})
        self._kept = replace(self._kept, critic=critic, samples=None, value_loss=state["value_loss"].item())
        if "anchors.states" in state and state["anchors.states"].shape == self.anchors.states.shape:
            anchors = Anchors(**{name: state[f"anchors.{name}"].numpy() for name in vars(self.anchors)})
            returns, lengths = state["returns"].numpy(), state["lengths"].numpy()
            self._kept = replace(self._kept, anchors=anchors, returns=returns, lengths=lengths)


def check_env(fitness: str, factory: EnvFactory | None) -> None:
    """Refuse segments of an env whose states cannot be copied.

    :param factory: of the env; None for a ready-made one
    """
    if fitness == "segment" and (factory is None or factory.describe_vector() != MujocoVectorEnv.__name__):
        raise ConfigError(
            "fitness='segment' copies states of the simulation: it needs one of Gymnasium's MuJoCo v5 tasks, unwrapped "
            "and given by id; use fitness='episode' for this env"
        )


def make_scorer(
    fitness: str, factory: EnvFactory | None, policy: MlpPolicy, n_pairs: int, **settings: Any
) -> EpisodeScorer | SegmentScorer:
    """Return the scorer of ``fitness``, ``"episode"`` or ``"segment"``, for an env that :func:`check_env` lets pass.

    :param settings: of a :class:`SegmentScorer`
    """
    if fitness == "episode":
        return EpisodeScorer()
    assert factory is not None
    envs = factory.vector(2)
    assert isinstance(envs, MujocoVectorEnv)
    state_size, time_limit = envs.get_states()[0].shape[1], envs.max_episode_steps
    envs.close()

    def features(encoded: Tensor) -> Tensor:
        return policy.features(encoded.to(policy.device)).cpu()

    n_features = features(torch.zeros(1, policy.n_inputs, dtype=torch.float64)).shape[1]
    return SegmentScorer(n_pairs, state_size, time_limit, features, n_features, **settings)


def _lengths(results: list[SegmentResult]) -> np.ndarray:
    return np.concatenate([result.lengths for result in results])


def _rewards(results: list[SegmentResult]) -> np.ndarray:
    return np.concatenate([result.rewards for result in results], axis=1)


def _ended(results: list[SegmentResult]) -> np.ndarray:
    return np.concatenate([result.terminated | result.truncated for result in results])
