"""The model class that vLLM instantiates for a registered factory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from polyshard.adapters.vllm.compat import (
    IntermediateTensors,
    SupportsLoRA,
    SupportsPP,
    VllmConfig,
    WeightsMapper,
    get_world_group,
)
from polyshard.adapters.vllm.config import fill_rotary_base
from polyshard.adapters.vllm.context import serving_context
from polyshard.adapters.vllm.engines.routing import ROUTING_WORKER
from polyshard.adapters.vllm.layers.experts import serve_experts
from polyshard.adapters.vllm.served.early_exit import uses_early_exit
from polyshard.adapters.vllm.served.forward import explain_trace_errors, make_model_forward
from polyshard.adapters.vllm.served.live_module import check_load_format
from polyshard.adapters.vllm.served.loading import attach_loaders, keep_buffers, load_weights, packed_names
from polyshard.adapters.vllm.served.pipeline import HIDDEN, check_pipeline, names_on_other_stages
from polyshard.adapters.vllm.served.quantized import quantize_layers, refuse_quantized_reload, refuse_unserved_codes
from polyshard.adapters.vllm.served.routing import RoutingRecorder
from polyshard.adapters.vllm.transfer.guard import WeightGuard, shared_memory_watch
from polyshard.core.context import ParallelContext
from polyshard.core.errors import CheckpointError, RegistrationError
from polyshard.core.serving import ModelFactory, RegisteredModel, build_model, check_served_interface
from polyshard.core.weight_table import WeightTable, collect_layouts
from polyshard.exact.trace import recorder_of
from polyshard.layers.vocabulary import gather_logits
from polyshard.registry import renamer, report_to_parent
from polyshard.registry.live_module import LiveModel
from polyshard.weights.view import parameter_changes

logger = logging.getLogger(__name__)

_LORA_ON_CPU = (
    "vLLM 0.32 on CPU applies the LoRA adapter of its last slot to requests without an adapter if a batch mixes both "
    "kinds (also for vLLM's own models). Set max_loras above the number of adapters, or do not mix them"
)


# With every adapter, because vLLM 0.33 rejects a class without SupportsLoRA before `_check_supported` can explain why.
class ServedModel(nn.Module, SupportsPP, SupportsLoRA):
    """The module that vLLM calls; the user's model is `self.model`.

    Each registration is a subclass, because vLLM inspects the class and creates the instances itself.

    Attributes:
        registered: the registration.
        factory: builds the user's model in each worker.
    """

    registered: ClassVar[RegisteredModel]
    factory: ClassVar[ModelFactory]
    packed_modules_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # vLLM looks for it on class and instance
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"": "model."})

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        with report_to_parent(get_world_group().rank):
            self.build(vllm_config)

    def build(self, vllm_config: VllmConfig) -> None:
        """Build the user's model in this worker, and everything that vLLM needs around it."""
        _check_supported(self.registered, vllm_config)
        self.shares_memory = isinstance(self.factory, LiveModel)
        check_load_format(self.registered.name, self.shares_memory, vllm_config)
        self.context = serving_context(vllm_config, self.registered)
        self.config = config = vllm_config.model_config.hf_config
        fill_rotary_base(config)
        self.model = build_model(self.factory, config, self.context, self.registered.name)
        check_served_interface(self.model, self.registered.name, self.registered.outputs)
        self.model.requires_grad_(False)
        axis = self.context.axis("pipeline")
        self.first_stage, self.last_stage = axis.rank == 0, axis.rank == axis.size - 1
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.table = collect_layouts(self.model)
        self.padded_to_vocabulary = _is_padded_to_vocabulary(self.table, self.vocab_size, self.context)
        self.quantized = None
        rename = self.rename = renamer(self.registered.names)
        if vllm_config.quant_config is not None or vllm_config.lora_config is not None:
            self.packed_modules_mapping = packed_names(self.table, self.registered.name)
        if vllm_config.quant_config is not None:
            vllm_config.quant_config.packed_modules_mapping.update(self.packed_modules_mapping)
            self.quantized = quantize_layers(self.model, self.table, vllm_config.quant_config)
        on_cpu = self.context.device.type == "cpu"
        if vllm_config.lora_config is not None and on_cpu and self.context.rank == 0:
            logger.warning(_LORA_ON_CPU)
        self.other_stages = names_on_other_stages(self.registered.name, self.table)
        refuse_unserved_codes(self.registered.name, vllm_config, self.table, rename, self.other_stages, self.quantized)
        self.hidden_size = vllm_config.model_config.get_hidden_size()
        refuse_expert_parallel(self.registered.name, self.table, vllm_config)
        attach_loaders(self.model, self.table, self.context)
        if self.context.exact is None:
            serve_experts(self.model, self.context, keep_weights=self.shares_memory)
        keep_buffers(self.model)
        self.weights = WeightGuard()
        if isinstance(self.factory, LiveModel):
            changes = parameter_changes(self.factory.module)
            self.weights.accept("the trainer's own", shared_memory_watch(changes, "the engine was started"))
        self.recorder = recorder_of(self.model, self.context.get_tensor_parallel_rank())
        self.routing = None
        if vllm_config.parallel_config.worker_extension_cls == ROUTING_WORKER:
            self.routing = RoutingRecorder(self.model, vllm_config.cache_config.block_size)
        can_exit = self.registered.outputs == "hidden" and self.last_stage and self.recorder is None
        can_exit = can_exit and self.routing is None  # layers after the last attention skip tokens
        self.early_exit = can_exit and uses_early_exit(self.model, vllm_config)
        # A submodule, because vLLM warms up and captures the compiled modules that it finds in a model.
        self.model_forward = make_model_forward(self.registered, self.model, vllm_config, self.early_exit)
        self.loaded = False

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings `[tokens, hidden]` of token IDs, for prompts that mix both."""
        embed = getattr(self.model, "embed_input_ids", None)
        if embed is None:
            raise RegistrationError(
                f"model {self.registered.name!r} has no embed_input_ids(input_ids), which prompts given as embeddings "
                "need. Add the method"
            )
        return embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """Return hidden states `[tokens, hidden]` of this stage, or logits if the model returns them."""
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise RegistrationError(
                f"model {self.registered.name!r} was given unsupported inputs by vLLM: got {', '.join(unknown)}, "
                "expected token IDs or embeddings with positions. Switch off the feature that adds them"
            )
        with self.weights.computing():
            if not self.first_stage:
                inputs_embeds = intermediate_tensors[HIDDEN]
            with explain_trace_errors(self.registered.name):
                hidden = self.model_forward(None if inputs_embeds is not None else input_ids, positions, inputs_embeds)
            if self.routing is not None:
                self.routing.add(input_ids, positions)
            if not self.last_stage:
                return IntermediateTensors({HIDDEN: hidden})
            return self.full_logits(hidden) if self.registered.outputs == "logits" else hidden

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Return buffers for the hidden states that the previous stage sends."""
        hidden = torch.zeros(batch_size, self.hidden_size, dtype=dtype, device=device)
        return IntermediateTensors({HIDDEN: hidden})

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits `[tokens, vocabulary]` of all tensor-parallel ranks."""
        with self.weights.computing():  # here as well, since a captured graph replaces forward
            if self.registered.outputs == "logits":
                return hidden_states
            if self.early_exit:
                hidden_states = self.model.finish(hidden_states)  # pyrefly: ignore  # checked when built
            return self.full_logits(self.model.compute_logits(hidden_states))  # pyrefly: ignore  # checked when built

    def full_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Gather logits over the vocabulary, and drop its padding."""
        if logits.shape[-1] >= self.vocab_size and not self.padded_to_vocabulary:  # one rank, or already gathered
            return logits[..., : self.vocab_size]
        return gather_logits(logits, self.context, self.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; return the names of the parameters that were loaded."""
        reloading = any(parameter.is_meta for parameter in self.model.parameters())  # as vLLM's reload makes them
        if self.loaded and not reloading:
            raise CheckpointError(
                f"model {self.registered.name!r} is running: load_weights alone would leave packed copies of the old "
                "weights. Call polyshard.WeightSync, or vLLM's reload_weights"
            )
        if reloading:
            self.weights.refuse("a reload of its weights has begun and is not finished")
            refuse_quantized_reload(self.registered.name, self.quantized)
            if (receiver := getattr(self, "polyshard_receiver", None)) is not None:
                receiver.end_sharing()
        with report_to_parent(self.context.rank):
            names = load_weights(
                self.model, self.table, weights, self.registered.name, self.rename, self.other_stages, self.quantized
            )
        if reloading:
            self.weights.accept(None)
        self.loaded = True
        return {f"model.{name}" for name in names}


def make_model_class(registered: RegisteredModel, factory: ModelFactory) -> type[ServedModel]:
    """Return the class with the interface that vLLM inspects, for one registration."""
    return type(registered.name, (ServedModel,), {"registered": registered, "factory": staticmethod(factory)})


def _is_padded_to_vocabulary(table: WeightTable, vocab_size: int, context: ParallelContext) -> bool:
    """Return whether a rank's shard of the logits is as wide as a small vocabulary, because vLLM pads it.

    Its width then does not tell whether the model has gathered the logits. Gathering them twice leaves them unchanged:
    only the first rank's columns remain.
    """
    axis = context.axis("tensor")
    heads = (e.layout for e in table.values() if e.layout.dim == 0 and e.layout.shape[0] == vocab_size)
    return axis.size > 1 and any(layout.local_shape(axis.rank, axis.size)[0] >= vocab_size for layout in heads)


def refuse_expert_parallel(name: str, table: WeightTable, vllm_config: VllmConfig) -> None:
    """Raise `RegistrationError` if a model with experts is served with vLLM's expert parallel."""
    if vllm_config.parallel_config.enable_expert_parallel and any(e.layout.experts for e in table.values()):
        raise RegistrationError(
            f"model {name!r} is served with enable_expert_parallel, which is unsupported: vLLM's CPU experts crash "
            "with it, and polyshard shards experts over the tensor axis. Leave it out, and use tensor_parallel_size"
        )


def _check_supported(registered: RegisteredModel, vllm_config: VllmConfig) -> None:
    """Raise `RegistrationError` for features that vLLM would silently ignore on this model."""
    name = registered.name
    if vllm_config.model_config.runner_type == "pooling":
        raise RegistrationError(
            f"model {name!r} cannot be served for embeddings, scores or rewards: registered models generate text. "
            "Leave out runner='pooling'"
        )
    features = {
        "a quantized checkpoint": vllm_config.quant_config is not None,
        "LoRA": vllm_config.lora_config is not None,
    }
    for feature, enabled in features.items():
        if enabled and registered.adapter != "vllm":
            raise RegistrationError(
                f"model {name!r}: {feature} needs vLLM's own layers, but it was registered with "
                f"adapter={registered.adapter!r}. Register it with adapter='vllm'"
            )
    check_pipeline(name, vllm_config)
