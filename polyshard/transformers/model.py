"""The factory that builds a transformers model from its config, and the module around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polyshard.attention.placement import sequence_positions
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.vocabulary import vocab_parallel_cross_entropy
from polyshard.transformers.attention import exchange_attention
from polyshard.transformers.layers import exchange_layers
from polyshard.transformers.memory import give_memory
from polyshard.transformers.vocabulary import exchange_vocabulary


class TransformersModel(nn.Module):
    """A causal language model of transformers as training and serving call it; its weights keep their names.

    What its class does to the logits after the head (a soft-cap, a factor) is done by its own code.
    """

    def __init__(self, model: Any, context: ParallelContext) -> None:
        super().__init__()
        self.config, self.parallel_context = model.config, context
        self._body: str = model.base_model_prefix
        for name, child in model.named_children():
            self.add_module(name, child)
        self._given = _Given()
        setattr(model, self._body, self._given)
        self._whole = (model,)  # in a tuple, so that its modules do not count twice

    def _apply(self, fn: Any, recurse: bool = True) -> TransformersModel:
        """Move with the rest, but keep what is computed from the config (rotary frequencies) in its own dtype."""
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            moved = module.get_buffer(name)
            if moved.dtype != buffer.dtype and not buffer.is_meta:
                module.register_buffer(name, buffer.to(moved.device), persistent=False)
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states, or the loss.

        Args:
            input_ids: `[batch, seq]`, or packed `[tokens]`.
            positions: of the same shape; default from 0 in each sequence.
            cu_seqlens: int32 `[sequences + 1]` for packed input; default one sequence.
            labels: the token after each token, -100 where none; of the same shape.
            inputs_embeds: in place of `input_ids`, `[..., hidden]`.

        Returns:
            Hidden states `[..., hidden]`, or with labels the mean loss.
        """
        if positions is None:
            positions = sequence_positions(input_ids, cu_seqlens, self.parallel_context)
        packed = positions.dim() == 1
        if packed:
            positions = positions.unsqueeze(0)
            input_ids = input_ids if input_ids is None else input_ids.unsqueeze(0)
            inputs_embeds = inputs_embeds if inputs_embeds is None else inputs_embeds.unsqueeze(0)
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        bounds = {} if cu_seqlens is None else {"cu_seq_lens_q": cu_seqlens}
        body = getattr(self, self._body)
        hidden = body(**tokens, position_ids=positions, use_cache=False, return_dict=True, **bounds).last_hidden_state
        hidden = hidden.squeeze(0) if packed else hidden
        if labels is None:
            return hidden
        vocabulary = self.config.get_text_config().vocab_size
        return vocab_parallel_cross_entropy(
            self.compute_logits(hidden), labels, self.parallel_context, vocab_size=vocabulary
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids to embeddings."""
        return getattr(self, self._body).get_input_embeddings()(input_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's shard of the logits, or all of them; `[..., hidden]` to `[..., vocabulary]`."""
        self._given.hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
        try:
            logits = self._whole[0](inputs_embeds=self._given.hidden, return_dict=True).logits
        finally:
            self._given.hidden = None
        return logits if hidden.dim() == 3 else logits.squeeze(0)


class _Given(nn.Module):
    """Stands where the decoder stood in the whole model, so that its forward is the head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None  # [batch, seq, hidden]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states that were given."""
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)  # pyrefly: ignore  # transformers types it Float


def transformers_model(config: Any, parallel_context: ParallelContext) -> TransformersModel:
    """Build the causal language model of a transformers config, with polyshard's layers in place of its own.

    A factory: `register_model("LlamaForCausalLM", "polyshard:transformers_model")` serves a checkpoint of that
    architecture by transformers' own code, and training builds the same model on any adapter.

    Attention that `replace_with_trainable_attention` recognises is exchanged, gated MLPs are fused, and every other
    linear layer follows transformers' own tensor-parallel plan. Attention that is not recognised keeps its code, and
    takes the engine's cache, at tensor-parallel 1. Each kind of exchanged norm and MLP is compared with the original
    first.

    Args:
        config: a transformers config, or the fields of one (`polyshard.read_config`).
        parallel_context: where this process stands; its tensor axis may have any size.

    Raises:
        ConfigurationError: it has no causal language model, or one that cannot be sharded; or the layout asks for
            pipeline, context or sequence parallel.
    """
    from transformers import AutoModelForCausalLM

    config = _transformers_config(config)
    layout = parallel_context.layout
    asked = {"pipeline": layout.pipeline > 1, "context": layout.context > 1, "sequence": layout.sequence_parallel}
    for way, wanted in asked.items():
        if wanted:
            raise ConfigurationError(f"transformers models have no {way} parallel here: tensor and data parallel alone")
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    except ValueError as error:
        raise ConfigurationError(f"transformers builds no causal language model of {type(config).__name__}") from error
    exchange_attention(model, parallel_context)
    exchange_vocabulary(model, parallel_context)
    exchange_layers(model, parallel_context)
    give_memory(model, parallel_context.device)
    return TransformersModel(model, parallel_context)


def _transformers_config(config: Any) -> Any:
    """The config itself, or the one whose fields a checkpoint's config.json has."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(config, PretrainedConfig):
        return config
    fields = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    try:
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            f"transformers_model needs a transformers config, got {type(config).__name__}: "
            "transformers.AutoConfig.from_pretrained(directory) reads one"
        ) from error
