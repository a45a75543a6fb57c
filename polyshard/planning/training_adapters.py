"""What a plan asks of the adapters that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polyshard.core.capabilities import Capabilities
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import ConfigurationError
from polyshard.planning.library import Library
from polyshard.planning.strategy import SHARDINGS, Strategy, reason_against


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingAdapter:
    """An adapter that trains, as a plan sees it.

    Attributes:
        capabilities: of the adapter.
        schedules: of its pipelines.
        library: what it holds in memory.
    """

    capabilities: Capabilities
    schedules: Sequence[str]
    library: Library

    def reason_against(self, strategy: Strategy) -> str | None:
        """Return why the adapter cannot run a strategy, or None."""
        least = self.library.least_sharding
        if strategy.replicas > 1 and SHARDINGS.index(strategy.sharding) < SHARDINGS.index(least):
            return f"{strategy.sharding}: its engine shards at least as {least}"
        return reason_against(strategy, self.capabilities, self.schedules)


def training_adapters(names: Sequence[str] | None) -> dict[str, TrainingAdapter]:
    """Return the adapters that train, by name."""
    found = {name: load_adapter(name) for name in names or adapter_names()}
    training = {name: adapter for name, adapter in found.items() if adapter.capabilities["training"].available}
    if not training:
        raise ConfigurationError(f"no adapter trains: got {', '.join(found)}. Pass adapters= that train.")
    return {
        name: TrainingAdapter(
            capabilities=adapter.capabilities,
            schedules=getattr(adapter, "pipeline_schedules", ("1f1b",)),
            library=Library.of(adapter),
        )
        for name, adapter in training.items()
    }


def reasons_against_axis(axis: str, adapters: Mapping[str, TrainingAdapter]) -> list[str]:
    """Return why adapters lack an axis, by name."""
    known = {name: adapter.capabilities[axis] for name, adapter in adapters.items()}
    return [f"{name}: {axis}: {support.reason}" for name, support in known.items() if not support.available]
