"""Register the MuJoCo tasks for ``gymnasium.make`` and ``gymnasium.make_vec``."""

from gymnasium.envs.registration import register, registry

TASK_NAMES = (
    "Ant", "HalfCheetah", "Hopper", "Humanoid", "HumanoidStandup", "InvertedDoublePendulum", "InvertedPendulum",
    "Pusher", "Reacher", "Swimmer", "Walker2d",
)  # fmt: skip


def register_envs() -> None:
    """Register ``eggroll_rl/<Task>-v5``: Gymnasium's env, and :mod:`eggroll_rl.mujoco_tasks` as its vector env."""
    for name in TASK_NAMES:
        spec = registry[f"{name}-v5"]
        register(
            f"eggroll_rl/{name}-v5",
            entry_point=spec.entry_point,
            vector_entry_point=f"eggroll_rl.mujoco_tasks:{name}",
            max_episode_steps=spec.max_episode_steps,
            reward_threshold=spec.reward_threshold,
        )
