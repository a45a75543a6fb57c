"""For tests of adapters and models: functions run on several ranks, with hard timeouts and each rank's traceback."""

from polyshard.testing.ranks import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
