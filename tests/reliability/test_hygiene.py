"""R32: few dependencies, each with a reason, and static checks that find nothing that is not explained."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.promise("R32")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# Where the name to import is another than that to install.
IMPORTED_AS = {"pillow": "PIL", "scikit-learn": "sklearn"}
# Come with a dependency that is declared: imported for what they are to it.
OF_OTHERS = {"tensorboard": "tensorboard"}


def names(requirements):
    return {re.split(r"[\[<>=!~ ;]", requirement)[0] for requirement in requirements}


def imported():
    """Return the packages from elsewhere that the code imports, and where."""
    found = {}
    for path in sorted((ROOT / "eggroll_rl").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top != "eggroll_rl":
                    found.setdefault(top, set()).add(path.name)
    return found


def as_imported(requirements):
    return {IMPORTED_AS.get(name, name).replace("-", "_") for name in names(requirements)}


def undeclared(found):
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = as_imported(PROJECT["project"]["dependencies"]).union(*(as_imported(extra) for extra in extras))
    return {name: paths for name, paths in found.items() if name not in declared}


def test_every_dependency_has_a_line_in_the_docs():
    listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("**Dependencies.**")[1]
    listed = "\n".join(line for line in listed.splitlines() if line.startswith("- "))
    assert set(re.findall(r"`([^`]+)`", listed)) == names(PROJECT["project"]["dependencies"])


def test_what_is_imported_is_declared_and_what_is_declared_is_imported(cells):
    found = imported()
    for name in found:
        with cells.cell(f"{name} is declared"):
            assert not undeclared({name: found[name]}), f"{name} in {found[name]}"
    for name in sorted(as_imported(PROJECT["project"]["dependencies"]) - {"PIL"}):  # which imageio imports
        with cells.cell(f"{name} is used"):
            assert name in found, f"{name} is declared and never imported"
    with cells.control("an import that nobody declared"):
        assert not undeclared({"requests": {"somewhere.py"}})


def ruff(*words, text=None):
    """Run the rules of bandit; skip where ruff is not installed."""
    beside = Path(sys.executable).parent / "ruff"
    program = str(beside) if beside.exists() else shutil.which("ruff")
    if program is None:
        pytest.skip("needs ruff, of the extra dev")
    command = [program, "check", "--no-cache", "--select", "S", "--ignore", "S101", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, input=text, timeout=60)


def test_the_rules_of_bandit_find_nothing_unexplained(cells):
    with cells.cell("the rules are on"):
        assert "S" in PROJECT["tool"]["ruff"]["lint"]["select"]
    with cells.cell("findings"):
        done = ruff("eggroll_rl")
        assert done.returncode == 0, done.stdout
    with cells.cell("every exception has its reason"):
        lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        for i, line in enumerate(lines):
            if re.search(r'"S\d+"', line):
                code = re.search(r'"(S\d+)"', line)[1]
                assert f"{code}:" in lines[i - 1] or "#" in line, f"{line} says no reason"
    with cells.cell("nothing is silenced line by line"):
        for path in (ROOT / "eggroll_rl").glob("*.py"):
            assert not re.search(r"noqa: *S\d", path.read_text(encoding="utf-8")), path.name
    with cells.control("a shell"):
        done = ruff("--stdin-filename", "eggroll_rl/made_up.py", "-", text="import os\nos.system(input())\n")
        assert done.returncode == 0
