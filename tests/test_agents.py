import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium import spaces

from eggroll_rl import agents, files
from eggroll_rl.errors import RunFolderError
from eggroll_rl.policies import LinearPolicy, MlpPolicy
from eggroll_rl.space_files import space_from_json, space_to_json

OBS = spaces.Box(np.array([-1.0, -np.inf]), np.array([1.0, np.inf]), dtype=np.float64)
ACTIONS = spaces.Box(-2, 3, (2,), np.float32)


def save(path, **kwargs):
    torch.manual_seed(0)
    policy = MlpPolicy(OBS, ACTIONS, net_arch=[5], zero_last_layer=False, **kwargs)
    agents.save_policy(path, policy, {"env_id": "X-v0", "timesteps": 3})
    return policy


def test_a_policy_is_built_again_without_its_env(tmp_path):
    policy = save(tmp_path / "policy.safetensors", activation_fn="relu", squash_output=True)
    state = torch.get_rng_state()
    loaded = agents.load_policy(tmp_path / "policy.safetensors")
    assert torch.equal(state, torch.get_rng_state())
    obs = np.random.default_rng(0).normal(size=(5, 2))
    assert np.array_equal(loaded.predict(obs)[0], policy.predict(obs)[0])
    assert loaded.observation_space == OBS and loaded.action_space == ACTIONS


@pytest.mark.parametrize(
    "space",
    [
        OBS,
        ACTIONS,
        spaces.Box(-np.inf, np.inf, (3, 2), np.float32),
        spaces.Box(0, 255, (4, 4), np.uint8),
        spaces.Discrete(4, start=-1),
        spaces.MultiDiscrete([2, 5]),
        spaces.MultiDiscrete([2, 5], dtype=np.int32, start=[1, -3]),
        spaces.MultiBinary(3),
        spaces.MultiBinary([2, 2]),
        spaces.Dict([("z", spaces.Discrete(3)), ("a", spaces.Box(-1, np.inf, (2,), np.float32))]),
    ],
)
def test_spaces_survive_json(space):
    back = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert back == space
    if isinstance(space, spaces.Dict):
        assert list(back) == list(space)


def test_linear_policies_too(tmp_path):
    agents.save_policy(tmp_path / "p.safetensors", LinearPolicy(OBS, ACTIONS), {})
    assert type(agents.load_policy(tmp_path / "p.safetensors")) is LinearPolicy


def foreign(path):
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)


def pickled(path):
    path.write_bytes(pickle.dumps({"a": 1}))


def truncated(path):
    save(path)
    path.write_bytes(path.read_bytes()[:-20])


def header_only(path):
    save(path)
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def other_kind(path):
    agents.save_tensors(path, "training", {"a": torch.zeros(1)}, {})


def newer(path):
    metadata = {"format": "eggroll-rl", "version": "99", "kind": "policy", "about": "{}"}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)


def wrong_shapes(path):
    policy = save(path)
    tensors, about = agents.load_tensors(path, "policy")
    tensors["network.0.weight"] = torch.zeros(9, 9)
    agents.save_tensors(path, "policy", tensors, about)
    assert policy is not None


def unknown_policy(path):
    save(path)
    tensors, about = agents.load_tensors(path, "policy")
    agents.save_tensors(path, "policy", tensors, {**about, "policy": "os.system"})


@pytest.mark.promise("R15")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "damaged or not a safetensors file"),
        (empty, "damaged"),
        (pickled, "damaged"),
        (truncated, "damaged"),
        (header_only, "damaged"),
        (foreign, "not a policy of eggroll-rl"),
        (other_kind, "not a policy of eggroll-rl"),
        (newer, "format version 99; this eggroll-rl reads versions 1 and 2"),
        (wrong_shapes, "cannot be built|can be built"),
        (unknown_policy, "can be built"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(make, message, tmp_path):
    path = tmp_path / "policy.safetensors"
    make(path)
    with pytest.raises(RunFolderError, match=message) as caught:
        agents.load_policy(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.promise("R13")
def test_loading_runs_no_code(tmp_path):
    path = tmp_path / "policy.safetensors"
    save(path)
    agents.load_policy(path)  # imports what loading needs at all
    watched, events = True, []
    wrong = {"pickle.find_class", "subprocess.Popen", "os.system", "socket.connect", "import"}
    sys.addaudithook(lambda event, args: events.append((event, args)) if watched and event in wrong else None)
    agents.load_policy(path)
    watched = False
    assert events == []


@pytest.mark.promise("R9")
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunFolderError, match="cannot write .*file: No space left on device"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_torn_last_line_of_the_curve_is_left_out(tmp_path):
    rows = [{"generation": i, "ep_rew_mean": i / 2} for i in range(3)]
    agents.write_csv(tmp_path / "progress.csv", rows)
    with open(tmp_path / "progress.csv", "a") as file:
        file.write("3")
    assert [row["generation"] for row in agents.read_csv(tmp_path / "progress.csv")] == ["0", "1", "2"]


def test_evaluations_have_sb3s_keys(tmp_path):
    rows = [{"timesteps": 10 * i, "returns": [1.0, 2.0], "lengths": [3, 4], "seconds": 0.5} for i in range(3)]
    agents.write_evaluations(tmp_path / "evaluations.npz", rows)
    with np.load(tmp_path / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 10, 20]
        assert file["results"].shape == file["ep_lengths"].shape == (3, 2)
    assert agents.read_evaluations(tmp_path / "evaluations.npz") == rows
    path = tmp_path / "evaluations.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(RunFolderError, match="evaluations.npz is damaged"):
        agents.read_evaluations(path)


@pytest.mark.promise("R29")
def test_a_folder_is_one_processs_own_until_that_ends(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import time
from pathlib import Path
from eggroll_rl.files import alone_in
with alone_in(Path({str(folder)!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        with pytest.raises(RunFolderError, match="run is in use by another process"), files.alone_in(folder):
            pass
        process.kill()
    for _ in range(2):
        with files.alone_in(folder):
            assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (2,), np.int64),
        spaces.Box(0, np.iinfo(np.uint64).max, (2,), np.uint64),
        spaces.Box(np.array([-3, 2], np.int8), np.array([5, 7], np.int8), dtype=np.int8),
        spaces.Box(-np.inf, np.array([1.5, np.inf], np.float32), (2,)),
        spaces.Discrete(4, start=-1, dtype=np.int32),
    ],
    ids=str,
)
def test_spaces_come_back_to_the_bit(space):
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space
