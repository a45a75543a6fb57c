"""The factory that builds a transformers model from its config, and the module around it."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyshard.attention.defaults import sequence_positions
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.layers.vocabulary import vocab_parallel_cross_entropy
from polyshard.transformers.attention import exchange_attention
from polyshard.transformers.kept_attention import kept_shards_by_heads
from polyshard.transformers.layers import exchange_layers, replicate_exactly
from polyshard.transformers.meta_weights import give_memory
from polyshard.transformers.mixtures import find_mixtures, store_mixtures
from polyshard.transformers.replaced.requirement import TRANSFORMERS
from polyshard.transformers.trial.kinds import kept_modules
from polyshard.transformers.trial.trial import try_model
from polyshard.transformers.trial.unsupported import (
    refuse_lost_sharing,
    refuse_unsupported,
    shared_parameters,
    stored_names_of_children,
)
from polyshard.transformers.vocabulary import exchange_vocabulary

logger = logging.getLogger(__name__)


class TransformersModel(nn.Module):
    """A causal language model of transformers with the interface of training and serving; weights keep their names.

    Operations of the model class after the head (a soft-cap, a factor) run in the class's own code.

    Examples:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = ps.transformers_model(config, ps.initialize("torch"))
        >>> hidden = model(torch.tensor([3, 1, 4, 1, 5]))
        >>> hidden.shape, model.compute_logits(hidden).shape
        (torch.Size([5, 32]), torch.Size([5, 96]))
    """

    def __init__(self, model: Any, context: ParallelContext, stored: Mapping[str, str]) -> None:
        super().__init__()
        self.config, self.parallel_context = model.config, context
        self.architecture = type(model).__name__  # `architectures` of its checkpoints
        own: str = model.base_model_prefix
        self._body = stored.get(own, own)
        self.packed_refusal: str | None = None  # why packed sequences are unsupported
        for name, child in model.named_children():
            self.add_module(stored.get(name, name), child)
        self._given = _Given(getattr(model, own))
        setattr(model, own, self._given)
        self._model = (model,)  # in a tuple, so that its modules are not registered twice

    def _apply(self, fn: Any, recurse: bool = True) -> TransformersModel:
        """Apply `fn`, but keep the dtype of buffers that are computed from the config (rotary frequencies)."""
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
        """Return hidden states, or the loss if labels are given.

        Args:
            input_ids: `[batch, seq]`, or packed `[tokens]`.
            positions: same shape; by default they start at 0 in each sequence.
            cu_seqlens: int32 `[sequences + 1]` for packed input; one sequence by default.
            labels: same shape; the token after each token, or -100 to ignore a token.
            inputs_embeds: `[..., hidden]`, in place of `input_ids`.

        Returns:
            Hidden states `[..., hidden]`, or the mean loss.
        """
        if positions is None:
            positions = sequence_positions(input_ids, cu_seqlens, self.parallel_context)
        packed = positions.dim() == 1
        if self.packed_refusal is not None:
            self._refuse_packed(positions, cu_seqlens)
        if packed:
            positions = positions.unsqueeze(0)
            input_ids = input_ids if input_ids is None else input_ids.unsqueeze(0)
            inputs_embeds = inputs_embeds if inputs_embeds is None else inputs_embeds.unsqueeze(0)
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        bounds = {} if cu_seqlens is None else {"cu_seq_lens_q": cu_seqlens}
        if positions.is_meta:  # a plan: without a mask, transformers looks for sequences in the positions' values
            bounds["attention_mask"] = torch.ones_like(positions)
        body = getattr(self, self._body)
        hidden = body(**tokens, position_ids=positions, use_cache=False, return_dict=True, **bounds).last_hidden_state
        hidden = hidden.squeeze(0) if packed else hidden
        if labels is None:
            return hidden
        vocabulary = self.config.get_text_config().vocab_size
        return vocab_parallel_cross_entropy(
            self.compute_logits(hidden), labels, self.parallel_context, vocab_size=vocabulary
        )

    def _refuse_packed(self, positions: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        several = cu_seqlens is not None and len(cu_seqlens) > 2
        if several or (not positions.is_meta and bool((positions[..., 1:] == 0).any())):
            raise ConfigurationError(f"{self.packed_refusal}. Pass one sequence in each row, [batch, seq].")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of token IDs."""
        return getattr(self, self._body).get_input_embeddings()(input_ids)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits, `[..., hidden]` to `[..., vocabulary]`, or this rank's shard of them."""
        self._given.hidden = hidden if hidden.dim() == 3 else hidden.unsqueeze(0)
        try:
            logits = self._model[0](inputs_embeds=self._given.hidden, return_dict=True).logits
        finally:
            self._given.hidden = None
        return logits if hidden.dim() == 3 else logits.squeeze(0)


class _Given(nn.Module):
    """A stand-in for the decoder inside the full model, so that the model's forward runs only the head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None  # [batch, seq, hidden]
        self._body = (body,)  # in a tuple, so that its modules are not registered twice

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":  # OPT's head calls the decoder of its model
            return self
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self._body[0], name)  # Falcon H1 scales logits by an attribute of its decoder
            if isinstance(value, (bool, int, float, str)):
                return value
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states that were set; arguments have no effect."""
        return _output_class()(last_hidden_state=self.hidden)


@functools.cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    class HiddenStates(BaseModelOutputWithPastAndCrossAttentions):
        """Hidden states; every other attribute that a head reads (such as caches) is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return HiddenStates


def transformers_model(config: Any, parallel_context: ParallelContext) -> TransformersModel:
    """Build the causal language model of a transformers config, with polyshard's layers in place of its own.

    This is a factory: `register_model("LlamaForCausalLM", "polyshard:transformers_model")` serves a checkpoint of that
    architecture with transformers' own code, and training builds the same model with any adapter.

    Attention that `replace_with_trainable_attention` recognises is replaced, mixtures of experts become
    `mixture_of_experts`, gated MLPs are merged, and other linear layers follow transformers' own tensor-parallel plan.
    Attention that is not recognised keeps its code and uses the engine's cache; over several tensor-parallel ranks it
    is sharded by heads if its projections allow it, and else replicated. A trial model of the same configuration is
    compared with transformers' own, once for each configuration (docs/reference/transformers-models.md lists the result
    for every family).

    Args:
        config: a transformers config, or the fields of one (`polyshard.read_config`).
        parallel_context: the parallel context; its tensor axis may have any size.

    Returns:
        The model. If a layer carries state from token to token, the model rejects packed sequences and names the layer.

    Raises:
        ConfigurationError: transformers has no causal language model for the config, the model has unsupported parts or
            logits that differ from transformers', or the layout uses pipeline, context or sequence parallel. The error
            is raised before memory is allocated.

    Examples:
        >>> import transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers_model(config, ps.initialize("torch"))
        >>> model(torch.tensor([[3, 1, 4]]), labels=torch.tensor([[1, 4, -100]])).shape
        torch.Size([])
    """
    TRANSFORMERS.require()
    config = _transformers_config(config)
    layout = parallel_context.layout
    asked = {"pipeline": layout.pipeline > 1, "context": layout.context > 1, "sequence": layout.sequence_parallel}
    for way, wanted in asked.items():
        if wanted:
            raise ConfigurationError(
                f"{way} parallel is unsupported for transformers models. Use tensor and data parallel only."
            )
    model = _on_meta(config)
    refuse_unsupported(model, config)
    by_heads = layout.tensor > 1 and kept_shards_by_heads(model, layout.tensor)
    verdict = try_model(  # before memory is allocated
        config,
        sum(parameter.numel() for parameter in model.parameters()),
        lambda small, context: _built(_on_meta(small), context, by_heads),
        sharded=layout.tensor > 1,
        by_heads=by_heads,
        served=parallel_context.attention is not None,
    )
    name = type(model).__name__
    built = _built(model, parallel_context, by_heads)
    others = sorted(kept_modules(built) ^ verdict.kept)
    if others:
        raise ConfigurationError(
            f"{name} has other layers than the trial model that was compared with transformers' own: got {others[0]} "
            "in only one of the two. Write its factory (docs/how-to/bring-a-model.md)."
        )
    replicate_exactly(built, parallel_context)
    built.packed_refusal = verdict.packed
    if parallel_context.attention is None and getattr(config, "output_router_logits", False):
        logger.warning(
            "%s: output_router_logits is set, but polyshard's loss leaves out transformers' auxiliary loss. Use "
            "polyshard.Balance in a factory of your own (docs/how-to/experts.md)",
            name,
        )
    return built


def _on_meta(config: Any) -> Any:
    """Build transformers' own model without allocating memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    except Exception as error:  # transformers' code may raise anything
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            raise ConfigurationError(
                f"transformers has no causal language model for {type(config).__name__}. Use the config of one."
            ) from error
        raise ConfigurationError(
            f"transformers cannot build the model of this {type(config).__name__}: {type(error).__name__}: {error}. "
            "Complete the config."
        ) from error


def _built(model: Any, context: ParallelContext, by_heads: bool) -> TransformersModel:
    stored, shared = stored_names_of_children(model), shared_parameters(model)
    mixtures = find_mixtures(model)
    replicated = exchange_attention(model, context, by_heads)
    exchange_vocabulary(model, context)
    exchange_layers(model, context, mixtures, replicated)
    store_mixtures(model, mixtures)
    give_memory(model, context.device)
    built = TransformersModel(model, context, stored)
    refuse_lost_sharing(built, shared, type(model).__name__)
    return built


def _transformers_config(config: Any) -> Any:
    """Return the config itself, or the one that transformers creates from the fields of a config.json."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if isinstance(config, PretrainedConfig):
        return config
    fields = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ConfigurationError(
            f"the config is unsupported: got {type(config).__name__} with model_type {fields.get('model_type')!r}, "
            "expected a transformers config. Read one with transformers.AutoConfig.from_pretrained(directory)."
        )
    with tempfile.TemporaryDirectory(prefix="polyshard-config-") as folder:
        try:
            (Path(folder) / "config.json").write_text(json.dumps(fields))
            found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a config class may raise anything
            raise ConfigurationError(
                f"transformers rejects the fields of this {fields['model_type']!r} config: {type(error).__name__}: "
                f"{error}. Correct config.json."
            ) from error
    found._name_or_path = ""
    return found
