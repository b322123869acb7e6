"""Watch a training run from outside: memory, descriptors, threads, processes and temporary files, by generation."""

import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from scipy.stats import t as student

HERE = Path(__file__).parent
BLOCK = 5


@dataclass
class Sample:
    """The state of a run at one moment.

    :param generation: the last one in progress.csv
    :param parent: KiB that only the training process holds (USS)
    :param worker: KiB that only its oldest worker holds
    :param counts: descriptors and threads of the training process and of the oldest worker, workers, and files (not
        folders: torch and SB3 make some, once) in the folder for temporary ones
    """

    generation: int
    parent: float
    worker: float
    counts: dict[str, int]


@dataclass
class Watched:
    """A run that was watched to its end.

    :param status: exit status after SIGTERM
    :param kills: workers that were killed
    :param left: workers, temporary files and /dev/shm entries that outlived it
    :param text: what it printed
    """

    samples: list[Sample]
    status: int
    kills: int
    left: list[str]
    text: str


def watch(folder: Path, seconds: float, every: float, leak: int = 0, kill_every: int | None = None) -> Watched:
    """Train on Leaky-v0 by the command line with 2 workers for ``seconds``, then end it by SIGTERM.

    :param every: seconds between samples
    :param leak: bytes per episode that the env keeps
    :param kill_every: generations between SIGKILLs to the youngest worker; the oldest lives on, to show its leaks
    """
    preset, run, temporary = folder / "soak.toml", folder / "run", folder / "tmp"
    temporary.mkdir()
    preset.write_text(
        f'env_id = "Leaky-v0"\ntotal_timesteps = {10**12}\neval_freq = 0\ncheckpoint_every = 20\n'
        f"[env_kwargs]\nleak = {leak}\n"
        "[eggroll]\npopulation_size = 16\nslice_size = 8\n[eggroll.policy_kwargs]\nnormalize_obs = true\n"
    )
    arguments = ["train", "--gym-packages", "probe_envs", "--n-workers", "2", str(preset), "--output", str(run)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        "TMPDIR": str(temporary),
    }
    shared = set(os.listdir("/dev/shm"))
    output = folder / "output"
    with open(output, "wb") as file:
        process = psutil.Popen(
            [sys.executable, "-m", "eggroll_rl", *arguments], cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        samples, kills = _samples(process, folder, seconds, every, kill_every)
        workers = process.children()
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
        _, alive = psutil.wait_procs(workers, timeout=5)
    finally:
        for other in [process, *process.children(recursive=True)] if process.is_running() else []:
            other.kill()
        process.wait(10)
    left = [str(p) for p in [*alive, *_files(temporary)]] + sorted(set(os.listdir("/dev/shm")) - shared)
    return Watched(samples, status, kills, left, output.read_text(errors="replace"))


def _samples(
    process: psutil.Popen, folder: Path, seconds: float, every: float, kill_every: int | None
) -> tuple[list[Sample], int]:
    run = folder / "run"
    samples: list[Sample] = []
    kills = 0
    until = time.monotonic() + 60
    while generation_of(run) < 1 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.2)
    until = time.monotonic() + seconds
    killed_at = generation_of(run)
    while time.monotonic() < until:
        assert process.poll() is None, f"the run ended by itself: {(folder / 'output').read_text()[-2000:]}"
        generation = generation_of(run)
        workers = sorted(process.children(), key=lambda child: child.create_time())
        # While one is being replaced there is one less; those samples would say nothing about leaks.
        if len(workers) == 2 and generation > 0:
            samples.append(_sample(process, workers[0], generation))
            samples[-1].counts |= {"workers": len(workers), "temporary files": len(_files(folder / "tmp"))}
            if kill_every is not None and generation - killed_at >= kill_every:
                workers[-1].kill()
                killed_at = generation
                kills += 1
        time.sleep(every)
    return samples, kills


def _sample(process: psutil.Process, worker: psutil.Process, generation: int) -> Sample:
    counts: dict[str, int] = {}
    for name, which in (("parent", process), ("worker", worker)):
        counts |= {f"{name}'s descriptors": which.num_fds(), f"{name}'s threads": which.num_threads()}
    parent, oldest = (which.memory_full_info().uss / 1024 for which in (process, worker))
    return Sample(generation, parent, oldest, counts)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def generation_of(run: Path) -> int:
    """Return the generation of the last whole line of progress.csv, 0 before there is one."""
    try:
        with open(run / "progress.csv", "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    # The generation is the first column; the last piece is what follows the last line's end.
    last = lines[-2].split(b",")[0] if len(lines) > 1 else b""
    return int(last) if last.isdigit() else 0


@dataclass
class Slope:
    """KiB per 1,000 generations, with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1f} KiB per 1,000 generations (95 %: {self.low:.1f} to {self.high:.1f})"


def slope(generations: list[int], kib: list[float], from_share: float = 0.25) -> Slope:
    """Fit a line to the medians of :data:`BLOCK` samples after the first ``from_share``: caches fill at first.

    Least squares; the interval is Student's for independent errors. Medians, because a sample taken while a checkpoint
    is written is 10 MiB above the others, and one such early on would hide a leak.
    """
    first = int(len(kib) * from_share)
    n_blocks = (len(kib) - first) // BLOCK
    blocks = np.array([generations, kib], np.float64)[:, first : first + n_blocks * BLOCK].reshape(2, n_blocks, BLOCK)
    x, y = np.median(blocks, axis=2) / np.array([[1000.0], [1.0]])
    centred = x - x.mean()
    spread = (centred**2).sum()
    value = float((centred * y).sum() / spread)
    residual = y - y.mean() - value * centred
    n = len(y)
    half = float(student.ppf(0.975, n - 2) * np.sqrt((residual**2).sum() / (n - 2) / spread))
    return Slope(value, value - half, value + half)


def check_no_leak(watched: Watched, bound: float) -> None:
    """Fail if memory grows surely faster than ``bound`` KiB per 1,000 generations, or any count changed."""
    generations = [sample.generation for sample in watched.samples]
    for name in ("parent", "worker"):
        found = slope(generations, [getattr(sample, name) for sample in watched.samples])
        assert found.low <= bound, f"the {name} grows: {found}; allowed are {bound}"
    # Medians: a sample may fall into the moment in which a file is open, or a worker is replaced.
    third = len(watched.samples) // 3
    for name in watched.samples[0].counts:
        counts = [sample.counts[name] for sample in watched.samples]
        before, after = statistics.median_low(counts[third : 2 * third]), statistics.median_low(counts[2 * third :])
        assert before == after, f"{name}: {before} became {after}"
    assert watched.left == []
