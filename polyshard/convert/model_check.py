"""Checks of a checkpoint's tensors against the model that its configuration describes, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from polyshard.checkpoint.quantization.detect import signs_of_quantization
from polyshard.config.decoder_spec import FAMILIES, DecoderSpec, expected_shapes
from polyshard.config.expert_spec import EXPERT_FAMILIES
from polyshard.convert.accounting import (
    FREQUENCIES,
    PREFIXES,
    REDUNDANT,
    account,
    check_frequencies,
    check_shapes,
    some,
)
from polyshard.convert.expert_check import check_experts
from polyshard.convert.format import Foreign
from polyshard.core.errors import CheckpointError


def check_model(foreign: Foreign, where: Path, *, given: bool) -> tuple[str, ...]:
    """Check that the target will hold the model that its configuration describes, and return notes.

    Args:
        foreign: the checkpoint.
        where: its path, for errors.
        given: whether the configuration is the user's and not the checkpoint's own.

    Raises:
        CheckpointError: a tensor of the model is missing or has the wrong shape, names have a wrapper's prefix, or the
            user's configuration does not cover all tensors.
    """
    _refuse_prefix(foreign, where)
    check_experts(foreign, where)
    config = foreign.config or {}
    family, architectures = config.get("model_type"), config.get("architectures") or ["ForCausalLM"]
    known = FAMILIES + EXPERT_FAMILIES
    if family not in known or not architectures[0].endswith("ForCausalLM"):
        if given:
            raise CheckpointError(
                f"--config cannot be checked against {where}: got model_type={family!r} with {architectures[0]}, "
                f"expected a causal model of {', '.join(known)}. Put config.json into the source's directory."
            )
        return ()
    try:
        spec = DecoderSpec.of(config, experts=True)
        expected = expected_shapes(spec)
    except CheckpointError as error:
        if family in EXPERT_FAMILIES and not given:
            return (f"did not compare the tensors with the configuration: {error}",)
        raise CheckpointError(f"{'--config' if given else where}: {error}") from None
    stored, inside = _as_stored(expected, foreign, stacked=not given)
    check_shapes(where, {name: tensor.shape for name, tensor in foreign.tensors.items()}, stored)
    others = {name for name in set(foreign.tensors) - set(expected) - inside if not REDUNDANT.search(name)}
    notes: tuple[str, ...] = ()
    if spec.tied and "lm_head.weight" in others:
        others.discard("lm_head.weight")
        head, embedding = (foreign.tensors[name].load() for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, embedding):
            notes = ("lm_head.weight differs from the embedding, though tie_word_embeddings=true",)
            if given:
                others.add("lm_head.weight")
    if others and given:
        raise CheckpointError(
            f"{where} holds {len(others)} tensors that the model of --config does not have: unexpected tensors "
            f"{some(others)}. Pass --config with the configuration that belongs to this checkpoint."
        )
    if others:
        notes += (f"carried {len(others)} tensors that are not part of the configuration's model: {some(others)}",)
    return notes


def _as_stored(
    expected: Mapping[str, tuple[int, ...]], foreign: Foreign, *, stacked: bool
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the expected tensors that must be stored under their names, and the stored names that replace the others.

    Codes and scales replace the weight of a quantized layer; stacked tensors may replace the experts of a layer.
    """
    quantized = bool(signs_of_quantization(foreign.tensors, foreign.config))
    left, inside = dict(expected), set[str]()
    below: dict[str, set[str]] = {}
    directly: dict[str, set[str]] = {}
    for name in foreign.tensors:
        parts = name.split(".")
        directly.setdefault(".".join(parts[:-1]), set()).add(name)
        for length in range(1, len(parts)):
            below.setdefault(".".join(parts[:length]), set()).add(name)
    for name in expected:
        layer = name.removesuffix(".weight")
        codes = below.get(layer, set()) - {name, f"{layer}.bias"} if quantized and layer != name else set()
        block, experts, _ = name.partition(".experts.")
        together = directly.get(f"{block}.experts")
        if codes:
            inside |= below[layer]  # AutoGPTQ also writes a bias of zeros
            del left[name]
        elif stacked and experts and together:
            inside |= together
            del left[name]
    return left, inside


def _refuse_prefix(foreign: Foreign, where: Path) -> None:
    for prefix in PREFIXES:
        if prefix not in ("", "model.") and foreign.tensors and all(n.startswith(prefix) for n in foreign.tensors):
            raise CheckpointError(
                f"{where} holds the names of a wrapper: got {prefix!r} before every tensor, such as "
                f"{next(iter(foreign.tensors))}, which no loader accepts. Save the inner module's state_dict."
            )


def with_embedding(foreign: Foreign) -> Foreign:
    """Rename the head of a tied model to the embedding if only the head is stored."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = (foreign.config or {}).get("tie_word_embeddings") and (foreign.config or {}).get("model_type") in FAMILIES
    if not tied or embedding in foreign.tensors or head not in foreign.tensors:
        return foreign
    tensors = {embedding if name == head else name: tensor for name, tensor in foreign.tensors.items()}
    return replace(foreign, tensors=tensors, notes=(*foreign.notes, f"renamed {head} of a tied model to {embedding}"))


def narrowed(foreign: Foreign, where: Path) -> tuple[Foreign, tuple[str, ...]]:
    """Return the checkpoint without tensors that a format for decoder weights does not need, and notes.

    Args:
        foreign: a Llama-like decoder, with or without experts.
        where: its path, for errors.

    Raises:
        CheckpointError: a tensor is unexpected, or a frequency table or tied head contradicts the configuration.
    """
    if foreign.config is None:
        return foreign, ()
    spec = DecoderSpec.of(foreign.config, experts=True)
    expected = expected_shapes(spec)
    predicting = _multi_token_prediction(foreign, spec)
    notes = ()
    if predicting:
        notes = (f"left out {len(predicting)} tensors of multi-token prediction: {some(predicting)}",)
        kept = {name: tensor for name, tensor in foreign.tensors.items() if name not in predicting}
        foreign = replace(foreign, tensors=kept)
    left = sorted(set(foreign.tensors) - set(expected))
    tied = [name for name in left if name == "lm_head.weight"]
    if tied and not torch.equal(foreign.tensors[tied[0]].load(), foreign.tensors["model.embed_tokens.weight"].load()):
        raise CheckpointError(
            f"{where} holds a head that is not the embedding: got tie_word_embeddings=true, expected false. Correct "
            "the configuration."
        )
    account(where, foreign.tensors, {*expected, *tied}, "Write huggingface instead, which carries every tensor.")
    for name in left:
        if FREQUENCIES.search(name):
            check_frequencies(where, name, foreign.tensors[name].load(), spec)
    if not left:
        return foreign, notes
    kept = {name: tensor for name, tensor in foreign.tensors.items() if name in expected}
    return replace(foreign, tensors=kept), (
        *notes,
        f"left out {len(left)} tensors that derive from the others or from the configuration: {some(left)}",
    )


def _multi_token_prediction(foreign: Foreign, spec: DecoderSpec) -> set[str]:
    """Return the tensors of the layers after the last, which predict further tokens; transformers ignores them."""
    count = (foreign.config or {}).get("num_nextn_predict_layers") if spec.experts is not None else None
    prefixes = tuple(f"model.layers.{spec.layers + layer}." for layer in range(count or 0))
    return {name for name in foreign.tensors if prefixes and name.startswith(prefixes)}
