"""Training on a toy env, and hashes of its whole state after every generation."""

import hashlib

import numpy as np
import toy

from eggroll_rl import EGGROLL
from eggroll_rl.callbacks import GenerationCallback
from eggroll_rl.rollout import episode_seeds

SETTINGS = {"population_size": 12, "slice_size": 4, "policy_kwargs": {"net_arch": [8]}, "seed": 0}


def state_hash(model):
    """Hash everything that training changes: parameters, normalizer, optimizer, what the scorer keeps, counters."""
    h = hashlib.sha256(f"{model.num_timesteps} {model._n_updates}".encode())
    entries = model.policy.optimizer.state_dict()["state"]
    parts = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    parts |= {f"optimizer.{i}.{name}": value for i, entry in entries.items() for name, value in entry.items()}
    parts |= {f"scorer.{name}": value for name, value in model.scorer.state_dict().items()}
    for name, value in sorted(parts.items()):
        h.update(name.encode() + np.asarray(value).tobytes())
    return h.hexdigest()


class Chain(GenerationCallback):
    """Hashes after every generation; stops after ``n_generations``. ``meanwhile`` is called with their number."""

    def __init__(self, n_generations, meanwhile=None):
        super().__init__()
        self.hashes, self.n_generations, self.meanwhile = [], n_generations, meanwhile

    def on_generation_end(self):
        self.hashes.append(state_hash(self.model))
        if self.meanwhile is not None:
            self.meanwhile(len(self.hashes))
        return len(self.hashes) < self.n_generations


def make_model(env=toy.make_target, n_workers=2, **settings):
    return EGGROLL("MlpPolicy", env, n_workers=n_workers, **{**SETTINGS, **settings})


def chain(env=toy.make_target, n_workers=2, n_generations=4, meanwhile=None, **settings):
    """Return the hashes of a run."""
    callback = Chain(n_generations, meanwhile)
    make_model(env, n_workers, **settings).learn(10**9, callback, log_interval=None)
    return callback.hashes


def seed_of(member, generation=0):
    """Return the reset seed of a member's first episode in a run with SETTINGS."""
    model = make_model(n_workers=0)
    model._es.generation = generation
    return int(episode_seeds(model.next_generation().noise, 1)[member, 0])


def send_chain(connection, n_generations):
    """Send the hashes of a run to another process."""
    connection.send(chain(n_generations=n_generations))
