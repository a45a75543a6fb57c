"""Embedding and head of a transformers model, sharded over the tensor axis."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.layers.vocabulary import lm_head, vocab_embedding


class WrappedEmbedding(nn.Module):
    """A sharded embedding with a scale (Gemma), which sends no gradient to the row of a padding token."""

    def __init__(self, embedding: nn.Module, scale: float, padding: int | None) -> None:
        super().__init__()
        self.embedding = embedding
        self.scale, self.padding = scale, padding
        known: dict[str, Any] = vars(embedding).pop("weight_layouts")  # its checkpoint name is that of this module
        self.weight_layouts = {f"embedding.{name}": entry for name, entry in known.items()}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings: `[...]` to `[..., hidden]`."""
        x = self.embedding(input_ids)
        if self.padding is not None and torch.is_grad_enabled():
            x = torch.where((input_ids == self.padding).unsqueeze(-1), x.detach(), x)
        if self.scale == 1.0:
            return x
        return x * torch.tensor(self.scale, dtype=x.dtype, device="cpu")  # rounded to the dtype of the weights


def exchange_vocabulary(model: Any, context: ParallelContext) -> None:
    """Shard the embedding and the head, tied if they were tied.

    Raises:
        ConfigurationError: their classes cannot be sharded, at a tensor-parallel size above 1.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    scale = _scale(embedding)
    if scale is None or type(head) is not nn.Linear:
        if context.get_tensor_parallel_world_size() > 1:
            raise ConfigurationError(
                f"{type(embedding).__name__} and {type(head).__name__} of {type(model).__name__} cannot be sharded "
                "over the vocabulary. Run the model at tensor-parallel 1."
            )
        return
    tied = head.weight is embedding.weight
    new = vocab_embedding(embedding.num_embeddings, embedding.embedding_dim, context)
    new_head = lm_head(
        head.in_features, head.out_features, context, bias=head.bias is not None, tied_to=new if tied else None
    )
    # A server computes no gradients.
    padding = embedding.padding_idx if context.attention is None else None
    plain = scale == 1.0 and padding is None
    model.set_input_embeddings(new if plain else WrappedEmbedding(new, scale, padding))
    model.set_output_embeddings(new_head)


def _scale(embedding: Any) -> float | None:
    """Return the factor that an embedding multiplies by, found by running it; None if it does anything else."""
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", None)
    if not isinstance(embedding, nn.Embedding) or not isinstance(scale, (int, float)):
        return None
    trial: Any = copy.copy(embedding)
    trial._parameters, trial._buffers = dict(trial._parameters), dict(trial._buffers)
    with torch.no_grad(), torch.device("cpu"):
        weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        trial._parameters["weight"] = nn.Parameter(weight)
        for name in trial._buffers:
            trial._buffers[name] = torch.tensor(float(scale), dtype=torch.float32)
        ids = torch.tensor([2, 1])
        trial.padding_idx = None
        return float(scale) if torch.allclose(trial(ids), F.embedding(ids, weight) * scale) else None
