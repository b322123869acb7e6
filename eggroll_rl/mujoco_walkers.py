"""The MuJoCo v5 tasks of robots that move about: HalfCheetah, Hopper, Walker2d, Swimmer, Ant and the two Humanoids.

Written to be read beside Gymnasium's files: the same terms in the same order, for all sub-envs at once, because
floating point adds up differently in another order. Settings such as ``_ctrl_cost_weight`` are read from the
env that lends its model.

Shapes: N sub-envs.
"""

from typing import ClassVar

import numpy as np

from eggroll_rl.mujoco_vector import Infos, MujocoVectorEnv, Outcome, flat, norm, normal_velocities, sum_of_squares


def whereabouts(qpos: np.ndarray) -> Infos:
    """Return the infos about x and y, of a root that moves freely."""
    xy = qpos[:, :2].copy()
    return {"x_position": xy[:, 0], "y_position": xy[:, 1], "distance_from_origin": norm(xy)}


class _Runner(MujocoVectorEnv):
    """What HalfCheetah, Hopper and Walker2d have in common: they run along x, in a plane."""

    def place(self) -> np.ndarray:
        return self.qpos[:, 0].copy()

    def progress(self, before: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Infos]:
        """Return the reward for speed (N,), the cost of control (N,) and their infos."""
        task, after = self.task, self.place()
        x_velocity = (after - before) / self.dt
        forward_reward = task._forward_reward_weight * x_velocity
        ctrl_cost = task._ctrl_cost_weight * sum_of_squares(actions)
        infos = {"x_position": after, "x_velocity": x_velocity}
        return forward_reward, ctrl_cost, infos | {"reward_forward": forward_reward, "reward_ctrl": -ctrl_cost}


class HalfCheetah(_Runner):
    """Run. No termination."""

    entry_point = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"

    initial_state = normal_velocities

    def observe(self) -> np.ndarray:
        skipped = int(self.task._exclude_current_positions_from_observation)
        return np.concatenate([self.qpos[:, skipped:], self.qvel], axis=1)

    def outcome(self, before: np.ndarray, actions: np.ndarray) -> Outcome:
        forward_reward, ctrl_cost, infos = self.progress(before, actions)
        return forward_reward - ctrl_cost, self.nobody(), infos

    def reset_infos(self) -> Infos:
        return {"x_position": self.place()}


class _Upright(_Runner):
    """What Hopper and Walker2d have in common: they must not fall."""

    def healthy(self) -> np.ndarray:
        """Say who stands (N,)."""
        task, z, angle = self.task, self.qpos[:, 1], self.qpos[:, 2]
        (min_z, max_z), (min_angle, max_angle) = task._healthy_z_range, task._healthy_angle_range
        return (min_z < z) & (z < max_z) & (min_angle < angle) & (angle < max_angle)

    def observe(self) -> np.ndarray:
        skipped = int(self.task._exclude_current_positions_from_observation)
        return np.concatenate([self.qpos[:, skipped:], np.clip(self.qvel, -10, 10)], axis=1)

    def outcome(self, before: np.ndarray, actions: np.ndarray) -> Outcome:
        healthy = self.healthy()
        forward_reward, ctrl_cost, infos = self.progress(before, actions)
        healthy_reward = healthy * self.task._healthy_reward
        terminations = ~healthy & bool(self.task._terminate_when_unhealthy)
        infos = {**infos, **self.reset_infos(), "reward_survive": healthy_reward}
        return forward_reward + healthy_reward - ctrl_cost, terminations, infos

    def reset_infos(self) -> Infos:
        return {"x_position": self.place(), "z_distance_from_origin": self.qpos[:, 1] - self.task.init_qpos[1]}


class Hopper(_Upright):
    """Hop on one leg."""

    entry_point = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"

    def healthy(self) -> np.ndarray:
        least, most = self.task._healthy_state_range
        state = np.concatenate([self.qpos, self.qvel], axis=1)[:, 2:]
        return super().healthy() & ((least < state) & (state < most)).all(axis=1)


class Walker2d(_Upright):
    """Walk on two legs."""

    entry_point = "gymnasium.envs.mujoco.walker2d_v5:Walker2dEnv"


class Swimmer(MujocoVectorEnv):
    """Swim. No termination."""

    entry_point = "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv"

    def observe(self) -> np.ndarray:
        skipped = 2 * self.task._exclude_current_positions_from_observation
        return np.concatenate([self.qpos[:, skipped:], self.qvel], axis=1)

    def place(self) -> np.ndarray:
        return self.qpos[:, :2].copy()

    def outcome(self, before: np.ndarray, actions: np.ndarray) -> Outcome:
        task = self.task
        x_velocity, y_velocity = ((self.place() - before) / self.dt).T
        forward_reward = task._forward_reward_weight * x_velocity
        ctrl_cost = task._ctrl_cost_weight * sum_of_squares(actions)
        infos = {
            **self.reset_infos(),
            "x_velocity": x_velocity,
            "y_velocity": y_velocity,
            "reward_forward": forward_reward,
            "reward_ctrl": -ctrl_cost,
        }
        return forward_reward - ctrl_cost, self.nobody(), infos

    def reset_infos(self) -> Infos:
        return whereabouts(self.qpos)


class Ant(MujocoVectorEnv):
    """Walk on four legs."""

    entry_point = "gymnasium.envs.mujoco.ant_v5:AntEnv"

    @property
    def needs_contact_forces(self) -> bool:
        return bool(self.task._include_cfrc_ext_in_observation or self.task._contact_cost_weight)

    def bind_outputs(self) -> None:
        self.body = self.body_xpos(self.task._main_body)
        self.cfrc_ext = self.batch.bind("cfrc_ext")

    initial_state = normal_velocities

    def contact_forces(self) -> np.ndarray:
        """Return the clipped contact forces (N, bodies, 6)."""
        return np.clip(self.cfrc_ext, *self.task._contact_force_range)

    def healthy(self) -> np.ndarray:
        """Say who is neither too low nor too high (N,)."""
        min_z, max_z = self.task._healthy_z_range
        finite = np.isfinite(self.qpos).all(axis=1) & np.isfinite(self.qvel).all(axis=1)
        return finite & (min_z <= self.qpos[:, 2]) & (self.qpos[:, 2] <= max_z)

    def observe(self) -> np.ndarray:
        skipped = 2 * self.task._exclude_current_positions_from_observation
        parts = [self.qpos[:, skipped:], self.qvel]
        if self.task._include_cfrc_ext_in_observation:
            parts.append(flat(self.contact_forces()[:, 1:]))
        return np.concatenate(parts, axis=1)

    def place(self) -> np.ndarray:
        return self.body[:, :2].copy()

    def outcome(self, before: np.ndarray, actions: np.ndarray) -> Outcome:
        task, healthy = self.task, self.healthy()
        x_velocity, y_velocity = ((self.place() - before) / self.dt).T
        forward_reward = x_velocity * task._forward_reward_weight
        healthy_reward = healthy * task._healthy_reward
        ctrl_cost = task._ctrl_cost_weight * sum_of_squares(actions)
        contact_cost = task._contact_cost_weight * sum_of_squares(self.contact_forces())
        infos = {
            **self.reset_infos(),
            "x_velocity": x_velocity,
            "y_velocity": y_velocity,
            "reward_forward": forward_reward,
            "reward_ctrl": -ctrl_cost,
            "reward_contact": -contact_cost,
            "reward_survive": healthy_reward,
        }
        rewards = forward_reward + healthy_reward - (ctrl_cost + contact_cost)
        return rewards, ~healthy & bool(task._terminate_when_unhealthy), infos

    def reset_infos(self) -> Infos:
        return whereabouts(self.qpos)


class _Human(MujocoVectorEnv):
    """What Humanoid and HumanoidStandup have in common: the body, and how it is observed."""

    impact_weight: ClassVar[str]  # the setting that makes contact forces cost

    @property
    def needs_contact_forces(self) -> bool:
        # Gymnasium's class compares with `is True`: any other truthy value leaves a part out.
        return self.task._include_cfrc_ext_in_observation is True or bool(getattr(self.task, self.impact_weight))

    def bind_outputs(self) -> None:
        names = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "xipos", "ten_length", "ten_velocity")
        self.outputs = {name: self.batch.bind(name) for name in names}

    def observe(self) -> np.ndarray:
        task, outputs = self.task, self.outputs
        skipped = 2 * task._exclude_current_positions_from_observation
        parts = [self.qpos[:, skipped:], self.qvel]
        if task._include_cinert_in_observation is True:
            parts.append(flat(outputs["cinert"][:, 1:]))
        if task._include_cvel_in_observation is True:
            parts.append(flat(outputs["cvel"][:, 1:]))
        if task._include_qfrc_actuator_in_observation is True:
            parts.append(outputs["qfrc_actuator"][:, 6:])
        if task._include_cfrc_ext_in_observation is True:
            parts.append(flat(outputs["cfrc_ext"][:, 1:]))
        return np.concatenate(parts, axis=1)

    def tendons(self) -> Infos:
        """Return the infos about tendons (N, tendons)."""
        return {
            "tendon_length": self.outputs["ten_length"].copy(),
            "tendon_velocity": self.outputs["ten_velocity"].copy(),
        }


class Humanoid(_Human):
    """Walk like a human."""

    entry_point = "gymnasium.envs.mujoco.humanoid_v5:HumanoidEnv"
    impact_weight = "_contact_cost_weight"

    def place(self) -> np.ndarray:
        mass = self.task.model.body_mass
        return (np.einsum("b,nbj->nj", mass, self.outputs["xipos"]) / mass.sum())[:, :2]

    def outcome(self, before: np.ndarray, actions: np.ndarray) -> Outcome:
        task = self.task
        min_z, max_z = task._healthy_z_range
        healthy = (min_z < self.qpos[:, 2]) & (self.qpos[:, 2] < max_z)
        x_velocity, y_velocity = ((self.place() - before) / self.dt).T
        forward_reward = task._forward_reward_weight * x_velocity
        healthy_reward = healthy * task._healthy_reward
        ctrl_cost = task._ctrl_cost_weight * sum_of_squares(self.ctrl)
        contact_cost = task._contact_cost_weight * sum_of_squares(self.outputs["cfrc_ext"])
        contact_cost = np.clip(contact_cost, *task._contact_cost_range)
        infos = {
            **self.reset_infos(),
            "x_velocity": x_velocity,
            "y_velocity": y_velocity,
            "reward_survive": healthy_reward,
            "reward_forward": forward_reward,
            "reward_ctrl": -ctrl_cost,
            "reward_contact": -contact_cost,
        }
        rewards = forward_reward + healthy_reward - (ctrl_cost + contact_cost)
        return rewards, ~healthy & bool(task._terminate_when_unhealthy), infos

    def reset_infos(self) -> Infos:
        return {**whereabouts(self.qpos), **self.tendons()}


class HumanoidStandup(_Human):
    """Get up from the ground. No termination."""

    entry_point = "gymnasium.envs.mujoco.humanoidstandup_v5:HumanoidStandupEnv"
    impact_weight = "_impact_cost_weight"

    def outcome(self, before: None, actions: np.ndarray) -> Outcome:
        task = self.task
        uph_cost = self.qpos[:, 2] / task.model.opt.timestep
        ctrl_cost = task._ctrl_cost_weight * sum_of_squares(self.ctrl)
        impact_cost = task._impact_cost_weight * sum_of_squares(self.outputs["cfrc_ext"])
        impact_cost = np.clip(impact_cost, *task._impact_cost_range)
        infos = {
            **self.reset_infos(),
            "reward_linup": uph_cost,
            "reward_quadctrl": -ctrl_cost,
            "reward_impact": -impact_cost,
        }
        return uph_cost - ctrl_cost - impact_cost + 1, self.nobody(), infos

    def reset_infos(self) -> Infos:
        position = {
            "x_position": self.qpos[:, 0].copy(),
            "y_position": self.qpos[:, 1].copy(),
            "z_distance_from_origin": self.qpos[:, 2] - self.task.init_qpos[2],
        }
        return {**position, **self.tendons()}
