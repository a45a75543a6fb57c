"""The model registry: factories by name, and the way they reach every process of a server."""

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
from polyshard.registry.worker_errors import engine_errors, report_to_parent

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
    "report_to_parent",
    "resolve",
]
