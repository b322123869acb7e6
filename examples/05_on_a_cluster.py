"""Train on a Ray cluster: the same script on a laptop, one big machine or many, with the same result.

Run: python examples/05_on_a_cluster.py [local | auto | HOST:PORT] [total_timesteps]
Needs: pip install 'eggroll-rl[ray]'
"""

import sys

from eggroll_rl import EGGROLL
from eggroll_rl.errors import ConfigError
from eggroll_rl.ray_workers import RayEvaluator

address = sys.argv[1] if len(sys.argv) > 1 else "local"
total_timesteps = int(sys.argv[2]) if len(sys.argv) > 2 else 2_000_000

try:
    evaluator = RayEvaluator(address)
except ConfigError as error:
    sys.exit(str(error))
# 256 members in slices of 8: up to 32 cores have work. slice_size is part of the result; the number of cores is not.
model = EGGROLL("MlpPolicy", "HalfCheetah-v5", population_size=256, slice_size=8, seed=0, evaluator=evaluator)
model.learn(total_timesteps, progress_bar=True)
model.save("halfcheetah")

n_generations = model.evolution_strategy.generation
print(f"{n_generations} generations on {len(evaluator.nodes)} nodes: {evaluator.nodes}")
print(f"return of the members: {model.last_generation['ep_rew_mean']:.0f}")
sent, received = (n / n_generations / 1000 for n in (evaluator.bytes_sent, evaluator.bytes_received))
print(f"per generation {sent:.0f} kB to the nodes, {received:.0f} kB back")
