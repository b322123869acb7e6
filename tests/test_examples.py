import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = {
    "02_train_halfcheetah.py": ["1"],  # one generation
    "03_classify_digits.py": ["--generations", "2"],
    "04_cartpole_without_velocities.py": ["--total-timesteps", "1"],
    "05_on_a_cluster.py": ["local", "1"],
}
NEEDS = {"05_on_a_cluster.py": pytest.mark.ray}


@pytest.mark.parametrize(
    "name", [pytest.param(p.name, marks=NEEDS.get(p.name, ())) for p in sorted(EXAMPLES.glob("*.py"))]
)
def test_every_example_runs_and_is_short(name, tmp_path):
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, path, *FEW.get(name, [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
