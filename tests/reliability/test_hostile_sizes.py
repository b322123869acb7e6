"""A file that claims to be huge is refused before anything of that size is allocated, and in no time.

Each case runs in a copy of this process that may have 500 MB more than it has, and ten seconds.
"""

import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny_runs import run_and_read, tiny

from eggroll_rl import agents
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.envs import read_toml
from eggroll_rl.errors import ConfigError, EggrollError, RunFolderError
from eggroll_rl.evaluation import load_agent
from eggroll_rl.files import parse_json
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.tensor_files import load_tensors, save_tensors
from eggroll_rl.training import load_run_config, train

MORE_MEMORY = 500 * 2**20
SECONDS = 10
REFUSED, PASSED, OTHER_ERROR = 10, 11, 12


def bounded(function, *args):
    """For a copy of this process: call a function with little memory and time, and say how it ended."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_MEMORY, now + MORE_MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        function(*args)
    except EggrollError as error:
        print(error)
        sys.exit(REFUSED if "\n" not in str(error) and len(str(error)) < 700 else OTHER_ERROR)
    except BaseException as error:
        print(type(error).__name__, str(error)[:200])
        sys.exit(OTHER_ERROR)
    sys.exit(PASSED)


def outcome(function, *args):
    status, said = run_and_read(bounded, function, *args, seconds=SECONDS + 5)
    return status, said


def raw_safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


OURS = {"format": "eggroll-rl", "version": "1", "kind": "policy", "about": "{}"}  # version 1: without a checksum
DEEP = 100_000


def sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


TENSOR_FILES = {
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}" * 1000,
    "a header larger than the file": struct.pack("<Q", 10**6) + b"{}",
    "a header of 9 MB": raw_safetensors(b'{"a":' + b" " * 9_000_000 + b"{}}"),
    "a header nested 100,000 deep": raw_safetensors(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a list nested 100,000 deep": raw_safetensors(b'{"__metadata__":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    "a tensor of 10**12 entries": raw_safetensors({"__metadata__": OURS, "w": entry([10**12], 4 * 10**12)}),
    "a tensor of 2**63 by 2**63": raw_safetensors({"__metadata__": OURS, "w": entry([2**63, 2**63], 4)}, b"1234"),
    "a tensor of -1": raw_safetensors({"__metadata__": OURS, "w": entry([-1], 4)}, b"1234"),
    "a tensor of no entries and 10**18": raw_safetensors({"__metadata__": OURS, "w": entry([0, 10**18], 0)}),
    "overlapping tensors": raw_safetensors({"__metadata__": OURS, "v": entry([1], 4), "w": entry([1], 4)}, b"1234"),
    "a hole": raw_safetensors(
        {"__metadata__": OURS, "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"
    ),
    "an unknown type of numbers": raw_safetensors({"__metadata__": OURS, "w": entry([1], 4, "F31")}, b"1234"),
    "60,000 tensors": raw_safetensors({"__metadata__": OURS, **{f"{i:x}": entry([0], 0) for i in range(60_000)}}),
    "a key twice": raw_safetensors(b'{"__metadata__":{},"w":{},"w":{}}'),
    "metadata that is no text": raw_safetensors({"__metadata__": {**OURS, "about": {}}}),
    "metadata that is a list": raw_safetensors({"__metadata__": []}),
    "a header that is a list": raw_safetensors(b"[]"),
    "a description of NaN": raw_safetensors({"__metadata__": {**OURS, "about": '{"a": NaN}'}}),
    "a description of -Infinity": raw_safetensors({"__metadata__": {**OURS, "about": '{"a": -Infinity}'}}),
    "a description of 1e999": raw_safetensors({"__metadata__": {**OURS, "about": '{"a": 1e999}'}}),
    "a description of 10**100,000": raw_safetensors({"__metadata__": {**OURS, "about": '{"a": 1%s}' % ("0" * 10**5)}}),
    "a description nested 100,000 deep": raw_safetensors({"__metadata__": {**OURS, "about": "[" * DEEP}}),
    "a description with a key twice": raw_safetensors({"__metadata__": {**OURS, "about": '{"a": 1, "a": 2}'}}),
}  # fmt: skip


@pytest.mark.promise("R14")
def test_tensor_files(tmp_path, cells):
    path = tmp_path / "policy.safetensors"
    for name, content in TENSOR_FILES.items():
        path.write_bytes(content)
        with cells.cell(name):
            status, said = outcome(agents.load_policy, path)
            assert status == REFUSED, said
    for size in (2**31 + 1, 2**40):
        sparse(path, size)
        with cells.cell(f"{size:,} bytes that take no place on the disk"):
            status, said = outcome(agents.load_policy, path)
            assert status == REFUSED and "more than" in said, said
    sparse(path, 2**31 - 10)
    with cells.cell("as many as are allowed, and no memory for them"):
        status, said = outcome(agents.load_policy, path)
        assert status == REFUSED and "does not fit into the memory" in said, said


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    train(tiny(eval_freq=100), folder, progress_bar=False)
    return folder


def described(folder, **changes):
    """Change a policy's description."""
    tensors, about = load_tensors(folder / "policy.safetensors", "policy")
    kwargs = changes.pop("policy_kwargs", {})
    about = {**about, **changes, "policy_kwargs": {**about["policy_kwargs"], **kwargs}}
    save_tensors(folder / "policy.safetensors", "policy", tensors, about)


def box(shape, **changes):
    return {"type": "Box", "shape": shape, "dtype": "float32", "low": 0.0, "high": 1.0, **changes}


PICTURE = box([3, 84, 84], dtype="uint8", low=0, high=255)
DESCRIPTIONS = {
    "a layer of 10**9": {"policy_kwargs": {"net_arch": [10**9]}},
    "a layer of 10**18": {"policy_kwargs": {"net_arch": [10**18]}},
    "a layer of 10**30": {"policy_kwargs": {"net_arch": [10**30]}},
    "a layer of -1": {"policy_kwargs": {"net_arch": [-1]}},
    "two layers of 30,000": {"policy_kwargs": {"net_arch": [30_000, 30_000]}},
    "10**6 layers": {"policy_kwargs": {"net_arch": [1] * 10**6}},
    "layers that are text": {"policy_kwargs": {"net_arch": "x" * 10**6}},
    "a memory of 10**9": {"policy": "RecurrentPolicy", "policy_kwargs": {"hidden_size": 10**9}},
    "a memory of 10**5, of an LSTM": {
        "policy": "RecurrentPolicy", "policy_kwargs": {"hidden_size": 10**5, "cell": "lstm"},
    },
    "10**9 features of a picture": {
        "policy": "CnnPolicy", "observation_space": PICTURE,
        "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 10**9}},
    },
    "10**9 features of a Dict": {
        "policy": "MultiInputPolicy", "observation_space": {"type": "Dict", "spaces": {"a": PICTURE}},
        "policy_kwargs": {
            "features_extractor_class": "CombinedExtractor", "features_extractor_kwargs": {"cnn_output_dim": 10**9},
        },
    },
    "arguments that are not known": {"policy_kwargs": {"more": [1] * 1000}},
    "a Box of 10**10": {"observation_space": box([10**10])},
    "a Box of 10**10 in two dimensions": {"observation_space": box([10**5, 10**5])},
    "a Box of 10**5 dimensions": {"observation_space": box([2] * 10**5)},
    "a Box of 10**300": {"observation_space": box([10**30] * 10)},
    "a Box of -1": {"observation_space": box([-1])},
    "a Box of 0": {"observation_space": box([0])},
    "a Box of 1.5": {"observation_space": box([1.5])},
    "a Box of true": {"observation_space": box([True])},
    "a Box of texts of a gigabyte": {"observation_space": box([3], dtype="S1000000000")},
    "a Box of objects": {"observation_space": box([3], dtype="object")},
    "a Box of a structure": {"observation_space": box([3], dtype=[["a", "f4", [10**9]]])},
    "bounds nested 200 deep": {"observation_space": box([3], low=json.loads("[" * 200 + "0" + "]" * 200))},
    "bounds of 10**6 entries": {"observation_space": box([3], low=[0.0] * 10**6)},
    "Discrete of 10**10": {"observation_space": {"type": "Discrete", "n": 10**10, "start": 0}},
    "actions, Discrete of 10**10": {"action_space": {"type": "Discrete", "n": 10**10, "start": 0}},
    "actions, Discrete of 4 million": {"action_space": {"type": "Discrete", "n": 4 * 10**6, "start": 0}},
    "MultiDiscrete of 10**10": {"action_space": {"type": "MultiDiscrete", "nvec": [10**10, 2], "start": [0, 0]}},
    "MultiDiscrete of 10**5 choices": {
        "action_space": {"type": "MultiDiscrete", "nvec": [10**5] * 10**5, "start": [0] * 10**5},
    },
    "MultiBinary of 10**10": {"action_space": {"type": "MultiBinary", "n": 10**10}},
    "MultiBinary of 10**5 by 10**5": {"action_space": {"type": "MultiBinary", "n": [10**5, 10**5]}},
    "a Dict of 10,000 large parts": {
        "observation_space": {"type": "Dict", "spaces": {str(i): box([10**6]) for i in range(10_000)}},
    },
    "Dicts nested 400 deep": {
        "observation_space": json.loads('{"type": "Dict", "spaces": {"a": ' * 400 + "{}" + "}}" * 400),
    },
}  # fmt: skip


@pytest.mark.promise("R14")
@pytest.mark.reliability
def test_descriptions_of_policies(good_run, tmp_path, cells):
    for name, changes in DESCRIPTIONS.items():
        folder = tmp_path / "run"
        shutil.copytree(good_run, folder)
        described(folder, **json.loads(json.dumps(changes)))
        with cells.cell(name):
            status, said = outcome(agents.load_policy, folder / "policy.safetensors")
            assert status == REFUSED, said
        shutil.rmtree(folder)


@pytest.mark.promise("R14")
@pytest.mark.reliability
def test_the_limits_are_felt_where_nothing_is_looked_at(tmp_path, cells):
    """What a loader without bounds does with the same files, under the same limits."""
    space = spaces.Box(0, 1, (3,))
    with cells.control("a layer of 10**9"):
        status, said = outcome(MlpPolicy, space, space, [10**9])
        assert status == REFUSED, said
    with cells.control("results of 10**12"):
        (tmp_path / "evaluations.npz").write_bytes(claiming((10**12,)))
        status, said = outcome(lambda: np.load(tmp_path / "evaluations.npz")["results"])
        assert status == REFUSED, said
    with cells.control("10**6 layers"):
        status, said = outcome(MlpPolicy, space, space, [1] * 10**6)
        assert status == REFUSED, said
    with cells.control("a device"):
        status, said = outcome(lambda: open("/dev/zero", "rb").read())  # noqa: SIM115
        assert status == REFUSED, said


def npy(shape, dtype="<f8", body=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + body


def archive(members, **kwargs):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **kwargs) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def claiming(shape, dtype="<f8", **kwargs):
    return archive(dict.fromkeys(("timesteps", "results", "ep_lengths", "seconds"), npy(shape, dtype)), **kwargs)


def bomb(claims_little):
    """Return half a gigabyte of zeros in half a megabyte, which may claim to be 100 bytes."""
    content = bytearray(archive({"timesteps": bytes(2**29)}, compression=zipfile.ZIP_DEFLATED))
    if claims_little:
        claims = [(2**29, 100), (zlib.crc32(bytes(2**29)), zlib.crc32(bytes(100)))]
        for true, false in claims:
            while (place := content.find(struct.pack("<I", true))) >= 0:
                content[place : place + 4] = struct.pack("<I", false)
    return bytes(content)


@pytest.mark.promise("R14")
@pytest.mark.reliability
@pytest.mark.parametrize("claims_little", [False, True])
def test_a_zip_that_unpacks_to_a_thousand_times_its_size(claims_little, tmp_path, cells):
    path = tmp_path / "evaluations.npz"
    path.write_bytes(bomb(claims_little))
    with cells.cell("half a gigabyte" + (" that says 100 bytes" if claims_little else "")):
        status, said = outcome(agents.read_evaluations, path)
        assert status == REFUSED and "is damaged" in said, said


EVALUATIONS = {
    "results of 10**12": lambda: claiming((10**12,)),
    "results of 2**62 by 2**62": lambda: claiming((2**62, 2**62)),
    "results of no entries and 10**12": lambda: claiming((0, 10**12)),
    "results of -1": lambda: claiming((-1,)),
    "texts of a gigabyte": lambda: claiming((1,), "<U250000000"),
    "objects": lambda: claiming((1,), "|O"),
    "a header of 60,000 bytes": lambda: archive({"timesteps": b"\x93NUMPY\x01\x00\x60\xea" + b"(" * 60_000}),
    "another format of arrays": lambda: archive({"timesteps": b"\x93NUMPY\x03\x00" + struct.pack("<I", 2**31)}),
    "names that are missing": lambda: archive({"timesteps": npy((0,))}),
    "one array shorter": lambda: archive(
        {"timesteps": npy((1,), body=bytes(8)), "results": npy((2, 1), body=bytes(16)),
         "ep_lengths": npy((2, 1), body=bytes(16)), "seconds": npy((1,), body=bytes(8))}
    ),
    "NaN": lambda: archive(
        dict.fromkeys(("timesteps", "results", "ep_lengths", "seconds"), npy((1,), body=struct.pack("<d", np.nan)))
    ),
    "no zip": lambda: b"PK\x03\x04" + bytes(1000),
}  # fmt: skip


@pytest.mark.promise("R14")
def test_evaluations(tmp_path, cells):
    path = tmp_path / "evaluations.npz"
    for name, make in EVALUATIONS.items():
        path.write_bytes(make())
        with cells.cell(name):
            status, said = outcome(agents.read_evaluations, path)
            assert status == REFUSED and "is damaged" in said, said
    sparse(path, 2**40)
    with cells.cell("2**40 bytes that take no place on the disk"):
        assert outcome(agents.read_evaluations, path)[0] == REFUSED


TOMLS = {
    "a megabyte": 'env_id = "%s"' % ("x" * 2**20),
    "an integer of 100,000 digits": "seed = 1" + "0" * 10**5,
    "a list nested 100,000 deep": "a = " + "[" * DEEP,
    "tables nested 50,000 deep": "a = " + "{a=" * 50_000,
    "a name of 100,000 parts": "a." * 10**5 + "a = 1",
    "a table of 100,000 parts": "[" + "a." * 10**5 + "a]",
    "lines of 2,000 parts": "\n".join("a." * 2_000 + f"a{i} = 1" for i in range(60)),
    "10,000 tables of many parts": "\n".join(f"[a.b.c.d.e.f{i}]" for i in range(10_000)),
    "no text": "\x00" * 1000,
}


@pytest.mark.promise("R14")
@pytest.mark.reliability
def test_settings(tmp_path, cells, good_run):
    path = tmp_path / "config.toml"
    for name, text in TOMLS.items():
        path.write_text(text)
        with cells.cell(name):
            status, said = outcome(lambda: load_run_config(path.parent))
            assert status == REFUSED, said
    path.write_bytes(b"env_id = '\xff\xfe'")
    with cells.cell("not UTF-8"):
        assert outcome(read_toml, path)[0] == REFUSED
    path.unlink()
    os.mkfifo(path)
    with cells.cell("a pipe that nobody writes to"):
        assert outcome(read_toml, path)[0] == REFUSED
    for name in ("config.toml", "policy.safetensors"):
        folder = tmp_path / f"zero-{name}"
        shutil.copytree(good_run, folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        with cells.cell(f"{name} of /dev/zero"):
            assert outcome(load_agent, folder)[0] == REFUSED


def resume(folder):
    train(load_run_config(folder), folder, resume=True, progress_bar=False)


@pytest.mark.promise("R14")
@pytest.mark.reliability
def test_a_strangers_run_is_not_resumed_with_a_larger_network(good_run, tmp_path, cells):
    for name, kwargs in {
        "a layer of 10**9": {"net_arch": [10**9]},
        "two layers of 30,000": {"net_arch": [30_000, 30_000]},
        "10,000 layers": {"net_arch": [1] * 10_000},
    }.items():
        folder = tmp_path / name
        shutil.copytree(good_run, folder)
        config = load_run_config(folder)
        config.eggroll["policy_kwargs"] |= kwargs
        (folder / "config.toml").write_text(config.to_toml())
        with cells.cell(name):
            status, said = outcome(
                lambda folder=folder: train(load_run_config(folder), folder, True, progress_bar=False)
            )
            assert status == REFUSED and "larger network" in said, said
    with cells.cell("a new run of a layer of 10**9 ends in one line"):
        config = tiny(eggroll={"policy_kwargs": {"net_arch": [10**9]}})
        status, said = outcome(train, config, tmp_path / "new")
        assert status == REFUSED and "memory" in said, said


@pytest.mark.promise("R14")
def test_curves_and_results(tmp_path, cells):
    path = tmp_path / "progress.csv"
    for name, text in {
        "a field of a megabyte": "a\n" + "x" * 10**6 + "\n", "a quote that never ends": 'a\n"' + "x\n" * 10**6,
        "no text": "\x00\xff" * 100,
    }.items():  # fmt: skip
        path.write_text(text, encoding="latin-1")
        with cells.cell(f"progress.csv: {name}"):
            assert outcome(agents.read_csv, path)[0] == REFUSED
    sparse(path, 2**40)
    with cells.cell("progress.csv of 2**40 bytes"):
        assert outcome(agents.read_csv, path)[0] == REFUSED
    path = tmp_path / "results.json"
    twice = [f'"{i % 99_999}":1' for i in range(100_000)]
    for name, text in {
        "nested": "[" * DEEP, "NaN": '{"a": NaN}', "a list": "[]",
        "an integer of 100,000 digits": f'{{"a": {"1" * 10**5}}}',
        "100,000 keys, one of them twice": f"{{{','.join(twice)}}}",
    }.items():  # fmt: skip
        path.write_text(text)
        with cells.cell(f"results.json: {name}"):
            assert outcome(agents.read_json, path)[0] == REFUSED
    sparse(path, 2**40)
    with cells.cell("results.json of 2**40 bytes"):
        assert outcome(agents.read_json, path)[0] == REFUSED


@pytest.mark.promise("R14")
@pytest.mark.reliability
def test_what_is_allowed_is_read(good_run, tmp_path, cells):
    """The other side of the bounds: nothing of ours is refused."""
    torch.manual_seed(0)
    big = spaces.Box(0, 255, (4, 1000, 1000), np.uint8)
    path = tmp_path / "policy.safetensors"
    with cells.cell("a picture of four million bytes"):
        agents.save_policy(path, MlpPolicy(big, spaces.Discrete(2), net_arch=[], normalize_obs=False), {})
        assert agents.load_policy(path).observation_space == big
    with cells.cell("forty layers"):
        space = spaces.Box(-1, 1, (2,))
        agents.save_policy(path, MlpPolicy(space, space, net_arch=[3] * 40), {})
        assert len(agents.load_policy(path).net_arch) == 40
    with cells.cell("a resume"):
        assert newest_checkpoint(good_run)[2]["generation"] > 0
        for error in (ConfigError, RunFolderError):
            assert issubclass(error, EggrollError)
    with cells.cell("integers of JSON as large as seeds get"):
        assert parse_json(str(2**64 - 1)) == 2**64 - 1
