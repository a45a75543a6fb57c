"""Many models of transformers on the same ranks, one after the other. Top-level functions: ranks import them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

import polyshard as ps
from support.workers.on_ranks import full_gradients

LENGTHS = (24, 9)  # tokens; windows of the models are shorter


def token_ids(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[2, tokens]`, with a padding token among them, and another sequence `[1, tokens]`."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, LENGTHS[0]), (1, LENGTHS[1]))
    rows, other = (torch.randint(1, config.vocab_size, shape, generator=generator) for shape in shapes)
    rows[0, 5] = getattr(config, "pad_token_id", None) or 0
    return rows, other


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1)


def original_outcome(directory: Path) -> dict[str, Any]:
    """Logits of rows and of another sequence, loss and gradients of the rows: by transformers alone, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    rows, other = token_ids(model.config)
    output = model(rows, use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels_of(rows).flatten())
    loss.backward()
    with torch.no_grad():
        other_logits = model(other, use_cache=False).logits
    names = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    names = revert_weight_conversion(model, names)  # experts are stored one by one
    packed = torch.cat((output.logits[0].detach(), other_logits[0]))
    return {"logits": output.logits.detach(), "packed": packed, "loss": loss.item(), "gradients": names}


def families_outcomes(directories: dict[str, Path], axis: str = "tensor") -> dict[str, dict[str, Any]]:
    """The same by `transformers_model` over all ranks; packed sequences are None where the model refuses them."""
    torch.set_default_dtype(torch.float64)
    try:
        context = ps.initialize(timeout=60, **{axis: int(os.environ.get("WORLD_SIZE", "1"))})
        found = {name: _outcome(directory, context) for name, directory in directories.items()}
        ps.shutdown(context)
        return found
    finally:
        torch.set_default_dtype(torch.float32)


def families_on_axes(axes: dict[str, dict[str, Path]]) -> list[dict[str, dict[str, Any]]]:
    return [families_outcomes(directories, axis) for axis, directories in axes.items()]


def _outcome(directory: Path, context: ps.ParallelContext) -> dict[str, Any]:
    model = ps.transformers_model(transformers.AutoConfig.from_pretrained(directory), context).eval()
    ps.load_checkpoint(model, directory, context)
    vocabulary = model.config.vocab_size

    def logits(*inputs: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            shard = model.compute_logits(model(*inputs, **options))
        return shard if shard.shape[-1] == vocabulary else ps.gather_logits(shard, context, vocabulary)

    rows, other = token_ids(model.config)
    loss = model(rows, labels=labels_of(rows))
    loss.backward()
    for weight in model.parameters():  # a pooler that no logit depends on
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    bounds = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)
    try:
        packed = logits(torch.cat((rows[0], other[0])), cu_seqlens=bounds)
    except ps.ConfigurationError as error:
        packed = str(error)
    if context.get_tensor_parallel_world_size() == 1:
        ps.save_checkpoint(model, directory / "again", context, config=model.config)
    return {"logits": logits(rows), "packed": packed, "loss": loss.item(), "gradients": full_gradients(model, context)}
