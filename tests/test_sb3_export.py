import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from eggroll_rl.agents import load_policy, save_policy
from eggroll_rl.errors import ConfigError
from eggroll_rl.sb3_export import export_policy

sb3_contrib = pytest.importorskip("sb3_contrib")
ON_POLICY = [PPO, A2C, sb3_contrib.TRPO, sb3_contrib.ARS]
ALL = [*ON_POLICY, SAC, TD3, sb3_contrib.TQC]


def shaken(algorithm, env_id, normalize, **kwargs):
    """Return a model whose actor, statistics and biases are not those of the start."""
    envs = DummyVecEnv([lambda: gym.make(env_id)])
    if normalize:
        envs = VecNormalize(envs)
        envs.reset()
        for _ in range(20):
            envs.step(np.array([envs.action_space.sample()]))
    model = algorithm("MlpPolicy", envs, seed=0, device="cpu", **kwargs)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("algorithm", "env_id", "normalize"),
    [(algorithm, "Hopper-v5", True) for algorithm in ALL]
    + [(algorithm, "Pendulum-v1", False) for algorithm in ALL]  # bounds ±2
    + [(algorithm, "CartPole-v1", True) for algorithm in ON_POLICY],
)
def test_the_same_actions(algorithm, env_id, normalize, tmp_path):
    model = shaken(algorithm, env_id, normalize)
    rng = np.random.default_rng(0)
    raw = rng.normal(scale=2.0, size=(200, *model.observation_space.shape)).astype(model.observation_space.dtype)
    seen = model.get_vec_normalize_env().normalize_obs(raw) if normalize else raw
    expected = model.predict(seen, deterministic=True)[0]

    save_policy(tmp_path / "policy.safetensors", export_policy(model), {})
    actions = load_policy(tmp_path / "policy.safetensors").predict(raw)[0]
    assert actions.dtype == expected.dtype and np.unique(expected.round(3), axis=0).shape[0] > 1
    # Float32 differs only where the bounds are not ±1.
    np.testing.assert_allclose(actions, expected, atol=0 if env_id != "Pendulum-v1" else 2e-6)


def test_exporting_changes_no_generator(rng_state):
    model = shaken(PPO, "Pendulum-v1", False)
    before = torch.get_rng_state()
    export_policy(model)
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_exported_is_named():
    with pytest.raises(ConfigError, match="DQNPolicy"):
        export_policy(shaken(DQN, "CartPole-v1", False))
    with pytest.raises(ConfigError, match="activation Softplus"):
        export_policy(shaken(PPO, "Pendulum-v1", False, policy_kwargs={"activation_fn": torch.nn.Softplus}))
    envs = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), clip_obs=5.0)
    with pytest.raises(ConfigError, match=r"clip_obs=10.0 .* got 5.0"):
        export_policy(PPO("MlpPolicy", envs, device="cpu"))


class OneSided(gym.Env):
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space = spaces.Box(0, 4, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}


def test_bounds_that_are_not_symmetric():
    model = PPO("MlpPolicy", OneSided(), device="cpu", seed=0)
    with torch.no_grad():
        model.policy.action_net.weight += 3 * torch.randn_like(model.policy.action_net.weight)
    raw = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(np.float32)
    np.testing.assert_allclose(
        export_policy(model).predict(raw)[0], model.predict(raw, deterministic=True)[0], atol=2e-6
    )
    linear = sb3_contrib.ARS("LinearPolicy", OneSided(), device="cpu", seed=0)
    with pytest.raises(ConfigError, match="without bias"):
        export_policy(linear)
