"""What the README and the docs tell people to type: every Python block runs, every command line is understood."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from eggroll_rl.cli import cli
from eggroll_rl.config import RunConfig
from eggroll_rl.envs import resolve_wrappers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page takes as given.
GIVEN = {
    "README.md": """
import torch
module, inputs = torch.nn.Linear(3, 2), torch.randn(5, 3)
fitness, score = torch.randn(256), lambda module: module(inputs).sum().item()
""",
}
# Fewer steps than the page says, for the sake of time.
FEWER = [(r"learn\([\d_]+", "learn(3_000"), (r"n_eval_episodes=\d+", "n_eval_episodes=1")]


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for its, text in found if its == language]


def test_every_python_block_runs(tmp_path):
    """In one process, each page's blocks together, in names of their own."""
    pages = {}
    for page in PAGES:
        code = "\n".join([GIVEN.get(page.name, ""), *blocks(page, "python")])
        for found, instead in FEWER:
            code = re.sub(found, instead, code)
        pages[page.name] = code
    assert sum(bool(code) for code in pages.values()) >= 6
    script = tmp_path / "pages.py"
    script.write_text(f"""
import warnings
warnings.filterwarnings("error", module="eggroll_rl")
for page, code in {pages!r}.items():
    exec(compile(code, page, "exec"), {{"__name__": "__main__"}})
""")
    command = [sys.executable, "-W", "error::ResourceWarning", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "ResourceWarning" not in done.stderr


def command_lines():
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.splitlines():
                if line.startswith("eggroll-rl "):
                    yield pytest.param(line.partition(" #")[0], id=f"{page.name}: {line.partition(' #')[0].strip()}")


@pytest.mark.parametrize("line", list(command_lines()))
def test_every_command_line_is_understood(line):
    """Flags, their values and the number of arguments; the commands themselves run in tests of their own."""
    arguments = shlex.split(line)[1:]
    command, context = cli, click.Context(cli)
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
        context = click.Context(command, parent=context)
    command.make_context(name, arguments)


def test_every_preset_is_one():
    presets = [tomllib.loads(block) for page in PAGES for block in blocks(page, "toml")]
    assert presets
    for preset in presets:
        config = RunConfig.from_dict(preset, "the docs")
        resolve_wrappers(config.wrappers)
        assert config.env_id


def test_the_tests_that_a_page_names_exist():
    there = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 40 and named <= there, named - there


def test_what_a_page_links_to_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


SMALLER = [
    (r"^(.* train \S+.*)$", r"\1 --total-timesteps 4096"),
    (r"--seconds \d+", "--seconds 1"),
    (r"--trials \d+", "--trials 1"),
    (r"--seeds \d+", "--seeds 1"),
    (r"^(.* compare HalfCheetah-v5.*)$", r"\1 --output runs/compared"),
    (r"^(.* record .*)$", r"\1 --plain --scale 0.25"),
    (r"--n-eval-episodes \d+", "--n-eval-episodes 2"),
    (r"^(.* bench throughput .*)$", r"\1 --repetitions 1 --episode-steps 40"),
    (r"^(.*--track.*)$", r"\1 --overwrite"),
    (r"^(.* bench scaling .*)$", r"\1 --populations 100 --widths 8 --repetitions 1"),
]


@pytest.mark.slow
def test_every_command_line_runs(tmp_path):
    """One after the other, where they find what the repository has; on small budgets.

    ``enjoy`` needs a window, ``--cluster`` a cluster: test_ray.py has one.
    """
    for run in ("HalfCheetah-v5/eggroll-seed0", "Hopper-v5/compare/eggroll-seed0", "Hopper-v5/compare/ppo-seed0"):
        shutil.copytree(ROOT / "agents" / run, tmp_path / "agents" / run)
    lines = list(dict.fromkeys(param.values[0].strip() for param in command_lines()))
    lines.sort(key=lambda line: "train HalfCheetah-v5" not in line)  # others use what these write
    has_wandb, has_peer = (importlib.util.find_spec(name) is not None for name in ("wandb", "torcheggroll"))
    for line in lines:
        if (
            " enjoy " in line
            or "--cluster" in line
            or ("--track" in line and not has_wandb)
            or ("generation" in line and not has_peer)
        ):
            continue
        for found, instead in SMALLER:
            line = re.sub(found, instead, line)
        command = line.replace("eggroll-rl", f"{shlex.quote(sys.executable)} -m eggroll_rl", 1)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env={**os.environ, "WANDB_MODE": "offline"},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    for written in ("videos/HalfCheetah-v5.mp4", "cheetah.onnx", "policy.pt2", "runs/tune-Hopper-v5/preset.toml"):
        assert (tmp_path / written).stat().st_size > 0
