"""R25: a long run leaks nothing, as seen from outside.

The bounds are in KiB per 1,000 generations, and hold for the lower end of the slope's interval. A minute shows
little more than caches that fill; so its bound is larger. The long run takes 45 minutes, or EGGROLL_SOAK_MINUTES.
"""

import os
import time

import numpy as np
import psutil
import pytest
import toy
from scipy.stats import linregress, t
from watching import BLOCK, check_no_leak, slope, watch

from eggroll_rl import EGGROLL
from eggroll_rl.workers import ProcessEvaluator

MINUTES = float(os.environ.get("EGGROLL_SOAK_MINUTES", "45"))
BOUND_LONG = 16.0
BOUND_SHORT = 256.0
LEAK = 1024  # bytes per episode: 8 MiB per 1,000 generations in each worker


def test_the_slope_and_its_interval_are_those_of_linear_regression():
    rng = np.random.default_rng(0)
    generations = np.sort(rng.integers(0, 5000, 80))
    kib = 100 + 0.03 * generations + rng.normal(0, 5, 80)
    # Each five times, but for a spike among the five, which the median leaves out.
    spiky = np.repeat(kib, BLOCK)
    spiky[::BLOCK] += 1e4
    found = slope(np.repeat(generations, BLOCK).tolist(), spiky.tolist(), from_share=0)
    expected = linregress(generations, kib)
    half = t.ppf(0.975, 78) * expected.stderr * 1000
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.slope * 1000, expected.slope * 1000 - half, expected.slope * 1000 + half)
    )


@pytest.mark.promise("R25")
@pytest.mark.reliability
def test_a_minute_leaks_nothing(cells, tmp_path):
    with cells.cell("60 s"):
        watched = watch(tmp_path, seconds=60, every=0.5, kill_every=100)
        report(watched)
        check_no_leak(watched, BOUND_SHORT)
        assert watched.kills >= 1


@pytest.mark.promise("R25")
@pytest.mark.reliability
def test_a_leaking_env_is_noticed(cells, tmp_path):
    watched = watch(tmp_path, seconds=30, every=0.5, leak=LEAK)
    report(watched)
    with cells.control("an env that keeps 1 KiB per episode, 30 s"):
        check_no_leak(watched, BOUND_SHORT)


@pytest.mark.promise("R25")
@pytest.mark.soak
def test_a_long_run_leaks_nothing(cells, tmp_path):
    with cells.cell(f"{MINUTES:g} minutes"):
        watched = watch(tmp_path, seconds=60 * MINUTES, every=5, kill_every=100)
        report(watched)
        check_no_leak(watched, BOUND_LONG)
        assert watched.kills >= len(watched.samples) // 2


def report(watched):
    """Print the figures: pytest shows them with -s, or when the test fails."""
    generations = [sample.generation for sample in watched.samples]
    for name in ("parent", "worker"):
        kib = [getattr(sample, name) for sample in watched.samples]
        print(f"{name}: {slope(generations, kib)}, {kib[-1] / 1024:.1f} MiB at the end")
    print(f"{generations[-1]} generations, {watched.kills} workers killed, exit status {watched.status}")
    assert watched.status == 143, watched.text[-2000:]


def counts():
    me = psutil.Process()
    return me.num_fds(), me.num_threads(), len(me.children(recursive=True))


def cycle(n_workers):
    """Construct, train one generation, close."""
    model = EGGROLL("MlpPolicy", toy.make_target, seed=0, n_workers=n_workers, population_size=8, slice_size=4)
    model.learn(1, log_interval=None)
    return counts()


def check_counts_stay(n_cycles):
    cycle(1)  # what is opened once and for all
    before = counts()
    for index in range(n_cycles):
        after = cycle(1 + index % 2)
        assert after == before, f"descriptors, threads, processes: {before} became {after} after {index + 1} cycles"


@pytest.mark.promise("R25")
@pytest.mark.reliability
def test_a_few_cycles_leave_nothing(cells):
    with cells.cell("6 cycles"):
        check_counts_stay(6)


@pytest.mark.promise("R25")
@pytest.mark.reliability
def test_a_descriptor_that_stays_open_is_noticed(cells, monkeypatch):
    kept = []
    close = ProcessEvaluator.close

    def forgetful(self):
        kept.append(os.open(os.devnull, os.O_RDONLY))
        close(self)

    monkeypatch.setattr(ProcessEvaluator, "close", forgetful)
    with cells.control("close() leaves a descriptor open"):
        check_counts_stay(1)
    assert kept
    for descriptor in kept:
        os.close(descriptor)


@pytest.mark.promise("R25")
@pytest.mark.soak
def test_two_hundred_cycles_leave_nothing(cells):
    with cells.cell("200 cycles"):
        started = time.monotonic()
        check_counts_stay(200)
        print(f"{(time.monotonic() - started) / 200:.2f} s per cycle")
