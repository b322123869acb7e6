import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
import toy
from gymnasium.envs.registration import register, registry

from eggroll_rl import agents, training
from eggroll_rl.agents import load_policy, load_tensors, read_csv, save_tensors
from eggroll_rl.checkpoints import list_checkpoints, newest_checkpoint
from eggroll_rl.config import RunConfig
from eggroll_rl.errors import ConfigError, EpisodeError, RunFolderError
from eggroll_rl.files import alone_in
from eggroll_rl.training import Interrupted, load_run_config, train

if "Fault-v0" not in registry:
    register("Fault-v0", toy.FaultEnv, max_episode_steps=50, kwargs={"fault": "none"})


def config(**changes):
    eggroll = {
        "population_size": 8,
        "slice_size": 4,
        "policy_kwargs": {"net_arch": [4]},
        "learning_rate": "lin_0.05",
        "sigma": "lin_0.1",
    }
    values = {"total_timesteps": 2000, "n_workers": 0, "eval_freq": 700, "eval_episodes": 2, "checkpoint_every": 2}
    return RunConfig(**{"env_id": "CartPole-v1", "eggroll": eggroll, **values, **changes})


def tensors(folder, name="training"):
    return (
        newest_checkpoint(folder)[1]
        if name == "training"
        else load_tensors(folder / f"{name}.safetensors", "policy")[0]
    )


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def curve(folder):
    rows = read_csv(folder / "progress.csv")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_run(a, b):
    for name in ("training", "policy", "best"):
        x, y = tensors(a, name), tensors(b, name)
        assert x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x), name
    assert [{k: float(v) for k, v in row.items()} for row in curve(a)] == [
        {k: float(v) for k, v in row.items()} for row in curve(b)
    ]
    with np.load(a / "evaluations.npz") as x, np.load(b / "evaluations.npz") as y:
        assert np.array_equal(x["results"], y["results"]) and np.array_equal(x["timesteps"], y["timesteps"])
    results = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    assert results[0]["evaluation"] == results[1]["evaluation"] and results[0]["best"] == results[1]["best"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(config(), folder, progress_bar=False)
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.toml", "policy.safetensors", "best.safetensors", "checkpoints", "progress.csv", "evaluations.npz",
        "results.json",
    }  # fmt: skip
    generations = len(curve(finished))
    names = [f"generation-{g:08d}.safetensors" for g in ((generations - 1) // 2 * 2, generations)]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == names
    results = json.loads((finished / "results.json").read_text())
    rows = curve(finished)
    assert results["timesteps"] == int(rows[-1]["timesteps"]) >= 2000
    assert results["generations"] == len(rows)
    assert results["env_steps_per_second"] == pytest.approx(results["timesteps"] / results["wall_seconds"], rel=0.01)
    assert len(results["evaluation"]["returns"]) == 20
    selection = set(range(training.SELECTION_SEED, training.SELECTION_SEED + 2))
    assert not selection & set(results["best"]["seeds"]) and results["best"]["timesteps"] > 0
    assert {"torch", "gymnasium", "mujoco", "python"} <= set(results["versions"])
    assert results["wall_seconds"] == pytest.approx(float(read_csv(finished / "progress.csv")[-1]["seconds"]), abs=0.01)
    # The configuration is written out, defaults too.
    eggroll = load_run_config(finished).eggroll
    assert eggroll["sigma"] == "lin_0.1" and eggroll["fitness_shaping"] == "centered_rank"
    assert eggroll["optimizer"] == "Adam" and eggroll["policy_kwargs"]["activation_fn"] == "Tanh"


def test_the_saved_policy_is_the_mean_that_was_trained(finished):
    checkpoint, policy = tensors(finished), load_policy(finished / "policy.safetensors")
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, checkpoint[f"policy.{name}"])


def test_the_same_configuration_gives_the_same_run(finished, tmp_path):
    train(config(n_workers=2), tmp_path / "again", progress_bar=False)
    assert_same_run(finished, tmp_path / "again")


@pytest.mark.promise("R10")
def test_a_resumed_run_is_the_uninterrupted_one_at_every_generation(finished, tmp_path, monkeypatch):
    generations = len(curve(finished))
    assert generations >= 6
    for stop in range(1, generations):
        folder = tmp_path / f"stop{stop}"
        before = training.RunRecorder.on_generation_end

        def end(self, stop=stop, before=before):
            going = before(self)
            if self._model.evolution_strategy.generation == stop:
                self._pending = signal.SIGTERM
                self._stop_if_asked()
            return going

        with monkeypatch.context() as patch:
            patch.setattr(training.RunRecorder, "on_generation_end", end)
            with pytest.raises(Interrupted):
                train(config(), folder, progress_bar=False)
        assert not (folder / "results.json").exists()
        train(load_run_config(folder), folder, resume=True, progress_bar=False)
        assert_same_run(finished, folder)


@pytest.mark.promise("R10")
def test_a_run_that_dies_resumes_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    """Without a word at the end, as with SIGKILL: the curves are cut back to the checkpoint."""
    folder = tmp_path / "run"

    def end(self, before=training.RunRecorder.on_generation_end):
        if self._model.evolution_strategy.generation == 5:
            monkeypatch.setattr(training.RunRecorder, "checkpoint", lambda self: None)
            raise KeyboardInterrupt
        return before(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.RunRecorder, "on_generation_end", end)
        with pytest.raises(KeyboardInterrupt):
            train(config(), folder, progress_bar=False)
    monkeypatch.undo()
    assert newest_checkpoint(folder)[2]["generation"] == 4
    train(load_run_config(folder), folder, resume=True, progress_bar=False)
    assert_same_run(finished, folder)


def test_overwriting_a_run_removes_its_files_and_nothing_else(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "video.mp4").write_text("mine")
    train(config(eval_freq=0), tmp_path / "copy", overwrite=True, progress_bar=False)
    assert (tmp_path / "copy" / "video.mp4").exists()
    assert len(agents.read_evaluations(tmp_path / "copy" / "evaluations.npz")) == 1


@pytest.mark.promise("R10")
def test_a_run_can_be_resumed_before_its_first_generation(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.RunRecorder, "_on_rollout_start", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config(), folder, progress_bar=False)
    train(load_run_config(folder), folder, resume=True, progress_bar=False)
    assert_same_run(finished, folder)


def test_infinity_in_the_settings_of_an_env_is_saved(tmp_path):
    eggroll = {**config().eggroll, "max_episode_steps": 5}
    settings = {"env_id": "Hopper-v5", "env_kwargs": {"healthy_z_range": [0.7, float("inf")]}, "eggroll": eggroll}
    train(config(**settings, total_timesteps=50), tmp_path / "run", progress_bar=False)
    train(load_run_config(tmp_path / "run"), tmp_path / "run", resume=True, progress_bar=False)


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    train(load_run_config(tmp_path / "copy"), tmp_path / "copy", resume=True, progress_bar=False)
    assert_same_run(finished, tmp_path / "copy")


def test_an_error_in_the_env_keeps_what_was_reached(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        EpisodeError, match="generation 0, member 0, episode 0, step 3, seed .*reward is not finite: nan"
    ):
        train(config(env_id="Fault-v0", env_kwargs={"fault": "nan_reward"}), folder, progress_bar=False)
    _, saved, about, _ = newest_checkpoint(folder)
    assert about["generation"] == 0 and all(tensor.isfinite().all() for tensor in saved.values())


def test_an_existing_folder_is_refused_unless_the_user_says_what_to_do(finished, tmp_path):
    marker = tmp_path / "mine"
    marker.mkdir()
    (marker / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match="--resume.*--overwrite"):
        train(config(), finished)
    (marker / "config.toml").write_text('title = "of something else"')
    with pytest.raises(RunFolderError, match="not a run folder: --overwrite leaves it alone"):
        train(config(), marker, overwrite=True)
    assert "something else" in (marker / "config.toml").read_text()
    assert (marker / "thesis.tex").read_text() == "precious"
    with pytest.raises(RunFolderError, match="no checkpoint"):
        train(config(), marker, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        train(config(), tmp_path / "file")
    with pytest.raises(RunFolderError, match="cannot write"):
        train(config(), Path("/proc/none/run"))


@pytest.mark.promise("R29")
def test_a_run_in_progress_is_left_alone(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = contents(tmp_path / "run")
    with alone_in(tmp_path / "run"):
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(RunFolderError, match="in use by another process"):
                train(config(), tmp_path / "run", **how, progress_bar=False)
    assert contents(tmp_path / "run") == before


def test_a_checkpoint_of_another_network_does_not_fit(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    changed = config(eggroll={**config().eggroll, "policy_kwargs": {"net_arch": [5]}})
    with pytest.raises(RunFolderError, match="does not fit"):
        train(changed, tmp_path / "copy", resume=True)


def test_a_run_of_an_older_version_with_fewer_settings_is_resumed(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path, saved, about, _ = newest_checkpoint(folder)
    new = ("fitness", "segment_steps", "gamma", "gae_lambda")

    def older(text):
        table = tomllib.loads(text)
        table["eggroll"] = {name: value for name, value in table["eggroll"].items() if name not in new}
        return tomli_w.dumps(table)

    assert all(name in about["settings"] for name in new)
    about["settings"] = older(about["settings"])
    save_tensors(path, "training", saved, about)
    (folder / "config.toml").write_text(older((folder / "config.toml").read_text()))
    train(load_run_config(folder), folder, resume=True, progress_bar=False)


def test_a_changed_configuration_is_not_resumed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    changed = load_run_config(finished)
    changed.seed = 5
    with pytest.raises(RunFolderError, match="does not fit.*seed was 0"):
        train(changed, tmp_path / "copy", resume=True)


def test_a_run_can_be_made_longer(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    longer = load_run_config(finished)
    longer.total_timesteps = 3000
    results = train(longer, tmp_path / "copy", resume=True, progress_bar=False)
    assert results["timesteps"] >= 3000 and load_run_config(tmp_path / "copy").total_timesteps == 3000


def test_evaluation_needs_a_limit_that_is_not_only_for_training(tmp_path):
    eggroll = {**config().eggroll, "max_episode_steps": 5}
    with pytest.raises(ConfigError, match="CliffWalking-v1 shows no time limit"):
        train(config(env_id="CliffWalking-v1", eggroll=eggroll), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_env_whose_reset_raises_is_named(tmp_path):
    with pytest.raises(EpisodeError, match=r"reset\(\) failed.*broken reset"):
        train(config(env_id="Fault-v0", env_kwargs={"fault": "reset"}), tmp_path / "run")


def test_training_files_are_refused_when_damaged(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    for path in list_checkpoints(tmp_path / "copy"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunFolderError, match="no valid checkpoint: .*damaged.*; .*damaged"):
        train(config(), tmp_path / "copy", resume=True)


def test_best_is_what_evaluation_liked_best(finished):
    evaluations = agents.read_evaluations(finished / "evaluations.npz")
    means = [np.mean(e["returns"]) for e in evaluations]
    _, about = load_tensors(finished / "best.safetensors", "policy")
    assert about["timesteps"] == evaluations[int(np.argmax(means))]["timesteps"]


@pytest.mark.promise("R6")
@pytest.mark.parametrize(
    ("signum", "status"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.reliability), (signal.SIGTERM, 143)],
)
def test_a_signal_saves_says_how_to_go_on_and_leaves_no_process(signum, status, tmp_path):
    import psutil

    command = [sys.executable, "-m", "eggroll_rl", "train", "CartPole-v1", "--output", str(tmp_path / "run")]
    command += ["--n-workers", "2", "--total-timesteps", "100000000", "--eval-freq", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "progress.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert f"eggroll-rl train CartPole-v1 --output {tmp_path / 'run'} --resume" in errors
    assert not psutil.wait_procs(workers, timeout=5)[1]
    _, saved, about, _ = newest_checkpoint(tmp_path / "run")
    assert about["generation"] >= 1 and saved


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep, tmp_path):
    train(config(keep_checkpoints=keep, checkpoint_every=1, total_timesteps=800), tmp_path / "run", progress_bar=False)
    generations = len(curve(tmp_path / "run"))
    kept = [int(path.stem.removeprefix("generation-")) for path in list_checkpoints(tmp_path / "run")]
    assert generations > 3 and kept == list(range(generations, generations - keep, -1))


def test_an_error_after_an_update_saves_that_generation_under_its_own_number(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train(config(), whole, progress_bar=False)

    def full(self, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("eggroll_rl.eggroll.EGGROLL.dump_logs", full)
        with pytest.raises(OSError, match="No space"):
            train(config(), tmp_path / "run", progress_bar=False, tensorboard_log=tmp_path / "log")
    train(config(), tmp_path / "run", resume=True, progress_bar=False)
    assert (tmp_path / "run" / "policy.safetensors").exists()
    same = [load_tensors(folder / "policy.safetensors", "policy")[0] for folder in (whole, tmp_path / "run")]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])


def test_settings_that_are_one_long_line_in_toml_are_read_back(tmp_path):
    text = "\n".join(["<body name='x'/>"] * 1000)
    written = RunConfig("Target-v0", env_kwargs={"text": text}).to_toml()
    assert max(map(len, written.split("\n"))) > 5000
    (tmp_path / "config.toml").write_text(written)
    assert load_run_config(tmp_path).env_kwargs["text"] == text
