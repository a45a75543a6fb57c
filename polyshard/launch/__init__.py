"""Starting a run: `initialize` and `shutdown` in each rank, and `run_ranks`, which runs a function on several ranks."""

from polyshard.launch.ranks import RankError, run_ranks
from polyshard.launch.start import initialize, shutdown

__all__ = ["RankError", "initialize", "run_ranks", "shutdown"]
