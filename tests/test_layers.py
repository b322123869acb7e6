"""The drawing in the docs, held true: a module imports only from rows above its own."""

import ast
import subprocess
import sys
from pathlib import Path

LAYERS = [
    ["errors", "checks", "files", "signals"],
    ["noise", "forms", "lowrank", "memberwise", "population", "fitness", "schedules", "es"],
    ["normalization", "observations", "actions", "policies", "recurrent", "actor"],
    ["registration", "mujoco_contacts", "mujoco_vector", "mujoco_walkers", "mujoco_arms", "mujoco_tasks"],
    ["serial_vector", "box2d", "envs", "rollout", "segments"],
    ["dispatch", "processes", "workers", "vec_env", "sb3_vec_env", "sb3_export"],
    ["critic", "surrogate", "scoring", "settings", "callbacks", "eggroll"],
    ["space_files", "tensor_files", "agents", "checkpoints", "config", "evaluation"],
    ["export", "tracking", "machine", "ray_crew", "ray_workers", "training", "videos", "plots"],
    ["compare_algorithms", "compare_run", "compare_stats", "compare_report", "compare_plot", "compare", "tune", "zoo"],
    ["bench_peers", "bench", "bench_forward", "bench_generation", "bench_scaling", "bench_plot"],
    ["cli_bench", "cli_models", "cli"],
]
ORDER = [name for layer in LAYERS for name in layer]
PACKAGE = Path(__file__).parent.parent / "eggroll_rl"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "eggroll_rl":
                yield from (f"eggroll_rl.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)


def test_a_module_imports_only_from_above():
    for name in ORDER:
        for imported in imports(PACKAGE / f"{name}.py"):
            if imported.startswith("eggroll_rl."):
                other = imported.removeprefix("eggroll_rl.")
                assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


def test_the_docs_list_the_modules_in_this_order():
    house = (PACKAGE.parent / "docs" / "how-it-works.md").read_text().split("eggroll_rl/\n", 1)[1].split("```")[0]
    assert [line.split()[0] for line in house.splitlines()] == [f"{name}.py" for name in ORDER]


def test_the_core_loads_neither_mujoco_nor_sb3():
    code = (
        "import sys; from eggroll_rl import EvolutionStrategy; "
        "print(sorted({'mujoco', 'stable_baselines3', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
