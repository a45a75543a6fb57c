"""Memory of a rank in a training step, by kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from polyshard.core.zero_elements import ZeroElements, ZeroQuestion
from polyshard.planning.library import Library
from polyshard.planning.recorder import Level
from polyshard.planning.strategy import Strategy
from polyshard.planning.trace import Sizes, Trace

_MOMENTS = 2  # AdamW's
_LIVE = 1_000_000_000  # DeepSpeed's default stage3_max_live_parameters
_SUB_GROUP = 1_000_000_000  # DeepSpeed's default sub_group_size

# Bytes of gradients, and bytes that are gathered or under way, at a level of a micro-batch's pass.
_Held = Callable[[Level], tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a rank at the peak of a step.

    Attributes:
        parameters: of the model, as they are stored.
        gradients: accumulated over micro-batches.
        optimizer: masters and both moments of AdamW.
        activations: saved for the backward pass, and temporary.
        communication: parameters and gradients that are gathered or under way.
        reserve: see `Cluster.reserve`.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    reserve: int = 0

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(asdict(self).values())


def memory_of(
    strategy: Strategy,
    trace: Trace,
    stage: int = 0,
    reserve: int = 0,
    library: Library | None = None,
) -> Memory:
    """Return the memory of a rank of a pipeline stage.

    Source: Rajbhandari et al. 2020, "ZeRO"; Narayanan et al. 2021 for the micro-batches under way in a pipeline.

    Args:
        strategy: the strategy.
        trace: of one micro-batch of this rank's stages, in `strategy.precision.compute_dtype`.
        stage: the rank along the pipeline axis.
        reserve: see `Cluster.reserve`.
        library: that of the adapter; by default one that holds what every library does.
    """
    library = library or Library()
    precision, sizes = strategy.precision, trace.sizes
    stored, wide = precision.parameters.itemsize, precision.optimizer.itemsize
    counted = _counted(strategy, sizes, library)
    trained, shared = sizes.trainable, counted.owned if counted else _share(strategy, sizes)
    partitioned = strategy.sharding in ("zero3", "fsdp") and strategy.replicas > 1
    # A library with buckets keeps masters even of parameters that are as wide: DeepSpeed's flat partitions.
    flat = library.bucket > 0 and strategy.sharding.startswith("zero")
    states = _MOMENTS * wide + (wide if precision.has_masters or flat else 0)
    waiting = (passes_under_way(strategy, stage) - 1) * trace.held // strategy.stages_per_rank
    held = _held_by_engine(strategy, sizes, library.bucket, counted)
    copied_logits = trace.logits if library.copies_logits and precision.compute_dtype == torch.float32 else 0

    def at(level: Level) -> Memory:
        gradients, communication = held(level)
        return Memory(
            parameters=stored * ((shared if partitioned else trained) + sizes.frozen),
            gradients=gradients,
            optimizer=states * (trained if strategy.sharding == "data" else shared),
            activations=level.live + waiting + (copied_logits if level.in_loss else 0),
            communication=communication,
            reserve=reserve,
        )

    levels = (level for level in trace.levels if precision.has_masters or not level.copied)
    passes = max(map(at, levels), key=lambda memory: memory.total)
    if strategy.sharding == "zero3" and strategy.replicas > 1:
        update = replace(passes, activations=0, **_stage3_update(strategy, sizes, library.bucket))
        return max(passes, update, key=lambda memory: memory.total)
    if counted is None or not precision.has_masters:
        return passes
    cast = stored * counted.gradients + wide * counted.updating
    update = replace(passes, gradients=cast, activations=0, communication=0)
    return max(passes, update, key=lambda memory: memory.total)


def passes_under_way(strategy: Strategy, rank: int) -> int:
    """Return the largest number of forward passes of a pipeline rank's stages whose backward pass has not run.

    Args:
        strategy: the strategy; its schedule is 1F1B or interleaved 1F1B.
        rank: the rank along the pipeline axis.

    Examples:
        >>> from polyshard.planning.strategy import Strategy
        >>> layout = ps.ParallelLayout(pipeline=4)
        >>> passes_under_way(Strategy(layout=layout, micro_batches=8), rank=0)
        4
        >>> passes_under_way(Strategy(layout=layout, micro_batches=8, stages_per_rank=2), rank=0)
        11
    """
    ranks, several = strategy.layout.pipeline, strategy.stages_per_rank
    if several == 1:
        return min(ranks - rank, strategy.micro_batches)
    return min((several - 1) * ranks + 2 * (ranks - 1 - rank) + 1, strategy.micro_batches * several)


def _held_by_engine(strategy: Strategy, sizes: Sizes, bucket: int, counted: ZeroElements | None) -> _Held:
    """Return what an engine holds besides parameters, optimizer state and activations."""
    if counted is not None:
        each = strategy.precision.parameters.itemsize  # such libraries reduce gradients in the parameters' dtype
        return lambda _: (each * counted.gradients, each * counted.reducing)
    if strategy.replicas > 1 and strategy.sharding == "fsdp":
        return _gathered(strategy, sizes)
    if strategy.replicas > 1 and strategy.sharding != "data":
        return _zero(strategy, sizes, bucket)
    return _masters(strategy, sizes) if strategy.precision.has_masters else _replicated(strategy, sizes)


def _replicated(strategy: Strategy, sizes: Sizes) -> _Held:
    """DistributedDataParallel: gradients are views of its buckets, except those of earlier micro-batches."""
    full = strategy.precision.parameters.itemsize * sizes.trainable
    several = strategy.micro_batches > 1
    if strategy.replicas > 1:
        return lambda _: (full, full if several else 0)
    return lambda level: (full if several else level.gradients, 0)


def _masters(strategy: Strategy, sizes: Sizes) -> _Held:
    """Gradients are added up in a wider dtype, and sent from messages of that dtype."""
    reduced, compute = strategy.precision.reduce.itemsize, strategy.precision.compute_dtype.itemsize
    full, several, sends = reduced * sizes.trainable, strategy.micro_batches > 1, strategy.replicas > 1

    def at(level: Level) -> tuple[int, int]:
        new = level.gradients * reduced // compute
        return full if several else new, new if sends else 0

    return at


def _zero(strategy: Strategy, sizes: Sizes, bucket: int) -> _Held:
    """ZeRO: what each stage keeps of the gradients, and the buffers in which they are reduced.

    Stage 1 keeps full gradients: in the reduction's dtype, or with buckets and masters in that of the parameters beside
    a part in the former. DeepSpeed has two buckets in stage 2: one is reduced while the other is filled. It has one if
    gradients need no cast. Stage 3 has one bucket in the reduction's dtype, and a copy of it while it is reduced
    (`reduce_scatter_coalesced` of DeepSpeed 0.19).
    """
    precision, share = strategy.precision, _share(strategy, sizes)
    compute, reduced = precision.compute_dtype.itemsize, precision.reduce.itemsize
    own, buffer = reduced * share, compute * min(sizes.trainable, bucket)
    gathered = precision.parameters.itemsize * share  # after the update
    match strategy.sharding:
        case "zero1" if bucket and precision.has_masters:
            held = compute * sizes.trainable + own, buffer + gathered
        case "zero1":
            held = reduced * sizes.trainable, gathered
        case "zero2":
            held = own, buffer * (2 if precision.has_masters else 1)
        case _:
            live = compute * min(sizes.trainable + sizes.frozen, _LIVE)
            held = own, 2 * reduced * min(sizes.trainable, bucket) + live
    return lambda _: held


def _stage3_update(strategy: Strategy, sizes: Sizes, bucket: int) -> dict[str, int]:
    """ZeRO stage 3 during the update: its gradients beside a copy of those of one group of parameters."""
    reduced, share = strategy.precision.reduce.itemsize, _share(strategy, sizes)
    return {
        "gradients": reduced * (share + min(share, _SUB_GROUP)),
        "communication": reduced * min(sizes.trainable, bucket),
    }


def _gathered(strategy: Strategy, sizes: Sizes) -> _Held:
    """FSDP2: a block is gathered while it computes, and what is in no block for the whole pass.

    A block's backward pass holds its parameters, the gathered ones of the block before it, its gradients, and a copy of
    them that is being reduced. FSDP2 keeps full gradients of all but the last micro-batch.
    """
    precision = strategy.precision
    reduced, compute = precision.reduce.itemsize, precision.compute_dtype.itemsize
    root = sizes.trainable + sizes.frozen - sizes.blocks
    share = _share(strategy, sizes) / sizes.trainable
    several = strategy.micro_batches > 1

    def at(level: Level) -> tuple[int, int]:
        of_root = min(level.gradients, compute * root)
        of_blocks = (level.gradients - of_root) // compute * reduced
        full = reduced * sizes.trainable
        own = round(share * (full if several else of_blocks))
        block = sizes.block * (2 * compute + (compute + reduced if level.gradients else 0)) if level.in_block else 0
        last = reduced * root if not level.in_block and of_blocks else 0
        return own + (full if several else of_root), compute * root + block + last

    return at


def _counted(strategy: Strategy, sizes: Sizes, library: Library) -> ZeroElements | None:
    """Return what a library holds that divides parameters among the ranks by its own rule."""
    if library.zero_elements is None or strategy.replicas == 1 or strategy.sharding not in ("zero1", "zero2"):
        return None
    question = ZeroQuestion(
        stage=int(strategy.sharding.removeprefix("zero")),
        dense=sizes.dense_each,
        expert=sizes.expert_each,
        frozen=sizes.frozen,
        replicas=strategy.replicas,
        holders=_holders(strategy),
        micro_batches=strategy.micro_batches,
    )
    return library.zero_elements(question)


def _share(strategy: Strategy, sizes: Sizes) -> int:
    """Return the number of parameters that a rank keeps if the replicas share them."""
    return -(-sizes.dense // strategy.replicas) + -(-sizes.expert // _holders(strategy))


def _holders(strategy: Strategy) -> int:
    """Return the number of ranks that hold the same experts."""
    return max(1, strategy.replicas // strategy.layout.expert)
