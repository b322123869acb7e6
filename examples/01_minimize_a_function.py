"""Minimise the error of a small network without gradients: the core alone, no environment.

Run: python examples/01_minimize_a_function.py
"""

import torch
from torch import nn

from eggroll_rl import EvolutionStrategy

torch.manual_seed(0)
x = torch.linspace(-3, 3, 64).unsqueeze(1)
y = torch.sin(x)

network = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
es = EvolutionStrategy(network, population_size=256, sigma=0.05, rank=1, learning_rate=0.02, seed=0)

for generation in range(201):
    outputs = es.ask().forward(x)  # (256, 64, 1): all members in one call
    error = (outputs - y).square().mean(dim=(1, 2))
    metrics = es.tell(-error)  # higher is better
    if generation % 50 == 0:
        print(f"generation {generation:4d}   mean error {-metrics['fitness_mean']:.5f}")

with torch.no_grad():
    final = (network(x) - y).square().mean().item()
print(f"error of the mean parameters: {final:.5f}")
assert final < 0.01
