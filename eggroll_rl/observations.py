"""Observations of every supported space as rows of numbers, one row per env: what a network can take.

A batch of observations is an array (N, ...), or for a Dict space one such array per key. Images come from an env with
their channels last and are seen by policies with their channels first, as in SB3.

Shapes: N envs, I numbers of a row.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import (
    get_flattened_obs_dim,
    is_image_space,
    is_image_space_channels_first,
    maybe_transpose,
    preprocess_obs,
)
from stable_baselines3.common.vec_env import VecTransposeImage
from torch import Tensor

from eggroll_rl.errors import ConfigError

OBSERVATION_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

Observations = np.ndarray | dict[str, np.ndarray]


def check_observation_space(space: spaces.Space) -> None:
    """Refuse a space that :func:`encode` does not know, naming it.

    :raises ConfigError: another space than Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    """
    if not _parts(space):
        raise ConfigError(f"observation space {space} has no entries")
    for key, part in _parts(space):
        what = f"observation space {space}" if key is None else f"part {key!r} of the observation space, {part},"
        advice = "" if key is None else "; gymnasium.wrappers.FilterObservation chooses the others"
        if not isinstance(part, OBSERVATION_SPACES):
            known = ", ".join(known.__name__ for known in OBSERVATION_SPACES)
            raise ConfigError(f"{what} is not supported; supported are {known}, and a Dict of them{advice}")
        if isinstance(part, spaces.MultiDiscrete) and (part.nvec.ndim > 1 or np.any(part.start)):
            raise ConfigError(f"{what} must be one-dimensional and start at 0{advice}")
        check_entries(what if key is not None else "observation space", part)


def check_entries(what: str, space: spaces.Space) -> None:
    """Refuse a Box without any entries."""
    if isinstance(space, spaces.Box) and 0 in space.shape:
        raise ConfigError(f"{what} {space} has no entries")


def _parts(space: spaces.Space) -> list[tuple[str | None, spaces.Space]]:
    return [*space.spaces.items()] if isinstance(space, spaces.Dict) else [(None, space)]


def count_inputs(space: spaces.Space) -> int:
    """Return I: one per entry of a Box, one-hot for the discrete spaces."""
    return sum(get_flattened_obs_dim(part) for _, part in _parts(space))


def is_plain(space: spaces.Space) -> bool:
    """Say whether :func:`encode` only flattens."""
    return isinstance(space, spaces.Box) and not is_image_space(space)


def measured(space: spaces.Space, images: bool = True) -> Tensor:
    """Say which of the I numbers are measurements (I,), which can be normalized, and not of a one-hot code.

    :param images: normalize those too
    """
    parts = [part for _, part in _parts(space)]
    chosen = [isinstance(part, spaces.Box) and (images or not is_image_space(part)) for part in parts]
    sizes = [get_flattened_obs_dim(part) for part in parts]
    return torch.cat([torch.full((size,), which) for size, which in zip(sizes, chosen, strict=True)])


def encode(obs: Any, space: spaces.Space) -> Tensor:
    """Return rows (N, I): a Box flattened, images from 0 to 1, discrete spaces one-hot, a Dict's parts joined.

    :param obs: tensor (N, ...), or for a Dict one per key; images with the channels as ``space`` has them
    """
    if isinstance(space, spaces.Dict):
        return torch.cat([encode(obs[key], part) for key, part in space.spaces.items()], dim=1)
    if not is_plain(space):
        if isinstance(space, spaces.Discrete):
            # SB3's one-hot counts from 0. Rows of an env that was never reset hold 0, whatever the start.
            obs = (obs - int(space.start)).clamp(0, int(space.n) - 1)
        obs = preprocess_obs(obs, space)
    if obs.dim() == 1:  # of a space without dimensions
        return obs[:, None]
    return obs if obs.dim() == 2 else obs.flatten(1)


def decode(rows: Tensor, space: spaces.Space) -> Any:
    """Turn rows (N, I) back into what SB3's feature extractors take: a Box in its shape (N, ...), and a Dict as one."""
    if isinstance(space, spaces.Dict):
        sizes = [count_inputs(part) for part in space.spaces.values()]
        parts = zip(space.spaces.items(), rows.split(sizes, dim=1), strict=True)
        return {key: decode(part_rows, part) for (key, part), part_rows in parts}
    return rows.unflatten(1, space.shape) if isinstance(space, spaces.Box) and len(space.shape) > 1 else rows


def as_policies_see(obs: Observations, space: spaces.Space) -> Observations:
    """Put the channels of an env's images where the policy's ``space`` has them."""
    if isinstance(obs, dict):
        assert isinstance(space, spaces.Dict)
        return {key: maybe_transpose(obs[key], part) for key, part in space.spaces.items()}
    return maybe_transpose(obs, space)


def space_as_policies_see(space: spaces.Space) -> spaces.Space:
    """Return the space that a policy has for an env's: what SB3 makes of it around the env."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict([(key, space_as_policies_see(part)) for key, part in space.spaces.items()])
    if isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        return VecTransposeImage.transpose_space(space)
    return space


def finite_rows(obs: Observations) -> np.ndarray:
    """Say for each of N rows whether all its numbers are finite."""
    arrays = list(obs.values()) if isinstance(obs, dict) else [obs]
    finite = np.ones(len(arrays[0]), dtype=bool)
    for array in arrays:
        finite &= np.isfinite(array.reshape(len(array), -1)).all(axis=1)
    return finite


def map_arrays(function: Callable[[Any], Any], obs: Any) -> Any:
    """Apply a function to an observation's array, or to each of a Dict's."""
    return {key: function(part) for key, part in obs.items()} if isinstance(obs, dict) else function(obs)


def put_row(batch: Observations, row: int, obs: Any) -> None:
    """Write one env's observation into a batch.

    :raises ValueError: it lacks a key or has another shape; NumPy would repeat what is too small
    """
    if isinstance(batch, dict):
        if not isinstance(obs, dict) or batch.keys() - obs.keys():
            got = sorted(obs) if isinstance(obs, dict) else type(obs).__name__
            raise ValueError(f"the env's observation must have the keys {sorted(batch)}, got {got}")
        for key, part in batch.items():
            put_row(part, row, obs[key])
    elif (obs.shape if type(obs) is np.ndarray else np.shape(obs)) != batch.shape[1:]:
        raise ValueError(f"the env's observation must have shape {batch.shape[1:]}, got {np.shape(obs)}")
    else:
        batch[row] = obs
