"""What a stranger wrote executes nothing, whatever it holds and whoever reads it.

Every payload makes a file, the *sentinel*, if it is executed. Each is tried in every file of a run folder, with every
reader. The controls show that the same payload does fire where it is unpickled, or where the user agreed.
"""

import ast
import contextlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import tomli_w
import torch
from stable_baselines3 import PPO
from tiny_runs import run_and_read, tiny

import eggroll_rl
from eggroll_rl import agents
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.compare_report import Run
from eggroll_rl.envs import load_preset
from eggroll_rl.errors import ConsentError, EggrollError
from eggroll_rl.evaluation import load_agent
from eggroll_rl.tensor_files import load_tensors, save_tensors
from eggroll_rl.training import load_run_config, train

PACKAGE = Path(eggroll_rl.__file__).parent


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (Path(self.sentinel),)


def _touch(sentinel):
    return lambda: Path(sentinel).touch()


class CallsWhenUnpickled:
    """As :class:`Evil`, by a function that travels by its code."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, ()


def torch_zip(sentinel):
    stream = io.BytesIO()
    torch.save({"w": Evil(sentinel)}, stream)
    return stream.getvalue()


def object_array(sentinel):
    stream = io.BytesIO()
    array = np.array([Evil(sentinel)], dtype=object)
    np.savez(stream, timesteps=array, results=array, ep_lengths=array, seconds=array)
    return stream.getvalue()


def sb3_zip(sentinel):
    """Return a model that trains and acts, with a payload in what SB3 serializes."""
    stream = io.BytesIO()
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(stream)
    stream.seek(0)
    out = io.BytesIO()
    with zipfile.ZipFile(stream) as before, zipfile.ZipFile(out, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name == "data":
                import base64

                data = json.loads(content)
                data["more"] = {":type:": "x", ":serialized:": base64.b64encode(pickle.dumps(Evil(sentinel))).decode()}
                content = json.dumps(data).encode()
            after.writestr(name, content)
    return out.getvalue()


PAYLOADS = {
    "pickle": lambda sentinel: pickle.dumps(Evil(sentinel)),
    "pickle, protocol 0": lambda sentinel: pickle.dumps(Evil(sentinel), 0),
    "cloudpickle": lambda sentinel: cloudpickle.dumps(CallsWhenUnpickled(_touch(sentinel))),
    "torch.save": torch_zip,
    "SB3's zip": sb3_zip,
    "array of objects": object_array,
    "YAML": lambda sentinel: (
        f'!!python/object/apply:pathlib.Path.touch\n- !!python/object/apply:pathlib.Path ["{sentinel}"]'.encode()
    ),
    "JSON of a class": lambda sentinel: json.dumps(
        {"__class__": "pathlib.Path", "py/object": "pathlib.Path", "py/reduce": ["touch", str(sentinel)]}
    ).encode(),
    "Python": lambda sentinel: f"import pathlib; pathlib.Path({str(sentinel)!r}).touch()".encode(),
    "template": lambda sentinel: f"env_id = \"{{{{ open('{sentinel}', 'w') }}}}\"".encode(),
}  # fmt: skip


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "env" / "run"
    train(tiny(eval_freq=100), folder, progress_bar=False)
    return folder


def readers(folder):
    """Return every way in which a run folder is read."""

    def resume(folder):
        train(load_run_config(folder), folder, resume=True, progress_bar=False)

    return {
        "load_agent": load_agent,
        "load_agent, best": lambda folder: load_agent(folder, "best"),
        "load_policy": lambda folder: agents.load_policy(folder / "policy.safetensors"),
        "load_run_config": load_run_config,
        "load_preset": lambda folder: load_preset(str(folder / "config.toml")),
        "newest_checkpoint": newest_checkpoint,
        "resume": resume,
        "read_evaluations": lambda folder: agents.read_evaluations(folder / "evaluations.npz"),
        "read_csv": lambda folder: agents.read_csv(folder / "progress.csv"),
        "read_json": lambda folder: agents.read_json(folder / "results.json"),
        "list_runs": lambda folder: agents.list_runs(folder.parent.parent),
        "a comparison's run": Run.read,
    }


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def read_all(folder, sentinel):
    """Let every reader try; errors of ours are an answer, any other is not."""
    for name, read in readers(folder).items():
        copy = folder.parent / "copy"
        shutil.copytree(folder, copy, symlinks=True)
        try:
            read(copy)
        except EggrollError as error:
            assert "\n" not in str(error), name
        finally:
            shutil.rmtree(copy)
        assert not sentinel.exists(), name


@pytest.mark.promise("R13")
@pytest.mark.parametrize(
    "payload",
    [name if name == "pickle" else pytest.param(name, marks=pytest.mark.reliability) for name in PAYLOADS],
)
def test_a_payload_in_any_file(payload, good_run, tmp_path, cells):
    sentinel = tmp_path / "sentinel"
    content = PAYLOADS[payload](sentinel)
    for victim in files_of(good_run):
        name = victim.relative_to(good_run)
        folder = tmp_path / "env" / "run"
        shutil.copytree(good_run, folder)
        (folder / name).write_bytes(content)
        with cells.cell(f"{payload} as {name}"):
            read_all(folder, sentinel)
        shutil.rmtree(folder)


@pytest.mark.promise("R13")
def test_the_payloads_do_fire_where_they_are_unpickled(tmp_path, cells):
    def load_torch(content):
        torch.load(io.BytesIO(content), weights_only=False)

    def load_arrays(content):
        with np.load(io.BytesIO(content), allow_pickle=True) as file:
            file["results"]

    def load_sb3(content):
        (tmp_path / "model.zip").write_bytes(content)
        load_agent(tmp_path / "model.zip", env_id="CartPole-v1", algo="ppo", trust_pickle=True)

    fire = {
        "pickle": pickle.loads, "pickle, protocol 0": pickle.loads, "cloudpickle": pickle.loads,
        "torch.save": load_torch, "array of objects": load_arrays, "SB3's zip": load_sb3,
        "Python": lambda content: exec(content),
    }  # fmt: skip
    for payload, load in fire.items():
        sentinel = tmp_path / payload
        content = PAYLOADS[payload](sentinel)
        with cells.control(payload):
            load(content)
            assert not sentinel.exists()


@pytest.mark.promise("R13")
def test_an_sb3_model_asks_first(good_run, tmp_path, cells):
    """Alone, in a run folder, and as statistics beside a model."""
    sentinel = tmp_path / "sentinel"
    (tmp_path / "model.zip").write_bytes(PAYLOADS["SB3's zip"](sentinel))
    (tmp_path / "vecnormalize.pkl").write_bytes(PAYLOADS["pickle"](sentinel))
    folder = tmp_path / "run"
    shutil.copytree(good_run, folder)
    for name in ("model.zip", "vecnormalize.pkl"):
        shutil.copy(tmp_path / name, folder / name)
    for path, given in ((tmp_path / "model.zip", {"env_id": "CartPole-v1"}), (folder, {})):
        for more in ({}, {"vec_normalize": tmp_path / "vecnormalize.pkl"}):
            with cells.cell(f"{path.name} {list(more)}"):
                with pytest.raises(ConsentError, match="unpickles it and its statistics, which can run any code"):
                    load_agent(path, algo="ppo", **given, **more)
                assert not sentinel.exists()


@pytest.fixture
def evil_module(tmp_path, monkeypatch):
    """Make a module whose import makes the sentinel, with an env, a wrapper, a policy and more to tempt a loader."""
    (tmp_path / "path").mkdir()
    sentinel = tmp_path / "sentinel"
    (tmp_path / "path" / "evil_module.py").write_text(
        f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\n"
        "import gymnasium\nclass Wrapper(gymnasium.ObservationWrapper): ...\nclass Policy: ...\n"
        "gymnasium.register('Evil-v0', Policy)\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield sentinel
    sys.modules.pop("evil_module", None)


def about_policy(**changes):
    def change(folder):
        tensors, about = load_tensors(folder / "policy.safetensors", "policy")
        kwargs = {**about["policy_kwargs"], **changes.pop("policy_kwargs", {})}
        save_tensors(folder / "policy.safetensors", "policy", tensors, {**about, **changes, "policy_kwargs": kwargs})

    return change


def in_config(**changes):
    def change(folder):
        path = folder / "config.toml"
        table = tomllib.loads(path.read_text())
        table["eggroll"] |= changes.pop("eggroll", {})
        table["eggroll"]["policy_kwargs"] |= changes.pop("policy_kwargs", {})
        path.write_text(tomli_w.dumps({**table, **changes}))

    return change


def tensor_named(name):
    def change(folder):
        path, tensors, about, _ = newest_checkpoint(folder)
        save_tensors(path, "training", {**tensors, name: torch.zeros(2)}, about)
        tensors, about = load_tensors(folder / "policy.safetensors", "policy")
        save_tensors(folder / "policy.safetensors", "policy", {**tensors, name: torch.zeros(2)}, about)

    return change


DOTTED = "evil_module.Policy"
NAMES = {
    "policy, dotted": about_policy(policy=DOTTED),
    "policy, os.system": about_policy(policy="os.system"),
    "policy, private": about_policy(policy="__class__"),
    "activation_fn, dotted": about_policy(policy_kwargs={"activation_fn": DOTTED}),
    "activation_fn, of torch": about_policy(policy_kwargs={"activation_fn": "Module"}),
    "features_extractor_class, dotted": about_policy(policy_kwargs={"features_extractor_class": DOTTED}),
    "features_extractor_class, with a colon": about_policy(
        policy_kwargs={"features_extractor_class": "evil_module:Policy"}
    ),
    "type of numbers": about_policy(observation_space={"type": "Box", "shape": [3], "dtype": "O", "low": 0, "high": 1}),
    "space, dotted": about_policy(observation_space={"type": DOTTED}),
    "env_id": in_config(env_id="evil_module:Evil-v0"),
    "env_id, in a folder": in_config(env_id="../path/evil_module:Evil-v0"),
    "wrapper": in_config(wrappers=[{"name": "evil_module.Wrapper"}]),
    "wrapper that writes": in_config(wrappers=[{"name": "gymnasium.wrappers.RecordVideo", "video_folder": "sentinel"}]),
    "wrapper by a relative name": in_config(wrappers=[{"name": "gymnasium...evil_module.Wrapper"}]),
    "policy in config": in_config(eggroll={"policy": DOTTED}),
    "policy in config, with a colon": in_config(eggroll={"policy": "evil_module:Policy"}),
    "optimizer in config": in_config(eggroll={"optimizer": DOTTED}),
    "fitness_shaping in config": in_config(eggroll={"fitness_shaping": DOTTED}),
    "schedule in config": in_config(eggroll={"sigma": "lambda x: __import__('evil_module')"}),
    "device in config": in_config(eggroll={"device": "evil_module"}),
    "activation_fn in config": in_config(policy_kwargs={"activation_fn": DOTTED}),
    "extractor in config": in_config(policy_kwargs={"features_extractor_class": DOTTED}),
    "tensor outside": tensor_named("../../sentinel"),
    "tensor at an absolute path": tensor_named("/tmp/sentinel"),
    "tensor with a private name": tensor_named("__class__"),
}


@pytest.mark.promise("R13")
@pytest.mark.reliability
def test_names_of_code(good_run, evil_module, tmp_path, cells, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name, change in NAMES.items():
        folder = tmp_path / "env" / "run"
        shutil.copytree(good_run, folder)
        change(folder)
        with cells.cell(name):
            read_all(folder, evil_module)
            assert "evil_module" not in sys.modules
            assert not list((tmp_path / "cwd").iterdir())
        shutil.rmtree(folder)


@pytest.mark.promise("R13")
@pytest.mark.parametrize("name", ["env_id", "wrapper"])
def test_the_names_do_fire_with_consent(name, good_run, evil_module, tmp_path, cells):
    folder = tmp_path / "run"
    shutil.copytree(good_run, folder)
    NAMES[name](folder)
    with cells.control(name):
        with contextlib.suppress(EggrollError):  # the env is of no use; its module was imported
            load_agent(folder, gym_packages=("evil_module",))
        assert not evil_module.exists()


@pytest.mark.promise("R13")
@pytest.mark.reliability
def test_links_lead_nowhere(good_run, tmp_path, cells):
    """A folder of links: nothing behind them is written or removed, and devices are not read."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("precious")
    shutil.copytree(good_run / "checkpoints", mine / "checkpoints")
    before = {path: path.read_bytes() for path in files_of(mine)}
    for name in ("progress.csv", "evaluations.npz", "results.json", "best.safetensors", "config.toml"):
        folder = tmp_path / "run"
        shutil.copytree(good_run, folder)
        target = mine / "notes"
        if name == "config.toml":
            target = mine / "config.toml"
            shutil.copy(good_run / name, target)
            before[target] = target.read_bytes()
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with cells.cell(f"{name} to a file"):
            try:
                config = load_run_config(folder)
                config.total_timesteps += 200
                train(config, folder, resume=True, progress_bar=False)
            except EggrollError:
                pass
            assert {path: path.read_bytes() for path in files_of(mine)} == before
        shutil.rmtree(folder)
    folder = tmp_path / "run"
    shutil.copytree(good_run, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to(mine / "checkpoints")
    for how in ({"resume": True}, {"overwrite": True}):
        with cells.cell(f"checkpoints to a folder, {list(how)}"):
            with pytest.raises(EggrollError, match="checkpoints is a link"):
                train(load_run_config(folder), folder, **how, progress_bar=False)
            assert {path: path.read_bytes() for path in files_of(mine)} == before
    for device in ("/dev/zero", "/dev/stdin", "/proc/self/mem"):
        for name in ("policy.safetensors", "config.toml", "progress.csv", "evaluations.npz", "results.json"):
            folder = tmp_path / f"run{device.replace('/', '-')}{name}"
            shutil.copytree(good_run, folder)
            (folder / name).unlink()
            (folder / name).symlink_to(device)
            with cells.cell(f"{name} to {device}"):
                read_all(folder, tmp_path / "sentinel")


WATCHED = """
import sys
from pathlib import Path
from eggroll_rl import agents
from eggroll_rl.checkpoints import newest_checkpoint
from eggroll_rl.compare_report import Run
from eggroll_rl.training import load_run_config

def read(folder):
    agents.load_policy(folder / "policy.safetensors")
    load_run_config(folder)
    newest_checkpoint(folder)
    agents.read_csv(folder / "progress.csv")
    agents.list_runs(folder.parent.parent)
    Run.read(folder)

good, watched = Path(sys.argv[1]), Path(sys.argv[2])
read(good)  # imports what reading needs at all
events, on = [], True
def hook(event, args):
    if on and (event in ("exec", "import", "os.system", "pickle.find_class", "marshal.loads", "code.__new__",
                         "function.__new__", "ctypes.dlopen", "cpython.run_command")
               or event.split(".")[0] in ("subprocess", "socket", "urllib", "ftplib", "http", "shutil", "webbrowser")
               or event in ("os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.chmod")
               or event == "open" and args[1] is not None and set(str(args[1])) & set("wax+")
               or event == "compile" and args[1] != "<unknown>"):  # numpy reads an array's header as a literal
        events.append((event, str(args)[:80]))
sys.addaudithook(hook)
if len(sys.argv) > 3:
    import pickle
    pickle.loads(Path(sys.argv[3]).read_bytes())
else:
    read(watched)
on = False
print(events)
"""


@pytest.mark.promise("R13")
@pytest.mark.reliability
def test_what_the_interpreter_does_while_it_loads(good_run, tmp_path, cells):
    """No code is compiled, executed or imported, no process or connection started, no file opened to be written."""

    def watch(*more):
        words = [sys.executable, "-W", "ignore", "-c", WATCHED, str(good_run), str(good_run), *more]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    with cells.cell("every reader"):
        assert watch() == "[]"
    (tmp_path / "payload").write_bytes(PAYLOADS["pickle"](tmp_path / "sentinel"))
    with cells.control("pickle"):
        assert watch(str(tmp_path / "payload")) == "[]"


# Calls that can run what they are given, and why they may be where they are. Everything else is a finding.
_BUILTIN = {"eval", "exec", "compile", "__import__"}
_LAST = {
    "__import__", "import_module", "loads", "load", "load_module", "exec_module", "system", "popen", "Popen",
    "check_output", "run_path", "run_module", "execv", "execve", "unsafe_load", "full_load", "recv", "Unpickler",
}  # fmt: skip
_MODULES = {"subprocess", "runpy", "ctypes", "pickle", "cloudpickle", "marshal", "shelve", "yaml", "joblib", "dill"}
ALLOWED = {
    ("processes", "cloudpickle.loads"): "from its own parent, over a pair of sockets",
    ("processes", "connection.recv"): "from its own parent, over a pair of sockets",
    ("processes", "worker.connection.recv"): "from a worker that this process started",
    ("processes", "subprocess.Popen"): "a worker, by a fixed line",
    ("ray_crew", "pickle.loads"): "from an actor that this process started, on a cluster that the user named",
    ("signals", "subprocess.Popen"): "a run of a comparison, by a fixed line",
    ("config", "importlib.import_module"): "packages that the user names",
    ("envs", "importlib.import_module"): "packages that the user names, and Gymnasium's own",
    ("files", "tomllib.loads"): "TOML holds no code",
    ("files", "json.loads"): "JSON holds no code",
    ("tune", "json.loads"): "of what was dumped on the same line",
    ("tensor_files", "safetensors.torch.load"): "safetensors hold no code",
    ("evaluation", "importlib.import_module"): "an algorithm that the user names",
    ("evaluation", "algorithm.load"): "SB3's zip, after consent",
    ("evaluation", "VecNormalize.load"): "SB3's statistics, after consent",
    ("videos", "subprocess.run"): "this interpreter, to see whether a renderer works",
    ("eggroll", "super().load"): "SB3's own load, as in SB3; the docstring says so",
    ("zoo", "super().load"): "as in SB3",
}


def dangerous_calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            words = called.split(".")
            of_module = words[0] in _MODULES and words[-1] not in ("dumps", "TimeoutExpired")
            if called in _BUILTIN or words[-1] in _LAST or of_module:
                yield called


@pytest.mark.promise("R13")
def test_no_other_call_in_the_package_can_run_what_it_reads(cells, tmp_path):
    # What measures and films is given no file of a stranger's.
    tools = {
        "bench",
        "bench_peers",
        "bench_forward",
        "bench_generation",
        "bench_scaling",
        "bench_plot",
        "zoo",
        "tracking",
        "export",
    }
    for path in sorted(PACKAGE.glob("*.py")):
        with cells.cell(path.stem):
            found = {call for call in dangerous_calls(path) if (path.stem, call) not in ALLOWED}
            assert not found or path.stem in tools, found
    for path in sorted(PACKAGE.glob("*.py")):
        with cells.cell(f"{path.stem}: nothing through a shell"):
            assert "shell=True" not in path.read_text() and "allow_pickle=True" not in path.read_text()
    with cells.control("a module that unpickles"):
        (tmp_path / "x.py").write_text("import pickle\npickle.loads(b'')")
        assert not set(dangerous_calls(tmp_path / "x.py"))


@pytest.mark.promise("R13")
@pytest.mark.reliability
def test_the_command_line_on_a_strangers_folder(good_run, evil_module, tmp_path, cells):
    """Each command that takes a folder, on one whose env names a module."""
    from tiny_runs import command_line

    folder = tmp_path / "env" / "run"
    shutil.copytree(good_run, folder)
    NAMES["env_id"](folder)
    for words in (
        ("evaluate", folder), ("record", folder), ("enjoy", folder), ("export", folder, "-o", tmp_path / "x.onnx"),
        ("train", "Evil-v0", "--output", folder, "--resume"),
        ("train", folder / "config.toml", "--output", tmp_path / "new"),
        ("compare", folder / "config.toml", "--algos", "eggroll", "--timesteps", 10, "--output", tmp_path / "out"),
        ("tune", folder / "config.toml", "--timesteps", 10, "--output", tmp_path / "out"),
    ):  # fmt: skip
        with cells.cell(words[0]):
            status, said = run_and_read(command_line, *words)
            assert status == 2 and said.startswith("error: ") and said.count("\n") == 1, said
            assert "allow it with --gym-packages evil_module" in said
            assert not evil_module.exists()
