"""Callbacks by generation, beside SB3's callbacks by step."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList


class GenerationCallback(BaseCallback):
    """A callback that is asked once per generation and costs nothing per step: its ``on_step`` is never called."""

    def on_generation_end(self) -> bool:
        """Run after the update; return False to stop."""
        return True

    def _on_step(self) -> bool:
        return True


def _leaves(callback: BaseCallback) -> Iterator[BaseCallback]:
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _leaves(child)
    else:
        yield callback


def generation_callbacks(callback: BaseCallback) -> list[GenerationCallback]:
    """Return those of a callback's parts that are asked once per generation."""
    return [leaf for leaf in _leaves(callback) if isinstance(leaf, GenerationCallback)]


def only_generation_callbacks(callback: BaseCallback) -> bool:
    """Say whether no part of a callback looks at steps, so that none need be replayed."""
    return all(isinstance(leaf, GenerationCallback) for leaf in _leaves(callback))


def replay(model: BaseAlgorithm, n_steps: int, ends: dict[int, dict[str, Any]], callback: BaseCallback) -> bool:
    """Show a finished generation to a callback, member after member, as a ``VecEnv`` of the model's size would have.

    :param n_steps: env steps of all members
    :param ends: infos of the episodes that ended, by the number of the step, from 1
    :return: False if the callback says stop
    """
    assert model.env is not None
    stride = model.env.num_envs
    for step in range(0, n_steps, stride):
        infos = [ends.get(step + i, {}) for i in range(1, stride + 1)]
        dones = np.array(["episode" in info for info in infos])
        model.num_timesteps += min(stride, n_steps - step)
        model._update_info_buffer(infos, dones)
        # The names that SB3's callbacks look up.
        callback.update_locals({"dones": dones, "infos": infos, "self": model})
        if not callback.on_step():
            return False
    return True
