"""A process that is killed while it writes a checkpoint leaves a valid one: the last or the one before."""

import mmap
import os
import random
import signal
import stat
import struct
import time

import pytest
import torch
from tiny_runs import contents, fork, wait

from eggroll_rl import checkpoints, files, tensor_files
from eggroll_rl.checkpoints import newest_checkpoint, save_checkpoint
from eggroll_rl.errors import RunFolderError
from eggroll_rl.files import alone_in

KILLED = 137


def tensors_of(generation, n_entries=1000):
    return {"policy.w": torch.full((n_entries,), float(generation)), "optimizer.0.step": torch.tensor(generation)}


def save(folder, generation, keep=2, n_entries=1000):
    save_checkpoint(folder, tensors_of(generation, n_entries), {"generation": generation}, keep)


def generation_in(folder):
    """Return the newest valid checkpoint's generation, after a look at its tensors."""
    _, tensors, about, _ = newest_checkpoint(folder)
    generation = about["generation"]
    assert all((tensor == generation).all() for tensor in tensors.values())
    return generation


class DiesInTheMiddle:
    """A file whose ``write`` writes half and ends the process."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        self.file.__exit__(*error)

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        os._exit(KILLED)


def die(*args):
    os._exit(KILLED)


def then_die(function, only=lambda *args: True):
    def call(*args):
        function(*args)
        if only(*args):
            os._exit(KILLED)

    return call


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


# What takes the place of which function, for a process to end there in its next save.
DEATHS = {
    "after open": (files, "open", then_die(open)),
    "in the middle of the write": (files, "open", lambda *args: DiesInTheMiddle(open(*args))),  # noqa: SIM115
    "before fsync": (os, "fsync", die),
    "after fsync": (os, "fsync", then_die(os.fsync, lambda descriptor: not is_folder(descriptor))),
    "after replace": (os, "replace", then_die(os.replace)),
    "after the folder's fsync": (os, "fsync", then_die(os.fsync, is_folder)),
    "after reading back": (checkpoints, "_load", then_die(checkpoints._load)),
    "before the first removal": (checkpoints, "_remove", die),
    "after the first removal": (checkpoints, "_remove", then_die(checkpoints._remove)),
}
POINTS = list(DEATHS)


def crash(folder, point, generation, keep):
    def child():
        setattr(*DEATHS[point])
        save(folder, generation, keep)

    return wait(fork(child))


@pytest.mark.promise("R8")
def test_at_every_step(tmp_path, cells):
    for point in POINTS:
        for keep in (1, 2):
            for again in (False, True):  # the same generation, as a resume's first checkpoint is
                folder = tmp_path / f"{point}-{keep}-{again}"
                folder.mkdir()
                for generation in (1, 2, 3):
                    save(folder, generation, keep + 1)
                with cells.cell(f"{point}, the last {keep} kept{', same generation' if again else ''}"):
                    assert crash(folder, point, 3 if again else 4, keep) == KILLED
                    assert generation_in(folder) in ((3,) if again else (3, 4))
                    with alone_in(folder):
                        assert not list(folder.rglob("*.tmp"))
                    save(folder, 4, keep)
                    assert generation_in(folder) == 4 and len(contents(folder)) == keep


@pytest.mark.promise("R8")
def test_at_every_step_of_the_first_one(tmp_path, cells):
    for point in POINTS[:6]:  # the first fsync of a folder is the run folder's, with checkpoints/ in it
        folder = tmp_path / point
        folder.mkdir()
        with cells.cell(point):
            assert crash(folder, point, 0, 1) == KILLED
            try:
                assert generation_in(folder) == 0 and point == "after replace"
            except RunFolderError as error:
                assert "has no checkpoint" in str(error) and point != "after replace"


def write_in_place(path, content):
    with files.open(path, "wb") as file:
        file.write(content)


@pytest.mark.promise("R8")
def test_a_saver_that_writes_in_place_is_noticed(tmp_path, cells, monkeypatch):
    monkeypatch.setattr(tensor_files, "write_atomic", write_in_place)
    monkeypatch.setattr(files, "open", open, raising=False)
    save(tmp_path, 3, keep=1)
    with cells.control("in the middle of the write"):
        assert crash(tmp_path, "in the middle of the write", 3, 1) == KILLED
        try:
            assert generation_in(tmp_path) == 3
        except RunFolderError as error:
            raise AssertionError(error) from None


@pytest.mark.promise("R8")
def test_the_order_of_what_reaches_the_disk(tmp_path, cells, monkeypatch):
    """A name that reaches the disk before its content is a file of zeros after a power cut; no kill shows that."""
    save(tmp_path, 1, keep=1)
    calls = []

    def spy(place, name, label):
        real = getattr(place, name)

        def call(*args, **kwargs):
            calls.append(label(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, call)

    spy(os, "fsync", lambda descriptor: "sync folder" if is_folder(descriptor) else "sync file")
    spy(os, "replace", lambda *args: "replace")
    spy(checkpoints, "_load", lambda *args: "read back")
    spy(checkpoints, "_remove", lambda *args: "remove")
    save(tmp_path, 2, keep=1)
    with cells.cell("content, name, check, removal of the old one"):
        assert calls == ["sync file", "replace", "sync folder", "read back", "remove"]


@pytest.mark.promise("R8")
def test_rows_of_the_curve_reach_the_disk_before_their_checkpoint(tmp_path, cells, monkeypatch):
    from tiny_runs import tiny

    from eggroll_rl import training

    order = []
    monkeypatch.setattr(training, "sync", lambda path: order.append((path.name, path.read_text().count("\n") - 1)))

    def saved(folder, tensors, about, keep):
        order.append(("checkpoint", about["generation"]))

    monkeypatch.setattr(training, "save_checkpoint", saved)
    training.train(tiny(steps=150), tmp_path / "run", progress_bar=False)
    with cells.cell("row, then checkpoint, at every one"):
        assert order[0] == ("checkpoint", 0) and len(order) > 6
        for (name, rows), (what, generation) in zip(order[1::2], order[2::2], strict=True):
            assert (name, what) == ("progress.csv", "checkpoint") and rows == generation


@pytest.mark.promise("R8")
def test_a_checkpoint_that_does_not_read_back_removes_nothing(tmp_path, cells, monkeypatch):
    for generation in (1, 2):
        save(tmp_path, generation)

    def bad_disk(path, content):
        path.write_bytes(content[:-1] + b"?")

    monkeypatch.setattr(tensor_files, "write_atomic", bad_disk)
    with cells.cell("the older ones stay, the error names the file"):
        with pytest.raises(RunFolderError, match="generation-00000003.safetensors is damaged"):
            save(tmp_path, 3, keep=1)
        assert generation_in(tmp_path) == 2 and len(contents(tmp_path)) == 3


def save_for_ever(folder, done, n_entries):
    generation = generation_in(folder)
    with alone_in(folder):
        while True:
            generation += 1
            save(folder, generation, n_entries=n_entries)
            done[:8] = struct.pack("q", generation)


@pytest.mark.promise("R8")
@pytest.mark.reliability
def test_five_hundred_kills(tmp_path, cells):
    """At random times of a saver in a tight loop. Those in the middle of a write leave a temporary file, counted."""
    rng = random.Random(0)
    done = mmap.mmap(-1, 8)
    save(tmp_path, 0)
    in_the_middle = 0
    for kill in range(500):
        before = generation_in(tmp_path)
        done[:8] = struct.pack("q", before)
        pid = fork(save_for_ever, tmp_path, done, rng.choice((1_000, 30_000, 300_000)))
        deadline = time.monotonic() + 30
        while struct.unpack("q", done[:8])[0] == before and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        with cells.cell(f"kill {kill}"):
            assert wait(pid) == -signal.SIGKILL
            in_the_middle += bool(list(tmp_path.rglob("*.tmp")))
            (last,) = struct.unpack("q", done[:8])
            assert last > before and generation_in(tmp_path) in (last, last + 1)
            assert len([name for name in contents(tmp_path) if not name.endswith(".tmp")]) <= 3
    assert in_the_middle > 50, "the kills missed the writes"
