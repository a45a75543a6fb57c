"""Validation of token IDs and labels: one outside the vocabulary is an error instead of a silent zero."""

from __future__ import annotations

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Check that token IDs are in `[0, vocab_size)`.

    On the CPU the error names the ID. On a GPU and under torch.compile the check is an asynchronous assertion, which
    does not wait for the device.

    Args:
        input_ids: integers of any shape.
        vocab_size: logical size, without padding.

    Raises:
        IndexError: an ID is outside the vocabulary (on the CPU).
        ConfigurationError: the IDs are no tensor of int64 or int32.

    Examples:
        >>> check_ids(torch.tensor([0, 5]), vocab_size=5)
        Traceback (most recent call last):
        IndexError: token ID 5 is outside the vocabulary: expected 0 to 4
    """
    if not isinstance(input_ids, torch.Tensor):
        raise ConfigurationError(
            f"input_ids are no tensor: got {type(input_ids).__name__}, expected int64 token IDs. Convert them."
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ConfigurationError(
            f"input_ids have the wrong dtype: got {input_ids.dtype}, expected torch.int64. Convert them."
        )
    if not input_ids.numel() or input_ids.device.type == "meta":
        return
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        inside = (input_ids >= 0) & (input_ids < vocab_size)
        torch._assert_async(inside.all(), f"a token ID is outside the vocabulary of {vocab_size}")
        return
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocab_size:
        wrong = int(low) if low < 0 else int(high)
        raise IndexError(f"token ID {wrong} is outside the vocabulary: expected 0 to {vocab_size - 1}")


def check_labels(labels: torch.Tensor, vocab_size: int, ignore_index: int | None) -> None:
    """Check that labels are in `[0, vocab_size)` or equal to `ignore_index`; see `check_ids`.

    Raises:
        ValueError: a label is neither (on the CPU).
    """
    if not labels.numel() or labels.device.type == "meta":
        return
    right = (labels >= 0) & (labels < vocab_size)
    if ignore_index is not None:
        right = right | (labels == ignore_index)
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(right.all(), f"a label is outside the vocabulary of {vocab_size}")
    elif not right.all():
        allowed = "" if ignore_index is None else f", or {ignore_index} for no label"
        raise ValueError(
            f"label {int(labels[~right][0])} is outside the vocabulary: expected 0 to {vocab_size - 1}{allowed}"
        )


def check_of_logits(ids: torch.Tensor, logits: torch.Tensor, vocab_size: int | None, size: int) -> None:
    """Check that each row of logits has one integer ID, and that the logits have a column for each token.

    Args:
        ids: `[...]`, token IDs or labels.
        logits: `[..., local vocabulary]`.
        vocab_size: logical size as given; None for all columns.
        size: of the tensor axis.

    Raises:
        ValueError: the shape or dtype of the IDs is wrong, or `vocab_size` is larger than the number of columns.
    """
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"targets are no tensor: got {type(ids).__name__}, expected int64 token IDs. Convert them.")
    if logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"targets have the wrong shape: got {tuple(ids.shape)}, expected {tuple(logits.shape[:-1])}, that of the "
            "logits without the last dimension"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"targets have the wrong dtype: got {ids.dtype}, expected torch.int64. Convert them.")
    columns = logits.shape[-1] * size
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size is invalid: got {vocab_size}, expected 1 to {columns}, the columns of the logits on all "
            "tensor-parallel ranks. Pass the vocabulary size of the head."
        )


def check_present(losses: torch.Tensor, labels: torch.Tensor) -> None:
    """Check that no label has a logit of -inf, which padding columns of the vocabulary have; see `check_ids`.

    Args:
        losses: `[...]`, the loss of each label.
        labels: `[...]`.

    Raises:
        ValueError: a label has one (on the CPU).
    """
    if not losses.numel() or losses.device.type == "meta":
        return
    absent = losses.detach() == torch.inf
    if losses.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(~absent.any(), "a label's logit is -inf: it is outside the vocabulary, or masked")
    elif absent.any():
        raise ValueError(
            f"label {int(labels[absent][0])} has a logit of -inf: it is outside the vocabulary, whose padding has such "
            "logits, or masked"
        )


def check_ids_of(layer: nn.Module, vocab_size: int) -> None:
    """Make an embedding check its token IDs in every call."""
    layer.register_forward_pre_hook(IdCheck(vocab_size))


class IdCheck:
    """A forward pre-hook of an embedding. Engines omit it, since they check the IDs of their requests."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        """Check the first argument of the forward."""
        check_ids(arguments[0], self.vocab_size)
