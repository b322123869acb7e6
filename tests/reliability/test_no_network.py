"""Training on one machine opens nothing to the network."""

import socket

import psutil
import pytest
from tiny_runs import tiny

from eggroll_rl import training


def listening(process):
    """Return the sockets of a process and those that it started, that anybody could connect to."""
    found = []
    for one in [process, *process.children(recursive=True)]:
        sockets = one.net_connections(kind="inet")
        # UDP knows no listening: one that is bound gets what comes.
        found += [s for s in sockets if s.status == psutil.CONN_LISTEN or s.type == socket.SOCK_DGRAM]
    return found


def sockets_while_training(config, folder, monkeypatch):
    seen = []

    def end(self, before=training.RunRecorder.on_generation_end):
        seen.append((len(psutil.Process().children()), listening(psutil.Process())))
        return before(self)

    monkeypatch.setattr(training.RunRecorder, "on_generation_end", end)
    training.train(config, folder, progress_bar=False)
    return seen


@pytest.mark.promise("R28")
@pytest.mark.parametrize("n_workers", [0, pytest.param(2, marks=pytest.mark.reliability)])
def test_no_socket_listens_while_training(n_workers, tmp_path, cells, monkeypatch):
    seen = sockets_while_training(tiny(n_workers=n_workers), tmp_path / "run", monkeypatch)
    with cells.cell(f"{n_workers} workers"):
        assert len(seen) >= 8 and all(found == (n_workers, []) for found in seen)


@pytest.mark.promise("R28")
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_that_listens_is_noticed(kind, tmp_path, cells, monkeypatch):
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        with cells.control(kind.name):
            assert all(found == [] for _, found in sockets_while_training(tiny(), tmp_path / "run", monkeypatch))
