"""What a plan asks of the adapters that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyshard.core.capabilities import Capabilities
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import ConfigurationError


def training_adapters(names: Sequence[str] | None) -> dict[str, Any]:
    """Return the capabilities and pipeline schedules of the adapters that train, and what they hold under ZeRO."""
    found = {name: load_adapter(name) for name in names or adapter_names()}
    training = {name: adapter for name, adapter in found.items() if adapter.capabilities["training"].available}
    if not training:
        raise ConfigurationError(f"no adapter trains: got {', '.join(found)}. Pass adapters= that train.")
    return {
        "capabilities": {name: adapter.capabilities for name, adapter in training.items()},
        "full_gradients": {name: getattr(adapter, "zero_full_gradients", False) for name, adapter in training.items()},
        "schedules": {name: getattr(adapter, "pipeline_schedules", ("1f1b",)) for name, adapter in training.items()},
        "buckets": {name: getattr(adapter, "zero_bucket", 0) for name, adapter in training.items()},
    }


def reasons_against_axis(axis: str, capabilities: dict[str, Capabilities]) -> list[str]:
    """Return why adapters lack an axis, by name."""
    return [
        f"{name}: {axis}: {known[axis].reason}" for name, known in capabilities.items() if not known[axis].available
    ]
