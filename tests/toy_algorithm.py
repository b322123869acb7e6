"""Algorithms of a user's own."""

import torch
from stable_baselines3 import A2C


class Mine(A2C):
    """A2C, with an activation that cannot be exported."""

    def __init__(self, policy, env, policy_kwargs=None, **kwargs):
        super().__init__(policy, env, policy_kwargs={"activation_fn": torch.nn.Softplus}, **kwargs)


NOT_ONE = 3


class Failing(A2C):
    """A2C that breaks down after 100 env steps."""

    def train(self):
        super().train()
        if self.num_timesteps > 100:
            raise ArithmeticError("out of numbers")
