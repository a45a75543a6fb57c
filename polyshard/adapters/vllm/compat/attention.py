"""vLLM's attention kernels, on CPU and CUDA, and how it cuts a batch for them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.attention.selector import get_attn_backend

from polyshard.adapters.vllm.compat.engines import model_dtype
from polyshard.adapters.vllm.compat.paging import CPU_BLOCK, Blocks, cut_queries
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec
from polyshard.core.errors import ConfigurationError


def cpu_head_sizes() -> tuple[int, ...]:
    """Head dimensions of vLLM's CPU attention."""
    return tuple(CPUAttentionBackend.get_supported_head_sizes())


def cpu_head_size(needed: int) -> int | None:
    """The smallest of them that holds a head; None where none does."""
    return min((size for size in cpu_head_sizes() if size >= needed), default=None)


def cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, exact: bool = False
) -> torch.Tensor:
    """vLLM's CPU attention of packed sequences, through a paged cache that lasts for the call.

    Keys are not split over threads (VLLM_CPU_ATTN_SPLIT_KV=0 gives the same in an engine). `exact`: queries are
    attended in pieces that are alike in every batch, and a token's output depends on its sequence alone.

    Source: v1/attention/backends/cpu_attn.py, CPUAttentionBackendImpl.forward.
    """
    from vllm import _custom_ops as operators

    spec, heads, size = call.spec, k.shape[1], k.shape[2]
    cache, blocks, kind = cpu_cache(k, v, call.keys.host)
    keys, values = cache.chunk(2, dim=2)
    window = -1 if spec.sliding_window is None else spec.sliding_window
    bounds, seen, table = call.queries.host, call.keys.host.diff(), blocks.table
    if exact:
        bounds, seen, table = cut_queries(bounds, seen, table, queries_of_a_piece(kind, q.shape[1] // heads))
    bounds, seen, table = bounds.to(torch.int32), seen.to(torch.int32), table.to(torch.int32)
    plan = operators.cpu_attn_get_scheduler_metadata(
        len(seen), q.shape[1], heads, size, seen, q.dtype, bounds, spec.causal, window, kind, False
    )
    sinks = call.sinks
    if sinks is not None and sinks.dtype not in (torch.bfloat16, torch.float32):
        sinks = sinks.float()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    operators.cpu_attention_with_kv_cache(
        q.contiguous(),
        keys,
        values,
        out,
        bounds,
        seen,
        spec.scale,
        spec.causal,
        call.alibi_slopes,
        window,
        table,
        spec.softcap or 0.0,
        plan,
        sinks,
    )
    return out


def cpu_cache(k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> tuple[torch.Tensor, Blocks, str]:
    """A cache of packed keys and values as an engine on CPU would hold them.

    Args:
        k: `[tokens, kv_heads, head_dim]`.
        v: the same shape.
        bounds: int `[sequences + 1]`, cumulative lengths.

    Returns:
        `[blocks, kv_heads, 2 CPU_BLOCK, head_dim]`, of each block the keys before the values; where each token lies;
        and for which instruction set.
    """
    from vllm import _custom_ops as operators

    blocks, kind = Blocks.of(bounds, CPU_BLOCK), cpu_isa(k.dtype, k.shape[2])
    cache = k.new_zeros(blocks.count, k.shape[1], 2 * CPU_BLOCK, k.shape[2])
    keys, values = cache.chunk(2, dim=2)
    operators.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, blocks.slots, kind)
    return cache, blocks, kind


def cpu_isa(dtype: torch.dtype, head_dim: int) -> str:
    """The instruction set of vLLM's CPU attention on this machine."""
    return cpu_attn._get_attn_isa(dtype, CPU_BLOCK, head_dim, "auto")


@functools.cache
def keeps_keys_transposed(isa: str, dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Whether vLLM keeps a page's keys as `[dim, tokens]` and its values as `[tokens, dim]`, for this instruction set.

    Nothing in vLLM's Python says how they lie, so that a page is written, and looked at.

    Args:
        isa: see `cpu_isa`.
        dtype: of the cache, and of what is written.
        tokens: of a page.
        head_dim: size of a head.
    """
    from vllm import _custom_ops as operators

    places = torch.arange(2 * tokens * head_dim).view(tokens, 2, head_dim)  # of two heads
    for digit in range(4):  # each exact in bfloat16; four tell 2^28 places apart
        written = (places >> 7 * digit & 127).to(dtype)
        cache = torch.full((2, 2, 2 * tokens, head_dim), -1, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        slots = torch.arange(tokens, 2 * tokens)  # the second page
        operators.cpu_attn_reshape_and_cache(written, written, keys, values, slots, isa)
        found = keys[1].reshape(2, head_dim, tokens).permute(2, 0, 1), values[1].permute(1, 0, 2)
        if not all(torch.equal(t, written) for t in found) or not bool((cache[0] == -1).all()):
            return False
    return True


# Query heads that the kernel holds in registers at a time (0.32, csrc/cpu/cpu_attn_*.hpp, MaxQHeadNumPerIteration).
# Up to so many, the number of keys of a tile is one constant; beyond, it follows from the number of queries, which
# follows from the batch and the threads.
_HEADS_AT_A_TIME = {"vec": 8, "vec16": 16, "amx": 32}


def queries_of_a_piece(isa: str, heads_per_kv: int) -> int:
    """How many query tokens the kernel takes at a time.

    Raises:
        ConfigurationError: nothing is known of this instruction set.
    """
    if isa not in _HEADS_AT_A_TIME:
        raise ConfigurationError(
            f"exact mode knows vLLM's CPU attention for {', '.join(_HEADS_AT_A_TIME)}, this machine has {isa!r}: "
            "its kernel would have to be looked at first"
        )
    heads = _HEADS_AT_A_TIME[isa]
    return heads // heads_per_kv if heads % heads_per_kv == 0 else heads  # else each head goes by itself


class PinnedMetadataBuilder(CPUAttentionMetadataBuilder):
    """Hands vLLM's kernel a batch as pieces of queries that are alike in every batch, and never splits keys.

    Why: `_HEADS_AT_A_TIME`, and docs/explanation/exactness.md. A piece is a sequence to the kernel, over the same
    cache blocks.
    """

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's metadata of the pieces."""
        common = common_attn_metadata
        bounds, seen, table = cut_queries(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            queries_of_a_piece(self.isa, self.num_heads // self.num_kv_heads),
        )
        pieces = replace(common, query_start_loc=bounds, seq_lens=seen, block_table_tensor=table, num_reqs=len(seen))
        found = super().build(common_prefix_len, pieces, fast_build)
        if envs.VLLM_CPU_ATTN_SPLIT_KV:
            from vllm import _custom_ops as operators

            dtype: Any = self.dtype
            found.scheduler_metadata = operators.cpu_attn_get_scheduler_metadata(
                len(seen),
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                seen,
                dtype,
                bounds,
                found.causal,
                self.window_size,
                self.isa,
                False,
            )
        return found


class PinnedBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with that builder, for `Attention(attn_backend=...)`."""

    @staticmethod
    @override
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return PinnedMetadataBuilder


def cuda_flash_attention() -> Any:
    """vLLM's bundled flash-attention: forward alone."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def cuda_flash_version(head_dim: int, spec: AttentionSpec, sinks: bool) -> int:
    """Which of its versions an engine takes on this device, as v1/attention/backends/flash_attn.py asks for it."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(
        requires_alibi=spec.alibi_slopes is not None,
        head_size=head_dim,
        has_sinks=sinks,
        requires_softcap=spec.softcap is not None,
    )
    return version or 2


def uses_latents(vllm_config: VllmConfig) -> bool:
    """Whether vLLM lays out its cache for latent attention: it knows the config's `model_type` for one that has it."""
    return bool(vllm_config.model_config.use_mla)


def latents_lack(vllm_config: VllmConfig, size: int, num_heads: int) -> str | None:
    """Why vLLM has no kernel for latents and rotated keys of `size` together on this platform; None where it has."""
    cache = vllm_config.cache_config.cache_dtype
    try:
        backend = get_attn_backend(size, model_dtype(vllm_config), cache, use_mla=True, num_heads=num_heads)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    sizes = backend.get_supported_head_sizes()
    return f"{backend.get_name()} has {', '.join(map(str, sizes))}" if sizes and size not in sizes else None
