"""All of vLLM that polyshard relies on; written for 0.32. A new vLLM is met by changing this file alone.

Imported on first use of vLLM. `tests/test_vllm_contract.py` names each import and signature.
"""

from __future__ import annotations

from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    VocabParallelEmbedding,
)

__all__ = [
    "DEFAULT_VOCAB_PADDING_SIZE",
    "Attention",
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "ModelRegistry",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RMSNorm",
    "RowParallelLinear",
    "VllmConfig",
    "VocabParallelEmbedding",
    "get_pp_group",
    "get_tp_group",
]


# The shard ids that vLLM's fused layers' weight loaders take, by segment.
QKV_SHARD_IDS = ("q", "k", "v")
