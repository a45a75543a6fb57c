"""Starting: `initialize` and `shutdown` in a rank, and `run_ranks`, which starts ranks of a function."""

from polyshard.launch.ranks import RankError, run_ranks
from polyshard.launch.start import initialize, shutdown

__all__ = ["RankError", "initialize", "run_ranks", "shutdown"]
