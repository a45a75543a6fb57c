"""The check, before a step of a pipeline, that all its ranks have the same micro-batches and can run them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from polyshard.core.batch import MicroBatch
from polyshard.core.context import ParallelAxis, ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.training.prepared import told_error


def agree_over_pipeline(
    micro_batches: Sequence[MicroBatch],
    counted: Sequence[torch.Tensor],
    headless: bool,
    replays: bool,
    error: Exception | None,
    context: ParallelContext,
) -> tuple[bool, Exception | None]:
    """Return whether a rank of the pipeline replays experts, and the error to raise. A collective over its axis.

    Args:
        micro_batches: of this rank.
        counted: the number of their tokens that count.
        headless: whether the last stage is here, without a head, and a head is needed.
        replays: whether experts are replayed here.
        error: of this rank's preparation.
        context: the parallel context.

    Returns:
        The error is set on all ranks of the pipeline or on none: one of them has an error, they have different
        micro-batches, or there is no head.
    """
    axis: ParallelAxis = context.axis("pipeline")
    if axis.size == 1:
        return replays, error
    zero = torch.zeros((), dtype=torch.float64, device=context.device)
    mine = zero.expand(3)
    if error is None:
        structure = torch.full_like(zero, float(_structure(micro_batches)))
        mine = torch.stack((structure, torch.stack([*counted]).sum(), _content(micro_batches, context.device)))
    assert axis.collectives is not None
    flags = zero.new_tensor((float(headless), float(replays), float(error is not None)))
    reduced = axis.collectives.all_reduce(torch.cat((mine, -mine, flags)), "max")
    most, least, flags = reduced.split((3, 3, 3))
    if bool(flags[2]):
        return replays, told_error(error, axis, context)
    if bool(flags[0]):
        return replays, ConfigurationError(
            "The last pipeline stage has no compute_logits. Pass loss=, which sums the losses of a micro-batch."
        )
    if bool((most != -least).any()):
        return replays, ConfigurationError(
            f"the ranks of a pipeline have different micro-batches: got {len(micro_batches)} on this rank, with "
            f"{float(mine[1]):.0f} tokens. Pass the same ones on all ranks {axis.ranks}: select data by "
            "context.axis('data').rank, and seed samplers alike."
        )
    return bool(flags[1]), None


def _structure(micro_batches: Sequence[MicroBatch]) -> int:
    """Return a hash of names, shapes and dtypes that float64 represents."""
    shapes = [
        (name, tuple(value.shape), str(value.dtype)) if isinstance(value, torch.Tensor) else name
        for micro_batch in micro_batches
        for name, value in sorted(micro_batch.items())
    ]
    digest = hashlib.blake2b(repr((len(micro_batches), shapes)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def _content(micro_batches: Sequence[MicroBatch], device: torch.device) -> torch.Tensor:
    """Return a number that depends on all elements and their order, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, micro_batch in enumerate(micro_batches):
        for place, (_, value) in enumerate(sorted(micro_batch.items())):
            if isinstance(value, torch.Tensor) and value.numel():
                flat = value.detach().reshape(-1).to(device, torch.float64).nan_to_num()
                ramp = torch.arange(flat.numel(), dtype=torch.float64, device=device).remainder_(1021.0).add_(1.0)
                total = total + (flat @ ramp) * (1.0 + index + 0.37 * place)
    return total
