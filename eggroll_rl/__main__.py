"""``python -m eggroll_rl`` is ``eggroll-rl``."""

from eggroll_rl.cli import main

main()
