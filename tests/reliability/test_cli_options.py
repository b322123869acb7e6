"""R31: a user's mistake on the command line is one line on stderr that names the option, and status 2."""

import os
import subprocess
import sys

import click
import pytest
from stable_baselines3 import A2C

from eggroll_rl import cli

pytestmark = pytest.mark.promise("R31")

PENDULUM = ["Pendulum-v1", "--total-timesteps", "1000", "--n-workers", "0", "--population-size", "4"]
VALUES = {int: "many", float: "fast", "range": "0"}


def commands(group=cli.cli, path=()):
    """Return every command by the words that call it, groups too."""
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*path, name))
    return found


COMMANDS = commands()
ARGUMENTS = {
    ("train",): ["Pendulum-v1"], ("compare",): ["Pendulum-v1", "--algos", "eggroll"], ("tune",): ["Pendulum-v1"],
    ("evaluate",): ["."], ("record",): ["."], ("enjoy",): ["."], ("export",): [".", "-o", "x.onnx"],
    ("bench", "throughput"): [], ("bench", "forward"): [], ("bench", "generation"): [], ("bench", "scaling"): [],
    ("list",): [],
    ("replay",): ["run", "--member", "0"],
}  # fmt: skip
MODEL_COMMANDS = ("evaluate", "record", "enjoy", "export")
# Options that take any text, and what is wrong for them.
TEXTS = {
    "--fitness": "both", "--sigma": "fast", "--learning-rate": "-1", "--fitness-shaping": "best", "--policy": "Mlp",
    "--widths": "a", "--ranks": "0", "--populations": "3", "--batches": "x", "--peers": "nobody", "--plot": "x.docx",
    "--objective": "least", "--algos": "nothing", "--algo": "nothing", "--env": "Nowhere-v0",
    "--gym-packages": "no_such_module", "--vec-normalize": "no-such-file.pkl",
    "--on-bad-member": "forgive", "--cluster": "nowhere",
}  # fmt: skip
# Values of the right type that no option may take.
OUT_OF_RANGE = {
    "--seed": "-1", "--population-size": "3", "--rank": "0", "--n-eval-episodes": "0", "--slice-size": "3",
    "--max-episode-steps": "0", "--total-timesteps": "0", "--eval-freq": "-1", "--eval-episodes": "0",
    "--checkpoint-every": "0", "--keep-checkpoints": "0", "--step-timeout": "0", "--member": "-1",
    "--n-workers": "-1", "--scale": "0", "--episodes": "0", "--seeds": "0", "--trials": "0",
    "--repetitions": "0", "--episode-steps": "0", "--layers": "0", "--population": "1", "--timesteps": "0",
    "--seconds": "-1", "--evaluations": "0", "--torch-threads": "0", "--n-cores": "-1", "--threshold": "nan",
}  # fmt: skip


def cases():
    for words, command in COMMANDS.items():
        if hasattr(command, "commands"):
            continue
        for option in command.params:
            if not isinstance(option, click.Option) or option.is_flag:
                continue
            name = max(option.opts, key=len)
            if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
                yield words, name, "many"
            for bad in (TEXTS.get(name), OUT_OF_RANGE.get(name)):
                if bad is not None:
                    yield words, name, bad


CASES = list(dict.fromkeys(cases()))


def one_line(status, err, *words):
    assert status == 2, f"status {status}: {err[-300:]}"
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err[-300:]
    for word in words:
        assert word in lines[0], f"{lines[0]!r} does not say {word}"


def test_every_option_that_takes_a_value_is_tried():
    tried = {(words, name) for words, name, _ in CASES}
    free = {"--output", "--tensorboard-log", "--track"}  # any text is right
    for words, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag and not hasattr(command, "commands"):
                name = max(option.opts, key=len)
                assert (words, name) in tried or name in free, (words, name)


@pytest.fixture
def sb3_model(tmp_path):
    """Return the words that load a model of SB3's."""
    A2C("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [2]}).save(tmp_path / "model.zip")
    return [str(tmp_path / "model.zip"), "--trust-pickle", "--algo", "a2c", "--env", "Pendulum-v1"]


def test_bad_values_of_every_option(cells, monkeypatch, run, tmp_path, sb3_model):
    monkeypatch.chdir(tmp_path)
    assert run("train", *PENDULUM, "--output", "run")[0] == 0
    for words, name, bad in CASES:
        with cells.cell(f"{' '.join(words)} {name} {bad}"):
            arguments = ARGUMENTS[words] if name != "--algos" else ["Pendulum-v1"]
            arguments = [*sb3_model, *arguments[1:]] if words[0] in MODEL_COMMANDS else arguments
            budget = ["--timesteps", "1000"] if words[0] in ("compare", "tune") and name != "--timesteps" else []
            status, _, err = run(*words, *arguments, *budget, name, bad)
            field = name.removeprefix("--")
            spelt = [w for w in (field, field.replace("-", "_"), bad) if w in err]
            one_line(status, err)
            assert spelt, f"{err!r} names neither {name} nor {bad}"


def test_help_of_every_command(cells, monkeypatch, run):
    for words, command in COMMANDS.items():
        with cells.cell(" ".join(words) or "eggroll-rl"):
            status, out, err = run(*words, "--help")
            assert status == 0 and err == "" and out.startswith("Usage: ")
            for option in command.params:
                if isinstance(option, click.Option):
                    assert option.opts[0] in out


def test_other_mistakes(cells, monkeypatch, run, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("env_id = \n")
    (tmp_path / "wrong.toml").write_text('env_id = "Pendulum-v1"\n[eggroll]\npopulation_siz = 4\n')
    (tmp_path / "a file").write_text("")
    mistakes = {
        "unknown env": (["train", "HalfCheeta-v5"], ["HalfCheeta-v5", "HalfCheetah-v5"]),
        "another version": (["train", "Pendulum-v9"], ["Pendulum-v9", "Pendulum-v1"]),
        "unknown env, unicode": (["train", "Cäsar ✓-v0"], ["Cäsar ✓-v0"]),
        "empty env": (["train", ""], ["env"]),
        "unknown option": (
            ["train", "Pendulum-v1", "--populationsize", "4"],
            ["--populationsize", "--population-size"],
        ),
        "unknown command": (["trian", "Pendulum-v1"], ["trian"]),
        "no env": (["train"], ["ENV"]),
        "no value": (["train", "Pendulum-v1", "--seed"], ["--seed"]),
        "two envs": (["train", "Pendulum-v1", "CartPole-v1"], ["CartPole-v1"]),
        "no preset": (["train", "nothing here.toml"], ["nothing here.toml"]),
        "a broken preset": (["train", "broken.toml"], ["broken.toml", "TOML"]),
        "a wrong preset": (["train", "wrong.toml"], ["wrong.toml", "population_siz", "population_size"]),
        "no model": (["evaluate", "no such ✓ folder"], ["no such ✓ folder"]),
        "a folder without a run": (["evaluate", str(tmp_path)], [tmp_path.name]),
        "an output that is a file": (["train", *PENDULUM, "-o", "a file"], ["a file"]),
        "nothing to resume": (["train", "Pendulum-v1", "--resume", "-o", "nowhere"], ["nowhere"]),
        "no module": (["train", "no_such_module:Env-v0"], ["no_such_module"]),
    }
    for name, (words, named) in mistakes.items():
        with cells.cell(name):
            status, _, err = run(*words)
            one_line(status, err, *named)


def test_an_error_that_is_not_caught_is_noticed(cells, monkeypatch, run, tmp_path):
    monkeypatch.chdir(tmp_path)
    with cells.control("main() without its handlers"):
        monkeypatch.setattr(cli, "main", lambda: cli.cli(standalone_mode=False))
        try:
            run("train", "Pendulum-v9")
        except Exception as error:
            raise AssertionError("a traceback") from error


def eggroll(*words, **how):
    how = {"capture_output": True, "text": True, "timeout": 300, **how}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-m", "eggroll_rl", *map(str, words)], env=environment, **how)


@pytest.mark.reliability
def test_in_a_process_of_its_own(cells, tmp_path):
    folder = tmp_path / "é ✓ with spaces"
    with cells.cell("a path with unicode and spaces"):
        done = eggroll("train", *PENDULUM, "--eval-episodes", "1", "-o", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert str(folder) in done.stdout
        done = eggroll("evaluate", folder, "--n-eval-episodes", "1", "--json", cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("{"), done.stderr
    with cells.cell("a terminal that knows no unicode"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, "-m", "eggroll_rl", "evaluate", str(folder), "--n-eval-episodes", "1"]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300, cwd=tmp_path)
        assert b"Traceback" not in done.stderr, done.stderr
    for words in (["list"], ["--help"], ["train", "--help"]):
        with cells.cell(f"a closed pipe: {' '.join(words)}"):
            read, write = os.pipe()
            os.close(read)
            done = eggroll(*words, cwd=tmp_path, capture_output=False, stdout=write, stderr=subprocess.PIPE)
            os.close(write)
            assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    with cells.cell("a mistake"):
        done = eggroll("train", "Pendulum-v9", cwd=tmp_path)
        one_line(done.returncode, done.stderr, "Pendulum-v9", "Pendulum-v1")
