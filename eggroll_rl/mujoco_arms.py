"""The MuJoCo v5 tasks of robots that stay in place: the two pendulums, Reacher and Pusher.

As :mod:`eggroll_rl.mujoco_walkers`: Gymnasium's terms in Gymnasium's order. Shapes: N sub-envs.
"""

from itertools import repeat

import numpy as np

from eggroll_rl.mujoco_vector import MujocoVectorEnv, Outcome, norm, normal_velocities, sum_of_squares, uniform


def squared(values: np.ndarray) -> np.ndarray:
    """Square each number as ``np.float64 ** 2`` does."""
    # That is the C library's pow, which differs from x * x in the last bit once in a thousand.
    return np.array([*map(pow, values.ravel().tolist(), repeat(2.0))]).reshape(values.shape)


class InvertedPendulum(MujocoVectorEnv):
    """Balance a pole on a cart."""

    entry_point = "gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv"

    def observe(self) -> np.ndarray:
        return np.concatenate([self.qpos, self.qvel], axis=1)

    def outcome(self, before: None, actions: np.ndarray) -> Outcome:
        observations = self.observe()
        terminations = ~np.isfinite(observations).all(axis=1) | (np.abs(observations[:, 1]) > 0.2)
        rewards = (~terminations).astype(np.int64)
        return rewards, terminations, {"reward_survive": rewards}


class InvertedDoublePendulum(MujocoVectorEnv):
    """Balance two poles, one on the other, on a cart."""

    entry_point = "gymnasium.envs.mujoco.inverted_double_pendulum_v5:InvertedDoublePendulumEnv"

    def bind_outputs(self) -> None:
        self.tip = self.batch.bind("site_xpos")[:, 0]
        self.qfrc_constraint = self.batch.bind("qfrc_constraint")

    initial_state = normal_velocities

    def observe(self) -> np.ndarray:
        angles = self.qpos[:, 1:]
        forces = np.clip(self.qfrc_constraint[:, :1], -10, 10)
        velocities = np.clip(self.qvel, -10, 10)
        return np.concatenate([self.qpos[:, :1], np.sin(angles), np.cos(angles), velocities, forces], axis=1)

    def outcome(self, before: None, actions: np.ndarray) -> Outcome:
        x, y = self.tip[:, 0], self.tip[:, 2]
        terminations = y <= 1
        xx, yy, v1v1, v2v2 = squared(np.stack([x, y - 2, self.qvel[:, 1], self.qvel[:, 2]]))
        distance_penalty = 0.01 * xx + yy
        velocity_penalty = 0.001 * v1v1 + 0.005 * v2v2
        alive_bonus = self.task._healthy_reward * (~terminations).astype(np.int64)
        infos = {
            "reward_survive": alive_bonus,
            "distance_penalty": -distance_penalty,
            "velocity_penalty": -velocity_penalty,
        }
        return alive_bonus - distance_penalty - velocity_penalty, terminations, infos


class Reacher(MujocoVectorEnv):
    """Reach for a point. No termination."""

    entry_point = "gymnasium.envs.mujoco.reacher_v5:ReacherEnv"

    def bind_outputs(self) -> None:
        self.fingertip, self.target = self.body_xpos("fingertip"), self.body_xpos("target")

    def initial_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        task = self.task
        qpos = uniform(generator, 0.1, task.model.nq) + task.init_qpos
        while np.linalg.norm(goal := uniform(generator, 0.2, 2)) >= 0.2:
            pass
        qpos[-2:] = goal
        qvel = task.init_qvel + uniform(generator, 0.005, task.model.nv)
        qvel[-2:] = 0
        return qpos, qvel

    def observe(self) -> np.ndarray:
        theta, away = self.qpos[:, :2], self.fingertip - self.target
        parts = [np.cos(theta), np.sin(theta), self.qpos[:, 2:], self.qvel[:, :2], away[:, :2]]
        return np.concatenate(parts, axis=1)

    def outcome(self, before: None, actions: np.ndarray) -> Outcome:
        reward_dist = -norm(self.fingertip - self.target) * self.task._reward_dist_weight
        reward_ctrl = -sum_of_squares(actions) * self.task._reward_control_weight
        infos = {"reward_dist": reward_dist, "reward_ctrl": reward_ctrl}
        return reward_dist + reward_ctrl, self.nobody(), infos


class Pusher(MujocoVectorEnv):
    """Push a cylinder to a goal. No termination."""

    entry_point = "gymnasium.envs.mujoco.pusher_v5:PusherEnv"

    def bind_outputs(self) -> None:
        self.tip, self.cylinder, self.goal = (self.body_xpos(name) for name in ("tips_arm", "object", "goal"))

    def initial_state(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        task = self.task
        while True:
            cylinder = np.concatenate(
                [generator.uniform(low=-0.3, high=0, size=1), generator.uniform(low=-0.2, high=0.2, size=1)]
            )
            if np.linalg.norm(cylinder) > 0.17:
                break
        qpos = task.init_qpos.copy()
        qpos[-4:] = [*cylinder, 0, 0]
        qvel = task.init_qvel + uniform(generator, 0.005, task.model.nv)
        qvel[-4:] = 0
        return qpos, qvel

    def observe(self) -> np.ndarray:
        return np.concatenate([self.qpos[:, :7], self.qvel[:, :7], self.tip, self.cylinder, self.goal], axis=1)

    def outcome(self, before: None, actions: np.ndarray) -> Outcome:
        task = self.task
        reward_near = -norm(self.cylinder - self.tip) * task._reward_near_weight
        reward_dist = -norm(self.cylinder - self.goal) * task._reward_dist_weight
        reward_ctrl = -sum_of_squares(actions) * task._reward_control_weight
        infos = {"reward_dist": reward_dist, "reward_ctrl": reward_ctrl, "reward_near": reward_near}
        return reward_dist + reward_ctrl + reward_near, self.nobody(), infos
