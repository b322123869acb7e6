"""Train HalfCheetah-v5 through the API, in the shape of any Stable-Baselines3 script.

Run: python examples/02_train_halfcheetah.py [total_timesteps]
"""

import sys

from stable_baselines3.common.evaluation import evaluate_policy

from eggroll_rl import EGGROLL

total_timesteps = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000

settings = dict(fitness="segment", exploration_std=0.37, target_kl="lin_0.4", sample_reuse=2, population_size=8)
settings |= dict(gamma=0.98, gae_lambda=0.92)  # all as in the preset
model = EGGROLL("MlpPolicy", "HalfCheetah-v5", seed=0, verbose=1, **settings)
model.learn(total_timesteps, progress_bar=True)
model.save("halfcheetah")

model = EGGROLL.load("halfcheetah", env="HalfCheetah-v5")
mean, std = evaluate_policy(model, model.get_env(), n_eval_episodes=5)
print(f"return of the mean policy: {mean:.0f} ± {std:.0f}")
