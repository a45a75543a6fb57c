"""polyshard: write a decoder once, train it on any parallelism library, serve it in an unpatched vLLM.

Every public name is imported on first use: `import polyshard` imports no vendor, and little beyond torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyshard.adapters.vllm.clients.http import HttpClient
    from polyshard.adapters.vllm.clients.local import LlmClient
    from polyshard.adapters.vllm.engines.rollout import Rollout
    from polyshard.adapters.vllm.engines.rollouts import RolloutEngine
    from polyshard.adapters.vllm.engines.routing import ROUTING_WORKER, served_routing
    from polyshard.adapters.vllm.transfer.lora_sync import LoraSync
    from polyshard.adapters.vllm.transfer.report import SyncReport
    from polyshard.adapters.vllm.transfer.sync import WeightSync
    from polyshard.attention import RotaryEmbedding, TrainableFlashAttention, TrainableMLA, packed_attention
    from polyshard.attention.context_parallel import context_parallel_attention, context_shard, context_unshard
    from polyshard.attention.defaults import sequence_positions
    from polyshard.attention.packing import pack
    from polyshard.checkpoint import (
        ModelConfig,
        PendingSave,
        TrainingState,
        download_checkpoint,
        latest_checkpoint,
        load_checkpoint,
        load_training_state,
        read_config,
        save_checkpoint,
        save_config,
        save_training_state,
        upload_checkpoint,
    )
    from polyshard.config.families import complete_config
    from polyshard.core.adapter import Adapter, StepResult, TrainingEngine
    from polyshard.core.batch import BatchResult
    from polyshard.core.build_stages import build_stages
    from polyshard.core.capabilities import Capabilities, Rejected
    from polyshard.core.context import GroupContext, ParallelContext
    from polyshard.core.discovery import adapter_names, load_adapter
    from polyshard.core.errors import (
        AdapterError,
        CheckpointError,
        ConfigurationError,
        EngineFailureError,
        LayoutError,
        MissingDependencyError,
        PolyshardError,
        RankFailureError,
        RegistrationError,
        RoutingError,
        UnsupportedVersionError,
        WeightSyncError,
    )
    from polyshard.core.experts import ClampedSwiglu, ExpertStorage
    from polyshard.core.linear_adapter import LinearAdapter
    from polyshard.core.optimizer import AdamW, TorchOptimizer
    from polyshard.core.parallel_layout import ParallelLayout
    from polyshard.core.parameter_groups import ParameterGroup
    from polyshard.core.pipeline_plan import PipelinePlan, pipeline_plan
    from polyshard.core.precision import Precision
    from polyshard.core.stages import Stages
    from polyshard.core.weight_sharding import Segment, WeightLayout
    from polyshard.core.weight_table import collect_layouts
    from polyshard.exact import exact_context
    from polyshard.experts.balance import Balance, RouterStatistics
    from polyshard.experts.layer import MixtureOfExperts, SharedExperts, mixture_of_experts
    from polyshard.experts.observed import router_loss, router_statistics, update_router_bias
    from polyshard.experts.replay import packed_routing, record_routing, replay_routing
    from polyshard.experts.router import Router
    from polyshard.launch import initialize, shutdown
    from polyshard.layers.activation import swiglu
    from polyshard.layers.initialization import initialize_weights, normal_initializer
    from polyshard.layers.linear import column_parallel, qkv_parallel, replicated_linear, row_parallel
    from polyshard.layers.lm_loss import lm_logprobs, lm_loss
    from polyshard.layers.logprobs import token_logprobs
    from polyshard.layers.norm import rms_norm
    from polyshard.layers.pipeline import PipelineStage, pipeline_stage, stage_layers
    from polyshard.layers.residual import add_residual
    from polyshard.layers.vocabulary import gather_logits, lm_head, vocab_embedding, vocab_parallel_cross_entropy
    from polyshard.lora import add_lora, load_lora, lora_disabled, save_lora, save_merged_lora
    from polyshard.planning import Cluster, Plan, PlannedLayout, plan
    from polyshard.ray import RayClient, ray_engine, run_on_ray
    from polyshard.registry import engine_errors, register_model, registered_models
    from polyshard.training.data import PackedDocuments, StepLoader, packed_batch
    from polyshard.training.dropout import Dropout
    from polyshard.training.generators import manual_seed, sharded_random
    from polyshard.training.layer_costs import LayerCosts, measure_layers
    from polyshard.training.monitor import (
        JsonLines,
        ModelFlops,
        Monitor,
        ProgressBar,
        StepRecord,
        TensorBoard,
        known_peak_flops,
        measured_peak_flops,
        model_flops,
        profile_steps,
    )
    from polyshard.training.muon import Muon
    from polyshard.training.train_batch import train_batch
    from polyshard.transformers import transformers_model
    from polyshard.transformers.replaced import replace_with_trainable_attention

__version__ = "0.1.0"

_HOMES = {
    "polyshard.adapters.vllm.clients.http": ("HttpClient",),
    "polyshard.adapters.vllm.clients.local": ("LlmClient",),
    "polyshard.adapters.vllm.engines.rollout": ("Rollout",),
    "polyshard.adapters.vllm.engines.rollouts": ("RolloutEngine",),
    "polyshard.adapters.vllm.engines.routing": ("ROUTING_WORKER", "served_routing"),
    "polyshard.adapters.vllm.transfer.lora_sync": ("LoraSync",),
    "polyshard.adapters.vllm.transfer.report": ("SyncReport",),
    "polyshard.adapters.vllm.transfer.sync": ("WeightSync",),
    "polyshard.attention": ("RotaryEmbedding", "TrainableFlashAttention", "TrainableMLA", "packed_attention"),
    "polyshard.attention.context_parallel": ("context_parallel_attention", "context_shard", "context_unshard"),
    "polyshard.attention.packing": ("pack",),
    "polyshard.attention.defaults": ("sequence_positions",),
    "polyshard.checkpoint": (
        "ModelConfig",
        "PendingSave",
        "TrainingState",
        "download_checkpoint",
        "latest_checkpoint",
        "load_checkpoint",
        "load_training_state",
        "read_config",
        "save_checkpoint",
        "save_config",
        "save_training_state",
        "upload_checkpoint",
    ),
    "polyshard.layers.activation": ("swiglu",),
    "polyshard.layers.residual": ("add_residual",),
    "polyshard.core.adapter": ("Adapter", "StepResult", "TrainingEngine"),
    "polyshard.core.optimizer": ("AdamW", "TorchOptimizer"),
    "polyshard.core.parameter_groups": ("ParameterGroup",),
    "polyshard.core.batch": ("BatchResult",),
    "polyshard.core.build_stages": ("build_stages",),
    "polyshard.core.pipeline_plan": ("PipelinePlan", "pipeline_plan"),
    "polyshard.core.stages": ("Stages",),
    "polyshard.training.layer_costs": ("LayerCosts", "measure_layers"),
    "polyshard.training.muon": ("Muon",),
    "polyshard.training.train_batch": ("train_batch",),
    "polyshard.core.capabilities": ("Capabilities", "Rejected"),
    "polyshard.core.context": ("GroupContext", "ParallelContext"),
    "polyshard.core.discovery": ("adapter_names", "load_adapter"),
    "polyshard.config.families": ("complete_config",),
    "polyshard.core.errors": (
        "AdapterError",
        "CheckpointError",
        "ConfigurationError",
        "EngineFailureError",
        "LayoutError",
        "MissingDependencyError",
        "PolyshardError",
        "RankFailureError",
        "RegistrationError",
        "RoutingError",
        "UnsupportedVersionError",
        "WeightSyncError",
    ),
    "polyshard.training.generators": ("manual_seed", "sharded_random"),
    "polyshard.training.data": ("PackedDocuments", "StepLoader", "packed_batch"),
    "polyshard.training.dropout": ("Dropout",),
    "polyshard.training.monitor": (
        "JsonLines",
        "ModelFlops",
        "Monitor",
        "ProgressBar",
        "StepRecord",
        "TensorBoard",
        "known_peak_flops",
        "measured_peak_flops",
        "model_flops",
        "profile_steps",
    ),
    "polyshard.layers.initialization": ("initialize_weights", "normal_initializer"),
    "polyshard.core.parallel_layout": ("ParallelLayout",),
    "polyshard.layers.linear": ("column_parallel", "qkv_parallel", "replicated_linear", "row_parallel"),
    "polyshard.core.linear_adapter": ("LinearAdapter",),
    "polyshard.layers.norm": ("rms_norm",),
    "polyshard.layers.vocabulary": ("gather_logits", "lm_head", "vocab_embedding", "vocab_parallel_cross_entropy"),
    "polyshard.core.precision": ("Precision",),
    "polyshard.core.weight_sharding": ("Segment", "WeightLayout"),
    "polyshard.core.weight_table": ("collect_layouts",),
    "polyshard.exact": ("exact_context",),
    "polyshard.core.experts": ("ClampedSwiglu", "ExpertStorage"),
    "polyshard.experts.balance": ("Balance", "RouterStatistics"),
    "polyshard.experts.layer": ("MixtureOfExperts", "SharedExperts", "mixture_of_experts"),
    "polyshard.experts.observed": ("router_loss", "router_statistics", "update_router_bias"),
    "polyshard.experts.replay": ("packed_routing", "record_routing", "replay_routing"),
    "polyshard.experts.router": ("Router",),
    "polyshard.layers.lm_loss": ("lm_logprobs", "lm_loss"),
    "polyshard.layers.logprobs": ("token_logprobs",),
    "polyshard.launch": ("initialize", "shutdown"),
    "polyshard.lora": ("add_lora", "load_lora", "lora_disabled", "save_lora", "save_merged_lora"),
    "polyshard.layers.pipeline": ("PipelineStage", "pipeline_stage", "stage_layers"),
    "polyshard.planning": ("Cluster", "Plan", "PlannedLayout", "plan"),
    "polyshard.ray": ("RayClient", "ray_engine", "run_on_ray"),
    "polyshard.registry": ("engine_errors", "register_model", "registered_models"),
    "polyshard.transformers.replaced": ("replace_with_trainable_attention",),
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
