"""Pages of the API reference: every public name, by topic. The docstrings are rendered by mkdocstrings."""

from collections.abc import Callable, Mapping

TOPICS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "start": (
        "Starting and layout",
        "Make process groups, and describe where this process stands.",
        (
            *("initialize", "shutdown", "manual_seed", "ParallelLayout", "ParallelContext", "GroupContext"),
            *("adapter_names", "load_adapter"),
        ),
    ),
    "layers": (
        "Layers",
        "What a model is written with. Each function builds a layer of the library that the context was created for.",
        (
            *("column_parallel", "row_parallel", "qkv_parallel", "replicated_linear", "rms_norm", "vocab_embedding"),
            *("lm_head", "gather_logits", "swiglu", "add_residual", "Dropout", "sharded_random"),
            *("vocab_parallel_cross_entropy", "token_logprobs", "lm_loss", "lm_logprobs"),
            *("initialize_weights", "normal_initializer"),
            *("PipelineStage", "pipeline_stage", "stage_layers"),
            *("PipelinePlan", "pipeline_plan", "build_stages", "Stages"),
            *("measure_layers", "LayerCosts"),
        ),
    ),
    "experts": (
        "Mixture of experts",
        "The layer, its routers and the balance of their load; the names of checkpoints; record and replay of routing.",
        (
            *("mixture_of_experts", "MixtureOfExperts", "Router", "SharedExperts", "ExpertStorage", "ClampedSwiglu"),
            *("Balance", "router_loss", "update_router_bias", "router_statistics", "RouterStatistics"),
            *("record_routing", "replay_routing", "packed_routing", "served_routing", "ROUTING_WORKER"),
        ),
    ),
    "attention": (
        "Attention",
        "Attention modules and functions, in training and in serving.",
        (
            *("TrainableFlashAttention", "TrainableMLA", "RotaryEmbedding", "packed_attention", "pack"),
            *("sequence_positions", "context_parallel_attention", "context_shard", "context_unshard"),
            "replace_with_trainable_attention",
        ),
    ),
    "training": (
        "Training",
        "Engines, optimizers, and one training step.",
        (
            *("TrainingEngine", "AdamW", "Muon", "TorchOptimizer", "ParameterGroup", "Precision"),
            *("train_batch", "BatchResult", "StepResult"),
            *("add_lora", "lora_disabled", "save_lora", "load_lora", "save_merged_lora"),
        ),
    ),
    "planning": (
        "Planning",
        "Layouts of a model on a cluster: memory, communication and predicted time, before any GPU is used.",
        (*("plan", "Cluster", "Plan", "PlannedLayout"), *("planning.Strategy", "planning.ServingPlan")),
    ),
    "data": (
        "Data and monitoring",
        "Pack documents, load them so that a run can be resumed, and record what each step does.",
        (
            *("PackedDocuments", "packed_batch", "StepLoader", "Monitor", "StepRecord", "JsonLines", "TensorBoard"),
            *("ProgressBar", "model_flops", "ModelFlops", "known_peak_flops", "measured_peak_flops", "profile_steps"),
        ),
    ),
    "checkpoints": (
        "Configurations and checkpoints",
        "Read and write Hugging Face directories and training states.",
        (
            *("save_checkpoint", "load_checkpoint", "save_training_state", "load_training_state", "TrainingState"),
            *("latest_checkpoint", "PendingSave", "ModelConfig", "read_config", "save_config", "complete_config"),
            *("download_checkpoint", "upload_checkpoint"),
        ),
    ),
    "serving": (
        "Serving and weight sync",
        "Register a model with vLLM, and keep a running engine's weights equal to a trainer's.",
        (
            *("register_model", "registered_models", "engine_errors", "WeightSync", "SyncReport", "LoraSync"),
            *("HttpClient", "LlmClient", "RayClient", "ray_engine", "run_on_ray"),
            *("RolloutEngine", "Rollout", "exact_context", "transformers_model"),
        ),
    ),
    "adapters": (
        "Writing an adapter",
        "Protocols and data that an adapter implements. `polyshard.core` exports all of them.",
        (
            *("Adapter", "LinearAdapter", "Capabilities", "Rejected", "WeightLayout", "Segment", "collect_layouts"),
            *("core.Requirement", "core.FullLinearAdapter", "core.Collectives", "core.ParallelAxis"),
            *("core.AttentionSpec", "core.PackedSequences", "core.WeightTable", "core.WeightEntry", "core.Piece"),
            *("core.OptimizerState", "core.GroupSettings", "testing.AdapterSuite", "testing.run_ranks"),
        ),
    ),
    "errors": (
        "Errors",
        "Every error that polyshard raises is a `PolyshardError`.",
        (
            *("PolyshardError", "ConfigurationError", "LayoutError", "AdapterError", "MissingDependencyError"),
            *("UnsupportedVersionError", "RegistrationError", "CheckpointError", "WeightSyncError", "RankFailureError"),
            *("EngineFailureError", "RoutingError"),
            "core.UntestedVersionWarning",
        ),
    ),
}


def pages() -> dict[str, Callable[[], str]]:
    return {name: lambda name=name: page(name) for name in TOPICS}


def page(name: str) -> str:
    title, introduction, names = TOPICS[name]
    return f"# {title}\n\n{introduction}\n\n" + "\n".join(f"::: polyshard.{public}\n" for public in names)
