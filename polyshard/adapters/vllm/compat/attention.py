"""vLLM's attention kernels on CPU and CUDA, and the batch metadata that they take."""

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
from polyshard.adapters.vllm.compat.operators import allow_amx
from polyshard.adapters.vllm.compat.paging import CPU_BLOCK, Blocks, split_queries
from polyshard.attention.kernels.protocol import AttentionCall
from polyshard.core.attention import AttentionSpec, LatentSpec
from polyshard.core.errors import ConfigurationError


def cpu_head_sizes() -> tuple[int, ...]:
    """Return the head dimensions that vLLM's CPU attention supports."""
    return tuple(CPUAttentionBackend.get_supported_head_sizes())


def cpu_head_size(needed: int) -> int | None:
    """Return the smallest supported head dimension of at least `needed`; None if there is none."""
    return min((size for size in cpu_head_sizes() if size >= needed), default=None)


def cpu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, exact: bool = False
) -> torch.Tensor:
    """Run vLLM's CPU attention on packed sequences, through a paged cache that exists only during the call.

    Keys are not split over threads (an engine does the same with VLLM_CPU_ATTN_SPLIT_KV=0).

    Args:
        q: `[tokens, heads, head_dim]`.
        k: `[keys, kv_heads, head_dim]`.
        v: the same shape as `k`.
        call: the attention call.
        exact: process queries in chunks of one size, so that a token's output depends only on its sequence.

    Source: v1/attention/backends/cpu_attn.py, CPUAttentionBackendImpl.forward.
    """
    from vllm import _custom_ops as operators

    spec, heads, size = call.spec, k.shape[1], k.shape[2]
    cache, blocks, kind = cpu_cache(k, v, call.keys.host)
    keys, values = cache.chunk(2, dim=2)
    window = -1 if spec.sliding_window is None else spec.sliding_window
    bounds, key_counts, table = call.queries.host, call.keys.host.diff(), blocks.table
    if exact:
        bounds, key_counts, table = split_queries(
            bounds, key_counts, table, queries_per_chunk(kind, q.shape[1] // heads)
        )
    bounds, key_counts, table = bounds.to(torch.int32), key_counts.to(torch.int32), table.to(torch.int32)
    plan = operators.cpu_attn_get_scheduler_metadata(
        len(key_counts), q.shape[1], heads, size, key_counts, q.dtype, bounds, spec.causal, window, kind, False
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
        key_counts,
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
    """Return a cache of packed keys and values in the layout of an engine on CPU.

    Args:
        k: `[tokens, kv_heads, head_dim]`.
        v: the same shape.
        bounds: int `[sequences + 1]`, cumulative lengths.

    Returns:
        The cache `[blocks, kv_heads, 2 * CPU_BLOCK, head_dim]`, with the keys of each block before its values; the
        positions of the tokens; and the instruction set that the layout is for.
    """
    from vllm import _custom_ops as operators

    blocks, kind = Blocks.of(bounds, CPU_BLOCK), cpu_isa(k.dtype, k.shape[2])
    cache = k.new_zeros(blocks.count, k.shape[1], 2 * CPU_BLOCK, k.shape[2])
    keys, values = cache.chunk(2, dim=2)
    operators.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, blocks.slots, kind)
    return cache, blocks, kind


def cpu_isa(dtype: torch.dtype, head_dim: int) -> str:
    """Return the instruction set that vLLM's CPU attention uses on this machine."""
    allow_amx()
    return cpu_attn._get_attn_isa(dtype, CPU_BLOCK, head_dim, "auto")


@functools.cache
def keeps_keys_transposed(isa: str, dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Whether vLLM stores a page's keys as `[dim, tokens]` and its values as `[tokens, dim]` for this instruction set.

    vLLM's Python API does not expose the layout, so this function writes a page and inspects it.

    Args:
        isa: the instruction set; see `cpu_isa`.
        dtype: dtype of the cache and of the values written.
        tokens: number of tokens in a page.
        head_dim: size of a head.
    """
    from vllm import _custom_ops as operators

    places = torch.arange(2 * tokens * head_dim).view(tokens, 2, head_dim)  # of two heads
    for digit in range(4):  # base-128 digits, exact in bfloat16; four distinguish 2^28 positions
        written = (places >> 7 * digit & 127).to(dtype)
        cache = torch.full((2, 2, 2 * tokens, head_dim), -1, dtype=dtype)
        keys, values = cache.chunk(2, dim=2)
        slots = torch.arange(tokens, 2 * tokens)  # the second page
        operators.cpu_attn_reshape_and_cache(written, written, keys, values, slots, isa)
        found = keys[1].reshape(2, head_dim, tokens).permute(2, 0, 1), values[1].permute(1, 0, 2)
        if not all(torch.equal(t, written) for t in found) or not bool((cache[0] == -1).all()):
            return False
    return True


# Query heads that the kernel holds in registers at once (0.32, csrc/cpu/cpu_attn_*.hpp, MaxQHeadNumPerIteration). Up
# to this many, the number of keys in a tile is a constant. Beyond, it depends on the number of queries, which depends
# on the batch and the number of threads.
_HEADS_PER_ITERATION = {"vec": 8, "vec16": 16, "amx": 32}


def queries_per_chunk(isa: str, heads_per_kv: int) -> int:
    """Return the number of query tokens that the kernel processes at once.

    Raises:
        ConfigurationError: the instruction set is unknown.
    """
    if isa not in _HEADS_PER_ITERATION:
        raise ConfigurationError(
            f"vLLM's CPU attention is unsupported in exact mode on this machine: got instruction set {isa!r}, expected "
            f"{', '.join(_HEADS_PER_ITERATION)}. Use another machine"
        )
    heads = _HEADS_PER_ITERATION[isa]
    return heads // heads_per_kv if heads % heads_per_kv == 0 else heads  # otherwise each head is processed separately


class BatchInvariantMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch into query chunks whose size does not depend on the batch, and never splits keys.

    `_HEADS_PER_ITERATION` and docs/explanation/exactness.md explain why. To the kernel, each chunk is a sequence over
    the same cache blocks.
    """

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """Return vLLM's metadata, with one sequence per chunk."""
        common = common_attn_metadata
        bounds, key_counts, table = split_queries(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            queries_per_chunk(self.isa, self.num_heads // self.num_kv_heads),
        )
        chunks = replace(
            common, query_start_loc=bounds, seq_lens=key_counts, block_table_tensor=table, num_reqs=len(key_counts)
        )
        metadata = super().build(common_prefix_len, chunks, fast_build)
        if envs.VLLM_CPU_ATTN_SPLIT_KV:
            from vllm import _custom_ops as operators

            dtype: Any = self.dtype
            metadata.scheduler_metadata = operators.cpu_attn_get_scheduler_metadata(
                len(key_counts),
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                key_counts,
                dtype,
                bounds,
                metadata.causal,
                self.window_size,
                self.isa,
                False,
            )
        return metadata


class BatchInvariantBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend with batch-invariant metadata, for `Attention(attn_backend=...)`."""

    @staticmethod
    @override
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return BatchInvariantMetadataBuilder


def cuda_flash_attention() -> Any:
    """Return vLLM's bundled flash-attention, which has no backward pass."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    return flash_attn_varlen_func


def cuda_flash_version(head_dim: int, spec: AttentionSpec, sinks: bool) -> int:
    """Return the flash-attention version that an engine uses on this device.

    Source: v1/attention/backends/flash_attn.py.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(
        requires_alibi=spec.alibi_slopes is not None,
        head_size=head_dim,
        has_sinks=sinks,
        requires_softcap=spec.softcap is not None,
    )
    return version or 2


def uses_latent_cache(vllm_config: VllmConfig) -> bool:
    """Whether vLLM caches latents, which it decides by the config's `model_type`."""
    return bool(vllm_config.model_config.use_mla)


def latent_unsupported_reason(vllm_config: VllmConfig, spec: AttentionSpec, latent: LatentSpec) -> str | None:
    """Return why vLLM cannot cache latents on this platform; None if it can.

    vLLM itself does not check whether its CPU backends support a dtype or a size.

    Args:
        vllm_config: vLLM's configuration.
        spec: the attention of one layer on this rank.
        latent: its latents.
    """
    size, dtype = latent.kv_rank + latent.rope_dim, model_dtype(vllm_config)
    cache = vllm_config.cache_config.cache_dtype
    try:
        backend = get_attn_backend(size, dtype, cache, use_mla=True, num_heads=spec.num_heads)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    sizes, name = backend.get_supported_head_sizes(), backend.get_name()
    if sizes and size not in sizes:
        return f"{name} supports only {', '.join(map(str, sizes))}"
    reason = None
    if not backend.supports_dtype(dtype):
        reason = f"{name} does not support {dtype}"
    elif name == "AMX_MLA" and (latent.nope_dim % 32 or spec.v_dim % 32):
        got = f"{latent.nope_dim} and {spec.v_dim}"
        reason = f"{name} needs multiples of 32 as qk_nope_head_dim and v_head_dim, got {got}"
    return reason and f"{reason}. Start the engine with attention_backend='CPU_MLA'"
