"""Every error that eggroll-rl raises on purpose, so that one ``except EggrollError`` catches them all."""


class EggrollError(Exception):
    """Base class; its text is one sentence for the user."""


class ConfigError(EggrollError, ValueError):
    """A setting is wrong; the text names the field, its value and what would be right."""


class UnsupportedModuleError(EggrollError, TypeError):
    """A layer cannot be perturbed exactly; the text names it."""


class NonFiniteError(EggrollError, ArithmeticError):
    """A fitness or an update is NaN or infinite; parameters and optimizer are as they were before."""


class EpisodeError(EggrollError, RuntimeError):
    """An episode failed; the text names generation, member, episode, step and seed, with the env's traceback.

    :ivar member: whose it was, or the simulation where segments run; None outside of training
    """

    member: int | None = None


class TooManyFailuresError(EpisodeError):
    """More members of a generation failed than ``max_bad_fraction`` allows; nothing of it was used."""


class WorkerDiedError(EggrollError, RuntimeError):
    """A worker ended, or was stuck, again and again at the same slice; the text names generation, member and signal.

    :ivar member: whose env was being called; None if nobody knows
    """

    member: int | None = None


class RunFolderError(EggrollError):
    """A run folder is missing, foreign, damaged, or in the way."""


class ConsentError(EggrollError):
    """Loading this file would execute code, and the caller did not agree."""


class RenderError(EggrollError, RuntimeError):
    """No picture can be made on this machine; the text says what to install."""
