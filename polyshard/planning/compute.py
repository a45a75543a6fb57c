"""Predicted time of a training step. It rests on assumed efficiencies, which a plan states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyshard.planning.cluster import Cluster
from polyshard.planning.communication import Traffic, sent_of
from polyshard.planning.contexts import span_of
from polyshard.planning.memory import Memory
from polyshard.planning.strategy import Strategy
from polyshard.planning.trace import Trace

_BACKWARD = 2 / 3  # part of a micro-batch's computation, in which gradients of the previous blocks are reduced
_OVERLAPPED = ("replica", "expert replicas")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        compute: of matrix products and attention, recomputation included.
        communication: that no computation hides, by axis.
        bubble: while a pipeline fills and drains.
        optimizer: of the update.
    """

    compute: float
    communication: Mapping[str, float]
    bubble: float
    optimizer: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.compute + sum(self.communication.values()) + self.bubble + self.optimizer

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        parts = {"compute": self.compute, "bubble": self.bubble, "optimizer": self.optimizer, **self.communication}
        return max(parts, key=lambda name: parts[name])


def step_time(strategy: Strategy, trace: Trace, payload: Traffic, memory: Memory, cluster: Cluster) -> StepTime:
    """Predict the time of a step on the slowest stage.

    Messages of the tensor, context, expert and pipeline axis wait for the computation before them. Those of gradients
    and gathered parameters run beside it: gradients beside the last micro-batch's backward pass, and the parameters of
    FSDP2 and ZeRO stage 3 beside all computation. A pipeline runs one forward and one backward pass in turn (1F1B).
    With several stages on each rank, its bubble is divided by their number.

    Args:
        strategy: the strategy.
        trace: of one micro-batch of the slowest stage.
        payload: see `payload_of`.
        memory: whose parameters, gradients and optimizer state the update reads and writes.
        cluster: the machines, and the efficiencies that are assumed.
    """
    layout = strategy.layout
    compute = trace.flops.total * strategy.micro_batches / (cluster.peak_flops * cluster.efficiency)
    sent = {
        axis: nbytes / cluster.bandwidth(span_of(layout, "replica" if axis in _OVERLAPPED else axis))
        for axis, nbytes in sent_of(strategy, payload).items()
    }
    waits = {axis: seconds for axis, seconds in sent.items() if axis not in _OVERLAPPED}
    gathers = strategy.sharding in ("fsdp", "zero3")
    window = compute if gathers else compute / strategy.micro_batches * _BACKWARD
    hidden = {axis: max(0.0, sent[axis] - window) for axis in _OVERLAPPED if axis in sent}
    share = (layout.pipeline - 1) / (strategy.micro_batches * strategy.stages_per_rank)
    update = memory.parameters + memory.gradients + 2 * memory.optimizer
    return StepTime(
        compute=compute,
        communication={**waits, **hidden},
        bubble=(compute + sum(waits.values())) * share,
        optimizer=update / (cluster.memory_bandwidth * 1e9),
    )
