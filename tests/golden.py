"""The results that are not to drift: hashes of the parameters of each of five generations, and what they score.

Hashes are of one machine's arithmetic: of torch's and NumPy's version and of the instructions that they choose.
``python tests/golden.py`` writes those of this machine to ``golden.json``, beside the others; a change that is meant to
alter results renews them so, and says it in the changelog.
"""

import hashlib
import json
import platform
from pathlib import Path

import numpy as np
import torch
import toy
from threadpoolctl import threadpool_info

from eggroll_rl import EGGROLL

PATH = Path(__file__).parent / "golden.json"
GENERATIONS = 5
EPISODES = {"population_size": 16, "slice_size": 8, "n_workers": 0, "seed": 5}
CONFIGURATIONS = {
    "episodes, MlpPolicy": ("MlpPolicy", toy.make_target, EPISODES | {"policy_kwargs": {"net_arch": [8, 8]}}),
    "episodes, RecurrentPolicy": (
        "RecurrentPolicy",
        toy.make_target,
        EPISODES | {"policy_kwargs": {"net_arch": [4], "hidden_size": 5, "cell": "lstm"}, "rank": 2},
    ),
    "episodes, MultiInputPolicy": ("MultiInputPolicy", toy.make_goal, EPISODES | {"fitness_shaping": "standardize"}),
    "segments, MlpPolicy": (
        "MlpPolicy",
        toy.make_target,
        {"fitness": "segment", "n_segments": 8, "slice_size": 8, "segment_steps": 50, "batch_size": 100, "seed": 5}
        | {"n_workers": 0, "sample_reuse": 1, "policy_kwargs": {"net_arch": [8, 8]}},
    ),
}


def key():
    """Name what the last bits of results depend on."""
    blas = sorted(
        {f"{pool['internal_api']} {pool.get('architecture')}" for pool in threadpool_info()} - {"openmp None"}
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}, {capability}, {', '.join(blas)}"


def trace(name):
    """Train five generations; return the sha256 of the policy after each, chained, and the scores."""
    policy, make, settings = CONFIGURATIONS[name]
    model = EGGROLL(policy, make, **settings)
    hashes, scores = [], []
    digest = hashlib.sha256()
    for _ in range(GENERATIONS):
        model.learn(1, reset_num_timesteps=False)
        for part, tensor in sorted(model.policy.state_dict().items()):
            digest.update(part.encode() + tensor.numpy().tobytes())
        hashes.append(digest.hexdigest())
        size = sum(p.double().square().sum() for p in model.policy.parameters())
        scores.append({"return": model.last_generation["ep_rew_mean"], "size": float(size.detach().sqrt())})
    return {"hashes": hashes, "scores": scores}


def main():
    """Renew the hashes of this machine, and the scores that others are compared with."""
    stored = json.loads(PATH.read_text()) if PATH.exists() else {"hashes": {}}
    traces = {name: trace(name) for name in CONFIGURATIONS}
    stored["hashes"][key()] = {name: found["hashes"] for name, found in traces.items()}
    stored["scores"] = {name: found["scores"] for name, found in traces.items()}
    PATH.write_text(json.dumps(stored, indent=1) + "\n")
    print(f"{key()}: {PATH}")


if __name__ == "__main__":
    main()
