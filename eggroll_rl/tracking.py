"""A run's curves in TensorBoard and W&B."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import configure

from eggroll_rl.errors import ConfigError


@contextmanager
def tracked(
    model: BaseAlgorithm, name: str, settings: dict[str, object], tensorboard_log: Path | None, project: str | None
) -> Iterator[bool]:
    """Log what ``model`` learns while this lasts, and give whether there is anything to log to.

    :param name: of the run
    :param tensorboard_log: in it a folder of this name gets TensorBoard's files; with ``project`` alone in W&B's own
    :param project: of W&B, whose own environment variables say where it goes (``WANDB_MODE=offline``)
    :raises ConfigError: a package is missing
    """
    if tensorboard_log is None and project is None:
        yield False
        return
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError("TensorBoard is missing: pip install 'eggroll-rl[tensorboard]'") from error
    run, folder = None, tensorboard_log
    if project is not None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("W&B is missing: pip install 'eggroll-rl[track]'") from error
        run = wandb.init(project=project, name=name, config=settings, sync_tensorboard=True)
        folder = folder or Path(run.dir)
    failed = True
    try:
        assert folder is not None
        logger = configure(str(folder / name.replace("/", "-")), ["tensorboard"])
        model.set_logger(logger)
        try:
            yield True
        finally:
            logger.close()
        failed = False
    finally:
        if run is not None:
            run.finish(exit_code=int(failed))
