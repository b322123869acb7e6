"""The scoreboard of the promises in docs/reliability.md: what was tried, whether it held, how long it took.

A test with the marker ``promise("R8")`` is one cell of promise R8, or as many as it makes with the fixture ``cells``.
A *control* is a cell in which the mechanism is switched off and the detector has to notice. ``--scoreboard FOLDER``
writes ``cells.jsonl`` (the raw log) and ``scoreboard.json`` there, and prints the table.
"""

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

PROMISES = {
    "R1": "a killed worker changes nothing",
    "R2": "a worker that dies again and again: bounded retries, then a named error",
    "R3": "an exception in an env is named, with a way to replay it",
    "R4": "malformed or infinite rewards and observations never reach the parameters",
    "R5": "diverged physics is noticed",
    "R6": "a signal saves, stops and leaves nothing behind",
    "R7": "workers leave when their parent is killed",
    "R8": "a kill during a checkpoint leaves a valid one",
    "R9": "a full or read-only disk is named, old files stay",
    "R10": "a resumed run is the uninterrupted one, to the bit",
    "R11": "one seed, one result, whatever the workers",
    "R12": "results do not drift between versions",
    "R13": "loading executes nothing",
    "R14": "a hostile size is refused before it is allocated",
    "R15": "a damaged or foreign file is named",
    "R16": "a wrong argument is named before any env is made",
    "R17": "ask and tell out of order are refused",
    "R18": "every space works or is refused by name",
    "R19": "an env that breaks Gymnasium's contract is named",
    "R20": "an env that never ends meets a limit",
    "R21": "very different episode lengths: same result",
    "R22": "moments are exact",
    "R23": "float32 does not drift",
    "R24": "degenerate populations do no harm",
    "R25": "a long run leaks nothing",
    "R26": "a crash while pickling is named",
    "R27": "lost, late, doubled and reordered results change nothing",
    "R28": "nothing listens on the network",
    "R29": "two runs in one folder refuse each other",
    "R30": "Stable-Baselines3's contract",
    "R31": "no traceback for a user's mistake on the command line",
    "R32": "few dependencies, clean static checks",
}


def pytest_addoption(parser):
    parser.addoption("--scoreboard", metavar="FOLDER", type=Path, help="write the promises' cells and their table here")


def pytest_configure(config):
    folder = config.getoption("scoreboard")
    if folder is not None and not hasattr(config, "workerinput"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cells.jsonl").unlink(missing_ok=True)


class Cells:
    """Cells of one test. A failed cell does not end the test; all of them are reported at its end."""

    def __init__(self, promise, test, folder):
        self.promise, self.test, self.folder = promise, test, folder
        self.failed, self.n_cells = [], 0

    @contextmanager
    def cell(self, name, control=False):
        """Try one case: it passes if the block does. A control passes if the block raises an AssertionError."""
        started = time.perf_counter()
        error = None
        try:
            yield
            if control:
                error = "the control was not noticed"
        except (Exception, pytest.fail.Exception) as raised:
            if not (control and isinstance(raised, AssertionError)):
                error = f"{type(raised).__name__}: {raised}"
        self.record(name, error, time.perf_counter() - started, control)

    def control(self, name):
        """Try a case in which the mechanism is switched off: passes if an assertion in the block fails."""
        return self.cell(name, control=True)

    def record(self, name, error, seconds, control=False):
        """Log a cell whose outcome is known; ``error`` is None if it passed."""
        self.n_cells += 1
        if error is not None:
            self.failed.append(f"{name}: {error}")
        if self.folder is not None:
            cell = {"promise": self.promise, "test": self.test, "cell": str(name), "control": control}
            cell |= {"passed": error is None, "seconds": round(seconds, 4), "error": error}
            line = (json.dumps(cell) + "\n").encode()
            # One write to a file opened for appending: several test processes log here.
            descriptor = os.open(self.folder / "cells.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)


def _cells_of(item):
    if not hasattr(item, "cells"):
        marker = item.get_closest_marker("promise")
        assert marker is not None, "a test that logs cells needs a promise"
        (promise,) = marker.args
        assert promise in PROMISES
        item.cells = Cells(promise, item.nodeid, item.config.getoption("scoreboard"))
    return item.cells


@pytest.fixture
def cells(request):
    """Return the test's :class:`Cells`; failed ones fail the test."""
    cells = _cells_of(request.node)
    yield cells
    if cells.failed:
        shown = "\n".join(cells.failed[:20])
        pytest.fail(f"{len(cells.failed)} of {cells.n_cells} cells failed\n{shown}", pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if call.when != "call" or item.get_closest_marker("promise") is None:
        return
    cells = _cells_of(item)
    raised = report.failed and "cells" in item.fixturenames
    if report.skipped:
        return
    if "cells" not in item.fixturenames or raised:
        cells.record(item.name, report.longreprtext[-500:] if report.failed else None, report.duration)


def summarize(cells):
    """Return the table's rows from the cells of the log."""
    from scipy.stats import beta

    rows = []
    for promise, title in PROMISES.items():
        ours = [cell for cell in cells if cell["promise"] == promise and not cell["control"]]
        controls = [cell for cell in cells if cell["promise"] == promise and cell["control"]]
        n, passed = len(ours), sum(cell["passed"] for cell in ours)
        # Clopper and Pearson (1934), one-sided: with no failure in n, 1 - 0.05 ** (1 / n).
        bound = None if n == 0 else 1.0 if passed == 0 else float(beta.ppf(0.95, n - passed + 1, passed))
        rows.append(
            {
                "id": promise,
                "promise": title,
                "cells": n,
                "passed": passed,
                "failure_rate_below": bound,
                "controls": len(controls),
                "controls_noticed": sum(cell["passed"] for cell in controls),
                "worst_seconds": max((cell["seconds"] for cell in ours), default=None),
            }
        )
    return rows


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("scoreboard")
    if folder is None or hasattr(config, "workerinput") or not (folder / "cells.jsonl").exists():
        return
    from eggroll_rl.machine import machine, versions

    rows = summarize([json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()])
    board = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "versions": versions(), "promises": rows}
    (folder / "scoreboard.json").write_text(json.dumps(board, indent=2) + "\n")
    write = terminalreporter.write_line
    write("")
    write(f"{'':4} {'held':>13} {'fails below':>11} {'controls':>9} {'worst':>8}  promise   (bound: 95 % confidence)")
    for row in rows:
        if row["cells"] == 0:
            write(f"{row['id']:4} {'not run':>13} {'':11} {'':9} {'':8}  {row['promise']}")
            continue
        held, noticed = f"{row['passed']} of {row['cells']}", f"{row['controls_noticed']} of {row['controls']}"
        write(
            f"{row['id']:4} {held:>13} {row['failure_rate_below']:>11.2%} {noticed if row['controls'] else '':>9} "
            f"{row['worst_seconds']:>7.2f}s  {row['promise']}"
        )
    write(f"saved in {folder}: scoreboard.json, cells.jsonl")
