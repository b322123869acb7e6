"""Recordings, in ``videos/`` by default: whole episodes at the env's own frame rate, one or several side by side."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.registration import EnvSpec
from mujoco import mj_name2id, mjtGeom, mjtObj, mjtRndFlag
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from eggroll_rl.envs import EnvFactory, time_limit
from eggroll_rl.errors import ConfigError, RenderError, RunFolderError
from eggroll_rl.evaluation import Acting, Agent
from eggroll_rl.observations import map_arrays

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
"""


@dataclass(frozen=True)
class Recording:
    """What was recorded; ``seconds`` is the video's length."""

    path: Path
    frames: int
    fps: float
    episode_return: float
    seconds: float


def record(
    agent: Agent, output: Path, seed: int = 0, plain: bool = False, scale: float = 1.0, progress_bar: bool = True
) -> Recording:
    """Record the episode that starts from reset seed ``seed``, to its end.

    Rendering reads the simulation and never advances it: the episode is the one that runs unrecorded.

    :param output: ``.mp4`` (H.264, yuv420p, which every browser plays) or ``.gif``
    :param plain: MuJoCo without shadows, reflections and smoothing, which is ten times faster without a GPU
    :param scale: of both sides of the picture, above 0 and at most 1
    :raises ConfigError: another suffix
    :raises RenderError: nothing can render here; the text says what to install
    """
    _check_output(output)
    choose_gl()
    env = _build(agent, "rgb_array", plain)
    try:
        total, fps = time_limit(env), _fps(env)
        episode = _Episode(env, agent, seed, scale)
        _write(output, fps, tqdm(episode, total=total and total + 1, desc="recording", disable=not progress_bar))
    finally:
        env.close()
    return Recording(output, episode.frames, fps, episode.episode_return, episode.frames / fps)


def record_side_by_side(
    agents: Sequence[Agent],
    output: Path,
    seed: int = 0,
    plain: bool = False,
    scale: float = 1.0,
    progress_bar: bool = True,
) -> list[Recording]:
    """Record the agents' episodes from reset seed ``seed`` as tiles of one video, with names and running returns.

    An episode that has ended keeps its last frame, greyed, until the longest one ends.

    :param scale: of each tile, as :func:`record`'s
    :return: one recording per agent, all of them of the same file; ``frames`` are those of its own episode
    :raises ConfigError: another suffix, or envs with different frame rates
    :raises RenderError: as :func:`record`
    """
    _check_output(output)
    choose_gl()
    envs: list[gym.Env] = []
    try:
        for agent in agents:
            envs.append(_build(agent, "rgb_array", plain))
        rates = {_fps(env) for env in envs}
        if len(rates) > 1:
            raise ConfigError(f"side by side needs one frame rate, got {', '.join(map(str, sorted(rates)))}")
        episodes = [_Episode(env, agent, seed, scale) for env, agent in zip(envs, agents, strict=True)]
        limits = [time_limit(env) for env in envs]
        total = None if None in limits else max(limit or 0 for limit in limits) + 1
        frames = _tiles([agent.name for agent in agents], episodes)
        _write(output, rates.pop(), tqdm(frames, total=total, desc="recording", disable=not progress_bar))
        fps = _fps(envs[0])
    finally:
        for env in envs:
            env.close()
    return [Recording(output, e.frames, fps, e.episode_return, e.frames / fps) for e in episodes]


def _check_output(output: Path) -> None:
    if output.suffix not in {".mp4", ".gif"}:
        raise ConfigError(f"output must end in .mp4 or .gif, got {output}")


def _fps(env: gym.Env) -> float:
    return float(env.metadata.get("render_fps") or 30)


def _write(output: Path, fps: float, frames: Iterable[np.ndarray]) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # An unfinished video must not look like a finished one.
        temporary = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
        try:
            with _writer(temporary, fps) as writer:
                for frame in frames:
                    writer.append_data(frame)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot write {output}: {error}") from error


def _tiles(names: Sequence[str], episodes: Sequence["_Episode"]) -> Iterator[np.ndarray]:
    """Yield the episodes' frames as one picture, up to three in a row and more in two or more rows."""
    streams = [iter(episode) for episode in episodes]
    last: list[Image.Image] = [Image.new("RGB", (2, 2)) for _ in episodes]
    active = [True] * len(episodes)
    columns = len(episodes) if len(episodes) <= 3 else -(-len(episodes) // 2) if len(episodes) <= 8 else 4
    while True:
        for i, stream in enumerate(streams):
            frame = next(stream, None) if active[i] else None
            if frame is not None:
                last[i] = Image.fromarray(frame)
            elif active[i]:
                active[i] = False
                last[i] = last[i].convert("L").convert("RGB")
        if not any(active):
            return
        width, height = (max(image.size[axis] for image in last) for axis in (0, 1))
        rows = -(-len(last) // columns)
        canvas = Image.new("RGB", (width * columns, height * rows))
        for i, (name, episode) in enumerate(zip(names, episodes, strict=True)):
            x, y = width * (i % columns), height * (i // columns)
            canvas.paste(last[i], (x, y))
            ended = "" if active[i] else ", ended"
            _caption(canvas, (x, y), width, f"{name}   {_number(episode.episode_return)}{ended}")
        yield _even(np.asarray(canvas))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.1f}"


def _caption(canvas: Image.Image, corner: tuple[int, int], width: int, text: str) -> None:
    """Write white on a dark bar over the top of a tile, as large as the tile's width allows."""
    size = max(width // 22, 8)
    draw = ImageDraw.Draw(canvas)
    x, y = corner
    draw.rectangle((x, y, x + width - 1, y + 2 * size), fill=(30, 30, 30))
    draw.text((x + size, y + size), text, fill=(255, 255, 255), font=ImageFont.load_default(size), anchor="lm")


def show(agent: Agent, seed: int = 0, episodes: int | None = None) -> Iterator[float]:
    """Play episodes in a window, yielding each return; without ``episodes`` until the user stops."""
    env = _build(agent, "human")
    try:
        index = 0
        while episodes is None or index < episodes:
            episode = _Episode(env, agent, seed + index, scale=1.0)
            for _ in episode:
                pass
            yield episode.episode_return
            index += 1
    finally:
        env.close()


class _Episode:
    """Iterate over the frames of one episode."""

    def __init__(self, env: gym.Env, agent: Agent, seed: int, scale: float):
        self._env, self._agent, self._seed, self._scale = env, agent, seed, scale
        self.frames = 0
        self.episode_return = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        if isinstance(self._agent.predict, Acting):
            self._agent.predict.restart()
        obs, _ = self._env.reset(seed=self._seed)
        yield self._frame()
        done = False
        while not done:
            action = self._agent.predict(map_arrays(lambda part: np.asarray(part)[None], obs))[0]
            obs, reward, terminated, truncated, _ = self._env.step(action)
            self.episode_return += float(reward)
            done = terminated or truncated
            yield self._frame()

    def _frame(self) -> np.ndarray:
        self.frames += 1
        # With render_mode "human" this is None, and the window is the output.
        frame = self._env.render()
        if not isinstance(frame, np.ndarray):
            return np.empty(0)
        if self._scale < 1:
            height, width = (max(round(side * self._scale), 2) for side in frame.shape[:2])
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
        return _even(frame)


def _even(frame: np.ndarray) -> np.ndarray:
    # yuv420p halves the colour planes: odd sides lose a line.
    return np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])


def _writer(path: Path, fps: float):  # type: ignore[no-untyped-def]  # imageio has no types
    if path.suffix == ".gif":
        return imageio.get_writer(path, mode="I", duration=1000 / fps, loop=0)
    return imageio.get_writer(
        path, fps=fps, codec="libx264", pixelformat="yuv420p", macro_block_size=2, quality=4, ffmpeg_log_level="error"
    )


def _build(agent: Agent, render_mode: str, plain: bool = False) -> gym.Env:
    with closing(agent.factory()) as probe:
        if render_mode not in probe.metadata.get("render_modes", ()):
            raise RenderError(f"{agent.name}'s env cannot render as {render_mode!r}")
        factory = _following(agent.factory, probe)
    try:
        env = factory(render_mode=render_mode)
        env.reset(seed=0)
        if isinstance(env.unwrapped, MujocoEnv):
            _widen_floor(env.unwrapped.model)
        if plain and isinstance(env.unwrapped, MujocoEnv):
            env.unwrapped.model.vis.quality.offsamples = 0  # read when the first picture is made
        env.render()
        if plain and isinstance(env.unwrapped, MujocoEnv):
            viewer: Any = env.unwrapped.mujoco_renderer.viewer
            for flag in (mjtRndFlag.mjRND_SHADOW, mjtRndFlag.mjRND_REFLECTION):
                viewer.scn.flags[int(flag)] = 0
    except gym.error.DependencyNotInstalled as error:
        raise RenderError(f"{error}: pip install 'eggroll-rl[classic]' brings it") from error
    except ConfigError:
        raise
    except Exception as error:  # drivers fail in many ways
        raise RenderError(f"this machine cannot render ({type(error).__name__}: {error}); {_ADVICE}") from error
    return env


def _widen_floor(model: Any, factor: float = 25.0) -> None:
    """Draw planes larger: physics takes them for endless, but a fast robot runs off their picture."""
    for geom in np.flatnonzero(model.geom_type == int(mjtGeom.mjGEOM_PLANE)):
        model.geom_size[geom, :2] *= factor
        if model.geom_matid[geom] >= 0 and not model.mat_texuniform[model.geom_matid[geom]]:
            model.mat_texrepeat[model.geom_matid[geom]] *= factor


def _following(factory: EnvFactory, env: gym.Env) -> EnvFactory:
    """Choose the model's camera that follows the robot, unless the user chose one.

    Gymnasium 1.4 takes a free camera instead, out of which HalfCheetah-v5 runs within two seconds.
    """
    task = env.unwrapped
    if not isinstance(factory.source, EnvSpec) or not isinstance(task, MujocoEnv):
        return factory
    chosen = {"camera_id", "camera_name", "default_camera_config"} & {*factory.source.kwargs, *factory.kwargs}
    if chosen or mj_name2id(task.model, mjtObj.mjOBJ_CAMERA, "track") == -1:
        return factory
    return replace(factory, kwargs={**factory.kwargs, "camera_name": "track"})


_ADVICE = "on Debian or Ubuntu `apt-get install libegl1 libgl1-mesa-dri` brings EGL, `libosmesa6` OSMesa"


def choose_gl() -> None:
    """Set ``MUJOCO_GL`` to EGL or else OSMesa, unless the user has set it.

    A driver that fails cannot be left in the process that tried it, so each is tried in one of its own.

    :raises RenderError: neither works
    """
    if not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws the classic envs
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return
    for backend in ("egl", "osmesa"):
        env = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
        if subprocess.run([sys.executable, "-c", _PROBE], env=env, capture_output=True, check=False).returncode == 0:
            os.environ.update(MUJOCO_GL=backend, PYOPENGL_PLATFORM=backend)
            return
    raise RenderError(f"neither EGL nor OSMesa works here; {_ADVICE}")
