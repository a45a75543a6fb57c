"""polyshard: write a decoder once, train it on any parallelism library, serve it in an unpatched vLLM.

Every public name is imported on first use: `import polyshard` imports no vendor, and little beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyshard.adapters.vllm.rollouts import Rollout, RolloutEngine
    from polyshard.adapters.vllm.transfer.sync import SyncReport, WeightSync
    from polyshard.attention import RotaryEmbedding, TrainableFlashAttention, TrainableMLA, packed_attention
    from polyshard.attention.context import context_parallel_attention, context_shard, context_unshard
    from polyshard.attention.packing import pack
    from polyshard.attention.placement import sequence_positions
    from polyshard.checkpoint import (
        ModelConfig,
        PendingSave,
        TrainingState,
        latest_checkpoint,
        load_checkpoint,
        load_training_state,
        read_config,
        save_checkpoint,
        save_config,
        save_training_state,
    )
    from polyshard.core.activation import swiglu
    from polyshard.core.adapter import AdamW, Adapter, StepResult, TrainingEngine
    from polyshard.core.batch import BatchResult, train_batch
    from polyshard.core.capabilities import Capabilities, Rejected
    from polyshard.core.context import GroupContext, ParallelContext
    from polyshard.core.discovery import adapter_names, load_adapter
    from polyshard.core.errors import (
        AdapterError,
        CheckpointError,
        ConfigurationError,
        LayoutError,
        MissingDependencyError,
        PolyshardError,
        RankFailureError,
        RegistrationError,
        UnsupportedVersionError,
        WeightSyncError,
    )
    from polyshard.core.families import complete_config
    from polyshard.core.generators import manual_seed, sharded_random
    from polyshard.core.initialization import initialize_weights, normal_initializer
    from polyshard.core.layout import ParallelLayout
    from polyshard.core.linear import column_parallel, qkv_parallel, replicated_linear, row_parallel
    from polyshard.core.linear_adapter import LinearAdapter
    from polyshard.core.norm import rms_norm
    from polyshard.core.pipeline import PipelineStage, pipeline_stage, stage_layers
    from polyshard.core.residual import add_residual
    from polyshard.core.vocabulary import gather_logits, lm_head, vocab_embedding, vocab_parallel_cross_entropy
    from polyshard.core.weight_layout import Segment, WeightLayout
    from polyshard.core.weight_table import collect_layouts
    from polyshard.dropout import Dropout
    from polyshard.exact import exact_context
    from polyshard.exact.logprobs import token_logprobs
    from polyshard.launch import initialize, shutdown
    from polyshard.registry import engine_errors, register_model, registered_models
    from polyshard.replace import replace_with_trainable_attention
    from polyshard.transformers import transformers_model

__version__ = "0.1.0"

_HOMES = {
    "polyshard.adapters.vllm.rollouts": ("Rollout", "RolloutEngine"),
    "polyshard.adapters.vllm.transfer.sync": ("SyncReport", "WeightSync"),
    "polyshard.attention": ("RotaryEmbedding", "TrainableFlashAttention", "TrainableMLA", "packed_attention"),
    "polyshard.attention.context": ("context_parallel_attention", "context_shard", "context_unshard"),
    "polyshard.attention.packing": ("pack",),
    "polyshard.attention.placement": ("sequence_positions",),
    "polyshard.checkpoint": (
        "ModelConfig",
        "PendingSave",
        "TrainingState",
        "latest_checkpoint",
        "load_checkpoint",
        "load_training_state",
        "read_config",
        "save_checkpoint",
        "save_config",
        "save_training_state",
    ),
    "polyshard.core.activation": ("swiglu",),
    "polyshard.core.residual": ("add_residual",),
    "polyshard.core.adapter": ("Adapter", "AdamW", "StepResult", "TrainingEngine"),
    "polyshard.core.batch": ("BatchResult", "train_batch"),
    "polyshard.core.capabilities": ("Capabilities", "Rejected"),
    "polyshard.core.context": ("GroupContext", "ParallelContext"),
    "polyshard.core.discovery": ("adapter_names", "load_adapter"),
    "polyshard.core.families": ("complete_config",),
    "polyshard.core.errors": (
        "AdapterError",
        "CheckpointError",
        "ConfigurationError",
        "LayoutError",
        "MissingDependencyError",
        "PolyshardError",
        "RankFailureError",
        "RegistrationError",
        "UnsupportedVersionError",
        "WeightSyncError",
    ),
    "polyshard.core.generators": ("manual_seed", "sharded_random"),
    "polyshard.dropout": ("Dropout",),
    "polyshard.core.initialization": ("initialize_weights", "normal_initializer"),
    "polyshard.core.layout": ("ParallelLayout",),
    "polyshard.core.linear": ("column_parallel", "qkv_parallel", "replicated_linear", "row_parallel"),
    "polyshard.core.linear_adapter": ("LinearAdapter",),
    "polyshard.core.norm": ("rms_norm",),
    "polyshard.core.vocabulary": ("gather_logits", "lm_head", "vocab_embedding", "vocab_parallel_cross_entropy"),
    "polyshard.core.weight_layout": ("Segment", "WeightLayout"),
    "polyshard.core.weight_table": ("collect_layouts",),
    "polyshard.exact": ("exact_context",),
    "polyshard.exact.logprobs": ("token_logprobs",),
    "polyshard.launch": ("initialize", "shutdown"),
    "polyshard.core.pipeline": ("PipelineStage", "pipeline_stage", "stage_layers"),
    "polyshard.registry": ("engine_errors", "register_model", "registered_models"),
    "polyshard.replace": ("replace_with_trainable_attention",),
    "polyshard.transformers": ("transformers_model",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # pyrefly: ignore  # computed from the table above


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'polyshard' has no attribute {name!r}")
    try:
        value = getattr(import_module(home), name)
    except ModuleNotFoundError:
        if home.startswith("polyshard.adapters."):
            import_module("polyshard.core.discovery").load_adapter(home.split(".")[2]).requirement.require()
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
