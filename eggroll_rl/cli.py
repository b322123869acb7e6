"""``eggroll-rl``: train, evaluate, record, watch and compare agents; list what there is; measure throughput."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

import eggroll_rl
from eggroll_rl.cli_bench import bench
from eggroll_rl.cli_models import MODEL_COMMANDS, gym_packages
from eggroll_rl.errors import (
    ConfigError,
    ConsentError,
    EggrollError,
    EpisodeError,
    RenderError,
    RunFolderError,
    WorkerDiedError,
)
from eggroll_rl.signals import sigterm_raised, status_of

_OVERRIDES = {  # flags of `train` that are EGGROLL's own settings
    "fitness", "population_size", "sigma", "rank", "learning_rate", "n_eval_episodes", "fitness_shaping", "slice_size",
    "policy", "on_bad_member",
}  # fmt: skip


class _Number(click.ParamType):
    """A number, or text that a setting explains, such as lin_0.1."""

    name = "number"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return float(value)
        except ValueError:
            return value


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(eggroll_rl.__version__, prog_name="eggroll-rl")
def cli() -> None:
    """Train Gymnasium agents with low-rank evolution strategies (EGGROLL)."""


@cli.command()
@click.argument("env")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the whole run.")
@click.option("--total-timesteps", "-n", type=int, help="Env steps of all members together.")
@click.option("--n-workers", type=int, help="Worker processes; 0: none. The result is the same. [default: all cores]")
@click.option("--cluster", metavar="ADDRESS", help="Train on a Ray cluster: auto, HOST:PORT, or local to try it here.")
@click.option("--step-timeout", type=float, help="Seconds until a stuck worker is replaced; inf: never. [default: 300]")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Run folder. [default: agents/ENV/eggroll-seedSEED]",
)
@click.option("--fitness", help="episode: whole episodes; segment: a few thousand env steps per update.")
@click.option("--population-size", type=int, help="Members per generation, even.")
@click.option("--sigma", type=_Number(), help="Noise scale of episodes; lin_X falls from X to 0.")
@click.option("--rank", type=int, help="Rank of a weight's perturbation.")
@click.option("--learning-rate", type=_Number(), help="Step size, of episodes; lin_X falls from X to 0.")
@click.option("--n-eval-episodes", type=int, help="Training episodes per member.")
@click.option("--fitness-shaping", help="centered_rank, pair_rank, standardize, none or best_fraction.")
@click.option("--on-bad-member", help="A member that fails: raise an error, or rank it worst.")
@click.option("--slice-size", type=int, help="Members evaluated together; part of the result.")
@click.option("--policy", help="MlpPolicy, LinearPolicy, CnnPolicy, MultiInputPolicy or RecurrentPolicy.")
@click.option("--max-episode-steps", type=int, help="Time limit of the task, in place of the registered one.")
@click.option("--eval-freq", type=int, help="Env steps between evaluations; 0: only at the end. [default: a tenth]")
@click.option("--eval-episodes", type=int, help="Episodes per evaluation. [default: 10]")
@click.option("--checkpoint-every", type=int, help="Generations between checkpoints. [default: 10]")
@click.option("--keep-checkpoints", type=int, help="Checkpoints that are kept, the last ones. [default: 2]")
@click.option("--tensorboard-log", type=click.Path(path_type=Path), help="Folder for TensorBoard's files.")
@click.option("--track", metavar="PROJECT", help="Log to this project of W&B, too.")
@click.option("--resume", is_flag=True, help="Continue the run in the output folder.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@gym_packages
@click.pass_context
def train(context: click.Context, env: str, output: Path | None, resume: bool, overwrite: bool, **flags: Any) -> None:
    """Train on ENV: a Gymnasium id, module:id, or a preset file.

    Settings come from the flags, then from the preset (`eggroll-rl list`), then from the defaults.
    """
    from eggroll_rl.config import RunConfig, without_fitness
    from eggroll_rl.envs import load_preset
    from eggroll_rl.training import Interrupted, load_run_config
    from eggroll_rl.training import train as run

    packages = named_packages = flags.pop("gym_packages")
    logs = {name: flags.pop(name) for name in ("tensorboard_log", "track")}
    cluster = flags.pop("cluster")
    given = {name: value for name, value in flags.items() if value is not None and _was_given(context, name)}
    if resume:
        if output is None:
            output = default_folder(load_preset(env).get("env_id", env), flags["seed"])
        config = _resumed(load_run_config(output), env, given)
    else:
        table = load_preset(env)
        config = RunConfig.from_dict({**table, **{n: v for n, v in given.items() if n not in _OVERRIDES}}, env)
        if given.get("policy", config.eggroll.get("policy")) != config.eggroll.get("policy"):
            config.eggroll.pop("policy_kwargs", None)  # the preset's are for its own policy
        if given.get("fitness", config.eggroll.get("fitness", "episode")) != config.eggroll.get("fitness", "episode"):
            config.eggroll = without_fitness(config.eggroll)
        config.eggroll.update({n: v for n, v in given.items() if n in _OVERRIDES})
        config.check()
        if output is None:
            output = default_folder(config.env_id, config.seed)
    module = config.env_id.rpartition(":")[0]
    if module and config.env_id == env:  # named on the command line
        packages = (*packages, module)
    named = "".join(f" --gym-packages {package}" for package in named_packages)
    evaluator = _on_cluster(cluster, given.get("n_workers"))  # not a resumed run's, which was of another machine
    try:
        bar = sys.stderr.isatty()
        results = run(config, output, resume, overwrite, packages, progress_bar=bar, evaluator=evaluator, **logs)
    except (EpisodeError, WorkerDiedError) as error:
        if error.member is not None:
            raise type(error)(
                f"{error}\nreplay it: eggroll-rl replay {output} --member {error.member}{named}"
            ) from error
        raise
    except Interrupted as stop:
        there = "" if cluster is None else f" --cluster {cluster}"
        again = f"eggroll-rl train {env} --output {output} --resume{there}{named}"
        click.echo(f"stopped and saved; continue with: {again}", err=True)
        sys.exit(128 + stop.signum)
    final, best = results["evaluation"], results["best"]
    click.echo(
        f"{results['env_id']}, seed {results['seed']}: {results['timesteps']:,} steps in "
        f"{results['wall_seconds']:.1f} s ({results['env_steps_per_second'] or 0:,.0f} steps/s)\n"
        f"final policy  {final['mean_return']:9.2f} ± {final['std_return']:.2f} over {len(final['returns'])} episodes\n"
        f"best policy   {best['mean_return']:9.2f} ± {best['std_return']:.2f} (chosen at {best['timesteps']:,} steps)\n"
        f"saved in {output}"
    )


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--member", type=int, required=True, help="Its number in the generation that failed.")
@gym_packages
def replay(folder: Path, member: int, gym_packages: tuple[str, ...]) -> None:
    """Run one member of FOLDER's next generation again, alone and in this process: to see why it fails."""
    from eggroll_rl.training import replay as run

    generation, returns, lengths = run(folder, member, gym_packages)
    for episode_return, length in zip(returns, lengths, strict=True):
        click.echo(f"generation {generation}, member {member}: return {episode_return:.2f} after {length} steps")


def default_folder(env_id: str, seed: int) -> Path:
    """Return ``agents/<ENV>/eggroll-seed<S>``."""
    return Path("agents") / env_id.replace("/", "-").replace(":", "-") / f"eggroll-seed{seed}"


def _on_cluster(address: str | None, n_workers: int | None) -> Any:
    if address is None:
        return None
    from eggroll_rl.ray_workers import RayEvaluator

    return RayEvaluator(address, n_workers)


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _resumed(config: Any, env: str, given: dict[str, Any]) -> Any:
    """Apply the flags that may change in a resumed run, and refuse the others."""
    free = {"n_workers", "step_timeout", "eval_freq", "checkpoint_every", "keep_checkpoints", "total_timesteps"}
    stored = {**config.eggroll, **vars(config)}
    for name, value in given.items():
        if name in free:
            setattr(config, name, value)
        elif stored.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} {value} differs from the run's {name} ({stored.get(name)}); drop it to resume")
    config.check()
    if env not in {config.env_id, config.env_id.rpartition(":")[2]} and not env.endswith(".toml"):
        raise ConfigError(f"the run to resume is on {config.env_id}, not on {env}")
    return config


@cli.command("list")
def list_() -> None:
    """List the presets and the trained agents."""
    from eggroll_rl.agents import list_runs
    from eggroll_rl.envs import list_presets, read_toml

    click.echo("presets")
    for name, path in list_presets().items():
        try:
            click.echo(f"  {name:<28} {read_toml(path).get('total_timesteps', 0):>12,} steps   {path}")
        except ConfigError as error:
            click.echo(f"  {name:<28} {error}")
    click.echo("agents")
    for folder, results in list_runs():
        evaluation = results.get("evaluation", results)  # a comparison's runs have it at the top
        mean = evaluation.get("mean_return") if isinstance(evaluation, dict) else None
        click.echo(f"  {folder!s:<44} {mean if isinstance(mean, float) else float('nan'):>10.2f}")


class _TakesLists(click.Command):
    """Let ``--algos`` and ``--threshold`` take several words: everything up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        last = ""
        for word in args:
            follows = last in {"--algos", "--threshold"} and not re.match(r"-+[A-Za-z]", word)
            if follows and words[-1] != last:
                words.append(last)
            words.append(word)
            last = last if follows else word
        return super().parse_args(ctx, words)


@cli.command(cls=_TakesLists)
@click.argument("env")
@click.option("--algos", multiple=True, required=True, metavar="NAME...", help="From the list above, or module:Class.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each: 0, 1, ...")
@click.option("--seconds", type=float, help="Wall-clock per run, evaluations not counted.")
@click.option("--timesteps", "-n", type=int, help="Env steps per run.")
@click.option("--evaluations", type=int, default=18, show_default=True, help="Evaluations per run.")
@click.option("--eval-episodes", type=int, default=10, show_default=True, help="Episodes per evaluation.")
@click.option(
    "--threshold", type=float, multiple=True, metavar="RETURN...", help="Returns to time, beside Gymnasium's."
)
@click.option("--torch-threads", type=int, default=1, show_default=True, help="Threads of torch, for everyone.")
@click.option("--n-cores", type=int, help="Processes of algorithms that use several. [default: all cores]")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder. [default: agents/ENV]")
@click.option("--overwrite", is_flag=True, help="Replace runs of other settings that are in the way.")
@gym_packages
def compare(
    env: str,
    algos: tuple[str, ...],
    seeds: int,
    threshold: tuple[float, ...],
    n_cores: int | None,
    output: Path | None,
    overwrite: bool,
    gym_packages: tuple[str, ...],
    **budget: Any,
) -> None:
    """Compare algorithms on ENV: one task, one budget, one evaluation, several seeds.

    Algorithms: eggroll, openes (ours at full rank), ppo, sac, td3, a2c, and of sb3-contrib ars, tqc, trpo. Their
    settings come from the tables of the preset `envs/<ENV>.toml`. One run at a time; the same command goes on
    after an interruption and uses finished runs again.
    """
    from eggroll_rl import compare as comparing
    from eggroll_rl.compare_report import markdown, write_readme
    from eggroll_rl.compare_run import Rules
    from eggroll_rl.envs import load_preset
    from eggroll_rl.workers import available_cores

    rules = Rules(**budget, n_cores=n_cores or available_cores(), gym_packages=gym_packages)
    ours = output is None
    folder = output or default_folder(load_preset(env).get("env_id", env), 0).parent
    command = shlex.join(["eggroll-rl", *sys.argv[1:]])
    try:
        result = comparing.compare(env, algos, seeds, rules, folder, threshold, overwrite, command)
    except KeyboardInterrupt as stop:
        click.echo("stopped; the same command goes on with what is left", err=True)
        sys.exit(status_of(stop))
    click.echo(markdown(result))
    click.echo(f"saved in {folder}: comparison.png, .csv, .json, .md; the runs in {folder / 'compare'}")
    if ours:
        rebuilt = write_readme(folder.parent)
        said = "is rebuilt" if rebuilt else "is left alone: it was not written by this command"
        click.echo(f"{folder.parent / 'README.md'} {said}")


@cli.command()
@click.argument("env")
@click.option("--fitness", default="segment", show_default=True, help="segment or episode.")
@click.option("--trials", type=click.IntRange(min=1), default=50, show_default=True, help="Trials in all.")
@click.option("--seconds", type=float, help="Wall-clock per run, evaluations not counted.")
@click.option("--timesteps", "-n", type=int, help="Env steps per run.")
@click.option("--seeds", type=click.IntRange(min=1), default=2, show_default=True, help="Runs per trial: 0, 1, ...")
@click.option(
    "--objective", default="mean", show_default=True, help="final return, or mean over the evaluations: speed counts."
)
@click.option("--evaluations", type=int, default=10, show_default=True, help="Evaluations per run.")
@click.option("--eval-episodes", type=int, default=8, show_default=True, help="Episodes per evaluation.")
@click.option("--n-cores", type=int, help="Worker processes. [default: all cores]")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder. [default: runs/tune-ENV]")
@gym_packages
def tune(
    env: str,
    fitness: str,
    trials: int,
    seeds: int,
    objective: str,
    n_cores: int | None,
    output: Path | None,
    gym_packages: tuple[str, ...],
    **budget: Any,
) -> None:
    """Search EGGROLL's settings for ENV with Optuna, and write the best as a preset.

    The space is a table [tune] of the preset over our own; the preset's settings are the first trial. The same command
    goes on after an interruption, and with more --trials.
    """
    from eggroll_rl import tune as tuning
    from eggroll_rl.compare_run import Rules
    from eggroll_rl.envs import load_preset
    from eggroll_rl.workers import available_cores

    rules = Rules(**budget, n_cores=n_cores or available_cores(), gym_packages=gym_packages)
    folder = output or Path("runs") / f"tune-{default_folder(load_preset(env).get('env_id', env), 0).parent.name}"
    try:
        best = tuning.tune(tuning.Search(env, fitness, objective, seeds, rules), trials, folder)
    except KeyboardInterrupt as stop:
        click.echo("stopped; the same command goes on", err=True)
        sys.exit(status_of(stop))
    if not best:
        raise EggrollError(f"no trial succeeded; {folder / 'trials.csv'} lists them")
    click.echo((folder / "preset.toml").read_text(encoding="utf-8"))
    click.echo(f"saved in {folder}: preset.toml, trials.csv, study.log")


cli.add_command(bench)
for command in MODEL_COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line: one line on stderr and status 2 for a user's mistake, 1 for a failed run."""
    try:
        with sigterm_raised():
            cli(standalone_mode=False)
    except click.exceptions.Abort as stop:  # click's, of an interruption
        sys.exit(status_of(stop.__cause__))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (ConfigError, ConsentError, RunFolderError, RenderError) as error:
        _fail(str(error), 2)
    except EggrollError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except KeyboardInterrupt as stop:
        sys.exit(status_of(stop))


def _fail(message: str, status: int) -> None:
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(status)
