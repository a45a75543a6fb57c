"""The default model of `polyshard verify`, in a form that an engine can serve.

It has the conformance suite's blocks, with a head size that vLLM's attention supports, and the same float64 reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.checkpoint import ModelConfig, save_checkpoint
from polyshard.core.context import ParallelContext
from polyshard.core.weight_table import collect_layouts, copy_into_shard
from polyshard.launch import initialize, shutdown
from polyshard.layers.norm import rms_norm
from polyshard.layers.pipeline import pipeline_stage, stage_layers
from polyshard.layers.vocabulary import lm_head, vocab_embedding
from polyshard.testing.model import SuiteBlock, SuiteConfig
from polyshard.testing.reference import reference_run, reference_weights

FACTORY = "polyshard.proof.small_model:build_model"
CONFIG = SuiteConfig(vocab_size=97, hidden_size=64, intermediate_size=96, head_dim=32)
_MAX_POSITION = 512


class SmallModel(nn.Module):
    """A decoder of two blocks with biases, QK norm, shared KV heads and a padded vocabulary."""

    def __init__(self, config: SuiteConfig, context: ParallelContext) -> None:
        super().__init__()
        self.stage = stage = pipeline_stage(config.num_layers, context)
        if stage.first:
            self.embed = vocab_embedding(config.vocab_size, config.hidden_size, context)
        self.blocks = stage_layers(stage, lambda _: SuiteBlock(config, context))
        if stage.last:
            self.norm = rms_norm(config.hidden_size, context)
            self.head = lm_head(config.hidden_size, config.vocab_size, context)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return hidden states `[..., hidden]` of token IDs `[batch, seq]` or packed `[tokens]`.

        A later pipeline stage gets those of the stage before as `inputs_embeds`.
        """
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            x = block(x, positions, cu_seqlens)
        return self.norm(x) if self.stage.last else x

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return this rank's shard of the logits."""
        return self.head(hidden)


def build_model(config: Any, parallel_context: ParallelContext) -> SmallModel:
    """Build the model; its sizes are those of `CONFIG`, regardless of the config."""
    del config
    return SmallModel(CONFIG, parallel_context)


def save_small_model(directory: Path) -> Path:
    """Save the model with the reference's weights as a Hugging Face directory."""
    context = initialize("torch", device="cpu")
    model = SmallModel(CONFIG, context)
    full, parameters = reference_weights(CONFIG, dtype=torch.float32), dict(model.named_parameters())
    for entry in collect_layouts(model).values():
        count = len(entry.checkpoint_names)
        for index, name in enumerate(entry.checkpoint_names):
            copy_into_shard(parameters[entry.parameter], entry.layout, count, index, full[name], 0, 1)
    fields = {
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": _MAX_POSITION,
    }
    save_checkpoint(model, directory, context, config=ModelConfig(**fields), architecture="PolyshardSmall")
    shutdown(context)
    return directory


def oracle(token_ids: list[int]) -> dict[str, torch.Tensor]:
    """Return `loss`, `logits` `[tokens, vocabulary]` and every gradient in float64; each token predicts the next."""
    labels = torch.tensor([*token_ids[1:], -100])
    found = reference_run(CONFIG, torch.tensor(token_ids)[None], labels[None])
    return {**found, "logits": found["logits"][0]}
