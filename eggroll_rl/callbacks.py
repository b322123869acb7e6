"""Callbacks by generation, beside SB3's callbacks by step."""

from collections.abc import Iterator

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
