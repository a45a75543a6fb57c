"""Communication of a rank in a training step, by axis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from polyshard.planning.strategy import Strategy
from polyshard.planning.trace import Trace

Traffic = Mapping[tuple[str, str], int]

# Bytes that a rank sends for one byte of payload in a group of n ranks, with ring algorithms.
_FACTORS = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}


def payload_of(strategy: Strategy, trace: Trace) -> Traffic:
    """Return the payload bytes of a step by axis and operation; messages of a few scalars are left out.

    The axis `replica` is the data and the context axis together, over which gradients are averaged.

    Args:
        strategy: the strategy.
        trace: of one micro-batch.
    """
    layout, precision, sizes = strategy.layout, strategy.precision, trace.sizes
    total = Counter({key: nbytes * strategy.micro_batches for key, nbytes in trace.traffic.items()})
    if layout.pipeline > 1:
        total["pipeline", "send"] += 2 * trace.output * strategy.micro_batches * strategy.stages_per_rank
    if strategy.replicas == 1:
        return total
    compute, steps = precision.compute_dtype.itemsize, strategy.micro_batches
    reduced = (precision.reduce if precision.has_masters or precision.casts else precision.parameters).itemsize
    groups = {"replica": (sizes.dense, strategy.replicas)}
    groups["expert replicas"] = (sizes.expert, strategy.replicas // layout.expert)
    for axis, (count, size) in groups.items():
        if size == 1 or not count:
            continue
        match strategy.sharding:
            case "data":
                total[axis, "all_reduce"] += reduced * count
            case "zero1" | "zero2":
                total[axis, "reduce_scatter"] += reduced * count * (steps if strategy.sharding == "zero2" else 1)
                total[axis, "all_gather"] += precision.parameters.itemsize * count
            case "zero3":
                total[axis, "reduce_scatter"] += reduced * count * steps
                total[axis, "all_gather"] += compute * count * 2 * steps
            case "fsdp":
                kept = count - sizes.blocks if axis == "replica" else 0
                total[axis, "reduce_scatter"] += reduced * count
                total[axis, "all_gather"] += compute * (count * 2 - max(0, kept)) * steps
    return total


def sent_of(strategy: Strategy, payload: Traffic) -> dict[str, float]:
    """Return the bytes that a rank sends in a step, by axis."""
    sent: dict[str, float] = {}
    for (axis, operation), nbytes in payload.items():
        sent[axis] = sent.get(axis, 0.0) + nbytes * _FACTORS[operation](size_of(strategy, axis))
    return sent


def size_of(strategy: Strategy, axis: str) -> int:
    """Return the number of ranks of an axis, `replica` and `expert replicas` included."""
    derived = {"replica": strategy.replicas, "expert replicas": strategy.replicas // strategy.layout.expert}
    return derived.get(axis) or getattr(strategy.layout, axis)
