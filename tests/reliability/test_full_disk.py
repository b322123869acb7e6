"""A disk that is full, read-only or broken: the error names path and reason, old files and no others are there."""

import errno
import os
import resource
import sys

import numpy as np
import pytest
from test_crashes import generation_in, save
from tiny_runs import command_line, contents, fork, run_and_read, tiny, wait

from eggroll_rl import files, tensor_files
from eggroll_rl.errors import RunFolderError
from eggroll_rl.training import train


def refused_under(limit, folder):
    """For a copy of this process: try to save with files limited to so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(folder, 3, keep=1)
    except RunFolderError as error:
        expected = f"cannot write {folder / 'checkpoints' / 'generation-00000003.safetensors'}: File too large"
        sys.exit(10 if str(error) == expected else 11)


@pytest.mark.promise("R9")
def test_files_limited_to_every_size(tmp_path, cells):
    for generation in (1, 2):
        save(tmp_path, generation)
    before = contents(tmp_path)
    size = len(before["checkpoints/generation-00000002.safetensors"])
    for limit in np.linspace(0, size - 1, 20).astype(int).tolist():
        with cells.cell(f"{limit} of {size} bytes"):
            assert wait(fork(refused_under, limit, tmp_path)) == 10
            assert contents(tmp_path) == before
    with cells.cell(f"{size} of {size} bytes"):
        assert wait(fork(refused_under, size, tmp_path)) == 0
        assert generation_in(tmp_path) == 3


@pytest.mark.promise("R9")
def test_a_saver_that_writes_in_place_loses_the_old_file(tmp_path, cells, monkeypatch):
    save(tmp_path, 3, keep=1)
    before = contents(tmp_path)
    monkeypatch.setattr(tensor_files, "write_atomic", lambda path, content: path.write_bytes(content))
    with cells.control("half of the bytes"):
        run_and_read(refused_under, 2000, tmp_path)
        assert contents(tmp_path) == before


@pytest.mark.promise("R9")
def test_every_call_may_fail(tmp_path, cells, monkeypatch):
    for generation in (1, 2):
        save(tmp_path, generation)
    before = contents(tmp_path)
    for number in (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT):
        reason = os.strerror(number)
        for name, call in (("open", 1), ("write", 1), ("fsync", 1), ("replace", 1), ("fsync", 2)):
            with cells.cell(f"{reason}: {name}, call {call}"), monkeypatch.context() as patch:
                fail_at(patch, name, call, number)
                with pytest.raises(RunFolderError) as caught:
                    save(tmp_path, 3, keep=1)
                patch.undo()
                assert str(caught.value).startswith("cannot write ") and str(caught.value).endswith(f": {reason}")
                assert "generation-00000003.safetensors" in str(caught.value)
                after = contents(tmp_path)
                # The last call comes after the new file, whole, has its name.
                after.pop("checkpoints/generation-00000003.safetensors", None) if call == 2 else None
                assert after == before
                (tmp_path / "checkpoints" / "generation-00000003.safetensors").unlink(missing_ok=True)


def fail_at(patch, name, call, number):
    calls = []

    def fail(real):
        def failing(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return failing

    if name == "write":

        class File:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def write(self, content):
                self.file.write(content[: len(content) // 3])
                raise OSError(number, os.strerror(number))

        patch.setattr(files, "open", lambda *args: File(open(*args)), raising=False)  # noqa: SIM115
    elif name == "open":
        patch.setattr(files, "open", fail(open), raising=False)
    else:
        patch.setattr(os, name, fail(getattr(os, name)))


def without_permission(folder):
    """For a copy of this process: try to save as somebody who may read the folder and not write into it."""
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    from pathlib import Path

    try:
        save(Path("."), 3)
    except RunFolderError as error:
        sys.exit(10 if str(error).endswith("generation-00000003.safetensors: Permission denied") else 11)


@pytest.mark.promise("R9")
def test_a_folder_that_may_not_be_written(tmp_path, cells):
    save(tmp_path, 2)
    before = contents(tmp_path)
    os.chmod(tmp_path, 0o755)
    os.chmod(tmp_path / "checkpoints", 0o555)
    with cells.cell("mode 0555"):
        assert wait(fork(without_permission, tmp_path)) == 10
        assert contents(tmp_path) == before
    os.chmod(tmp_path / "checkpoints", 0o755)


def limited_training(limit, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command_line("train", folder.parent / "preset.toml", "--output", folder)


@pytest.mark.promise("R9")
@pytest.mark.parametrize("limit", [100, 3000, 4200])
def test_training_ends_with_one_line(limit, tmp_path, cells):
    """100 bytes are too few for config.toml, 3,000 for the first checkpoint, and 4,200 for the curve."""
    config = tiny(steps=10**9, env_id="CartPole-v1", eggroll={"policy_kwargs": {"net_arch": [4]}, "population_size": 4})
    (tmp_path / "preset.toml").write_text(config.to_toml())
    with cells.cell(f"{limit} bytes"):
        status, said = run_and_read(limited_training, limit, tmp_path / "run")
        lines = said.splitlines()
        assert status == 2 and "Traceback" not in said
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
        assert lines[-1].startswith(f"error: cannot write {tmp_path / 'run'}")
        assert lines[-1].endswith(": File too large")
        assert not list((tmp_path / "run").rglob("*.tmp"))
        if limit == 4200:
            assert generation_in_run(tmp_path / "run") > 10


def generation_in_run(folder):
    from eggroll_rl.checkpoints import newest_checkpoint

    return newest_checkpoint(folder)[2]["generation"]


@pytest.mark.promise("R9")
def test_an_error_of_the_env_is_told_even_if_nothing_can_be_saved(tmp_path, cells, monkeypatch, capsys):
    """Two things went wrong: the first is the reason, the second is said as well."""
    import toy
    from gymnasium.envs.registration import register, registry

    from eggroll_rl.errors import EpisodeError

    if "Fault-v0" not in registry:
        register("Fault-v0", toy.FaultEnv, max_episode_steps=50, kwargs={"fault": "none"})
    config = tiny(env_id="Fault-v0", env_kwargs={"fault": "raise"})
    made = files.os.replace
    calls = []

    def replace(*args):
        calls.append(args)
        if len(calls) > 2:  # config.toml and the first checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return made(*args)

    monkeypatch.setattr(files.os, "replace", replace)
    with cells.cell("both"):
        with pytest.raises(EpisodeError, match="broken step"):
            train(config, tmp_path / "run", progress_bar=False)
        assert "nothing was saved of the last generations: cannot write" in capsys.readouterr().err
