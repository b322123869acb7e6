"""Two processes in one run folder: the second is refused by name, and a dead one is no obstacle."""

import os
import signal
import time

import pytest
from tiny_runs import EPISODES_STEPS, fork, state_of, tiny, wait

from eggroll_rl import agents, files
from eggroll_rl.errors import RunFolderError
from eggroll_rl.files import alone_in
from eggroll_rl.training import load_run_config, train


def stay_in(folder, write):
    with alone_in(folder):
        os.write(write, b"in")
        time.sleep(60)


@pytest.fixture
def neighbour(tmp_path):
    """Return a folder in which another process is, and that process."""
    read, write = os.pipe()
    pid = fork(stay_in, tmp_path / "run", write)
    assert os.read(read, 2) == b"in"
    yield tmp_path / "run", pid
    for descriptor in (read, write):
        os.close(descriptor)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    os.waitpid(pid, 0)


@pytest.mark.promise("R29")
def test_the_second_one_is_told_who_is_there(neighbour, cells):
    folder, pid = neighbour
    refused = pytest.raises(RunFolderError, match=rf"another process \(pid {pid}\): wait for it")
    with cells.cell("alone_in"), refused, alone_in(folder):
        pass
    for how in ({"resume": True}, {"overwrite": True}, {}):
        with cells.cell(f"train {how}"), pytest.raises(RunFolderError) as caught:
            train(tiny(), folder, **how, progress_bar=False)
        # An empty folder: nothing to resume or to overwrite, so that only the third comes to the lock.
        assert how or f"pid {pid}" in str(caught.value)
    with cells.cell("a system that does not say"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError))
        with pytest.raises(RunFolderError, match="in use by another process: wait for it"), alone_in(folder):
            pass
    with cells.control("without the lock"), pytest.MonkeyPatch.context() as patch:
        import fcntl

        patch.setattr(fcntl, "flock", lambda *args: None)
        try:
            with alone_in(folder):
                raise AssertionError("two in one folder")
        except RunFolderError:
            pass


@pytest.mark.promise("R29")
def test_a_killed_process_keeps_nobody_out_and_its_leftovers_go(neighbour, cells):
    folder, pid = neighbour
    (folder / "checkpoints").mkdir()
    leftovers = [folder / ".progress.csv.4711.tmp", folder / "checkpoints" / ".generation-00000001.safetensors.1.tmp"]
    mine = [folder / "notes.tmp", folder / ".hidden", folder / ".a.b.tmp"]
    for path in (*leftovers, *mine):
        path.write_text("x")
    with cells.cell("alive: nothing is touched"), pytest.raises(RunFolderError), alone_in(folder):
        pass
    assert all(path.exists() for path in leftovers)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    with cells.cell("dead: its temporary files go, others stay"), alone_in(folder):
        assert not any(path.exists() for path in leftovers) and all(path.exists() for path in mine)


@pytest.mark.promise("R29")
def test_leftovers_behind_a_link_are_not_ours(tmp_path, cells):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".a.1.tmp").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(elsewhere)
    with cells.cell("a linked folder"), alone_in(tmp_path / "run"):
        assert (elsewhere / ".a.1.tmp").exists()


@pytest.mark.promise("R29")
def test_a_line_of_the_curve_that_was_cut_anywhere_is_left_out(tmp_path, cells):
    """By a kill in the middle of a write: a number without its last digits looks like one, but for the end of line."""
    path = tmp_path / "progress.csv"
    for generation in (1, 2, 3):
        agents.append_csv(path, {"generation": generation, "timesteps": 1000 * generation, "ep_rew_mean": 12.345})
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for n_bytes in range(last, len(whole)):
        path.write_bytes(whole[:n_bytes])
        with cells.cell(f"{n_bytes} of {len(whole)} bytes"):
            assert [row["generation"] for row in agents.read_csv(path)] == ["1", "2"]
    path.write_bytes(whole)
    with cells.cell("the whole line"):
        assert agents.read_csv(path)[-1] == {"generation": "3", "timesteps": "3000", "ep_rew_mean": "12.345"}


@pytest.mark.promise("R29")
def test_a_resumed_run_has_every_row_once(tmp_path, cells):
    """A kill after rows that no checkpoint has yet, the last of them torn."""
    train(tiny(), tmp_path / "whole", progress_bar=False)
    config = tiny(steps=200, checkpoint_every=3)
    train(config, tmp_path / "cut", progress_bar=False)
    n_rows = len(agents.read_csv(tmp_path / "cut" / "progress.csv"))
    for generation in range(n_rows + 1, n_rows + 3):
        agents.append_csv(tmp_path / "cut" / "progress.csv", {"generation": generation})
    with open(tmp_path / "cut" / "progress.csv", "a") as file:
        file.write(f"{n_rows + 3},9")
    config = load_run_config(tmp_path / "cut")
    config.total_timesteps = EPISODES_STEPS
    train(config, tmp_path / "cut", resume=True, progress_bar=False)
    with cells.cell("none lost, none doubled"):
        assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")
