import gc
import warnings
from dataclasses import replace

import imageio.v2 as imageio
import numpy as np
import pytest
import toy

from eggroll_rl.envs import env_factory
from eggroll_rl.errors import ConfigError, RenderError
from eggroll_rl.evaluation import Agent, batched, evaluate
from eggroll_rl.mujoco_tasks import TASKS
from eggroll_rl.policies import MlpPolicy
from eggroll_rl.videos import choose_gl, record, record_side_by_side


def agent(env_id, steps):
    factory = env_factory(env_id, max_episode_steps=steps)
    env = factory()
    policy = MlpPolicy(env.observation_space, env.action_space, net_arch=[4], zero_last_layer=False)
    return Agent("test", batched(lambda obs: policy.predict(obs)[0]), factory)


def look(path):
    with warnings.catch_warnings():
        # imageio's reader leaves its pipes to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        with imageio.get_reader(path) as reader:
            content = reader.get_meta_data(), [np.asarray(frame) for frame in reader]
        del reader
        gc.collect()
    return content


@pytest.mark.parametrize(
    ("env_id", "fps", "plain"), [("HalfCheetah-v5", 20, False), ("HalfCheetah-v5", 20, True), ("Pendulum-v1", 30, True)]
)
def test_a_video_is_the_whole_episode_at_the_envs_frame_rate(env_id, fps, plain, tmp_path):
    subject = agent(env_id, 12)
    video = record(subject, tmp_path / "folder" / "video.mp4", seed=3, plain=plain, progress_bar=False)
    about, frames = look(video.path)
    assert about["codec"] == "h264" and about["pix_fmt"].startswith("yuv420p")
    assert about["fps"] == fps == video.fps
    assert len(frames) == video.frames == 13  # the reset, then one per step
    assert video.seconds == pytest.approx(13 / fps)
    assert np.abs(frames[0].astype(float) - frames[-1]).max() > 50  # something moved
    # Rendering did not change the episode, but on some CPUs MKL rounds each row of a batch differently.
    assert video.episode_return == pytest.approx(
        evaluate(subject.predict, subject.factory, [1, 2, 3]).returns[2], abs=1e-4
    )
    assert [path.name for path in video.path.parent.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(("steps", "shape"), [((4, 8), (500, 1000)), ((6, 3, 4, 5), (1000, 1000))])
def test_several_agents_side_by_side(steps, shape, tmp_path):
    subjects = [replace(agent("Pendulum-v1", n), name=f"agent {n}") for n in steps]
    videos = record_side_by_side(subjects, tmp_path / "tiles.mp4", seed=3, plain=True, progress_bar=False)
    about, frames = look(tmp_path / "tiles.mp4")
    assert frames[0].shape[:2] == shape and about["fps"] == 30
    # As long as the longest episode; each agent's is the one that it has alone.
    assert len(frames) == max(steps) + 1 and [video.frames for video in videos] == [n + 1 for n in steps]
    for subject, video in zip(subjects, videos, strict=True):
        assert video.episode_return == pytest.approx(evaluate(subject.predict, subject.factory, [3]).returns[0])
    # An ended episode stands still, in grey; the longest moves to the end.
    first, longest = (
        np.s_[60:500, 500 * i : 500 * (i + 1)] for i in (steps.index(min(steps)) % 2, steps.index(max(steps)) % 2)
    )
    at_the_end = [frame[first].astype(int) for frame in frames[-2:]]
    assert (np.abs(at_the_end[0] - at_the_end[1]) > 60).mean() < 1e-4  # a few pixels are H.264's
    assert np.abs(frames[-1][longest].astype(int) - frames[-3][longest]).max() > 100
    # Captions: white on dark, and not the same for every tile.
    bars = [frames[0][:44, 500 * i : 500 * (i + 1)].astype(int) for i in range(2)]
    assert all(bar.min() < 60 and bar.max() > 200 for bar in bars) and np.abs(bars[0] - bars[1]).max() > 100


def test_side_by_side_needs_one_frame_rate(tmp_path):
    with pytest.raises(ConfigError, match=r"one frame rate, got 20\.0, 30\.0"):
        record_side_by_side([agent("Pendulum-v1", 3), agent("HalfCheetah-v5", 3)], tmp_path / "a.mp4", plain=True)


def test_a_smaller_picture(tmp_path):
    alone = record(agent("Pendulum-v1", 3), tmp_path / "one.mp4", scale=0.25, progress_bar=False)
    subjects = [agent("Pendulum-v1", 3)] * 2
    record_side_by_side(subjects, tmp_path / "two.mp4", scale=0.25, progress_bar=False)
    whole = record(agent("Pendulum-v1", 3), tmp_path / "whole.mp4", progress_bar=False)
    one, two, large = (look(tmp_path / f"{name}.mp4")[1] for name in ("one", "two", "whole"))
    assert one[0].shape == (124, 124, 3) and two[0].shape == (124, 248, 3)  # 125, and an even number
    assert large[0].shape[:2] == (500, 500) and whole.frames == alone.frames
    # The same picture: where the large one is dark, the small one is.
    shrunk = large[0][:496, :496].reshape(124, 4, 124, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - one[0]).mean() < 8


def test_gif_too(tmp_path):
    video = record(agent("Pendulum-v1", 5), tmp_path / "video.gif", progress_bar=False)
    assert len(look(video.path)[1]) == 6


def test_an_env_that_draws_nothing_is_refused(tmp_path):
    subject = Agent("test", lambda obs: np.zeros((len(obs), 2)), env_factory(toy.make_target))
    with pytest.raises(RenderError, match="cannot render as 'rgb_array'"):
        record(subject, tmp_path / "video.mp4")


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.mp4 or \.gif"):
        record(agent("Pendulum-v1", 5), tmp_path / "video.avi")


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
def test_each_sub_env_is_drawn(env_id):
    choose_gl()
    envs = TASKS[env_id](2, render_mode="rgb_array", width=64, height=48)
    envs.reset(seed=0)
    for _ in range(10):
        envs.step(np.stack([np.ones(envs.single_action_space.shape), -np.ones(envs.single_action_space.shape)]))
    first, second = envs.render()
    assert first.shape == second.shape == (48, 64, 3) and first.std() > 0
    assert not np.array_equal(first, second)
    envs.close()
