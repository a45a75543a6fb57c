"""All of vLLM that polyshard relies on; written for 0.32 and 0.33. A new vLLM is met by changing this folder alone.

Imported on first use of vLLM. `tools/vllm_contract.py` names each import and signature, and checks a new version's
wheel.
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
    PinnedBackend,
    cpu_attention,
    cpu_cache,
    cpu_head_size,
    cpu_head_sizes,
    cpu_isa,
    cuda_flash_attention,
    cuda_flash_version,
    keeps_keys_transposed,
    latents_lack,
    queries_of_a_piece,
    uses_latents,
)
from polyshard.adapters.vllm.compat.engines import (
    LocalWorker,
    captures_graphs,
    end_engine,
    ends_with_engine,
    engine_dtype,
    engine_is_dead,
    is_eager,
    local_worker,
    model_dtype,
    runs_pipelines,
    unfinished_requests,
)
from polyshard.adapters.vllm.compat.loading import (
    QKV_SHARD_IDS,
    absorb_latents,
    base_layer,
    begin_reload,
    end_reload,
    load_into,
    process_after_loading,
    source_metadata,
)
from polyshard.adapters.vllm.compat.operators import (
    batch_invariant,
    cpu_packed_product,
    has_packed_product,
    has_product_of_processor,
    is_batch_invariant,
    operator_rms_norm,
    operator_takes_norm,
    rotate_in_place,
    silu_and_mul,
    takes_rotary,
    vllm_product,
)
from polyshard.adapters.vllm.compat.registration import register_class, register_loader, register_transfer

__all__ = [
    "DEFAULT_VOCAB_PADDING_SIZE",
    "QKV_SHARD_IDS",
    "Attention",
    "BaseModelLoader",
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
    "PinnedBackend",
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
    "absorb_latents",
    "base_layer",
    "batch_invariant",
    "begin_reload",
    "captures_graphs",
    "cpu_attention",
    "cpu_cache",
    "cpu_head_size",
    "cpu_head_sizes",
    "cpu_isa",
    "cpu_packed_product",
    "cuda_flash_attention",
    "cuda_flash_version",
    "end_engine",
    "end_reload",
    "ends_with_engine",
    "engine_dtype",
    "engine_is_dead",
    "get_pp_group",
    "get_pp_indices",
    "get_tp_group",
    "get_world_group",
    "has_packed_product",
    "has_product_of_processor",
    "is_batch_invariant",
    "is_eager",
    "keeps_keys_transposed",
    "latents_lack",
    "load_into",
    "local_worker",
    "model_dtype",
    "operator_rms_norm",
    "operator_takes_norm",
    "process_after_loading",
    "queries_of_a_piece",
    "register_class",
    "register_loader",
    "register_transfer",
    "rotate_in_place",
    "runs_pipelines",
    "silu_and_mul",
    "source_metadata",
    "support_torch_compile",
    "takes_rotary",
    "unfinished_requests",
    "uses_latents",
    "vllm_product",
]
