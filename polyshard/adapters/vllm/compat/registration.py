"""vLLM's registries of models, loaders and weight transfer."""

from __future__ import annotations

from torch import nn
from vllm import ModelRegistry
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import _MODEL_ARCH_BY_HASH


def register_class(name: str, model_class: type[nn.Module]) -> None:
    """Put a class into vLLM's registry; one of the same name gives way, also where an engine has looked it up already.

    A class object: the lazy string form costs a subprocess, and caches stale flags. vLLM keeps the class that it found
    for a checkpoint (0.32, model_executor/model_loader/utils.py), and would go on with the one registered before.
    """
    ModelRegistry.register_model(name, model_class)
    for key in [key for key, (_, found) in _MODEL_ARCH_BY_HASH.items() if found == name]:
        del _MODEL_ARCH_BY_HASH[key]


def register_loader(load_format: str, loader: type[BaseModelLoader]) -> None:
    """Make a way of loading known to vLLM in this process; again is as once."""
    if load_format not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(load_format)(loader)


def register_transfer(name: str, module: str, attribute: str) -> None:
    """Make a weight transfer backend known to vLLM in this process; again is as once."""
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, module, attribute)
