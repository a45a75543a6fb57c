"""vLLM's registries of models, loaders and weight transfer."""

from __future__ import annotations

from torch import nn
from vllm import ModelRegistry
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH


def register_class(name: str, model_class: type[nn.Module]) -> None:
    """Register a model class with vLLM, replacing any class of that name, even if an engine has looked it up already.

    It takes a class object, because vLLM's lazy string form costs a subprocess and caches stale flags. vLLM also caches
    the class of each checkpoint (0.32, model_executor/model_loader/utils.py), so entries of this name are dropped.
    """
    ModelRegistry.register_model(name, model_class)
    for key in [key for key, (_, cached) in _MODEL_ARCH_BY_HASH.items() if cached == name]:
        del _MODEL_ARCH_BY_HASH[key]


def register_loader(load_format: str, loader: type[BaseModelLoader]) -> None:
    """Register a load format with vLLM in this process. Idempotent."""
    if load_format not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(load_format)(loader)


def register_transfer(name: str, module: str, attribute: str) -> None:
    """Register a weight transfer backend with vLLM in this process. Idempotent."""
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, attribute)
