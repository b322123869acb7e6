"""A run that was cut at any generation and resumed ends as the one that was not, to the bit."""

import itertools
import shutil

import pytest
from tiny_runs import EPISODES, SEGMENTS, SEGMENTS_STEPS, state_of, tiny

from eggroll_rl import training
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.errors import EggrollError
from eggroll_rl.tensor_files import save_tensors
from eggroll_rl.training import load_run_config, train

GENERATIONS = 8


def run_with_copies(config, folder, monkeypatch):
    """Train, and return the folders as a kill would have left them after generations 1 to 7, and the whole run's."""
    copies = {}

    def end(self, before=training.RunRecorder.on_generation_end):
        going = before(self)
        generation = self._model.evolution_strategy.generation
        copies[generation] = folder / f"after{generation}"
        shutil.copytree(folder / "whole", copies[generation])
        return going

    with monkeypatch.context() as patch:
        patch.setattr(training.RunRecorder, "on_generation_end", end)
        train(config, folder / "whole", progress_bar=False)
    assert max(copies) >= GENERATIONS
    return {generation: copies[generation] for generation in range(1, GENERATIONS)}, folder / "whole"


def resumed(folder, n_workers=0):
    config = load_run_config(folder)
    config.n_workers = n_workers
    train(config, folder, resume=True, progress_bar=False)
    return folder


def with_schedule(settings, linear):
    name, value = ("target_kl", 0.1) if settings.get("fitness") == "segment" else ("learning_rate", 0.05)
    return {**settings, name: f"lin_{value}" if linear else value}


def variants():
    for normalized, linear in itertools.product((True, False), (True, False)):
        kwargs = {"net_arch": [4], "normalize_obs": normalized}
        for optimizer in ("SGD", "Adam"):
            settings = with_schedule({**EPISODES, "optimizer": optimizer, "policy_kwargs": kwargs}, linear)
            if optimizer == "SGD":
                settings["optimizer_kwargs"] = {"momentum": 0.9}
            name = f"episode-{optimizer}-{'normalized' if normalized else 'raw'}-{'linear' if linear else 'constant'}"
            yield pytest.param(tiny(settings), id=name)
        name = f"segment-{'normalized' if normalized else 'raw'}-{'linear' if linear else 'constant'}"
        yield pytest.param(tiny(with_schedule({**SEGMENTS, "policy_kwargs": kwargs}, linear), SEGMENTS_STEPS), id=name)


ALL = list(variants())
FAST = [variant for variant in ALL if variant.id == "episode-Adam-normalized-linear"]
MAIN = [*FAST, *(variant for variant in ALL if variant.id == "segment-normalized-linear")]


def check_every_split(config, folder, monkeypatch, cells, n_workers=0, splits=range(1, GENERATIONS)):
    copies, whole = run_with_copies(config, folder, monkeypatch)
    for split in splits:
        with cells.cell(f"cut after {split}, {n_workers} workers after it"):
            assert state_of(resumed(copies[split], n_workers)) == state_of(whole)


@pytest.mark.promise("R10")
@pytest.mark.parametrize("config", FAST)
def test_every_split_point(config, tmp_path, monkeypatch, cells):
    check_every_split(config, tmp_path, monkeypatch, cells)


@pytest.mark.promise("R10")
@pytest.mark.reliability
@pytest.mark.parametrize("config", [variant for variant in ALL if variant not in FAST])
def test_every_split_point_of_every_variant(config, tmp_path, monkeypatch, cells):
    check_every_split(config, tmp_path, monkeypatch, cells)


@pytest.mark.promise("R10")
@pytest.mark.reliability
@pytest.mark.parametrize("config", ALL)
def test_with_other_workers_after_the_resume(config, tmp_path, monkeypatch, cells):
    check_every_split(config, tmp_path, monkeypatch, cells, n_workers=2, splits=(3,))


@pytest.mark.promise("R10")
@pytest.mark.reliability
@pytest.mark.parametrize("config", MAIN)
def test_with_other_workers_after_the_resume_at_every_split_point(config, tmp_path, monkeypatch, cells):
    check_every_split(config, tmp_path, monkeypatch, cells, n_workers=2)


@pytest.mark.promise("R10")
def test_a_later_checkpoint_that_is_damaged_is_skipped_by_name(tmp_path, monkeypatch, cells, capsys):
    copies, whole = run_with_copies(tiny(), tmp_path, monkeypatch)
    newest = sorted((copies[5] / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    with cells.cell("goes on from the one before"):
        assert newest_checkpoint(copies[5])[2]["generation"] == 4
        assert state_of(resumed(copies[5])) == state_of(whole)
    with cells.cell("and says so"):
        assert f"skipped: {newest} is damaged" in capsys.readouterr().err


@pytest.mark.promise("R10")
def test_a_run_folder_of_version_0_1_is_resumed(tmp_path, monkeypatch, cells):
    copies, whole = run_with_copies(tiny(), tmp_path, monkeypatch)
    _, tensors, about, _ = newest_checkpoint(copies[4])
    shutil.rmtree(copies[4] / "checkpoints")
    monkeypatch.setattr("eggroll_rl.tensor_files._VERSIONS", ("1", "1"))
    save_tensors(copies[4] / "training.safetensors", "training", tensors, about)
    monkeypatch.undo()
    with cells.cell("from training.safetensors"):
        assert newest_checkpoint(copies[4])[0].name == "training.safetensors"
        assert state_of(resumed(copies[4])) == state_of(whole)
        assert not (copies[4] / "training.safetensors").exists()


def spoiled(folder, name, how):
    """Change or drop one tensor or number of the newest checkpoint, with a checksum that fits."""
    path, tensors, about, _ = newest_checkpoint(folder)
    for older in path.parent.iterdir():
        if older != path:
            older.unlink()
    group = tensors if name in tensors else about
    if how == "dropped":
        del group[name]
    elif isinstance(group[name], dict):
        group[name] = {key: value + 1 for key, value in group[name].items()}
    elif isinstance(group[name], str):
        group[name] = group[name].replace("seed = 0", "seed = 1")
    elif name in tensors and group[name].dtype.is_floating_point:
        # A hundredth is enough, if nothing forgets it.
        group[name] = (group[name].nan_to_num() + 0.01).contiguous()
    elif name in tensors and group[name].dtype.is_floating_point is False and group[name].dtype.itemsize == 1:
        group[name] = ~group[name]
    else:
        group[name] = group[name] + 1
    save_tensors(path, "training", tensors, about)


# On the clock, or told twice: env and seed are in the settings.
NOT_STATE = {"training_seconds", "env_id", "seed"}
PENDULUM = {**SEGMENTS, "max_episode_steps": 12, "segment_steps": 5}


@pytest.mark.promise("R10")
@pytest.mark.reliability
@pytest.mark.parametrize("how", ["changed", "dropped"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny({**EPISODES, "learning_rate": "lin_0.05"}), id="episode"),
        pytest.param(tiny(PENDULUM, 160, env_id="InvertedPendulum-v5"), id="segment"),
    ],
)
def test_every_field_counts(config, how, tmp_path, monkeypatch, cells):
    """A field that can be spoiled without a difference would be one that a resume loses unnoticed."""
    copies, whole = run_with_copies(config, tmp_path, monkeypatch)
    before = state_of(whole)
    _, tensors, about, _ = newest_checkpoint(copies[3])
    unused = NOT_STATE | {name for name, value in about.items() if value == {}}
    if config.eggroll.get("fitness") != "segment":
        unused.add("last_episodes")  # told again by every generation
    for name in [*tensors, *(name for name in about if name not in unused)]:
        folder = tmp_path / f"spoiled-{name}"
        shutil.copytree(copies[3], folder)
        spoiled(folder, name, how)
        with cells.control(f"{name} {how}"):
            try:
                after = state_of(resumed(folder))
            except EggrollError:
                raise AssertionError("refused") from None
            assert after == before
