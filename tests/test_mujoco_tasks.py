"""The eleven MuJoCo tasks against Gymnasium's ``SyncVectorEnv`` of the same envs: equal to the last bit."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from eggroll_rl.evaluation import load_agent
from eggroll_rl.mujoco_tasks import TASKS
from eggroll_rl.mujoco_vector import mujoco_warnings_silenced

N = 4
# One value beside the default for every documented argument; frame_skip and xml_file are the model's.
COMMON = {"reset_noise_scale": 0.03, "frame_skip": 3}
POSITIONS = {"exclude_current_positions_from_observation": False}
RUNNER = {**COMMON, **POSITIONS, "forward_reward_weight": 1.7, "ctrl_cost_weight": 0.3}
UPRIGHT = {
    **RUNNER,
    "healthy_reward": 2.5,
    "terminate_when_unhealthy": False,
    "healthy_z_range": (1.0, 1.3),
    "healthy_angle_range": (-0.05, 0.05),
}
PARTS = {f"include_{part}_in_observation": False for part in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")}
ARGUMENTS = {
    "HalfCheetah-v5": RUNNER,
    "Swimmer-v5": RUNNER,
    "Hopper-v5": {**UPRIGHT, "healthy_state_range": (-0.8, 0.8)},
    "Walker2d-v5": UPRIGHT,
    "Ant-v5": {
        **RUNNER,
        "contact_cost_weight": 0.02,
        "healthy_reward": 0.4,
        "main_body": 3,
        "terminate_when_unhealthy": False,
        "healthy_z_range": (0.4, 0.8),
        "contact_force_range": (-0.3, 5.0),
        "include_cfrc_ext_in_observation": False,
    },
    "Humanoid-v5": {
        **RUNNER,
        **PARTS,
        "contact_cost_weight": 1e-3,
        "contact_cost_range": (0.5, 2.0),
        "healthy_reward": 1.0,
        "terminate_when_unhealthy": False,
        "healthy_z_range": (1.3, 1.5),
    },
    "HumanoidStandup-v5": {
        **COMMON,
        **POSITIONS,
        **PARTS,
        "uph_cost_weight": 2.0,
        "ctrl_cost_weight": 0.3,
        "impact_cost_weight": 1e-3,
        "impact_cost_range": (0.5, 2.0),
    },
    "InvertedPendulum-v5": COMMON,
    "InvertedDoublePendulum-v5": {**COMMON, "healthy_reward": 3.0},
    "Reacher-v5": {"frame_skip": 3, "reward_dist_weight": 2.0, "reward_control_weight": 0.3},
    "Pusher-v5": {"frame_skip": 3, "reward_near_weight": 2.0, "reward_dist_weight": 0.3, "reward_control_weight": 0.7},
}


def assert_same(ours, theirs, where):
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or np.array_equal(a, b), where
    else:
        assert np.array_equal(ours, theirs), f"{where}: {ours} is not {theirs}"
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype, where


def compare(env_id, kwargs, mode, steps, seed, limit=None, n=N, feedback=False, policy=None):
    """Step both with the same actions and return how many episodes ended."""
    limit = limit or gym.spec(env_id).max_episode_steps
    ours = TASKS[env_id](n, max_episode_steps=limit, autoreset_mode=mode, **kwargs)
    make = lambda: gym.make(env_id, max_episode_steps=limit, **kwargs)  # noqa: E731
    theirs = SyncVectorEnv([make] * n, autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    rng = np.random.default_rng(seed)
    low, high = ours.single_action_space.low, ours.single_action_space.high
    weights = rng.standard_normal((ours.single_observation_space.shape[0], len(low)))
    seeds = [int(s) for s in rng.integers(0, 2**31, n)]
    obs, infos = ours.reset(seed=seeds)
    expected_obs, expected_infos = theirs.reset(seed=seeds)
    assert_same(obs, expected_obs, "reset")
    assert_same(infos, expected_infos, "infos of a reset")
    ended = 0
    for step in range(steps):
        # Beyond the bounds too: nothing clips.
        actions = np.tanh(obs @ weights) * high if feedback else rng.uniform(1.2 * low, 1.2 * high, (n, len(low)))
        actions = policy(obs) if policy else actions.astype(np.float32)
        result, expected = ours.step(actions), theirs.step(actions)
        names = ("observations", "rewards", "terminations", "truncations", "infos")
        for name, a, b in zip(names, result, expected, strict=True):
            assert_same(a, b, f"{env_id} {kwargs} step {step} {name}")
        obs = result[0]
        done = result[2] | result[3]
        ended += int(done.sum())
        if mode is AutoresetMode.DISABLED and done.any():
            obs, infos = ours.reset(options={"reset_mask": done})
            other, other_infos = theirs.reset(options={"reset_mask": done})
            assert_same(obs, other, "reset by mask")
            assert_same(infos, other_infos, "infos of a reset by mask")
    ours.close()
    theirs.close()
    return ended


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_each_task_is_gymnasiums_to_the_bit(env_id, mode):
    assert compare(env_id, {}, mode, steps=45, seed=1, limit=12) >= 3 * N
    compare(env_id, {}, mode, steps=20, seed=2, limit=15, feedback=True)


@pytest.mark.parametrize("env_id", TASKS)
def test_each_argument_is_gymnasiums(env_id):
    for i, (name, value) in enumerate(ARGUMENTS[env_id].items()):
        compare(env_id, {name: value}, AutoresetMode.SAME_STEP, steps=8, seed=i, limit=6, n=2)
    compare(env_id, ARGUMENTS[env_id], AutoresetMode.NEXT_STEP, steps=8, seed=9, limit=6, n=2)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("seed", range(3))
def test_whole_episodes_with_drawn_arguments_are_gymnasiums(env_id, seed):
    rng = np.random.default_rng(seed)
    for feedback in (False, True):
        steps, ended = 0, 0
        while ended < 20:
            drawn = {k: v for k, v in ARGUMENTS[env_id].items() if rng.random() < 0.3 * bool(steps)}
            chunk = min(gym.spec(env_id).max_episode_steps, 300)
            ended += compare(
                env_id, drawn, AutoresetMode.SAME_STEP, chunk, steps + seed, limit=chunk, feedback=feedback
            )
            steps += chunk


@pytest.mark.slow
@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("feedback", [False, True])
def test_episodes_to_the_tasks_own_limit_are_gymnasiums(env_id, feedback):
    steps = gym.spec(env_id).max_episode_steps
    assert compare(env_id, {}, AutoresetMode.SAME_STEP, steps, seed=3, n=20, feedback=feedback) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_episodes_of_a_trained_policy_are_gymnasiums(seed):
    folder = Path(__file__).parent.parent / "agents" / "HalfCheetah-v5" / f"eggroll-seed{seed}"
    predict = load_agent(folder).predict
    assert compare("HalfCheetah-v5", {}, AutoresetMode.SAME_STEP, 1000, seed, n=20, policy=predict) == 20


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_layout_of_actions_does_not_matter(order, dtype):
    ours, theirs = TASKS["Ant-v5"](3), SyncVectorEnv([lambda: gym.make("Ant-v5")] * 3)
    ours.reset(seed=4), theirs.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(5):
        actions = np.asarray(rng.uniform(-1, 1, (3, 8)), dtype, order=order)
        assert np.array_equal(
            ours.step(actions)[1], [env.step(a)[1] for env, a in zip(theirs.envs, actions, strict=True)]
        )


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Humanoid-v5"])
def test_diverged_simulations_go_on_as_gymnasiums_in_every_mode(env_id):
    for mode in AutoresetMode:
        with mujoco_warnings_silenced():
            ours = TASKS[env_id](2, max_episode_steps=50, autoreset_mode=mode)
            theirs = SyncVectorEnv([lambda: gym.make(env_id, max_episode_steps=50)] * 2, autoreset_mode=mode)
            ours.reset(seed=1), theirs.reset(seed=1)
            ours.qvel[1] = 1e12
            theirs.envs[1].unwrapped.data.qvel[:] = 1e12
            actions = np.zeros(ours.action_space.shape, np.float32)
            result, expected = ours.step(actions), theirs.step(actions)
        for a, b in zip(result[:4], expected[:4], strict=True):
            assert np.array_equal(a, b)
        infos = result[4].get("final_info", result[4])
        assert infos["diverged"].tolist() == [False, True]
        assert "diverged" not in ours.step(actions)[4]


def test_a_single_simulation_an_int_seed_and_no_limit():
    envs = TASKS["Hopper-v5"](1, max_episode_steps=-1, terminate_when_unhealthy=1)
    obs, _ = envs.reset(seed=np.int64(3))
    assert np.array_equal(obs[0], gym.make("Hopper-v5").reset(seed=3)[0])
    again, _ = envs.reset(seed=np.array([3]))
    assert np.array_equal(obs, again)
    ends = [envs.step(np.ones((1, 3), np.float32))[2:4] for _ in range(60)]
    assert any(termination[0] for termination, _ in ends) and not any(truncation[0] for _, truncation in ends)


def test_the_camera_is_as_configured():
    envs = TASKS["Reacher-v5"](2, render_mode="rgb_array", default_camera_config={"distance": 7.0})
    assert envs.task.mujoco_renderer.default_cam_config == {"distance": 7.0}
    assert envs.render_mode == "rgb_array"


@pytest.mark.parametrize("env_id", TASKS)
def test_sub_envs_of_one_seed_start_and_go_on_as_gymnasiums(env_id):
    ours = TASKS[env_id](4, autoreset_mode=AutoresetMode.DISABLED)
    theirs = SyncVectorEnv([lambda: gym.make(env_id)] * 4, autoreset_mode=AutoresetMode.DISABLED)
    for seeds in ([1, 2, 3, 4], [7, 7, 8, 7], [8, 8, None, 7]):
        assert_same(ours.reset(seed=seeds)[0], theirs.reset(seed=seeds)[0], f"reset with {seeds}")
        for _ in range(2):  # their generators stand where they would
            assert_same(ours.reset()[0], theirs.reset()[0], f"reset after {seeds}")
    mask = {"reset_mask": np.array([False, True, True, False])}
    ours.reset(seed=[5, 5, 5, 5], options=mask), theirs.reset(seed=[5, 5, 5, 5], options=mask)
    assert_same(ours.reset()[0], theirs.reset()[0], "reset after a mask")


def test_misuse_is_named():
    envs = TASKS["Reacher-v5"](2)
    with pytest.raises(ResetNeeded):
        envs.step(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="seed must be one number or 2"):
        envs.reset(seed=[1])
    with pytest.raises(TypeError, match="array of bool"):
        envs.reset(options={"reset_mask": [True, False]})
    with pytest.raises(ValueError, match="a True value"):
        envs.reset(options={"reset_mask": np.zeros(2, bool)})
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 2\)"):
        envs.step(np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
        TASKS["Reacher-v5"](2, max_episode_steps=0)
