"""The same figures of a model that is cut into pipeline stages, through the adapter's training engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from polyshard.checkpoint import load_checkpoint, read_config
from polyshard.core.build_stages import build_stages
from polyshard.core.context import ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.optimizer import AdamW
from polyshard.core.precision import Precision
from polyshard.core.stages import Stages
from polyshard.core.weight_table import stored_parts
from polyshard.launch import initialize, shutdown
from polyshard.layers.logprobs import token_logprobs
from polyshard.layers.vocabulary import gather_logits, vocab_parallel_cross_entropy
from polyshard.registry import resolve
from polyshard.weights.gather import gather_shards

Named = dict[str, torch.Tensor]

_RATE = 4096.0  # so large that rounding of weights does not show in their change
# Every library has AdamW, and Megatron's sharded optimizer nothing else. Beside such an epsilon the norm of a gradient
# vanishes, and the update is the gradient times the rate, as in SGD.
_LINEAR = AdamW(lr=_RATE * 1e8, eps=1e8, betas=(0.0, 0.0), weight_decay=0.0)


def run_stages(adapter: str, tensor: int, pipeline: int, directory: str, factory: str, token_ids: list[int]) -> Named:
    """Return `loss`, `logits` and each gradient by checkpoint name, as `run_model` does; runs on each rank.

    Gradients are read from the change of the weights in an update. The ranks of a stage return its gradients, and
    those of the last also loss and logits.
    """
    context = initialize(adapter, tensor=tensor, pipeline=pipeline, timeout=300)
    config, stages = _load(context, directory, factory)
    engine = load_adapter(adapter).engine(stages, _LINEAR, context, max_grad_norm=None)
    ids = torch.tensor(token_ids, device=context.device)
    found: Named = {}

    def loss(hidden: torch.Tensor, micro_batch: Any) -> torch.Tensor:
        local = stages.compute_logits(hidden)
        found["logits"] = gather_logits(local.detach(), context, config.vocab_size).cpu()
        targets = micro_batch["input_ids"][1:]
        return vocab_parallel_cross_entropy(local[:-1], targets, context, vocab_size=config.vocab_size, reduction="sum")

    before = {name: shard.clone() for name, shard in engine.weights()}
    batch = {"input_ids": ids, "positions": torch.arange(len(ids), device=ids.device)}
    result = engine.train_batch([batch], loss, tokens=lambda _: torch.tensor(len(ids) - 1))
    engine.step()
    for name, shard in engine.weights():
        entry = engine.table[name]
        gradient = (before[name] - shard) / _RATE
        full = gather_shards(gradient, entry.layout, context.axis("tensor"))
        parts = stored_parts(entry.layout, len(entry.checkpoint_names), full)
        found.update((n, part.cpu().clone()) for n, part in zip(entry.checkpoint_names, parts))
    if stages.last is not None:
        found["loss"] = result.loss.float().cpu()
    shutdown(context)
    return found


def merged(of_ranks: Sequence[Named]) -> Named:
    """Return the figures of the full model from those of all ranks."""
    return {name: value for found in of_ranks for name, value in found.items()}


def logprobs_of_stages(
    context: ParallelContext,
    sequences: Sequence[tuple[list[int], list[int]]],
    directory: str,
    factory: str,
    dtype: torch.dtype,
    adapter: str,
    precision: Precision | None,
) -> torch.Tensor:
    """Return log-probabilities of sampled tokens from a training step, on the ranks of the last stage; else empty.

    Args:
        context: with several stages.
        sequences: prompt and sampled tokens of each.
        directory: the checkpoint.
        factory: reference of the model's factory.
        dtype: of the parameters.
        adapter: of the engine.
        precision: of the engine.
    """
    config, stages = _load(context, directory, factory)
    stages.to(dtype)
    engine = load_adapter(adapter).engine(stages, _LINEAR, context, max_grad_norm=None, precision=precision)
    lengths = [len(prompt) + len(sampled) for prompt, sampled in sequences]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ids = torch.tensor([token for prompt, sampled in sequences for token in prompt + sampled], device=context.device)
    rows = torch.cat(
        [
            torch.arange(start + len(prompt) - 1, start + length - 1, device=ids.device)
            for start, length, (prompt, _) in zip(starts, lengths, sequences)
        ]
    )
    found: list[torch.Tensor] = []

    def loss(hidden: torch.Tensor, micro_batch: Any) -> torch.Tensor:
        del micro_batch
        own = [
            token_logprobs(stages.compute_logits(hidden[part]), ids[part + 1], context, vocab_size=config.vocab_size)
            for part in rows.split(256)
        ]
        found.extend(part.detach() for part in own)
        return -torch.cat(own).sum()

    batch = {
        "input_ids": ids,
        "positions": torch.cat([torch.arange(length, device=ids.device) for length in lengths]),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32, device=ids.device),
    }
    engine.train_batch([batch], loss, tokens=lambda _: torch.tensor(len(rows)))
    return torch.cat(found).cpu() if found else torch.empty(0)


def _load(context: ParallelContext, directory: str, factory: str) -> tuple[Any, Stages]:
    config = read_config(directory)
    stages = build_stages(resolve(factory), config, context)
    load_checkpoint(stages, directory, context)
    return config, stages
