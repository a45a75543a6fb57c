"""Padding of micro-batches to one shape, for pipelines whose buffers have a fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyshard.core.batch import IGNORED, MicroBatch
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError

Shape = tuple[int, ...]


def padded_shape(shapes: Sequence[Sequence[int]], context: ParallelContext, own_loss: bool) -> Shape | None:
    """Return the shape to which all token IDs are padded; None if they have one shape.

    Args:
        shapes: `[tokens]` or `[batch, seq]`, of the token IDs of each micro-batch.
        context: the parallel context.
        own_loss: whether the loss is not the default.

    Raises:
        ConfigurationError: the numbers of dimensions differ, or the padding would not be at the end of a sequence.
    """
    found = {tuple(shape) for shape in shapes}
    if len(found) == 1:
        return None
    if len({len(shape) for shape in found}) > 1:
        raise ConfigurationError(
            f"micro-batches of a pipeline have different dimensions: got {sorted(found)}, expected [tokens] or "
            "[batch, seq] for all."
        )
    if context.axis("context").size > 1:
        raise ConfigurationError(
            f"micro-batches of a pipeline have different shapes under context parallel: got {sorted(found)}, expected "
            "one shape. Pad them before polyshard.context_shard."
        )
    if own_loss and context.layout.sequence_parallel and context.axis("tensor").size > 1:
        raise ConfigurationError(
            f"micro-batches of a pipeline have different shapes under sequence parallel: got {sorted(found)}, expected "
            "one shape for a loss of your own. Pad them, or use the default loss."
        )
    return tuple(max(sizes) for sizes in zip(*found))


def pad_arguments(arguments: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Pad the arguments of a model's forward to token IDs of `shape`, at the end of each row.

    Packed tokens get one more sequence. Positions continue with 0, 1, ...; everything else is padded with 0.

    Raises:
        ConfigurationError: an argument is a tensor that does not have the shape of `input_ids` first.
    """
    tokens = tuple(arguments["input_ids"].shape)
    if tokens == shape:
        return dict(arguments)
    padded: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "cu_seqlens" and value is not None:
            padded[name] = torch.cat((value, value.new_tensor([shape[0]])))
        elif isinstance(value, torch.Tensor) and value.dim():
            if tuple(value.shape[: len(tokens)]) != tokens:
                raise ConfigurationError(
                    f"{name} cannot be padded: got shape {tuple(value.shape)}, expected {tokens}, that of input_ids, "
                    "first. Pass micro-batches of one shape."
                )
            padded[name] = _pad(value, tokens, shape, name)
        else:
            padded[name] = value
    return padded


def unpadded(
    output: torch.Tensor, micro_batch: MicroBatch, tokens: Sequence[int], shape: Shape
) -> tuple[Any, MicroBatch]:
    """Return the output without padding, and the micro-batch that the loss gets.

    Under sequence parallel the output is a shard of the tokens: the labels are padded instead.
    """
    if tuple(tokens) == shape:
        return output, micro_batch
    if tuple(output.shape[: len(shape)]) == shape:
        return output[tuple(slice(0, size) for size in tokens)], micro_batch
    labels = torch.full(shape, IGNORED, dtype=micro_batch["labels"].dtype, device=micro_batch["labels"].device)
    labels[tuple(slice(0, size) for size in tokens)] = micro_batch["labels"]
    return output, {**micro_batch, "labels": labels}


def _pad(value: torch.Tensor, tokens: Shape, shape: Shape, name: str) -> torch.Tensor:
    result = value.new_zeros((*shape, *value.shape[len(tokens) :]))
    if name == "positions":
        if len(shape) == 1:
            result[tokens[0] :] = torch.arange(shape[0] - tokens[0], device=value.device)
        else:
            result.copy_(torch.arange(shape[1], device=value.device).expand(shape))
            result[: tokens[0], tokens[1] :] = (
                value[:, -1:] + 1 + torch.arange(shape[1] - tokens[1], device=value.device)
            )
    result[tuple(slice(0, size) for size in tokens)] = value
    return result
