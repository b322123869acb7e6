"""Low-rank evolution strategies (EGGROLL, arXiv 2511.16652) for Gymnasium agents.

Importing it registers ``eggroll_rl/<Task>-v5`` with Gymnasium. Names load on first use, so that
``from eggroll_rl import EvolutionStrategy`` loads neither MuJoCo nor Stable-Baselines3.
"""

from typing import TYPE_CHECKING, Any

from eggroll_rl.registration import register_envs

if TYPE_CHECKING:
    from eggroll_rl.eggroll import EGGROLL
    from eggroll_rl.es import EvolutionStrategy

__version__ = "0.1.0"
__all__ = ["EGGROLL", "EvolutionStrategy", "__version__"]

register_envs()


def __getattr__(name: str) -> Any:
    if name == "EGGROLL":
        from eggroll_rl.eggroll import EGGROLL

        return EGGROLL
    if name == "EvolutionStrategy":
        from eggroll_rl.es import EvolutionStrategy

        return EvolutionStrategy
    raise AttributeError(f"module 'eggroll_rl' has no attribute {name!r}")
