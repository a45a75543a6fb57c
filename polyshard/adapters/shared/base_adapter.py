"""What the adapters of all libraries have in common, and what those that only serve leave out."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import nn

from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import Capabilities
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import AdapterError
from polyshard.core.layout import ParallelLayout
from polyshard.core.requirement import Requirement


class BaseAdapter:
    """An `Adapter` whose process groups are those that the torch adapter makes.

    A subclass sets the class attributes and adds `adopt`, `engine` and `formats`.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    requirement: ClassVar[Requirement]
    linear: Any

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> GroupContext:
        """Make process groups as the torch adapter does, for this library's layers.

        Args:
            layout: default data parallel over the whole world.
            options: those of the torch adapter.

        Raises:
            MissingDependencyError: the library is not installed.
            AdapterError: the library lacks an axis of `layout`.
        """
        self.requirement.require()
        if layout is not None and layout.sequence_parallel:
            self.capabilities.require("sequence")
        return self.adopt(load_adapter("torch").initialize(layout, **options))

    def adopt(self, context: ParallelContext) -> GroupContext:
        """Return a context of this library's layers on the groups of `context`."""
        raise NotImplementedError

    def shutdown(self, context: ParallelContext) -> None:
        """Undo what `initialize` did, in order."""
        for undo in context.on_shutdown:
            undo()


class ServingOnlyAdapter:
    """An `Adapter` of a serving engine: it trains nothing, and its contexts are made in its own workers."""

    name: ClassVar[str]
    title: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    requirement: ClassVar[Requirement]

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> NoReturn:
        """Raise `AdapterError`: contexts of this adapter are made in the engine's workers."""
        raise AdapterError(
            f"the {self.name} adapter does not initialize training processes: register a model with "
            f"polyshard.register_model and start {self.title}, or train with another adapter"
        )

    def adopt(self, context: ParallelContext) -> NoReturn:
        """Raise `AdapterError`: the engine's layers read the engine's own groups."""
        raise AdapterError(f"{self.title}'s layers run only on {self.title}'s own groups, which its workers make")

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> NoReturn:
        """Raise `AdapterError`: see the capability `training`."""
        self.capabilities.require("training")
        raise AssertionError(f"{self.name} declares that it trains")

    def shutdown(self, context: ParallelContext) -> None:
        """Do nothing: the engine ends its own workers."""
