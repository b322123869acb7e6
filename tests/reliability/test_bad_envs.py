"""R19 and R20: an env that breaks Gymnasium's contract is named, or harmless; one that never ends meets a limit."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from eggroll_rl import EGGROLL
from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, EpisodeError
from eggroll_rl.evaluation import evaluate


class Bad(toy.TargetEnv):
    """Breaks one part of the contract, from the step ``at`` on."""

    def __init__(self, fault, at=2):
        super().__init__()
        self.fault, self.at = fault, at
        if fault == "float64 obs":
            self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        wrong = {
            "reset without info": obs, "reset of three": (obs, info, 0), "reset of None": None,
            "reset of a wrong shape": (obs[:2], info), "reset of text": ("start", info),
            "reset of two dimensions": (np.stack([obs, obs]), info),
        }  # fmt: skip
        return wrong.get(self.fault, (obs, info))

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if self.t < self.at:
            return obs, reward, terminated, truncated, info
        wrong = {
            "step of four": (obs, reward, terminated, info), "step of None": None,
            "step of six": (obs, reward, terminated, truncated, info, 0),
            "step of a wrong shape": (obs[:2], reward, terminated, truncated, info),
            "step of two dimensions": (np.stack([obs, obs]), reward, terminated, truncated, info),
            "step of text": ("a state", reward, terminated, truncated, info),
            "step without obs": (None, reward, terminated, truncated, info),
        }  # fmt: skip
        return wrong.get(self.fault, (obs, reward, terminated, truncated, info))


class NoSeed(toy.TargetEnv):
    def reset(self, *, options=None):
        return super().reset(options=options)


class NoOptions(toy.TargetEnv):
    def reset(self, seed=None):
        return super().reset(seed=seed)


class Reuses(toy.TargetEnv):
    """Writes every observation into one array, as many a simulator does."""

    def __init__(self):
        super().__init__()
        self.buffer = np.zeros(3, np.float32)

    def _obs(self):
        self.buffer[:] = super()._obs()
        return self.buffer


class Lists(toy.TargetEnv):
    """Gives lists and Python's numbers, which hold the same."""

    def _obs(self):
        return super()._obs().tolist()


class Rewards(toy.TargetEnv):
    """Gives its reward in another type."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.kind(reward), *rest


class Keeps(toy.TargetEnv):
    """Changes the action that it was given."""

    def step(self, action):
        given = super().step(action)
        action[:] = 99.0
        return given


def trained(make, **settings):
    settings = {"population_size": 4, "slice_size": 4, "n_workers": 0, "seed": 3, **settings}
    model = EGGROLL("MlpPolicy", make, policy_kwargs={"net_arch": [3]}, **settings)
    model.learn(60)
    return model


def result_of(make, **settings):
    return torch.cat([p.detach().flatten() for p in trained(make, **settings).policy.parameters()])


IN_RESET = ["reset without info", "reset of three", "reset of None", "reset of a wrong shape", "reset of text"]
IN_RESET += ["reset of two dimensions"]
IN_STEP = ["step of four", "step of None", "step of six", "step of a wrong shape", "step of two dimensions"]
IN_STEP += ["step of text", "step without obs"]


@pytest.mark.promise("R19")
def test_broken_contracts_are_named_with_their_place(cells):
    for fault in IN_RESET + IN_STEP:
        with cells.cell(fault):
            with pytest.raises((EpisodeError, ConfigError)) as raised:
                trained(lambda fault=fault: TimeLimit(Bad(fault), 50))
            text = str(raised.value)
            if fault in IN_RESET:
                assert "reset()" in text, text[:200]
            else:
                assert "generation 0, member 0, episode 0, step 2, seed " in text, text[:200]


@pytest.mark.promise("R19")
def test_an_env_that_takes_no_seed_is_named(cells):
    with cells.cell("reset(options)"), pytest.raises((EpisodeError, ConfigError), match="seed"):
        trained(lambda: TimeLimit(NoSeed(), 50))


@pytest.mark.promise("R19")
def test_what_is_harmless_gives_the_same_result(cells):
    right = result_of(toy.make_target)
    same = {
        "a buffer that is used again": Reuses, "lists": Lists,
        "rewards of NumPy": lambda: Rewards(np.float64), "an action that is changed": Keeps,
    }  # fmt: skip
    for name, env in same.items():
        with cells.cell(name):
            assert torch.equal(result_of(lambda env=env: TimeLimit(env(), 50)), right)
    with cells.cell("evaluation, a buffer that is used again"):
        model = trained(toy.make_target)

        def predict(obs):
            return model.predict(obs)[0]

        ours = evaluate(predict, env_factory(toy.make_target), [1, 2, 3])
        assert evaluate(predict, env_factory(lambda: TimeLimit(Reuses(), 50)), [1, 2, 3]).returns == ours.returns
    with cells.control("another reward"):
        assert torch.equal(result_of(lambda: TimeLimit(Rewards(lambda reward: -reward), 50)), right)


class Endless(gym.Env):
    observation_space = spaces.Box(-1, 1, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


@pytest.mark.promise("R20")
def test_an_env_without_a_limit_is_refused_and_a_limit_is_kept(cells):
    for fitness in ("episode", "segment"):
        with cells.cell(f"no limit, {fitness}"), pytest.raises(ConfigError, match="Endless shows no time limit"):
            trained(Endless, fitness=fitness)
    with cells.cell("max_episode_steps"):
        model = trained(Endless, max_episode_steps=7)
        assert {episode["l"] for episode in model.ep_info_buffer} == {7}
    with cells.cell("TimeLimit"):
        model = trained(lambda: TimeLimit(Endless(), 9))
        assert {episode["l"] for episode in model.ep_info_buffer} == {9}
    with cells.cell("the lesser of two"):
        model = trained(lambda: TimeLimit(Endless(), 9), max_episode_steps=4)
        assert {episode["l"] for episode in model.ep_info_buffer} == {4}
    with cells.control("another limit"):
        assert {episode["l"] for episode in trained(Endless, max_episode_steps=6).ep_info_buffer} == {7}
