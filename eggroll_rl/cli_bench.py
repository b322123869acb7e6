"""``eggroll-rl bench``."""

import json
from pathlib import Path

import click

from eggroll_rl.errors import ConfigError


@click.group()
def bench() -> None:
    """Measure speed on this machine."""


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_plot_option = click.option("--plot", type=click.Path(path_type=Path), help="Write a picture (PNG, PDF or SVG).")


@bench.command()
@click.argument("env_ids", nargs=-1, metavar="ENV...")
@click.option(
    "--n-workers",
    type=click.IntRange(min=1),
    help="Processes, and threads of the C limit, at most 2. [default: all cores]",
)
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--episode-steps", type=click.IntRange(min=1), default=200, show_default=True, help="Cap on episodes.")
@click.option("--real-ends", is_flag=True, help="Let episodes end where the task ends them.")
@click.option("--peers", default="", metavar="NAMES", help="Others to measure in the same rounds, by comma, or 'all'.")
@_json_option
@_plot_option
def throughput(
    env_ids: tuple[str, ...],
    n_workers: int | None,
    repetitions: int,
    episode_steps: int,
    real_ends: bool,
    peers: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Compare training's env steps per second with the raw MuJoCo C limit, and with peers, in one run.

    ENV is HalfCheetah-v5 by default. Peers: one_worker, ray, segments, sync, async, envpool, ppo, ppo_on_ours, ars,
    evotorch, one_member.
    """
    from eggroll_rl import bench as benchmarks
    from eggroll_rl.bench_peers import PEERS
    from eggroll_rl.bench_plot import check_plot, plot_throughput

    if plot:
        check_plot(plot)
    names = tuple(PEERS) if peers == "all" else tuple(name for name in peers.split(",") if name)
    results = []
    for env_id in env_ids or ("HalfCheetah-v5",):
        result = benchmarks.throughput(env_id, n_workers, repetitions, episode_steps, real_ends, names)
        results.append(result)
        if not as_json:
            click.echo(benchmarks.throughput_table(result))
    if as_json:
        click.echo(json.dumps(results))
    if plot:
        plot_throughput(results, plot)


@bench.command()
@click.option("--widths", default="64,256,1024", show_default=True, help="Widths of the layers, by comma.")
@click.option("--ranks", default="1,4", show_default=True, help="Ranks, by comma.")
@click.option("--populations", default="64,1024", show_default=True, help="Members, by comma.")
@click.option("--layers", type=click.IntRange(min=1), default=2, show_default=True, help="Linear layers.")
@_json_option
@_plot_option
def forward(widths: str, ranks: str, populations: str, layers: int, as_json: bool, plot: Path | None) -> None:
    """Compare a population's forward with the unperturbed one and with dense members, on one thread."""
    from eggroll_rl import bench_forward
    from eggroll_rl.bench_plot import check_plot, plot_forward

    if plot:
        check_plot(plot)
    rows = bench_forward.forward(
        _whole_numbers("widths", widths),
        _whole_numbers("ranks", ranks),
        _whole_numbers("populations", populations),
        n_layers=layers,
    )
    click.echo(json.dumps(rows) if as_json else bench_forward.forward_table(rows))
    if plot:
        plot_forward(rows, plot)


@bench.command()
@click.option("--widths", default="64,256", show_default=True, help="Widths of the two hidden layers, by comma.")
@click.option("--batches", default="1,16,256", show_default=True, help="Inputs for every member, by comma.")
@click.option("--population", type=click.IntRange(min=2), default=1024, show_default=True, help="Members.")
@click.option("--peers", default="torcheggroll,one_by_one", show_default=True, help="Others to time, by comma.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Interleaved rounds.")
@_json_option
def generation(widths: str, batches: str, population: int, peers: str, repetitions: int, as_json: bool) -> None:
    """Compare a generation of the core, on one thread, with torcheggroll's and with members that run one by one."""
    from eggroll_rl import bench_generation

    rows = bench_generation.generation(
        _whole_numbers("widths", widths),
        _whole_numbers("batches", batches),
        population + population % 2,
        repetitions,
        ("ours", *(name for name in peers.split(",") if name)),
    )
    click.echo(json.dumps(rows) if as_json else bench_generation.generation_table(rows))


@bench.command()
@click.argument("env_id", default="HalfCheetah-v5", metavar="ENV")
@click.option("--populations", default="1000,10000,100000", show_default=True, help="Members, by comma.")
@click.option("--widths", default="64,256", show_default=True, help="Widths of the two hidden layers, by comma.")
@click.option("--slice-size", type=click.IntRange(min=2), default=10, show_default=True, help="Members per slice.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds.")
@_json_option
@_plot_option
def scaling(
    env_id: str, populations: str, widths: str, slice_size: int, repetitions: int, as_json: bool, plot: Path | None
) -> None:
    """Measure what a generation is made of, and model it on up to 10,000 cores.

    With the ray extra the driver's time per call is measured, too.
    """
    from eggroll_rl import bench_scaling
    from eggroll_rl.bench_plot import check_plot, plot_scaling

    if plot:
        check_plot(plot)
    nets = tuple((width, width) for width in _whole_numbers("widths", widths))
    sizes = _whole_numbers("populations", populations)
    say = (lambda text: None) if as_json else (lambda text: click.echo(f"measuring {text} ...", err=True))
    result = bench_scaling.scaling(env_id, sizes, nets, slice_size, repetitions, say)
    click.echo(json.dumps(result) if as_json else bench_scaling.scaling_table(result))
    if plot:
        plot_scaling(result, plot)


def _whole_numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or (name == "populations" and any(number % 2 for number in numbers)):
        even = "even " if name == "populations" else ""
        raise ConfigError(f"--{name} must be {even}whole numbers above 0 with commas between, got {text!r}")
    return numbers
