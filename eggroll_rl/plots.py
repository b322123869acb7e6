"""What all pictures share: matplotlib, which is optional, and colours."""

from typing import Any

from eggroll_rl.errors import ConfigError

# Okabe and Ito's, which colour-blind people tell apart, and some more.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#7B3294", "#8C510A",
)  # fmt: skip


def figure_class() -> Any:
    """Return matplotlib's ``Figure``.

    :raises ConfigError: matplotlib is missing
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib: pip install 'eggroll-rl[plots]'") from error
    return Figure
