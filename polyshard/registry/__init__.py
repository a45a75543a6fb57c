"""Models by name: how a factory reaches every process of a serving engine."""

from polyshard.registry.models import (
    ENTRY_POINT_GROUP,
    ENVIRONMENT_VARIABLE,
    factory_of,
    model_from_entry,
    register_model,
    registered_models,
)
from polyshard.registry.names import renamer
from polyshard.registry.reference import reference_of, resolve
from polyshard.registry.worker_errors import engine_errors, told_to_parent

__all__ = [
    "ENTRY_POINT_GROUP",
    "ENVIRONMENT_VARIABLE",
    "engine_errors",
    "factory_of",
    "model_from_entry",
    "reference_of",
    "register_model",
    "registered_models",
    "renamer",
    "resolve",
    "told_to_parent",
]
