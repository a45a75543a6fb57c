"""FLOPs that a model needs for a training step, counted from its weight layouts and its attention layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from polyshard.core.attention import AttentionSpec
from polyshard.core.batch import MicroBatch
from polyshard.core.errors import ConfigurationError
from polyshard.experts.observed import expert_layers
from polyshard.layers.vocabulary import looks_up

if TYPE_CHECKING:
    from polyshard.core.adapter import TrainingEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """The FLOPs of a model's forward and backward pass, as a function of the lengths of its sequences.

    They are those of matrix products, 2 for each multiplication and addition: the forward pass, the gradients of
    inputs, and the gradients of trainable weights. Not counted are activations that are computed again, norms, and
    masked pairs of attention, of which a sliding window leaves few.

    Source: Chowdhery et al. 2022, "PaLM", appendix B (model FLOPs utilization); with masked pairs left out.

    Attributes:
        per_token: FLOPs of the matrix products with weights, for one token.
        attention: a spec for each attention layer, with the heads of all tensor-parallel ranks.

    Examples:
        >>> spec = ps.core.AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
        >>> flops = ModelFlops(per_token=1000, attention=(spec,))
        >>> flops([2])  # 3 pairs: 2 matmuls of 16 multiplications in 4 heads, forward and twice backward
        4304
    """

    per_token: int
    attention: tuple[AttentionSpec, ...] = ()

    def __call__(self, lengths: Iterable[int]) -> int:
        """Return the FLOPs of sequences of the given lengths."""
        lengths = list(lengths)
        total = self.per_token * sum(lengths)
        for spec in self.attention:
            pairs = sum(_pairs(n, spec.causal, spec.sliding_window) for n in lengths)
            total += 3 * 2 * pairs * spec.num_heads * (spec.head_dim + spec.v_dim)
        return total


def model_flops(engine: TrainingEngine) -> ModelFlops:
    """Count the FLOPs of an engine's model, at the sizes of the full model.

    A weight of two dimensions is taken for a matrix product of every token, unless it belongs to a `vocab_embedding` or
    a `torch.nn.Embedding`. Of a mixture of experts, those that a token takes are counted. Attention layers are modules
    with a `spec`, such as `TrainableFlashAttention`; others are named in a warning.

    Args:
        engine: the training engine. Of a pipeline, the parts of all stages must be added.

    Raises:
        ConfigurationError: `engine` is no training engine, or a weight outside of `mixture_of_experts` has more than
            two dimensions, so that its FLOPs are unknown.

    Examples:
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.Sequential(ps.column_parallel(4, 8, context), ps.row_parallel(8, 4, context))
        >>> model_flops(ps.load_adapter("torch").engine(model, ps.AdamW(), context)).per_token
        384
    """
    if not hasattr(engine, "table"):
        raise ConfigurationError(
            f"engine is invalid: got {type(engine).__name__}, expected the training engine around a model."
        )
    module = engine.module
    lookups = [f"{name}." if name else "" for name, part in module.named_modules() if looks_up(part)]
    parameters = dict(module.named_parameters())
    taken = {id(p): layer.experts_per_token for _, layer in expert_layers(module) for p in layer.experts.parameters()}
    per_token = 0
    for entry in engine.table.values():
        shape, parameter = entry.layout.shape, parameters[entry.parameter]
        passes = 3 if parameter.requires_grad else 2
        if id(parameter) in taken:
            if len(shape) == 3:  # a bias has two
                per_token += taken[id(parameter)] * 2 * math.prod(shape[1:]) * passes
            continue
        places = (entry.parameter, *entry.tied_parameters)
        uses = sum(not any(place.startswith(prefix) for prefix in lookups) for place in places)
        if len(shape) > 2 and uses:
            raise ConfigurationError(
                f"the FLOPs of {entry.name} are unknown: got a weight of shape {tuple(shape)}, expected at most two "
                "dimensions. Give Monitor a function of lengths for this model."
            )
        if len(shape) == 2:
            per_token += uses * 2 * math.prod(shape) * passes
    uncounted = [name for name, part in module.named_modules() if _is_attention(part) and not list(_specs(part))]
    if uncounted:
        logger.warning("the FLOPs of attention in %s are not counted: it has no AttentionSpec", ", ".join(uncounted))
    return ModelFlops(per_token=per_token, attention=tuple(_specs(module)))


def sequence_lengths(micro_batch: MicroBatch, context_size: int) -> list[int]:
    """Return the lengths of a micro-batch's sequences, over all context-parallel ranks."""
    boundaries: Any = micro_batch.get("cu_seqlens", micro_batch.get("cu_seq_lens_q"))  # the latter is transformers'
    if boundaries is not None:
        return boundaries.diff().tolist()
    shape = micro_batch["input_ids"].shape
    rows = 1 if len(shape) == 1 else int(shape[0])
    return [int(shape[-1]) * context_size] * rows


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and next(module.parameters(), None) is not None


def _specs(module: nn.Module) -> Iterable[AttentionSpec]:
    for part in module.modules():
        spec = getattr(part, "spec", None)
        if isinstance(spec, AttentionSpec):
            size = part.context.axis("tensor").size  # pyrefly: ignore
            yield replace(spec, num_heads=spec.num_heads * size)


def _pairs(length: int, causal: bool, window: int | None) -> int:
    """Return the number of pairs of a query and a key that the mask keeps."""
    reach = length if window is None else min(window, length)
    below = reach * (reach + 1) // 2 + (length - reach) * reach  # keys at or before the query
    return below if causal else 2 * below - length
