"""Gymnasium's eleven MuJoCo v5 tasks by name."""

from gymnasium.envs.registration import EnvSpec

from eggroll_rl.mujoco_arms import InvertedDoublePendulum, InvertedPendulum, Pusher, Reacher
from eggroll_rl.mujoco_vector import MujocoVectorEnv
from eggroll_rl.mujoco_walkers import Ant, HalfCheetah, Hopper, Humanoid, HumanoidStandup, Swimmer, Walker2d

TASKS: dict[str, type[MujocoVectorEnv]] = {
    f"{task.__name__}-v5": task
    for task in (
        Ant, HalfCheetah, Hopper, Humanoid, HumanoidStandup, InvertedDoublePendulum, InvertedPendulum,
        Pusher, Reacher, Swimmer, Walker2d,
    )
}  # fmt: skip


def vector_task(spec: EnvSpec) -> type[MujocoVectorEnv] | None:
    """Return the class for a registered env, or None if it has to be stepped by Gymnasium."""
    if spec.additional_wrappers:
        return None
    return next((task for task in TASKS.values() if task.entry_point == spec.entry_point), None)
