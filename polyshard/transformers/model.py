"""The factory that builds a transformers model from its config, and the module around it."""

from __future__ import annotations

import functools
import json
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
from polyshard.transformers.layers import exchange_layers
from polyshard.transformers.memory import give_memory
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


class TransformersModel(nn.Module):
    """A causal language model of transformers as training and serving call it; its weights keep their names.

    What its class does to the logits after the head (a soft-cap, a factor) is done by its own code.
    """

    def __init__(self, model: Any, context: ParallelContext, stored: Mapping[str, str]) -> None:
        super().__init__()
        self.config, self.parallel_context = model.config, context
        self.architecture = type(model).__name__  # of the checkpoints that it is saved as
        own: str = model.base_model_prefix
        self._body = stored.get(own, own)
        self.packed_refusal: str | None = None  # why it takes no packed sequences
        for name, child in model.named_children():
            self.add_module(stored.get(name, name), child)
        self._given = _Given(getattr(model, own))
        setattr(model, own, self._given)
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
        if self.packed_refusal is not None:
            self._refuse_packed(positions, cu_seqlens)
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

    def _refuse_packed(self, positions: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        several = cu_seqlens is not None and len(cu_seqlens) > 2
        if several or bool((positions[..., 1:] == 0).any()):
            raise ConfigurationError(f"{self.packed_refusal}. Pass one sequence in each row, [batch, seq]")

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
    """Stands where the decoder stood in the whole model, so that its forward is the head only."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None  # [batch, seq, hidden]
        self._body = (body,)  # in a tuple, so that its modules do not count twice

    def __getattr__(self, name: str) -> Any:
        if name == "decoder":  # OPT's head calls the decoder of its model
            return self
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self._body[0], name)  # Falcon H1 scales logits by a number of its body
            if isinstance(value, (bool, int, float, str)):
                return value
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states that were given; no argument can change what was computed."""
        return _output_class()(last_hidden_state=self.hidden)


@functools.cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    class HiddenStates(BaseModelOutputWithPastAndCrossAttentions):
        """Hidden states; whatever else a head asks for (caches of many kinds) is None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return HiddenStates


def transformers_model(config: Any, parallel_context: ParallelContext) -> TransformersModel:
    """Build the causal language model of a transformers config, with polyshard's layers in place of its own.

    A factory: `register_model("LlamaForCausalLM", "polyshard:transformers_model")` serves a checkpoint of that
    architecture by transformers' own code, and training builds the same model on any adapter.

    Attention that `replace_with_trainable_attention` recognises is replaced, gated MLPs are fused, and every other
    linear layer follows transformers' own tensor-parallel plan. Attention that is not recognised keeps its code, and
    takes the engine's cache, at tensor-parallel 1. A small model of the same configuration is compared as a whole with
    transformers' own, once for each configuration; docs/reference/transformers-models.md has the outcomes.

    Args:
        config: a transformers config, or the fields of one (`polyshard.read_config`).
        parallel_context: this process's position; its tensor axis may have any size.

    Returns:
        The model. If a layer carries state from token to token, the model refuses packed sequences and names the layer.

    Raises:
        ConfigurationError: it has no causal language model, or one with parts that polyshard does not build, or one
            whose logits would differ from transformers'; or the layout asks for pipeline, context or sequence parallel.
            No memory was taken.
    """
    TRANSFORMERS.require()
    config = _transformers_config(config)
    layout = parallel_context.layout
    asked = {"pipeline": layout.pipeline > 1, "context": layout.context > 1, "sequence": layout.sequence_parallel}
    for way, wanted in asked.items():
        if wanted:
            raise ConfigurationError(f"transformers models have no {way} parallel here: tensor and data parallel only")
    model = _on_meta(config)
    refuse_unsupported(model, config)
    verdict = try_model(  # before memory is taken
        config,
        sum(parameter.numel() for parameter in model.parameters()),
        lambda small, context: _built(_on_meta(small), context),
        sharded=layout.tensor > 1,
        served=parallel_context.attention is not None,
    )
    name = type(model).__name__
    built = _built(model, parallel_context)
    others = sorted(kept_modules(built) ^ verdict.kept)
    if others:
        raise ConfigurationError(
            f"{name} is built of other layers than the small model that was compared with transformers' own: got "
            f"{others[0]} in only one of the two. Write its factory (docs/how-to/bring-a-model.md)"
        )
    built.packed_refusal = verdict.packed
    return built


def _on_meta(config: Any) -> Any:
    """transformers' own model, without memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    except Exception as error:  # of whatever transformers' code raises
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            raise ConfigurationError(
                f"transformers builds no causal language model of {type(config).__name__}: use the config of one"
            ) from error
        raise ConfigurationError(
            f"transformers cannot build the model of this {type(config).__name__}: {type(error).__name__}: {error}. "
            "Complete the config"
        ) from error


def _built(model: Any, context: ParallelContext) -> TransformersModel:
    stored, shared = stored_names_of_children(model), shared_parameters(model)
    exchange_attention(model, context)
    exchange_vocabulary(model, context)
    exchange_layers(model, context)
    give_memory(model, context.device)
    built = TransformersModel(model, context, stored)
    refuse_lost_sharing(built, shared, type(model).__name__)
    return built


def _transformers_config(config: Any) -> Any:
    """The config itself, or the one that transformers makes of a checkpoint's config.json, as a server does."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if isinstance(config, PretrainedConfig):
        return config
    fields = config.to_dict() if callable(getattr(config, "to_dict", None)) else {}
    if fields.get("model_type") not in CONFIG_MAPPING:
        raise ConfigurationError(
            f"transformers_model needs a transformers config, got {type(config).__name__} with model_type "
            f"{fields.get('model_type')!r}: transformers.AutoConfig.from_pretrained(directory) reads one"
        )
    with tempfile.TemporaryDirectory(prefix="polyshard-config-") as folder:
        try:
            (Path(folder) / "config.json").write_text(json.dumps(fields))
            found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of whatever a config class raises
            raise ConfigurationError(
                f"transformers refuses the fields of this {fields['model_type']!r} config: {type(error).__name__}: "
                f"{error}. Correct config.json"
            ) from error
    found._name_or_path = ""
    return found
