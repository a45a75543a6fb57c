"""New prompts in an engine on CPU: attended by polyshard's compiled loops, where vLLM's kernel reads its paged cache.

A request of which nothing is cached has all its keys in the batch. vLLM writes them to the cache as ever; what is left
out is to read them from there block by block. Requests that go on are vLLM's, in the same batch too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from polyshard.adapters.vllm.compat import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    has_product_of_processor,
)
from polyshard.attention.kernels import fused
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.attention.packing import pack
from polyshard.attention.selection import ENVIRONMENT_VARIABLE
from polyshard.core.attention import AttentionSpec, PackedSequences


@dataclass(frozen=True, slots=True)
class NewPrompts:
    """What a batch's metadata carries where its last requests are new.

    Attributes:
        first_token: of them; the tokens before it belong to requests that go on.
        sequences: their boundaries.
        others: vLLM's metadata of the requests before them; None where there are none.
    """

    first_token: int
    sequences: PackedSequences
    others: Any


class PromptMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, which also says which of the batch's requests are new."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """See the class."""
        found: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)
        found.new_prompts = None
        if found.causal is not True or common_attn_metadata.max_query_len == 1:
            return found
        bounds, seen = common_attn_metadata.query_start_loc, common_attn_metadata.seq_lens
        known = (bounds.diff() != seen).nonzero()
        requests = int(known[-1]) + 1 if len(known) else 0
        if requests == len(seen):
            return found
        first = int(bounds[requests])
        others = None
        if requests:
            part = replace(
                common_attn_metadata,
                num_reqs=requests,
                num_actual_tokens=first,
                query_start_loc=bounds[: requests + 1],
                seq_lens=seen[:requests],
                block_table_tensor=common_attn_metadata.block_table_tensor[:requests],
            )
            others = super().build(common_prefix_len, part, fast_build)
        boundaries = bounds[requests:] - first
        found.new_prompts = NewPrompts(first, pack(boundaries, int(boundaries[-1])), others)
        return found


class PromptImpl(CPUAttentionBackendImpl):
    """vLLM's, with new prompts by the compiled loops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._spec = AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            scale=self.scale,
            sliding_window=None if self.sliding_window < 0 else self.sliding_window,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`output` `[tokens, heads, head_size]`, which is filled."""
        scales = (output_scale, output_block_scale)
        new: NewPrompts | None = getattr(attn_metadata, "new_prompts", None)
        if new is None or scales != (None, None):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        call = AttentionCall(spec=self._spec, queries=new.sequences, keys=new.sequences)
        if not fused.worthwhile_all(call):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        if new.others is not None:
            super().forward(layer, query, key, value, kv_cache, new.others, output)
        tokens = slice(new.first_token, attn_metadata.num_actual_tokens)
        fused.attend_into(query[tokens], key[tokens], value[tokens], call, output[tokens])
        return output


class PromptBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with both, for `Attention(attn_backend=...)`."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """See the class."""
        return PromptImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """See the class."""
        return PromptMetadataBuilder


def backend_for(spec: AttentionSpec, head_dim: int, dtype: torch.dtype, cache_dtype: str, sinks: bool) -> Any:
    """`PromptBackend` where the loops have all that a layer asks for and are faster; else None, for vLLM's own.

    Args:
        spec: of the layer.
        head_dim: of a head in the cache.
        dtype: of the model.
        cache_dtype: vLLM's name of the cache's; a narrower one rounds keys and values that the loops would not.
        sinks: whether the layer has them.

    The environment variable POLYSHARD_ATTENTION=vllm, by which a trainer attends by vLLM's kernel, means that kernel
    here too.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "vllm":
        return None
    if sinks or cache_dtype != "auto" or has_product_of_processor(dtype):
        return None
    plain = replace(spec, head_dim=head_dim, value_dim=head_dim)
    return PromptBackend if fused.rejects(plain, torch.float32) is None else None
