"""The mean policy, normalizer included, as one file that needs no eggroll_rl: ONNX or ``torch.export``."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from eggroll_rl.errors import ConfigError
from eggroll_rl.observations import map_arrays
from eggroll_rl.policies import MlpPolicy

FORMATS = (".onnx", ".pt2")


class _Deployed(nn.Module):
    """Observations of the env to actions of the env, and nothing else."""

    def __init__(self, policy: MlpPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, obs: Any) -> Tensor:
        return self.policy(obs)


def export_file(policy: MlpPolicy, path: str | Path) -> Path:
    """Write the policy to ``path``: raw observations (batch, ...) in, the env's actions (batch, ...) out.

    A ``.onnx`` file has the input ``obs``, or one input per key of a Dict, and the output ``actions``, and runs in any
    ONNX runtime; a ``.pt2`` file is loaded by ``torch.export.load(path).module()``. Observations have shape and
    dtype of the policy's space, in which the channels of an image come first.

    :raises ConfigError: another ending, or the packages for ONNX are missing
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ConfigError(f"the file must end in {' or '.join(FORMATS)}, got {path}")
    if policy.state_size:
        raise ConfigError(f"{type(policy).__name__} has a memory, which an exported file would not carry")
    deployed = _Deployed(policy.replica()).eval().requires_grad_(False)
    space = policy.observation_space
    names = list(space.spaces) if isinstance(space, spaces.Dict) else ["obs"]
    example = (_example(space),)
    batch = {"obs": map_arrays(lambda _: {0: torch.export.Dim("batch")}, example[0])}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt2":
        with torch.no_grad():
            torch.export.save(torch.export.export(deployed, example, dynamic_shapes=batch), path)
        return path
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"ONNX needs more packages ({error}): pip install 'eggroll-rl[onnx]'") from error
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            deployed, (), path, kwargs={"obs": example[0]}, input_names=names, output_names=["actions"],
            dynamic_shapes=batch, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own remarks, on its deprecations and on torchvision, from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _example(space: spaces.Space) -> Any:
    """Return two observations: a batch of one would be taken for a constant."""
    return map_arrays(lambda part: torch.from_numpy(np.stack([part, part])), space.sample())
