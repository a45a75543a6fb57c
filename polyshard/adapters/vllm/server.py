"""The vLLM server of registered models."""

from __future__ import annotations

from polyshard.adapters.vllm.compat import register_class, register_loader
from polyshard.adapters.vllm.config import register_config
from polyshard.adapters.vllm.served.live_module import LOAD_FORMAT, SharedWeights
from polyshard.adapters.vllm.served.model import make_model_class
from polyshard.core.serving import ModelFactory, RegisteredModel


class VllmServer:
    """Registers a model class with vLLM for each registered model."""

    def register(self, model: RegisteredModel, factory: ModelFactory) -> None:
        """Register `model` with vLLM in this process."""
        register_config()
        register_loader(LOAD_FORMAT, SharedWeights)
        if model.model_type is not None:
            register_config(model.model_type)
        register_class(model.name, make_model_class(model, factory))
