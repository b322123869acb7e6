"""How members are scored: by whole episodes, or by segments with a critic's opinion of where they end.

Shapes: T steps, N members, E episodes, P pairs, I inputs, S size of a simulation's state.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eggroll_rl.critic import Critic, discounted_differences
from eggroll_rl.envs import EnvFactory
from eggroll_rl.errors import ConfigError
from eggroll_rl.es import one_thread
from eggroll_rl.mujoco_vector import MujocoVectorEnv
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

    def score(
        self,
        results: list[RolloutResult],
        features: Callable[[Tensor], Tensor],
        alive_bonus_offset: float,
        generation: int,
    ) -> np.ndarray:
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


class SegmentScorer:
    """Scores members by their discounted reward and the value of the state where their segment ended.

    A pair goes on from where one of its members ended, drawn by lot, and from a new episode if that member's has
    ended. The critic learns from a generation's segments while the next ones are simulated.

    :param n_pairs: P
    :param n_inputs: I
    :param state_size: S
    :param time_limit: env steps of an episode, or None. The first episodes begin at random ages, so that not all pairs
        reach it together
    :param gamma: discount
    :param gae_lambda: of the critic's targets
    :param seed: of ages, branches and the critic
    :param critic_kwargs: see :class:`eggroll_rl.critic.Critic`
    """

    def __init__(
        self,
        n_pairs: int,
        n_inputs: int,
        state_size: int,
        time_limit: int | None,
        gamma: float,
        gae_lambda: float,
        seed: int,
        critic_kwargs: dict[str, Any],
    ):
        self.gamma, self.gae_lambda, self.seed = gamma, gae_lambda, seed
        ages = np.zeros(n_pairs, dtype=np.int64)
        if time_limit is not None:
            ages = self._generator(_AGES_STREAM, 0).integers(time_limit, size=n_pairs)
        self.anchors = Anchors(np.zeros((n_pairs, state_size)), ages, np.ones(n_pairs, dtype=bool))
        self.critic = Critic(n_inputs, seed, **critic_kwargs)
        self._returns, self._lengths = np.zeros(n_pairs), np.zeros(n_pairs, dtype=np.int64)  # of the running episodes
        self._samples: tuple[Tensor, np.ndarray, int] | None = None  # features, targets, generation
        self._next: tuple[Any, Anchors, np.ndarray, np.ndarray] | None = None  # all of these, after the generation
        self._metrics = {"value_loss": math.nan}  # of the generation before

    def _generator(self, stream: int, generation: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, generation)))

    def _chosen(self, generation: int) -> np.ndarray:
        """Return the member (P,) of each pair from which the pair goes on."""
        n_pairs = len(self.anchors.ages)
        return 2 * np.arange(n_pairs) + self._generator(_BRANCH_STREAM, generation).integers(2, size=n_pairs)

    def learn(self) -> None:
        """Let the critic learn from the last generation, if it has not yet."""
        if self._samples is not None:
            with one_thread():
                self._metrics = self.critic.fit(*self._samples)
            self._samples = None

    def ended_episodes(self, results: list[SegmentResult], generation: int) -> Infos:
        """As :meth:`EpisodeScorer.ended_episodes`, of the episodes that the pairs go on with."""
        lengths_N, returns_N, ended_N = _lengths(results), _rewards(results).sum(axis=0), _ended(results)
        steps_N, infos = np.cumsum(lengths_N), {}
        for pair, n in enumerate(self._chosen(generation).tolist()):
            if ended_N[n]:
                r, length = self._returns[pair] + returns_N[n], self._lengths[pair] + lengths_N[n]
                infos[int(steps_N[n])] = {"episode": {"r": float(r), "l": int(length)}}
        return infos

    def score(
        self,
        results: list[SegmentResult],
        features: Callable[[Tensor], Tensor],
        alive_bonus_offset: float,
        generation: int,
    ) -> np.ndarray:
        """Return the fitness (N,). Nothing changes until :meth:`advance`."""
        self.learn()
        obs_TNI = np.concatenate([result.obs for result in results], axis=1)
        rewards_TN, lengths_N = _rewards(results), _lengths(results)
        terminated_N = np.concatenate([result.terminated for result in results])
        n_steps, n_members = rewards_TN.shape
        active_TN = np.arange(n_steps)[:, None] < lengths_N
        with torch.no_grad(), one_thread():
            seen = features(torch.from_numpy(obs_TNI.reshape(-1, obs_TNI.shape[-1])))
            values_TN = self.critic.values(seen).reshape(n_steps + 1, n_members)
        segments = (rewards_TN + alive_bonus_offset * active_TN, values_TN, lengths_N, terminated_N, self.gamma)
        fitness_N = discounted_differences(*segments, lam=1.0)[0] + values_TN[0]
        targets_TN = discounted_differences(*segments, lam=self.gae_lambda) + values_TN[:-1]
        acted_on = torch.from_numpy(active_TN.ravel())
        samples = (seen[: active_TN.size][acted_on], targets_TN[active_TN], generation)
        self._next = (samples, *self._moved_on(results, generation))
        return fitness_N

    def _moved_on(self, results: list[SegmentResult], generation: int) -> tuple[Anchors, np.ndarray, np.ndarray]:
        """Return the next anchors, and returns and lengths so far of their episodes."""
        chosen_P = self._chosen(generation)
        states_PS = np.concatenate([result.states for result in results])[chosen_P]
        lengths_P, returns_P = _lengths(results)[chosen_P], _rewards(results).sum(axis=0)[chosen_P]
        new_P = _ended(results)[chosen_P]
        return (
            Anchors(states_PS, np.where(new_P, 0, self.anchors.ages + lengths_P), new_P),
            np.where(new_P, 0.0, self._returns + returns_P),
            np.where(new_P, 0, self._lengths + lengths_P),
        )

    def advance(self) -> dict[str, float]:
        """Move the anchors on, have samples ready for :meth:`learn`, and return what there is to log."""
        assert self._next is not None
        self._samples, self.anchors, self._returns, self._lengths = self._next
        self._next = None
        return self._metrics

    def state_dict(self) -> dict[str, Tensor]:
        """Return what continues a run to the bit, as tensors."""
        self.learn()
        arrays = {**{f"anchors.{name}": value for name, value in vars(self.anchors).items()}}
        arrays |= {"episodes.returns": self._returns, "episodes.lengths": self._lengths}
        optimizer = self.critic.optimizer.state_dict()["state"]
        return {
            **{name: torch.from_numpy(value.copy()) for name, value in arrays.items()},
            **{f"critic.{name}": value for name, value in self.critic.state_dict().items()},
            **{f"optimizer.{i}.{name}": value for i, entry in optimizer.items() for name, value in entry.items()},
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`; on an env with other states, with new episodes."""
        if state["anchors.states"].shape == self.anchors.states.shape:
            self._load_anchors(state)
        critic = {n.removeprefix("critic."): value for n, value in state.items() if n.startswith("critic.")}
        self.critic.load_state_dict(critic)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                entries.setdefault(int(index), {})[key] = value
        self.critic.optimizer.load_state_dict({**self.critic.optimizer.state_dict(), "state": entries})
        self._samples = None

    def _load_anchors(self, state: dict[str, Tensor]) -> None:
        self.anchors = Anchors(**{name: state[f"anchors.{name}"].numpy() for name in vars(self.anchors)})
        self._returns, self._lengths = state["episodes.returns"].numpy(), state["episodes.lengths"].numpy()


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
    fitness: str, factory: EnvFactory | None, n_inputs: int, n_pairs: int, **settings: Any
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
    return SegmentScorer(n_pairs, n_inputs, state_size, time_limit, **settings)


def _lengths(results: list[SegmentResult]) -> np.ndarray:
    return np.concatenate([result.lengths for result in results])


def _rewards(results: list[SegmentResult]) -> np.ndarray:
    return np.concatenate([result.rewards for result in results], axis=1)


def _ended(results: list[SegmentResult]) -> np.ndarray:
    return np.concatenate([result.terminated | result.truncated for result in results])
