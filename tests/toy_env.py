"""A package that registers envs when it is imported."""

import gymnasium as gym
import toy

gym.register("Toy-v0", toy.TargetEnv, max_episode_steps=50)
gym.register("Broken-v0", toy.FaultEnv, max_episode_steps=50, kwargs={"fault": "raise"})
