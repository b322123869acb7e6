"""One seed, one result: whatever the number of workers, their order, the hash seed, the threads and the lengths."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import toy
from chain import chain
from gymnasium.wrappers import TimeLimit

HERE = Path(__file__).parent
SEGMENTS = {"fitness": "segment", "n_segments": 8, "segment_steps": 60, "slice_size": 4, "population_size": 4}


class DelayedEnv(toy.TargetEnv):
    """Sleeps for a random while, so that slices end in any order."""

    def reset(self, *, seed=None, options=None):
        time.sleep(int.from_bytes(os.urandom(1)) / 255 * 0.02)
        return super().reset(seed=seed, options=options)


class LongTailEnv(toy.TargetEnv):
    """Most episodes are one step long, and some a thousand times as long."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.length = 2000 if self.length == 4 else 1
        return obs, info


def make_delayed():
    return TimeLimit(DelayedEnv(), 50)


def make_long_tail():
    return TimeLimit(LongTailEnv(), 5000)


@pytest.mark.promise("R11")
@pytest.mark.parametrize(
    "settings", [{}, pytest.param(SEGMENTS, marks=pytest.mark.reliability)], ids=["episode", "segment"]
)
def test_any_number_of_workers_in_any_order(cells, settings):
    expected = chain(n_workers=0, **settings)
    for n_workers in (1, 2):
        with cells.cell(f"{n_workers} workers, random delays"):
            assert chain(make_delayed, n_workers=n_workers, **settings) == expected
    with cells.control("another seed"):
        assert chain(n_workers=0, **{**settings, "seed": 1}) == expected


@pytest.mark.promise("R11")
@pytest.mark.reliability
def test_fresh_interpreters_with_other_surroundings(cells):
    code = """
        import sys
        from chain import chain
        print(hash("a"), *chain(n_workers=int(sys.argv[1]), n_generations=5))
    """
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    expected = chain(n_workers=0, n_generations=5)
    hashes = set()
    for n_workers in (0, 3, 5):
        for surroundings in ({"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}):
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(code), str(n_workers)],
                env={**os.environ, "PYTHONPATH": path, **surroundings},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            printed = done.stdout.split()
            hashes.add(printed[0])
            with cells.cell(f"{n_workers} workers, {surroundings}"):
                assert printed[1:] == expected
    assert len(hashes) == 2  # the surroundings did differ


@pytest.mark.promise("R21")
@pytest.mark.reliability
def test_lengths_from_one_step_to_thousands(cells):
    expected = chain(make_long_tail, n_workers=0, n_generations=2)
    for n_workers in (1, 3):
        with cells.cell(f"{n_workers} workers"):
            assert chain(make_long_tail, n_workers=n_workers, n_generations=2) == expected
