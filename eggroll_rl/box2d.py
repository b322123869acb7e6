"""``FreshWorld``: episodes of Gymnasium's BipedalWalker that do not depend on those before."""

from typing import Any

import gymnasium as gym

_BIPEDAL_WALKER = "gymnasium.envs.box2d.bipedal_walker"


class FreshWorld(gym.Wrapper):
    """Give BipedalWalker a new Box2D world at each reset.

    It keeps one for all its episodes, and a world from which the bodies were taken does not go on as a new one does:
    the same seed and actions then give other observations (Gymnasium mended LunarLander so, its issue 728).
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset into a new world."""
        walker: Any = self.unwrapped
        walker._destroy()  # bodies first: it would look for them in the new world
        walker.world = type(walker.world)()
        return super().reset(seed=seed, options=options)


def with_fresh_world(env: gym.Env) -> gym.Env:
    """Return a BipedalWalker in a :class:`FreshWorld`, and any other env as it is."""
    is_walker = any(parent.__module__ == _BIPEDAL_WALKER for parent in type(env.unwrapped).__mro__)
    return FreshWorld(env) if is_walker else env
