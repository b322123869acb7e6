"""Exported files against ``predict``."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import toy
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from eggroll_rl import EGGROLL
from eggroll_rl.errors import ConfigError
from eggroll_rl.export import export_file
from eggroll_rl.observations import map_arrays


class SeasonEnv(toy.TargetEnv):
    """A discrete observation that does not start at 0, and discrete actions."""

    observation_space = spaces.Discrete(4, start=2)
    action_space = spaces.Discrete(3, start=1)

    def _obs(self):
        self.target = np.zeros(3)
        return int(self.np_random.integers(2, 6))


ENVS = {
    "Box to Box": toy.make_target,
    "Box to Discrete": lambda: gym.make("CartPole-v1"),
    "Discrete to Discrete": lambda: TimeLimit(SeasonEnv(), 20),
    "Dict to Box": toy.make_goal,
    "float64": lambda: gym.make("HalfCheetah-v5"),
}


def trained(kind, **settings):
    policy = "MultiInputPolicy" if kind.startswith("Dict") else "MlpPolicy"
    model = EGGROLL(policy, ENVS[kind], population_size=4, n_workers=0, seed=0, max_episode_steps=20, **settings)
    with torch.no_grad():
        for layer in model.policy.network[::2]:
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    return model.learn(100, log_interval=None)


def observations(space, n):
    if isinstance(space, spaces.Dict):
        return {key: observations(part, n) for key, part in space.items()}
    if isinstance(space, spaces.Box):
        return np.random.default_rng(0).normal(size=(n, *space.shape)).astype(space.dtype)
    return np.random.default_rng(0).integers(space.start, space.start + space.n, size=n)


@pytest.mark.parametrize("kind", ENVS)
@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_file_gives_the_actions_that_predict_gives(kind, ending, tmp_path):
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    model = trained(kind, policy_kwargs={"squash_output": kind == "Box to Box"})
    path = export_file(model.policy, tmp_path / f"policy{ending}")
    for n in (1, 2, 7):
        obs = observations(model.observation_space, n)
        expected = model.predict(obs)[0]
        if ending == ".pt2":
            actions = torch.export.load(path).module()(map_arrays(torch.from_numpy, obs)).numpy()
        else:
            inputs = obs if isinstance(obs, dict) else {"obs": obs}
            (actions,) = runtime.InferenceSession(path).run(["actions"], inputs)
        assert actions.shape == expected.shape and np.allclose(actions, expected, atol=1e-5)
    assert isinstance(model.action_space, spaces.Box) or len(np.unique(expected)) > 1


def test_an_unknown_ending_is_refused(tmp_path):
    model = EGGROLL("MlpPolicy", "CartPole-v1", population_size=4, n_workers=0)
    with pytest.raises(ConfigError, match=r"must end in \.onnx or \.pt2, got .*policy\.pth"):
        export_file(model.policy, tmp_path / "policy.pth")
