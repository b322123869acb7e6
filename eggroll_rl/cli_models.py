"""The commands of ``eggroll-rl`` that take a trained model: evaluate, record, enjoy, export."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from eggroll_rl.errors import ConfigError

gym_packages = click.option(
    "--gym-packages", multiple=True, metavar="MODULE", help="Import MODULE first, for the envs it registers."
)
_model_options = (
    click.option("--best", is_flag=True, help="The best policy instead of the final one (run folders)."),
    click.option("--env", "env_id", metavar="ID", help="Env of an SB3 model."),
    click.option("--algo", metavar="NAME", help="Algorithm of an SB3 model: ppo, sac, ..."),
    click.option("--trust-pickle", is_flag=True, help="Agree to unpickle an SB3 model, which can run code."),
    click.option("--vec-normalize", type=click.Path(path_type=Path), help="VecNormalize file of an SB3 model."),
    gym_packages,
)


def _takes_a_model(command: Any) -> Any:
    for option in reversed(_model_options):
        command = option(command)
    return click.argument("model", type=click.Path(path_type=Path))(command)


def _takes_models(command: Any) -> Any:
    for option in reversed(_model_options):
        command = option(command)
    return click.argument("models", metavar="MODEL...", type=click.Path(path_type=Path), nargs=-1, required=True)(
        command
    )


def _load(model: Path, best: bool, **options: Any) -> Any:
    from eggroll_rl.evaluation import load_agent

    return load_agent(model, "best" if best else "policy", **options)


@click.command()
@_takes_a_model
@click.option("--n-eval-episodes", type=click.IntRange(min=1), default=20, show_default=True, help="Episodes.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Reset seeds SEED, SEED + 1, ..."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(model: Path, n_eval_episodes: int, seed: int, as_json: bool, **options: Any) -> None:
    """Evaluate MODEL, a run folder or an SB3 .zip, with its deterministic policy."""
    from eggroll_rl.evaluation import evaluate as run

    agent = _load(model, **options)
    result = run(agent.predict, agent.factory, range(seed, seed + n_eval_episodes))
    if as_json:
        click.echo(json.dumps(result.as_dict(), allow_nan=False))
    else:
        click.echo(
            f"{agent.name}: {result.mean:.2f} ± {result.std:.2f} over {n_eval_episodes} episodes "
            f"of {sum(result.lengths) / n_eval_episodes:.0f} steps"
        )


@click.command()
@_takes_models
@click.option("--output", "-o", type=click.Path(path_type=Path), help=".mp4 or .gif. [default: videos/ENV-MODEL.mp4]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Reset seed of the episode.")
@click.option("--plain", is_flag=True, help="No shadows and reflections: ten times faster without a GPU.")
@click.option("--scale", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of the picture, or each tile.")
def record(models: tuple[Path, ...], output: Path | None, seed: int, plain: bool, scale: float, **options: Any) -> None:
    """Record one episode of each MODEL, a run folder or an SB3 .zip, as a video; several side by side."""
    from eggroll_rl import videos

    if options["gym_packages"]:
        videos.choose_gl()  # dm_control takes the renderer that is chosen when it is imported
    agents = [_load(model, **options) for model in models]
    if output is None:
        names = "-".join(agent.name for agent in agents)
        output = Path("videos") / f"{task_folder(models[0]).name}-{names}.mp4"
    bar = sys.stderr.isatty()
    if len(agents) == 1:
        recordings = [videos.record(agents[0], output, seed, plain, scale, progress_bar=bar)]
    else:
        recordings = videos.record_side_by_side(agents, output, seed, plain, scale, progress_bar=bar)
    for agent, video in zip(agents, recordings, strict=True):
        click.echo(
            f"{video.path}: {agent.name}, {video.frames} frames, {video.seconds:.1f} s at {video.fps:g} frames/s, "
            f"return {video.episode_return:.2f}"
        )


def task_folder(model: Path) -> Path:
    """Return ``agents/<ENV>`` of a run folder in it or in its ``compare/``."""
    parent = model.resolve().parent
    return parent.parent if parent.name == "compare" else parent


@click.command()
@_takes_a_model
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Reset seed of the first episode.",
)
@click.option("--episodes", type=click.IntRange(min=1), help="Stop after so many. [default: Ctrl-C]")
def enjoy(model: Path, seed: int, episodes: int | None, **options: Any) -> None:
    """Watch MODEL in a window."""
    from eggroll_rl.videos import show

    for episode_return in show(_load(model, **options), seed, episodes):
        click.echo(f"return {episode_return:.2f}")


@click.command()
@_takes_a_model
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help=".onnx, or .pt2 for torch.export.")
def export(model: Path, output: Path, **options: Any) -> None:
    """Write MODEL's policy, normalizer included, as a file that needs no eggroll_rl."""
    from eggroll_rl.export import export_file

    agent = _load(model, **options)
    if agent.policy is None:
        raise ConfigError(f"{model} holds a policy of SB3's own; only ours can be exported")
    click.echo(f"{export_file(agent.policy, output)}: observations in, actions out")


MODEL_COMMANDS = (evaluate, record, enjoy, export)
