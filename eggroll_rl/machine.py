"""What results say of the machine and the packages that made them."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from eggroll_rl.workers import available_cores


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def machine() -> dict[str, Any]:
    """Return what results say of this machine."""
    return {"platform": platform.platform(), "processor": _processor(), "cores": available_cores()}


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide a result."""
    packages = ("eggroll-rl", "torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "sb3-contrib")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
