"""Every part of vLLM that polyshard depends on, for 0.32 and 0.33. A new vLLM version changes the code of this
package only, and the supported range in `adapter.py`.

It is imported on first use of vLLM. `tools/vllm_contract.py` lists each import and signature, and checks the wheel of
a new version.
"""

from __future__ import annotations

from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group, get_tp_group, get_world_group
from vllm.distributed.utils import get_pp_indices
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import WeightsMapper
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from polyshard.adapters.vllm.compat.attention import (
    BatchInvariantBackend,
    cpu_attention,
    cpu_cache,
    cpu_head_size,
    cpu_head_sizes,
    cpu_isa,
    cuda_flash_attention,
    cuda_flash_version,
    keeps_keys_transposed,
    latent_unsupported_reason,
    queries_per_chunk,
    uses_latent_cache,
)
from polyshard.adapters.vllm.compat.batch import batch_of_step
from polyshard.adapters.vllm.compat.connectors import connector_without_reset, reset_caches
from polyshard.adapters.vllm.compat.engines import (
    LocalWorker,
    abort_requests_until,
    captures_graphs,
    engine_dtype,
    engine_is_dead,
    is_eager,
    local_worker,
    model_dtype,
    raises_if_engine_dies,
    runs_pipelines,
    seeded_tokens_per_step,
    shut_down_engine,
    unfinished_requests,
)
from polyshard.adapters.vllm.compat.loading import (
    QKV_SHARD_IDS,
    absorb_latents,
    base_layer,
    begin_reload,
    end_reload,
    load_into,
    own_kernel_tensors,
    process_after_loading,
    source_metadata,
)
from polyshard.adapters.vllm.compat.lora import lora_config, lora_request, max_lora_rank, replace_lora
from polyshard.adapters.vllm.compat.operators import (
    allow_amx,
    batch_invariant,
    cpu_packed_matmul,
    has_packed_matmul,
    has_vllm_only_instructions,
    is_batch_invariant,
    is_row_invariant,
    operator_rms_norm,
    operator_supports_norm,
    rotate_in_place,
    silu_and_mul,
    supports_rotary,
    vllm_matmul,
)
from polyshard.adapters.vllm.compat.registration import register_class, register_loader, register_transfer

__all__ = [
    "DEFAULT_VOCAB_PADDING_SIZE",
    "QKV_SHARD_IDS",
    "Attention",
    "BaseModelLoader",
    "BatchInvariantBackend",
    "CPUAttentionBackend",
    "CPUAttentionBackendImpl",
    "CPUAttentionMetadataBuilder",
    "ColumnParallelLinear",
    "CompilationMode",
    "IntermediateTensors",
    "LocalWorker",
    "MLAAttention",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "ParamMeta",
    "QKVParallelLinear",
    "QuantizeMethodBase",
    "RMSNorm",
    "RowParallelLinear",
    "SupportsLoRA",
    "SupportsPP",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "VocabParallelEmbedding",
    "WeightSource",
    "WeightTransferEngine",
    "WeightTransferInitInfo",
    "WeightTransferUpdateInfo",
    "WeightsMapper",
    "abort_requests_until",
    "absorb_latents",
    "allow_amx",
    "base_layer",
    "batch_invariant",
    "batch_of_step",
    "begin_reload",
    "captures_graphs",
    "connector_without_reset",
    "cpu_attention",
    "cpu_cache",
    "cpu_head_size",
    "cpu_head_sizes",
    "cpu_isa",
    "cpu_packed_matmul",
    "cuda_flash_attention",
    "cuda_flash_version",
    "end_reload",
    "engine_dtype",
    "engine_is_dead",
    "get_pp_group",
    "get_pp_indices",
    "get_tp_group",
    "get_world_group",
    "has_packed_matmul",
    "has_vllm_only_instructions",
    "is_batch_invariant",
    "is_eager",
    "is_row_invariant",
    "keeps_keys_transposed",
    "latent_unsupported_reason",
    "load_into",
    "local_worker",
    "lora_config",
    "lora_request",
    "max_lora_rank",
    "model_dtype",
    "operator_rms_norm",
    "operator_supports_norm",
    "own_kernel_tensors",
    "process_after_loading",
    "queries_per_chunk",
    "raises_if_engine_dies",
    "register_class",
    "register_loader",
    "register_transfer",
    "replace_lora",
    "reset_caches",
    "rotate_in_place",
    "runs_pipelines",
    "seeded_tokens_per_step",
    "shut_down_engine",
    "silu_and_mul",
    "source_metadata",
    "support_torch_compile",
    "supports_rotary",
    "unfinished_requests",
    "uses_latent_cache",
    "vllm_matmul",
]
