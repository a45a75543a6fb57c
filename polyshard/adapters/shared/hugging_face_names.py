"""Matching of tensors that a library stores under Hugging Face's names, possibly with a wrapper's prefix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from polyshard.config.decoder_spec import DecoderSpec, expected_shapes
from polyshard.convert.accounting import FREQUENCIES, REDUNDANT, account, check_frequencies, named
from polyshard.core.errors import CheckpointError

Load = Callable[[str], torch.Tensor]


def match(where: Path, held: set[str], spec: DecoderSpec, load: Load) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map expected names to those in the source, account for every other tensor, and return the map and notes.

    Args:
        where: the source, for errors.
        held: names of weights in the source, without optimizer state.
        spec: the decoder spec of the model.
        load: returns the full tensor of a name; called for tensors that are checked against the configuration.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or contradicts the configuration.
    """
    names = named(where, held, expected_shapes(spec))
    carried = set(names.found.values())
    head, embedding = (names.prefix + name for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if spec.tied and head in held:
        same_head(where, load(head), load(embedding))
        carried.add(head)
    account(where, held, carried)
    redundant = sorted(name for name in held - carried if REDUNDANT.search(name))
    for name in redundant:
        if FREQUENCIES.search(name):
            check_frequencies(where, name, load(name), spec)
    if not redundant:
        return names.found, ()
    told = f"left out {len(redundant)} tables that follow from the configuration, such as {redundant[0]}"
    return names.found, (told,)


def same_head(where: object, head: torch.Tensor, embedding: torch.Tensor) -> None:
    """Check that the stored head of a tied model equals its embedding.

    Raises:
        CheckpointError: they differ.
    """
    if not torch.equal(head, embedding):
        raise CheckpointError(
            f"{where} holds a head that is not the embedding: got tie_word_embeddings=true, expected false. Correct "
            "the configuration."
        )
