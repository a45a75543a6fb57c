"""Models by name: how a factory reaches every process of a serving engine."""

from polyshard.registry.models import (
    ENTRY_POINT_GROUP,
    ENVIRONMENT_VARIABLE,
    factory_of,
    register_model,
    registered_models,
)
from polyshard.registry.names import renamer
from polyshard.registry.reference import reference_of, resolve

__all__ = [
    "ENTRY_POINT_GROUP",
    "ENVIRONMENT_VARIABLE",
    "factory_of",
    "reference_of",
    "register_model",
    "registered_models",
    "renamer",
    "resolve",
]
