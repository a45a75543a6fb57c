"""One micro-batch of a rank, recorded on the meta device at the planned size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.errors import ConfigurationError, LayoutError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.layers.lm_loss import lm_loss
from polyshard.planning.blocks import record_equal_blocks_once
from polyshard.planning.contexts import planned_context
from polyshard.planning.experts import expert_parameters
from polyshard.planning.recorder import Flops, Level, Recorder
from polyshard.planning.shapes import ShapeCache
from polyshard.training.recompute import Mode, apply_recomputation

Factory = Callable[[Any, ParallelContext], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Numbers of parameters on one rank.

    Attributes:
        dense_each: of each trainable parameter that all replicas share.
        expert_each: of each trainable parameter of experts, which are distributed over the expert axis.
        frozen: parameters that are not trained.
        block: of the largest block, the unit that FSDP2 gathers.
        blocks: of all blocks.
    """

    dense_each: tuple[int, ...]
    expert_each: tuple[int, ...]
    frozen: int
    block: int
    blocks: int

    @property
    def dense(self) -> int:
        """Trainable parameters that all replicas share."""
        return sum(self.dense_each)

    @property
    def expert(self) -> int:
        """Trainable parameters of experts."""
        return sum(self.expert_each)

    @property
    def trainable(self) -> int:
        """All trainable parameters."""
        return self.dense + self.expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The figures of one micro-batch on the first rank of a pipeline stage.

    Attributes:
        sizes: numbers of parameters.
        held: bytes that the forward pass saves for the backward pass.
        levels: the largest memory at each level of accumulated gradients.
        logits: bytes of the logits of a chunk of tokens, in float32; 0 on a stage without the loss.
        output: bytes of the hidden states that the stage passes on.
        flops: executed FLOPs, recomputation included.
        traffic: payload bytes by axis and operation; see `Recorder`.
    """

    sizes: Sizes
    held: int
    levels: tuple[Level, ...]
    logits: int
    output: int
    flops: Flops
    traffic: Mapping[tuple[str, str], int]


def joined(stages: Sequence[Trace]) -> Trace:
    """Return the figures of a rank that runs a micro-batch through several pipeline stages."""
    if len(stages) == 1:
        return stages[0]
    sizes = [stage.sizes for stage in stages]
    traffic: Counter[tuple[str, str]] = Counter()
    for stage in stages:
        traffic.update(stage.traffic)
    return Trace(
        sizes=Sizes(
            dense_each=tuple(n for size in sizes for n in size.dense_each),
            expert_each=tuple(n for size in sizes for n in size.expert_each),
            frozen=sum(size.frozen for size in sizes),
            block=max(size.block for size in sizes),
            blocks=sum(size.blocks for size in sizes),
        ),
        held=sum(stage.held for stage in stages),
        levels=tuple(level for stage in stages for level in stage.levels),
        logits=max(stage.logits for stage in stages),
        output=max(stage.output for stage in stages),
        flops=sum((stage.flops for stage in stages), Flops()),
        traffic=dict(traffic),
    )


def build(factory: Factory, config: Any, layout: ParallelLayout, dtype: torch.dtype, stage: int = 0) -> nn.Module:
    """Return a stage's model on the meta device.

    Raises:
        LayoutError: the model cannot be divided in this way.
        ConfigurationError: the factory builds something else, or on another device.
    """
    model = factory(config, planned_context(layout, stage))
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"the factory does not build a model: got {model!r}, expected a torch.nn.Module.")
    model = model.to(dtype)
    placed = [name for name, p in model.named_parameters() if p.device.type != "meta"]
    if placed:
        raise ConfigurationError(
            f"the factory builds {placed[0]} on {model.get_parameter(placed[0]).device}: expected the context's "
            "device. Create parameters on parallel_context.device."
        )
    return model


def sizes_of(model: nn.Module) -> Sizes:
    """Count the parameters of a built model."""
    experts = {id(parameter) for parameter in expert_parameters(model)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    blocks = [item for part in model.modules() if isinstance(part, nn.ModuleList) for item in part]
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    inner = {id(p): p.numel() for block in blocks for p in block.parameters()}
    return Sizes(
        dense_each=tuple(p.numel() for p in trainable if id(p) not in experts),
        expert_each=tuple(p.numel() for p in trainable if id(p) in experts),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        block=max(counts, default=0),
        blocks=sum(inner.values()),
    )


def record(
    factory: Factory,
    config: Any,
    layout: ParallelLayout,
    *,
    rows: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    recompute: Mode = "none",
    stage: int = 0,
    hidden: torch.Size | None = None,
    shapes: ShapeCache | None = None,
) -> tuple[Trace, torch.Size]:
    """Record the forward and backward pass of one micro-batch; return it with the shape of the hidden states.

    Args:
        factory: builds the model.
        config: its first argument.
        layout: the planned layout.
        rows: sequences of a micro-batch.
        length: tokens of a sequence, over all ranks of the context axis.
        dtype: of parameters and computation.
        recompute: see `apply_recomputation`.
        stage: the pipeline stage.
        hidden: shape of the hidden states that a later stage receives.
        shapes: of operations in earlier recordings, which save time.

    Raises:
        LayoutError: the model or the sequence cannot be divided in this way.
        ConfigurationError: the model cannot run on the meta device.
    """
    model = build(factory, config, layout, dtype, stage).train()
    sizes = sizes_of(model)
    apply_recomputation(model, recompute)
    if length % layout.context:
        raise LayoutError(f"{length} tokens cannot be divided by context-parallel size {layout.context}")
    ids = torch.zeros(rows, length // layout.context, dtype=torch.int64, device="meta")
    recorder = Recorder((*model.parameters(), *model.buffers(), ids), shapes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(recorder.accumulated)
    record_equal_blocks_once(model, recorder)
    context: Any = planned_context(layout, stage)
    last = stage == layout.pipeline - 1
    inputs: dict[str, Any] = {"input_ids": ids}
    if hidden is not None:
        inputs["inputs_embeds"] = torch.empty(hidden, dtype=dtype, device="meta", requires_grad=True)
    with recorder, _naming(model):
        out = model(**inputs)
        shape, output = out.shape, out.nbytes
        logits = 0
        if last:
            recorder.in_loss = True
            out, logits = _loss(model, out, ids, context)
            recorder.in_loss = False
        held = recorder.live
        out.backward(None if last else torch.empty_like(out))
    return Trace(
        sizes=sizes,
        held=held,
        levels=recorder.levels(),
        logits=logits,
        output=output,
        flops=recorder.flops,
        traffic=dict(recorder.traffic),
    ), shape


@contextmanager
def _naming(model: nn.Module) -> Iterator[None]:
    """Turn torch's errors into one that says what a plan needs."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be recorded on the meta device: {error}. Avoid shapes and branches that "
            "depend on the values of tensors."
        ) from error


def _loss(model: Any, hidden: torch.Tensor, labels: torch.Tensor, context: GroupContext) -> tuple[torch.Tensor, int]:
    """Return the loss, and the bytes of float32 logits of a chunk of tokens."""
    if not callable(getattr(model, "compute_logits", None)):
        raise ConfigurationError(
            f"{type(model).__name__} has no compute_logits, which the loss needs. Add it, as "
            "docs/how-to/bring-a-model.md shows."
        )
    sizes = [0]

    def head(rows: torch.Tensor) -> torch.Tensor:
        logits = model.compute_logits(rows)
        sizes.append(logits.numel() * torch.float32.itemsize)
        return logits

    return lm_loss(hidden, head, labels, context, reduction="sum"), max(sizes)
