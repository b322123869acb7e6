"""The scoreboard itself: it must not report a promise as held when it was not."""

import json

import pytest
from scoreboard import Cells, summarize


def test_a_failed_cell_and_an_unnoticed_control_are_logged_as_such(tmp_path):
    cells = Cells("R8", "some test", tmp_path)
    with cells.cell("holds"):
        pass
    with cells.cell("broken"):
        raise ValueError("what happened")
    with cells.control("noticed"):
        raise AssertionError
    with cells.control("not noticed"):
        pass
    with cells.control("ended otherwise"):
        raise KeyError("x")
    logged = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [(cell["passed"], cell["control"]) for cell in logged] == [
        (True, False), (False, False), (True, True), (False, True), (False, True),
    ]  # fmt: skip
    assert "what happened" in logged[1]["error"]
    assert len(cells.failed) == 3
    row = next(row for row in summarize(logged) if row["id"] == "R8")
    assert (row["cells"], row["passed"], row["controls"], row["controls_noticed"]) == (2, 1, 3, 1)


@pytest.mark.parametrize(("n", "failed", "bound"), [(500, 0, 0.00597), (1, 0, 0.95), (10, 10, 1.0), (20, 1, 0.2161)])
def test_the_bound_is_clopper_and_pearsons(n, failed, bound):
    logged = [{"promise": "R1", "control": False, "passed": i >= failed, "seconds": 0.0} for i in range(n)]
    assert summarize(logged)[0]["failure_rate_below"] == pytest.approx(bound, rel=1e-3)
