"""Runs of a few milliseconds, copies of this process in which to try what would end it, and the command line there."""

import hashlib
import os
import signal
import sys
import time
import traceback
import warnings

import torch
import toy
from gymnasium.envs.registration import register, registry

from eggroll_rl.agents import read_csv
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.config import RunConfig

if "Target-v0" not in registry:
    register("Target-v0", toy.TargetEnv, max_episode_steps=20)

EPISODES = {"population_size": 8, "slice_size": 4, "policy_kwargs": {"net_arch": [4]}, "learning_rate": 0.05}
SEGMENTS = {
    "fitness": "segment", "n_segments": 4, "slice_size": 2, "segment_steps": 10, "max_episode_steps": 10,
    "batch_size": 16, "population_size": 4, "policy_kwargs": {"net_arch": [4]}, "sample_reuse": 1,
    "critic_kwargs": {"net_arch": [4]},
}  # fmt: skip
EPISODES_STEPS, SEGMENTS_STEPS = 440, 320  # eight generations


def tiny(eggroll=EPISODES, steps=EPISODES_STEPS, **changes):
    """Return the configuration of a run of eight generations, with a checkpoint after each."""
    values = {"env_id": "Target-v0", "n_workers": 0, "eval_freq": 0, "eval_episodes": 2, "checkpoint_every": 1}
    return RunConfig(**{**values, "total_timesteps": steps, "eggroll": dict(eggroll), **changes})


def state_of(folder):
    """Return the SHA-256 of all that a run has reached: tensors, numbers and the curve, seconds left out."""
    _, tensors, about, _ = newest_checkpoint(folder)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    digest.update(repr(sorted((name, value) for name, value in about.items() if name != "training_seconds")).encode())
    rows = [
        {name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "progress.csv")
    ]
    digest.update(repr(rows).encode())
    return digest.hexdigest()


def contents(folder):
    """Return every file below a folder, by name, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fork(function, *args, output=None):
    """Call a function in a copy of this process, in a session of its own, and return the pid.

    The copy ends with status 0, 99 if the function raised, or what it said by SystemExit.

    :param output: descriptor for what the copy writes to stdout and stderr: a pipe's, which no limit of files touches
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
        if output is not None:
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        torch.set_num_threads(1)
        function(*args)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def wait(pid, seconds=60.0):
    """Return a copy's exit status, or minus the signal that killed it; killed and None if it takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run_and_read(function, *args, seconds=60.0):
    """Call a function in a copy of this process; return its exit status and what it wrote, up to a pipe's 64 KiB."""
    read, write = os.pipe()
    with os.fdopen(read, errors="replace") as file:
        status = wait(fork(function, *args, output=write), seconds)
        os.close(write)
        return status, file.read()


def command_line(*words):
    """Run ``eggroll-rl`` with these words, in this process; for :func:`fork`."""
    from eggroll_rl import cli

    sys.argv = ["eggroll-rl", *map(str, words)]
    cli.main()


def session_of(pid):
    """Return the processes of a copy's session that still run."""
    alive = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, _, _, session = file.read().rpartition(")")[2].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) == pid and state != "Z":
                alive.append(int(name))
    return alive
