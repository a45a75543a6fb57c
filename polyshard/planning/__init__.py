"""Planning of training and serving runs of any size, on the meta device of one process."""

from polyshard.planning.cluster import Cluster
from polyshard.planning.planner import plan
from polyshard.planning.result import Plan, PlannedLayout
from polyshard.planning.serving import ServingPlan
from polyshard.planning.strategy import Strategy

__all__ = ["Cluster", "Plan", "PlannedLayout", "ServingPlan", "Strategy", "plan"]
