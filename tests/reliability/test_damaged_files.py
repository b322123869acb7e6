"""A file that is cut off, changed by one bit, foreign, or of another version is refused by name, in one sentence."""

import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium import spaces
from stable_baselines3 import PPO

from eggroll_rl import agents, tensor_files
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.config import RunConfig
from eggroll_rl.errors import ConfigError, EggrollError, RunFolderError
from eggroll_rl.evaluation import load_agent
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.tensor_files import load_tensors, save_tensors

BOX = spaces.Box(-1, 1, (3,), np.float32)
AGENTS = Path(__file__).parents[2] / "agents"


@pytest.fixture
def policy(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "policy.safetensors"
    agents.save_policy(path, MlpPolicy(BOX, BOX, net_arch=[6], zero_last_layer=False), {"env_id": "X-v0", "seed": 3})
    return path


def refused(path, load):
    """Say whether a file is refused as it has to be: in one line that names it."""
    try:
        load(path)
    except RunFolderError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return True
    return False


def read_policy(path):
    return load_tensors(path, "policy")


@pytest.mark.promise("R15")
def test_cut_off_anywhere(policy, cells):
    content = policy.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    for n_bytes in [*range(header + 1), *sorted(rng.sample(range(header + 1, len(content)), 200))]:
        policy.write_bytes(content[:n_bytes])
        with cells.cell(f"{n_bytes} of {len(content)} bytes"):
            assert refused(policy, read_policy)
    policy.write_bytes(content + b"\0")
    with cells.cell("a byte too many"):
        assert refused(policy, read_policy)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.promise("R15")
@pytest.mark.parametrize("n_bits", [200, pytest.param(2000, marks=pytest.mark.reliability)])
def test_random_bits(n_bits, policy, cells):
    content = policy.read_bytes()
    for bit in sorted(random.Random(n_bits).sample(range(8 * len(content)), n_bits)):
        policy.write_bytes(flipped(content, bit))
        with cells.cell(f"bit {bit} of {8 * len(content)}"):
            assert refused(policy, read_policy)


@pytest.mark.promise("R15")
@pytest.mark.reliability
def test_every_bit(policy, cells):
    content = policy.read_bytes()
    for byte in range(len(content)):
        with cells.cell(f"byte {byte}"):
            for bit in range(8 * byte, 8 * byte + 8):
                policy.write_bytes(flipped(content, bit))
                assert refused(policy, read_policy), bit


@pytest.mark.promise("R15")
def test_without_the_checksum_bits_pass(policy, cells, monkeypatch):
    content = policy.read_bytes()
    monkeypatch.setattr(tensor_files, "check", lambda content, checksum: None)
    with cells.control("200 bits"):
        for bit in sorted(random.Random(1).sample(range(8 * len(content)), 200)):
            policy.write_bytes(flipped(content, bit))
            assert refused(policy, read_policy)


@pytest.mark.promise("R15")
def test_two_changes_that_cancel_out_are_seen(policy, cells):
    """A sum would not see them."""
    content = bytearray(policy.read_bytes())
    content[-1], content[-2] = content[-2] ^ 1, content[-1] ^ 1
    policy.write_bytes(bytes(content))
    with cells.cell("swapped bytes"):
        assert refused(policy, read_policy)


def sb3_zip(path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(path.with_suffix(".zip"))
    path.write_bytes(path.with_suffix(".zip").read_bytes())


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "{}")


def newer(path):
    metadata = {"format": "eggroll-rl", "version": "3", "kind": "policy", "about": "{}"}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata)


def resaved(path, change):
    """Write the file again with other tensors or another description, and a checksum that fits."""
    tensors, about = load_tensors(path, "policy")
    change(tensors, about)
    save_tensors(path, "policy", tensors, about)


FOREIGN = {
    "nothing": (lambda path: path.write_bytes(b""), "damaged or not a safetensors file"),
    "no file": (lambda path: path.unlink(), "does not exist"),
    "a folder": (lambda path: [path.unlink(), path.mkdir()], "not a regular file"),
    "text": (lambda path: path.write_text("weights = [1, 2, 3]\n" * 100), "damaged"),
    "JSON": (lambda path: path.write_text('{"format": "eggroll-rl"}'), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(5000)), "damaged"),
    "ones": (lambda path: path.write_bytes(b"\xff" * 5000), "damaged"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"w": 1})), "damaged"),
    "a file of torch": (lambda path: torch.save({"w": torch.zeros(3)}, path), "damaged"),
    "a zip": (zipped, "damaged"),
    "a model of SB3": (sb3_zip, "damaged"),
    "somebody else's safetensors": (
        lambda path: safetensors.torch.save_file({"w": torch.zeros(3)}, path), "not a policy of eggroll-rl",
    ),
    "another format's metadata": (
        lambda path: safetensors.torch.save_file({"w": torch.zeros(3)}, path, {"format": "pt"}),
        "not a policy of eggroll-rl",
    ),
    "another kind of ours": (
        lambda path: save_tensors(path, "training", {"a": torch.zeros(1)}, {}), "not a policy of eggroll-rl",
    ),
    "a newer version": (newer, "format version 3; this eggroll-rl reads versions 1 and 2"),
    "another observation": (
        lambda path: resaved(path, lambda tensors, about: about["observation_space"].update(shape=[4])), "can be built",
    ),
    "another action": (
        lambda path: resaved(path, lambda tensors, about: about.update(action_space={"type": "MultiBinary", "n": 9})),
        "can be built",
    ),
    "a tensor too few": (lambda path: resaved(path, lambda tensors, about: tensors.popitem()), "can be built"),
    "a tensor too many": (
        lambda path: resaved(path, lambda tensors, about: tensors.update(more=torch.zeros(1))), "can be built",
    ),
    "another type of numbers": (
        lambda path: resaved(
            path, lambda tensors, about: tensors.update({"network.0.weight": tensors["network.0.weight"].double()})
        ),
        "network.0.weight is of torch.float64, not torch.float32",
    ),
    "NaN": (
        lambda path: resaved(path, lambda tensors, about: tensors["network.0.weight"][0].fill_(torch.nan)),
        "'network.0.weight' has entries that are not finite",
    ),
    "infinity": (
        lambda path: resaved(path, lambda tensors, about: tensors["normalizer.mean"].fill_(-torch.inf)),
        "'normalizer.mean' has entries that are not finite",
    ),
    "no description": (lambda path: resaved(path, lambda tensors, about: about.clear()), "can be built"),
}  # fmt: skip


@pytest.mark.promise("R15")
def test_foreign_files(policy, cells, tmp_path):
    content = policy.read_bytes()
    for name, (make, message) in FOREIGN.items():
        path = tmp_path / name / "policy.safetensors"
        path.parent.mkdir()
        path.write_bytes(content)
        make(path)
        with cells.cell(name):
            with pytest.raises(RunFolderError, match=message) as caught:
                agents.load_policy(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.promise("R15")
def test_a_checkpoint_under_another_name(tmp_path, cells):
    from test_crashes import save

    save(tmp_path, 3)
    path = tmp_path / "checkpoints" / "generation-00000003.safetensors"
    path.rename(path.with_name("generation-00000009.safetensors"))
    with (
        cells.cell("generation 3 as 9"),
        pytest.raises(RunFolderError, match="generation-00000009.* holds generation 3"),
    ):
        newest_checkpoint(tmp_path)


@pytest.mark.promise("R15")
@pytest.mark.reliability
def test_all_agents_ever_published_load(cells):
    folders = sorted(path.parent for path in AGENTS.rglob("policy.safetensors"))
    assert len(folders) > 100
    for folder in folders:
        with cells.cell(folder.relative_to(AGENTS)):
            agents.load_policy(folder / "policy.safetensors")
            assert agents.read_evaluations(folder / "evaluations.npz")
            assert isinstance(agents.read_json(folder / "results.json"), dict)
            if (folder / "training.safetensors").exists():
                assert newest_checkpoint(folder)[2]["generation"] > 0


@pytest.mark.promise("R15")
def test_other_files_of_a_run_folder(tmp_path, cells):
    rows = [{"timesteps": 10 * i, "returns": [1.0, 2.0], "lengths": [3, 4], "seconds": 0.5} for i in range(3)]
    agents.write_evaluations(tmp_path / "evaluations.npz", rows)
    agents.write_json(tmp_path / "results.json", {"env_id": "X-v0", "mean_return": 1.5})
    rng = random.Random(2)
    readers = {"evaluations.npz": agents.read_evaluations, "results.json": agents.read_json}
    for name, read in readers.items():
        path = tmp_path / name
        content = path.read_bytes()
        for n_bytes in sorted(rng.sample(range(len(content) - 1), min(100, len(content) - 1))):
            path.write_bytes(content[:n_bytes])
            with cells.cell(f"{name}, {n_bytes} of {len(content)} bytes"):
                assert refused(path, read)
        for bit in sorted(rng.sample(range(8 * len(content)), 200)):
            path.write_bytes(flipped(content, bit))
            with cells.cell(f"{name}, bit {bit}: an error of ours, if it is seen"):
                refused(path, read)


@pytest.mark.promise("R15")
def test_a_config_that_is_damaged(tmp_path, cells):
    path = tmp_path / "config.toml"
    text = RunConfig("CartPole-v1", eggroll={"population_size": 8}).to_toml().encode()
    agents.save_policy(tmp_path / "policy.safetensors", MlpPolicy(BOX, BOX, net_arch=[6]), {})
    for bit in sorted(random.Random(3).sample(range(8 * len(text)), 200)):
        path.write_bytes(flipped(text, bit))
        with cells.cell(f"bit {bit}"):
            try:
                load_agent(tmp_path)
            except EggrollError as error:
                assert "\n" not in str(error)
            else:
                raise AssertionError("the spaces are others: nothing can be loaded")
    with cells.cell("not there"), pytest.raises(RunFolderError, match=r"no config\.toml"):
        path.unlink()
        load_agent(tmp_path)
    with cells.cell("a folder"), pytest.raises(ConfigError, match="not a regular file"):
        path.mkdir()
        load_agent(tmp_path)
