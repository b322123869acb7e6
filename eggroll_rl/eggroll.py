"""``EGGROLL``: low-rank evolution strategies as a Stable-Baselines3 algorithm."""

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, Logger
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import check_for_correct_spaces, safe_mean
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped, unwrap_vec_wrapper
from tqdm.auto import tqdm

from eggroll_rl.callbacks import generation_callbacks, only_generation_callbacks, replay
from eggroll_rl.checks import check_positive, check_whole
from eggroll_rl.envs import EnvFactory, EnvSource, check_time_limit, env_factory, resets_named, time_limit
from eggroll_rl.errors import ConfigError, EpisodeError, TooManyFailuresError, WorkerDiedError
from eggroll_rl.es import EvolutionStrategy, one_thread
from eggroll_rl.fitness import FitnessShaping
from eggroll_rl.lowrank import ContractElsewhere
from eggroll_rl.mujoco_vector import mujoco_warnings_silenced
from eggroll_rl.normalization import Moments
from eggroll_rl.policies import MlpPolicy, check_spaces
from eggroll_rl.processes import STEP_TIMEOUT
from eggroll_rl.recurrent import POLICIES
from eggroll_rl.rollout import Generation, load_generation
from eggroll_rl.scoring import EpisodeScorer, SegmentScorer, check_env, check_segment_steps, make_scorer
from eggroll_rl.segments import Result, evaluate_slice
from eggroll_rl.settings import (
    check_arguments,
    check_given,
    check_settings,
    fill_in_sizes,
    find_optimizer,
    make_schedule,
)
from eggroll_rl.surrogate import Improvement, check_network
from eggroll_rl.vec_env import VecEnvEvaluator
from eggroll_rl.workers import ClusterEvaluator, Evaluator, count_workers, make_evaluator


class EGGROLL(BaseAlgorithm):
    """Low-rank evolution strategy on a policy's returns, by whole episodes or by segments of them.

    Paper: https://arxiv.org/abs/2511.16652. The update convention is that of :mod:`eggroll_rl.es`.

    With ``fitness="segment"`` the members do not run episodes. ``n_segments`` simulations go on for ``segment_steps``
    under the mean policy with exploration noise, a critic says how much better each action was than expected, and the
    population is evaluated on these recorded states, by forward passes alone (:mod:`eggroll_rl.surrogate`). A
    generation is then a few thousand env steps. The policy learns by evolution alone, the critic by gradient descent.
    Simulations of Gymnasium's MuJoCo v5 tasks go on from generation to generation. The state of any other env cannot be
    copied: there each segment begins with a new episode, and ``segment_steps`` has to be at least its time limit.

    An env given by id, ``EnvSpec`` or function is rebuilt where it is needed (*native* mode): results are the
    same to the bit for any number of workers. A ready-made env or ``VecEnv`` is stepped as it is, in this
    process (*compatible* mode): it resets by itself and keeps its own seeding, so only the noise is reproducible.

    :param policy: ``"MlpPolicy"``, ``"LinearPolicy"``, ``"CnnPolicy"`` for images, ``"MultiInputPolicy"`` for a Dict of
        observations, ``"RecurrentPolicy"`` with memory, or a subclass of :class:`eggroll_rl.policies.MlpPolicy`
    :param env: id (``"module:Id-v0"`` works), ``EnvSpec``, function that returns an env, env, or ``VecEnv``
    :param population_size: members per generation, even; not pairs. None is 64. In segments it is per layer and update,
        at most as many as the layer is wide, and None is 16
    :param sigma: noise scale; a number, ``"lin_<number>"`` (linear to 0) or a function of the progress
        remaining, which falls from 1 to 0. Of episodes alone: segments have ``exploration_std``
    :param rank: rank of each weight matrix's perturbation; of segments 1
    :param learning_rate: step size, given as ``sigma`` is; of episodes alone, where segments have ``target_kl``
    :param fitness: ``"episode"`` or ``"segment"``
    :param n_eval_episodes: episodes per member; its fitness is their mean
    :param n_segments: simulations that run segments
    :param segment_steps: env steps of a segment
    :param exploration_std: of the noise on the network's outputs in segments, where 1 is half of an action's range, at
        the start: the update moves it, each output's by itself
    :param gamma: discount, of segments
    :param gae_lambda: of the advantages in segments
    :param target_kl: divergence that a generation of segments moves the policy by if its updates agree, measured on
        their own samples; like ``clip_range`` given as ``sigma`` is
    :param n_epochs: passes over a generation's samples
    :param batch_size: samples of the generation per update, each with a population of its own
    :param sample_reuse: generations before whose samples are used again, weighted by their likelihood
    :param clip_range: of the likelihood ratio, as in PPO
    :param damping: of the natural gradient in segments, in units of the Fisher matrix' mean eigenvalue: the larger, the
        closer to the plain gradient
    :param critic_kwargs: see :class:`eggroll_rl.critic.Critic`
    :param fitness_shaping: a name in :data:`eggroll_rl.fitness.FITNESS_SHAPING`, or a function of fitness (N,); like
        ``best_fraction``, the optimizer and its settings, for episodes alone
    :param best_fraction: share of pairs kept by ``fitness_shaping="best_fraction"``
    :param alive_bonus_offset: added to the reward at each step, in training only; -1 cancels Hopper's bonus
    :param max_episode_steps: episode cap, in training only; needed if the env has no time limit
    :param deterministic: of the actions in whole episodes of training; False samples them, from the scores of discrete
        choices, and with the deviation ``exploration_std`` around the others. Segments always sample
    :param optimizer: a ``torch.optim`` class or its name
    :param optimizer_kwargs: more arguments for the optimizer
    :param weight_decay: passed to the optimizer
    :param max_grad_norm: clip the gradient's global norm
    :param on_bad_member: what to do about a member whose env raises, gives a NaN or infinite reward or observation, or
        diverges, or ends its process again and again: ``"raise"``, or rank it ``"worst"``, just below all others, and
        leave its observations out. In segments the simulation's episode is cut short there, and what ends a process
        is always an error. ``bad_members`` counts them
    :param max_bad_fraction: share of a generation's members, or simulations, that may be bad with ``"worst"``
    :param slice_size: members, or simulations of segments, run together (even). Part of the result, because floating
        point rounds differently for another batch: never derived from the machine. None is 32, or 16 for segments
    :param n_workers: worker processes; 0 runs in this process, None takes all cores
    :param step_timeout: seconds that one call of an env may take in a worker process (of Gymnasium's MuJoCo tasks, a
        step of a slice); one that is stuck for longer is replaced, and its slice done again. ``math.inf`` waits for
        ever
    :param evaluator: evaluates on a cluster, in place of ``n_workers`` on this machine, with the same results:
        ``RayEvaluator("auto")`` of :mod:`eggroll_rl.ray_workers`. Not saved with the model
    :param env_kwargs: for the constructor of an env given by id
    :param policy_kwargs: see :class:`eggroll_rl.policies.MlpPolicy`
    :param stats_window_size: episodes in the logged means
    :param tensorboard_log: log folder
    :param verbose: 0 nothing, 1 info
    :param seed: seeds the noise, the episodes and, as in SB3, the global generators. None leaves those alone
        and draws the entropy kept in ``noise_seed``
    :param device: of the policy; rollouts run on the CPU
    :raises ConfigError: a setting is wrong; before any env or process is made, where it can be
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {**POLICIES}
    policy: MlpPolicy
    _scorer: EpisodeScorer | SegmentScorer | None = None

    def __init__(
        self,
        policy: str | type[MlpPolicy],
        env: EnvSource | EnvFactory | GymEnv | None,
        population_size: int | None = None,
        sigma: float | str | Schedule = 0.05,
        rank: int = 1,
        learning_rate: float | str | Schedule = 0.015,
        fitness: str = "episode",
        n_eval_episodes: int = 1,
        n_segments: int = 32,
        segment_steps: int = 64,
        exploration_std: float = 0.4,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        target_kl: float | str | Schedule = 0.1,
        n_epochs: int = 1,
        batch_size: int = 512,
        sample_reuse: int = 0,
        clip_range: float | str | Schedule = 0.2,
        damping: float = 0.1,
        critic_kwargs: dict[str, Any] | None = None,
        fitness_shaping: str | FitnessShaping = "centered_rank",
        best_fraction: float | None = None,
        alive_bonus_offset: float = 0.0,
        max_episode_steps: int | None = None,
        deterministic: bool = True,
        optimizer: str | type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        on_bad_member: str = "raise",
        max_bad_fraction: float = 0.5,
        slice_size: int | None = None,
        n_workers: int | None = None,
        step_timeout: float = STEP_TIMEOUT,
        evaluator: ClusterEvaluator | None = None,
        env_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        _init_setup_model: bool = True,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "env", "__class__")}
        # A subclass may have names of its own.
        check_arguments(
            {**given, "policy": self.policy_aliases.get(policy, policy) if isinstance(policy, str) else policy}
        )
        self.population_size: int = population_size  # type: ignore[assignment] # _fill_in() sees to it
        self.sigma = make_schedule("sigma", sigma)
        self.rank = rank
        self.fitness = fitness
        self.n_eval_episodes = n_eval_episodes
        self.n_segments = n_segments
        self.segment_steps = segment_steps
        self.exploration_std = exploration_std
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.target_kl = make_schedule("target_kl", target_kl)
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.sample_reuse = sample_reuse
        self.clip_range = make_schedule("clip_range", clip_range)
        self.damping = damping
        self.critic_kwargs = critic_kwargs
        self.fitness_shaping = fitness_shaping
        self.best_fraction = best_fraction
        self.alive_bonus_offset = alive_bonus_offset
        self.max_episode_steps = max_episode_steps
        self.deterministic = deterministic
        self.optimizer = find_optimizer(optimizer)
        self.optimizer_kwargs = optimizer_kwargs
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.on_bad_member = on_bad_member
        self.max_bad_fraction = max_bad_fraction
        self.bad_members: dict[str, int] = {}  # of all generations so far, by the reason in eggroll_rl.rollout
        self.slice_size: int = slice_size  # type: ignore[assignment]
        self.n_workers = n_workers
        self.step_timeout = step_timeout
        self.evaluator = evaluator
        self.seed = seed = None if seed is None else int(seed)  # NumPy's would not do for SB3
        self.noise_seed = seed
        learning_rate = make_schedule("learning_rate", learning_rate)
        self._fill_in()

        self.last_generation = {"ep_rew_mean": math.nan, "ep_len_mean": math.nan}  # of the episodes that ended last
        self.scorer_state: dict[str, torch.Tensor] = {}  # of a loaded model, until there is an env
        made, factory = self._make_env(env, env_kwargs)
        if (
            policy in ("MlpPolicy", "CnnPolicy")
            and made is not None
            and isinstance(made.observation_space, spaces.Dict)
        ):
            raise ConfigError(f"policy must be 'MultiInputPolicy' for {made.observation_space}, got {policy!r}")
        if made is not None and factory is None and max_episode_steps is not None:
            raise ConfigError("max_episode_steps needs an env given by id or function; this one is already made")
        self._factory = factory
        self.trained_on = None if factory is None else factory.describe()
        super().__init__(
            policy=policy,
            env=made,
            learning_rate=learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        if _init_setup_model:
            self._setup_model()

    @property
    def n_rows(self) -> int:
        """What slices are cut from: members, or simulations that run segments."""
        return self.n_segments if self.fitness == "segment" else self.population_size

    # The env --------------------------------------------------------------------------------------------

    def _make_env(self, env: Any, env_kwargs: dict[str, Any] | None) -> tuple[GymEnv | None, EnvFactory | None]:
        """Return an env for SB3 and how to rebuild it in training, or a ready-made env and None."""
        if env is None or isinstance(env, gym.Env | VecEnv):
            if env_kwargs:
                raise ConfigError("env_kwargs needs an env given by id or function; this one is already made")
            if isinstance(env, VecEnv):
                self._refuse_vec_normalize(env)
            if env is not None:
                check_env(self.fitness, None)
            return env, None
        factory = env_factory(env, env_kwargs)
        check_env(self.fitness, factory)
        training = factory if self.max_episode_steps is None else factory.with_cap(self.max_episode_steps)
        made = factory()
        check_spaces(made.observation_space, made.action_space)
        if time_limit(made) is None and self.max_episode_steps is not None:
            made = training()  # the cap is for training only, unless nothing else ends an episode
        check_time_limit(made)
        if self.fitness == "segment":
            limits = [limit for limit in (time_limit(made), self.max_episode_steps) if limit is not None]
            check_segment_steps(training, min(limits, default=None), self.segment_steps)
        return made, training

    def set_env(
        self,
        env: EnvSource | EnvFactory | GymEnv,
        force_reset: bool = True,
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Continue on another env with the same spaces, given in any form that the constructor takes."""
        made, factory = self._make_env(env, env_kwargs)
        assert made is not None
        wrapped = self._wrap_env(made, self.verbose)
        check_for_correct_spaces(wrapped, self.observation_space, self.action_space)
        self.n_envs = wrapped.num_envs  # nothing here depends on it, unlike in algorithms with a rollout buffer
        super().set_env(wrapped, force_reset=force_reset)
        self._keep_scorer_state()
        described = None if factory is None else factory.describe()
        if self.trained_on not in (None, described) or self._factory not in (None, factory):
            # The critic may still be of use; states of another env are not.
            of_env = ("anchors", "earlier")
            self.scorer_state = {name: v for name, v in self.scorer_state.items() if not name.startswith(of_env)}
        self._factory, self._scorer, self.trained_on = factory, None, described

    @classmethod
    def load(cls, path: Any, env: Any = None, device: Any = "cpu", **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a zip written by :meth:`save`, as in SB3; ``env`` in any form that the constructor takes.

        SB3's zip is unpickled and may execute code: load only files that you trust.

        :param kwargs: further arguments of SB3's ``load``, and settings to change
        """
        env_kwargs = kwargs.pop("env_kwargs", None)
        if kwargs.keys() & {"fitness", "exploration_std"}:
            saved = super().load(path, device=device, custom_objects=kwargs.get("custom_objects"))
            if kwargs.get("fitness", saved.fitness) != saved.fitness:  # what suited the one does not suit the other
                kwargs = {"population_size": None, "slice_size": None, **kwargs}
            if (
                kwargs.get("exploration_std") == saved.exploration_std
            ):  # where the noise started: it goes on from its own
                del kwargs["exploration_std"]
        model = super().load(path, env=None, device=device, **kwargs)
        check_given(model.fitness, kwargs)
        if "exploration_std" in kwargs and "std" in model.scorer_state:
            model.scorer_state["std"].fill_(kwargs["exploration_std"])
        if env is not None:
            model.set_env(env, env_kwargs=env_kwargs)
        return model

    @staticmethod
    def _refuse_vec_normalize(env: VecEnv) -> None:
        normalizer = unwrap_vec_wrapper(env, VecNormalize) if is_vecenv_wrapped(env, VecNormalize) else None
        if normalizer is not None:
            raise ConfigError(
                "EGGROLL's policy normalizes observations itself and saves the statistics with it: "
                "pass the env without VecNormalize (policy_kwargs=dict(normalize_obs=False) turns ours off)"
            )

    @property
    def scorer(self) -> EpisodeScorer | SegmentScorer:
        """How members are scored, with what it keeps between generations; made when an env is there."""
        if self._scorer is None:
            self._scorer = make_scorer(
                self.fitness, self._factory, self.policy, self.n_segments,
                exploration_std=self.exploration_std, gamma=self.gamma, gae_lambda=self.gae_lambda,
                seed=self.noise_seed, critic_kwargs=self.critic_kwargs or {},
            )  # fmt: skip
            if self.scorer_state:
                self._scorer.load_state_dict(self.scorer_state)
        return self._scorer

    # SB3's contract -------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        # load() may have put changed settings in place of the checked ones.
        for name in ("sigma", "target_kl", "clip_range"):
            setattr(self, name, make_schedule(name, getattr(self, name)))
        self.optimizer = find_optimizer(self.optimizer)
        if isinstance(self.learning_rate, str):
            self.learning_rate = make_schedule("learning_rate", self.learning_rate)
        self._fill_in()
        check_settings(self)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        if self.noise_seed is None:
            self.noise_seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        # The initial policy follows from noise_seed, and the global generators stay as SB3's contract has them.
        # One thread, as the orthogonal weights come from a QR decomposition, whose last bits depend on their number.
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.noise_seed % 2**63)
            try:
                policy = self.policy_class(self.observation_space, self.action_space, **self.policy_kwargs)
            except (TypeError, RuntimeError, MemoryError) as error:
                raise ConfigError(f"policy_kwargs {self.policy_kwargs}: {' '.join(str(error).split())}") from error
        assert isinstance(policy, MlpPolicy)  # check_policy() saw to it
        if self.fitness == "segment":
            check_network(policy.network)
        policy.set_training_mode(False)  # no dropout, no statistics of a batch: a member is a function of its inputs
        self.policy = policy.to(self.device)
        self._es = EvolutionStrategy(
            self.policy.network,
            population_size=self.population_size,
            sigma=lambda _: self.sigma(self._progress_remaining()),
            learning_rate=lambda _: self.lr_schedule(self._progress_remaining()),
            rank=self.rank,
            seed=self.noise_seed,
            optimizer=self.optimizer,
            optimizer_kwargs=self.optimizer_kwargs,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            fitness_shaping=self.fitness_shaping,
            best_fraction=self.best_fraction,
            track_best=False,
            slice_size=self.slice_size,
        )
        self._scorer = None
        # A loaded model goes on with the noise of the next generation, not with that of the first.
        self._es.generation = self._n_updates
        self.policy.optimizer = self._es.optimizer

    def _fill_in(self) -> None:
        """Give settings that were left open what suits the kind of fitness."""
        if callable(self.exploration_std):  # of models saved before the update moved it
            self.exploration_std = float(self.exploration_std(1.0))
        fill_in_sizes(self)
        if self.fitness_shaping is None:  # of models saved before this had a default
            self.fitness_shaping = "centered_rank"

    def save(self, path: Any, *args: Any, **kwargs: Any) -> None:
        """Save as SB3 does, with what the scorer keeps between generations."""
        self._keep_scorer_state()
        super().save(path, *args, **kwargs)

    def _keep_scorer_state(self) -> None:
        if self._scorer is not None:
            self.scorer_state = self._scorer.state_dict()

    def _progress_remaining(self) -> float:
        # A finished run is a little past its end, where a linear schedule would be negative.
        return max(self._current_progress_remaining, 1e-6)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_es", "_factory", "_scorer", "evaluator"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    @property
    def evolution_strategy(self) -> EvolutionStrategy:
        """The core that this algorithm drives."""
        return self._es

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "EGGROLL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train for at least ``total_timesteps`` env steps, counted over all members or simulations.

        :param callback: SB3 callbacks see a finished generation replayed in member order; one that says stop
            ends the run before the update. A ``GenerationCallback`` is asked once per generation instead
        :param log_interval: generations between logs
        :raises EpisodeError: an episode failed; nothing of its generation was used. A note says how to replay it
        :raises WorkerDiedError: a worker died, or was stuck, again and again at the same slice; likewise
        :raises TooManyFailuresError: more members failed than ``max_bad_fraction`` allows; likewise
        """
        if self.env is None:
            raise ConfigError("learn() needs an env: give one to the constructor, to load() or to set_env()")
        if callback is None:
            callback = []  # SB3 would make None a callback that has to see every step
        with resets_named(), self._logger_without_folder():
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar=False
            )
        callback.on_training_start(locals(), globals())
        try:
            with self._make_evaluator() as evaluator, self._progress(total_timesteps, progress_bar) as show:
                while self.num_timesteps < total_timesteps:
                    if not self._run_generation(evaluator, callback, total_timesteps):
                        break
                    show()
                    if log_interval is not None and self._n_updates % log_interval == 0:
                        self.dump_logs()
                    if not all(c.on_generation_end() for c in generation_callbacks(callback)):
                        break
        except (EpisodeError, WorkerDiedError) as error:
            if error.member is not None and self._factory is not None:
                error.add_note(f"model.replay_member({error.member}) runs it again, alone and in this process")
            raise
        finally:
            callback.on_training_end()
        return self

    @contextmanager
    def _progress(self, total_timesteps: int, progress_bar: bool) -> Iterator[Callable[[], None]]:
        """Give a function that shows how far training is."""
        if (
            not progress_bar
        ):  # nor a bar that is disabled: tqdm takes a lock of all processes, which a killed fork keeps
            yield lambda: None
            return
        with tqdm(
            desc="EGGROLL", total=total_timesteps, initial=self.num_timesteps, unit=" steps", unit_scale=True,
            file=sys.stderr,
        ) as bar:  # fmt: skip

            def show() -> None:
                bar.update(self.num_timesteps - bar.n)
                bar.set_postfix(ep_rew_mean=f"{self.last_generation['ep_rew_mean']:.1f}")

            yield show

    @contextmanager
    def _logger_without_folder(self) -> Iterator[None]:
        """Keep SB3 from leaving an empty folder in the temporary directory for a logger that writes no files."""
        of_the_user = self._custom_logger or self.tensorboard_log is not None
        if not of_the_user:
            self._logger = Logger(None, [HumanOutputFormat(sys.stdout)] if self.verbose else [])
        self._custom_logger |= not of_the_user
        try:
            yield
        finally:
            self._custom_logger &= of_the_user

    def _run_generation(self, evaluator: Evaluator, callback: BaseCallback, total_timesteps: int) -> bool:
        """Ask, evaluate, tell; return False if a callback stopped the run before the update."""
        self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
        callback.on_rollout_start()
        results = evaluator.evaluate(self.next_generation())
        self._check_failures(results)
        if not self._count_steps(results, callback):
            return False
        callback.on_rollout_end()
        self.update(results, None if self.evaluator is None else self.evaluator.contract)
        return True

    def update(self, results: list[Any], elsewhere: ContractElsewhere | None = None) -> None:
        """Update the mean by what the results say, then add what was observed to the normalizer.

        :param elsewhere: who may sum up the perturbations in place of this process
        """
        improvement = self._improvement()
        metrics = self.scorer.update(self._es, results, self.alive_bonus_offset, improvement, elsewhere)
        if self.policy.normalizer is not None:
            # After the update: one generation sees one normalizer.
            self.policy.normalizer.combine(Moments.concatenate([result.moments for result in results]))
        self._n_updates += 1
        reasons = Counter(failure.reason for result in results for failure in result.failures)
        self.bad_members = dict(Counter(self.bad_members) + reasons)
        self.last_generation.update(metrics)
        for name, value in metrics.items():
            section = "rollout" if name.startswith("fitness") else "train"
            self.logger.record(f"{section}/{name}", value)

    def next_generation(self) -> Generation:
        """Return what evaluators need for the current generation."""
        state = {name: tensor.cpu().numpy() for name, tensor in self.policy.state_dict().items()}
        noise = self._es.ask().noise
        anchors, n_steps = self.scorer.anchors, self.segment_steps
        action_std = None if self.deterministic or anchors is not None else self.exploration_std
        of_segments = self.scorer.exploration_std
        allowed = int(self.max_bad_fraction * self.n_rows) if self.on_bad_member == "worst" else 0
        return Generation(noise, state, self.n_eval_episodes, anchors, n_steps, of_segments, action_std, allowed)

    def replay_member(self, member: int) -> Result:
        """Evaluate one member of the coming generation again, alone and in this process, to see why it fails.

        After an error nothing has changed, so the coming generation is the one that failed. What ended a worker
        process ends this one.

        :param member: its number, or that of a simulation where segments run
        :return: of its slice; the other rows are empty
        :raises EpisodeError: it fails again
        :raises ConfigError: there is no such member, or the env is a ready-made one
        """
        check_whole("member", member, 0)
        if member >= self.n_rows:
            raise ConfigError(f"member must be below {self.n_rows}, got {member}")
        if self._factory is None:
            raise ConfigError("replay_member() needs an env given by id or function; this one is already made")
        first = member - member % self.slice_size
        others = set(range(first, first + self.slice_size)) - {member}
        generation = replace(self.next_generation(), max_failures=0)
        policy = self.policy.replica()
        load_generation(policy, generation)
        with closing(self._factory.vector(self.slice_size)) as envs, one_thread(), mujoco_warnings_silenced():
            return evaluate_slice(policy, generation, first, envs, others)

    def _check_failures(self, results: list[Any]) -> None:
        """Log the bad members of a generation, and refuse too many."""
        failures = [failure for result in results for failure in result.failures]
        reasons = Counter(failure.reason for failure in failures)
        if self.on_bad_member == "worst":
            self.last_generation["bad_members"] = len({failure.member for failure in failures})
            self.logger.record("rollout/bad_members", self.last_generation["bad_members"])
        if not failures:
            return
        said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        bad = f"{self.last_generation['bad_members']} of {self.n_rows} bad in generation {self._n_updates} ({said})"
        if self.last_generation["bad_members"] > min(self.max_bad_fraction * self.n_rows, self.n_rows - 1):
            raise TooManyFailuresError(
                f"{bad}, more than max_bad_fraction {self.max_bad_fraction} allows; the first: {failures[0].text}"
            )
        logging.getLogger("eggroll_rl").warning("%s, ranked worst; the first: %s", bad, failures[0].text)

    def _improvement(self) -> Improvement:
        target_kl, clip_range = (f(self._progress_remaining()) for f in (self.target_kl, self.clip_range))
        for name, value in (("target_kl", target_kl), ("clip_range", clip_range)):
            check_positive(name, value)
        return Improvement(self.n_epochs, self.batch_size, self.sample_reuse, target_kl, clip_range, self.damping)

    def _make_evaluator(self) -> Evaluator:
        assert self.env is not None
        if self._factory is None:
            if self.evaluator is not None:
                raise ConfigError("evaluator needs an env given by id or function; this one is already made")
            ignored = "" if self.max_episode_steps is None else "; max_episode_steps is ignored"
            self._say(f"compatible mode: this env is stepped as it is, in this process, with fewer guarantees{ignored}")
            return VecEnvEvaluator(self.policy, self.env)
        if self.evaluator is not None:
            self._say(f"native mode: {self._factory.describe_vector()}, on a cluster")
            n_slices = -(-self.n_rows // self.slice_size)
            return self.evaluator.start(
                self.policy.replica(), self._factory, self.slice_size, n_slices, self.step_timeout
            )
        n_workers = count_workers(self.n_workers, self.n_rows, self.slice_size)
        self._say(f"native mode: {self._factory.describe_vector()}, {n_workers} worker processes")
        return make_evaluator(n_workers, self.policy, self._factory, self.slice_size, self.step_timeout)

    def _say(self, text: str) -> None:
        if self.verbose:
            print(text)

    def _count_steps(self, results: list[Any], callback: BaseCallback) -> bool:
        """Count the steps and fill the episode buffer, replaying them for callbacks that look at steps."""
        now = round(time.time_ns() / 1e9 - self.start_time / 1e9, 6)
        # Steps in which a ready-made env waited for the others come last: they belong to no member.
        lengths = np.concatenate([result.lengths.ravel() for result in results])
        total = int(lengths.sum()) + sum(result.idle_steps for result in results)
        episodes = self.scorer.ended_episodes(results)
        if len(episodes.steps):
            self.last_generation["ep_rew_mean"] = float(episodes.returns.mean())
            self.last_generation["ep_len_mean"] = float(episodes.lengths.mean())
        if only_generation_callbacks(callback):
            self.num_timesteps += total
            kept = list(episodes.infos(now, last=self._stats_window_size).values())
            self._update_info_buffer(kept, np.ones(len(kept), dtype=bool))
            return True
        return replay(self, total, episodes.infos(now), callback)

    def dump_logs(self) -> None:
        """Write the usual keys."""
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([e["r"] for e in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([e["l"] for e in self.ep_info_buffer]))
        if self.ep_success_buffer:
            self.logger.record("rollout/success_rate", safe_mean(self.ep_success_buffer))
        self.logger.record("time/iterations", self._n_updates, exclude="tensorboard")
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)
