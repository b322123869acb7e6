"""What one process of peers.py does: put one fault to one library and note in FOLDER/observed.json what came of it.

    python probes.py SYSTEM PROBE FOLDER [OPTION=VALUE ...]

Systems: ``ppo`` is Stable-Baselines3's PPO with SubprocVecEnv, ``ars`` is sb3-contrib's ARS with AsyncEval, ``async``
is Gymnasium's AsyncVectorEnv with random actions, ``eggroll`` is ours. Each has two workers unless a probe says
otherwise.
"""

import contextlib
import hashlib
import json
import pickle
import resource
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import probe_envs
import torch
from probe_envs import DivergingCheetah, OffsetEnv, ProbeEnv, make
from sb3_contrib import ARS
from sb3_contrib.common.vec_env import AsyncEval
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecCheckNan, VecNormalize

from eggroll_rl import EGGROLL
from eggroll_rl.agents import load_policy
from eggroll_rl.checkpoints import list_checkpoints
from eggroll_rl.config import RunConfig
from eggroll_rl.training import train

SMALL = {"net_arch": [8]}
BIG = {"net_arch": [64, 64]}
FOREVER = 10**9


def build(system, fn, n_workers=2, wrap=None, policy_kwargs=SMALL, **options):
    """Return a model; ``wrap`` goes around the SB3 systems' VecEnv, and 0 workers are this process."""
    wrap = wrap or (lambda venv: venv)
    if system == "ppo":
        venv = DummyVecEnv([fn, fn]) if n_workers == 0 else SubprocVecEnv([fn] * n_workers)
        settings = {"n_steps": 64 // venv.num_envs, "batch_size": 32, "n_epochs": 2}
        return PPO(
            "MlpPolicy", wrap(venv), seed=0, device="cpu", policy_kwargs=policy_kwargs, **{**settings, **options}
        )
    if system == "ars":
        policy = "MlpPolicy" if policy_kwargs is BIG else "LinearPolicy"
        kwargs = policy_kwargs if policy_kwargs is BIG else {}
        return ARS(policy, wrap(DummyVecEnv([fn])), n_delta=4, seed=0, device="cpu", policy_kwargs=kwargs, **options)
    settings = {"population_size": 8, "slice_size": 4, "seed": 0, "policy_kwargs": policy_kwargs, **options}
    return EGGROLL("MlpPolicy", fn, n_workers=n_workers, **settings)


def learn(system, model, fn, steps, n_workers=2, wrap=None, **kwargs):
    """Train ``steps`` further env steps; ARS gets its worker processes here."""
    wrap = wrap or (lambda venv: venv)
    if system == "ars" and n_workers:
        async_eval = AsyncEval([lambda: wrap(DummyVecEnv([fn]))] * n_workers, model.policy)
        async_eval.seed(0)
        model.learn(steps, async_eval=async_eval, **kwargs)
        async_eval.close()
    else:
        model.learn(steps, **kwargs)
    if model.env is not None:
        model.env.close()
    return model


def digest(model):
    """Hash the policy: parameters, and the normalizer where it is part of it."""
    h = hashlib.sha256()
    for name, tensor in sorted(model.policy.state_dict().items()):
        h.update(name.encode() + tensor.numpy().tobytes())
    return h.hexdigest()


def file_digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def error_of(call):
    """Return None, or what ``call`` raised, as "Type: text"."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


# Probes: each returns what it observed. ``seen`` is written even if the probe raises or is killed between. ------------


def fault(system, folder, seen, fault, steps=1000, **options):
    """Train with an env that has ``fault`` once."""
    fn = make(DivergingCheetah, folder) if fault == "diverge" else make(ProbeEnv, fault, folder)
    limit = options.pop("limit", None)
    if system == "async":
        return random_steps(fn, limit, seen)
    if limit is not None:
        options["step_timeout"] = limit
    checks = options.pop("check_nan", False)
    wrap = (lambda venv: VecCheckNan(venv, raise_exception=True)) if checks else None
    model = build(system, fn, wrap=wrap, **options)
    try:
        learn(system, model, fn, steps, wrap=wrap if system == "ppo" else None)
    finally:
        seen["finite"] = all(bool(p.isfinite().all()) for p in model.policy.parameters())
        seen["digest"] = digest(model)
    seen["timesteps"] = model.num_timesteps


def random_steps(fn, limit, seen, n_steps=300):
    """Step Gymnasium's AsyncVectorEnv with random actions."""
    envs = gym.vector.AsyncVectorEnv([fn, fn])
    envs.action_space.seed(0)
    envs.reset(seed=0)
    rewards = np.zeros(2)
    for _ in range(n_steps):
        envs.step_async(envs.action_space.sample())
        obs, reward, *_ = envs.step_wait(timeout=limit)
        rewards += reward
        seen["finite"] = seen.get("finite", True) and bool(np.isfinite(reward).all() and np.isfinite(obs).all())
    envs.close()


def script(system, folder, seen):
    """The script that users write: learn, then save. The driver sends it a signal in the middle."""
    fn = make(ProbeEnv, "none", folder)
    model = build(system, fn)
    learn(system, model, fn, FOREVER)
    model.save(folder / "model.zip")


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """As on a full disk, no file can grow past ``n_bytes``: the write fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(system, folder, seen):
    """Save over a good file when the disk is full."""
    fn = make(ProbeEnv, "none", folder)
    model = build(system, fn, n_workers=0, policy_kwargs=BIG)
    path = folder / "model.zip"
    model.save(path)
    before = file_digest(path)
    with files_of_at_most(4096):
        seen["save_error"] = error_of(lambda: model.save(path))
    seen["intact"] = file_digest(path) == before
    seen["load_error"] = error_of(lambda: type(model).load(path))
    if system == "eggroll":
        seen["run"] = {}
        full_disk_of_a_run(folder / "run", seen["run"])


def run_config(folder, steps, **settings):
    eggroll = {"population_size": 8, "slice_size": 4, "policy_kwargs": BIG}
    return RunConfig(
        "Probe-v0", {"fault": "none", "folder": str(folder)}, total_timesteps=steps, n_workers=0, eval_freq=0,
        eval_episodes=1, checkpoint_every=1, keep_checkpoints=1, eggroll=eggroll, **settings,
    )  # fmt: skip


def full_disk_of_a_run(run, seen):
    run.mkdir()
    train(run_config(run, 256), run / "agent", progress_bar=False)
    (checkpoint,) = list_checkpoints(run / "agent")
    before = {path: file_digest(path) for path in (checkpoint, run / "agent" / "policy.safetensors")}
    with files_of_at_most(4096):
        seen["save_error"] = error_of(
            lambda: train(run_config(run, 512), run / "agent", resume=True, progress_bar=False)
        )
    seen["intact"] = all(file_digest(path) == was for path, was in before.items())
    seen["load_error"] = error_of(lambda: load_policy(run / "agent" / "policy.safetensors"))
    seen["left"] = sorted(p.name for p in (run / "agent").iterdir() if p.name.endswith(".tmp"))
    seen["resume_error"] = error_of(lambda: train(run_config(run, 512), run / "agent", resume=True, progress_bar=False))


class Payload:
    """Unpickling it makes a file: harmless, and enough to show that code ran."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (self.sentinel,)


def payload(system, folder, seen):
    """Load a model file with a payload."""
    fn = make(ProbeEnv, "none", folder)
    sentinel = folder / "sentinel"
    model = build(system, fn, n_workers=0)
    model.note = Payload(sentinel)
    model.save(folder / "model.zip")
    assert not sentinel.exists()
    seen["load_error"] = error_of(lambda: type(model).load(folder / "model.zip"))
    seen["ran"] = sentinel.exists()
    if system == "eggroll":
        sentinel.unlink(missing_ok=True)
        seen["run"] = {}
        payload_in_a_run(folder / "run", sentinel, seen["run"])


def payload_in_a_run(run, sentinel, seen):
    """Put the payload where a run folder's files hold text or bytes, and load each."""
    run.mkdir()
    agent = run / "agent"
    train(run_config(run, 128), agent, progress_bar=False)
    paths = {"policy": agent / "policy.safetensors", "training": list_checkpoints(agent)[0]}
    good = paths["policy"].read_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    about = json.loads(header["__metadata__"]["about"])
    named = f"__import__('pathlib').Path({str(sentinel)!r}).touch()"

    def with_about(**changes):
        # Of version 1, which has no checksum to stop at.
        metadata = {**header["__metadata__"], "about": json.dumps({**about, **changes}), "version": "1"}
        del metadata["sha256"]
        text = json.dumps({**header, "__metadata__": metadata}).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    torch_file = run / "torch.pt"
    torch.save({"weights": Payload(sentinel)}, torch_file)
    kwargs = about["policy_kwargs"]
    files = {
        "pickle": pickle.dumps(Payload(sentinel)),
        "torch.save": torch_file.read_bytes(),
        "policy class named": with_about(policy=named),
        "activation named": with_about(policy_kwargs={**kwargs, "activation_fn": named}),
        "extractor named": with_about(policy_kwargs={**kwargs, "features_extractor_class": named}),
    }
    seen["errors"] = {}
    for name, content in files.items():
        for kind in paths:
            if kind == "training" and "named" in name:
                continue
            for part, path in paths.items():
                shutil.copy(path, run / f"{part}.good")
            paths[kind].write_bytes(content)
            if kind == "policy":
                seen["errors"][f"{kind}: {name}"] = error_of(lambda: load_policy(agent / "policy.safetensors"))
            else:
                seen["errors"][f"{kind}: {name}"] = error_of(
                    lambda: train(run_config(run, 256), agent, resume=True, progress_bar=False)
                )
            for part, path in paths.items():
                shutil.copy(run / f"{part}.good", path)
    seen["control_error"] = error_of(lambda: load_policy(agent / "policy.safetensors"))
    seen["ran"] = sentinel.exists()
    # That the payload is one: pickle alone runs it.
    pickle.loads(files["pickle"])
    seen["payload_works"] = sentinel.exists()


def workers(system, folder, seen):
    """Train with one seed and 0, 1 and 2 workers."""
    fn = make(ProbeEnv, "none", folder)
    seen["digests"] = {}
    for n_workers in (0, 1, 2):
        model = learn(system, build(system, fn, n_workers=n_workers), fn, 512, n_workers=n_workers)
        seen["digests"][n_workers] = digest(model)
    seen["again"] = digest(learn(system, build(system, fn, n_workers=2), fn, 512, n_workers=2))


def resume(system, folder, seen):
    """Compare 512 steps with 256, save, load and 256 more; all in this process, where nothing else interferes."""
    fn = make(ProbeEnv, "none", folder)
    whole = learn(system, build(system, fn, n_workers=0), fn, 512, n_workers=0)
    again = learn(system, build(system, fn, n_workers=0), fn, 512, n_workers=0)
    half = learn(system, build(system, fn, n_workers=0), fn, 256, n_workers=0)
    half.save(folder / "half.zip")
    env = {"ppo": DummyVecEnv([fn, fn]), "ars": DummyVecEnv([fn])}.get(system, fn)
    loaded = type(half).load(folder / "half.zip", env=env, device="cpu")
    learn(system, loaded, fn, 256, n_workers=0, reset_num_timesteps=False)
    seen["timesteps"] = [whole.num_timesteps, loaded.num_timesteps]
    seen["repeats"] = digest(whole) == digest(again)
    seen["same"] = digest(whole) == digest(loaded)
    if system == "eggroll":
        run = folder / "run"
        run.mkdir()
        train(run_config(run, 512), run / "whole", progress_bar=False)
        train(run_config(run, 256), run / "parts", progress_bar=False)
        train(run_config(run, 512), run / "parts", resume=True, progress_bar=False)
        whole_state, parts_state = (load_policy(run / n / "policy.safetensors") for n in ("whole", "parts"))
        pairs = zip(whole_state.state_dict().values(), parts_state.state_dict().values(), strict=True)
        seen["run_same"] = all(torch.equal(a, b) for a, b in pairs)


def moments(system, folder, seen):
    """Train with normalized observations that are offset ± 1, and say what mean and deviation were found."""
    seen["found"] = {}
    for offset in (1e4, 1e9):
        fn = make(OffsetEnv, offset)
        wrap = VecNormalize if system != "eggroll" else None
        n_workers = 2 if system == "ars" else 0  # ARS merges what its workers found; the others have one place
        model = build(system, fn, n_workers=n_workers, wrap=wrap)
        if system == "eggroll":
            learn(system, model, fn, 2000, n_workers=n_workers)
            normalizer = model.policy.normalizer
            mean, variance = float(normalizer.mean[0]), float(normalizer.m2[0] / normalizer.count)
            count = float(normalizer.count)
        else:
            rms = model.get_vec_normalize_env().obs_rms
            learn(system, model, fn, 2000, n_workers=n_workers, wrap=wrap)
            mean, variance, count = float(rms.mean[0]), float(rms.var[0]), float(rms.count)
        seen["found"][f"{offset:g}"] = {"mean_error": mean - offset, "std": variance**0.5, "count": count}


PROBES = {
    "fault": fault, "script": script, "full_disk": full_disk, "payload": payload,
    "workers": workers, "resume": resume, "moments": moments,
}  # fmt: skip


def main(system, probe, folder, *options):
    assert Path(probe_envs.__file__).parent == Path(__file__).parent
    folder, seen = Path(folder), {}
    chosen = {name: json.loads(value) for name, _, value in (option.partition("=") for option in options)}
    try:
        PROBES[probe](system, folder, seen, **chosen)
    except BaseException as error:
        seen["error"] = {"type": type(error).__name__, "text": str(error)}
        raise
    finally:
        (folder / "observed.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
