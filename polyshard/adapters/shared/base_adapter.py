"""The base classes of adapters: of training libraries, and of engines that only serve."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import nn

from polyshard.core.adapter import OptimizerFactory
from polyshard.core.capabilities import Capabilities
from polyshard.core.context import GroupContext, ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import AdapterError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.core.requirement import Requirement
from polyshard.core.shutdown import shut_down


class BaseAdapter:
    """An `Adapter` that uses the process groups of the torch adapter.

    A subclass sets the class attributes and adds `adopt`, `engine` and `formats`.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    requirement: ClassVar[Requirement]
    linear: Any

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> GroupContext:
        """Create process groups as the torch adapter does, for this library's layers.

        Args:
            layout: the parallel layout; by default data parallel over all ranks.
            options: options of the torch adapter.

        Raises:
            MissingDependencyError: the library is not installed.
            AdapterError: the library lacks an axis of `layout`.
        """
        self.requirement.require()
        if layout is not None and layout.sequence_parallel:
            self.capabilities.require("sequence")
        if layout is not None and layout.pipeline > 1:
            self.capabilities.require("pipeline")
        if layout is not None and layout.expert > 1:
            self.capabilities.require("expert")
        return self.adopt(load_adapter("torch").initialize(layout, **options))

    def adopt(self, context: ParallelContext) -> GroupContext:
        """Return a context with this library's layers on the process groups of `context`."""
        raise NotImplementedError

    def shutdown(self, context: ParallelContext) -> None:
        """Wait for work in the background, and run the context's `on_shutdown` functions, which undo `initialize`."""
        shut_down(context)


class ServingOnlyAdapter:
    """An `Adapter` of a serving engine: it does not train, and its workers create its contexts."""

    name: ClassVar[str]
    title: ClassVar[str]
    capabilities: ClassVar[Capabilities]
    requirement: ClassVar[Requirement]

    def initialize(self, layout: ParallelLayout | None = None, **options: Any) -> NoReturn:
        """Raise `AdapterError`: contexts of this adapter are created in the engine's workers."""
        raise AdapterError(
            f"the {self.name} adapter does not initialize training processes. Register a model with "
            f"polyshard.register_model and start {self.title}, or train with another adapter"
        )

    def adopt(self, context: ParallelContext) -> NoReturn:
        """Raise `AdapterError`: the engine's layers use the engine's own process groups."""
        raise AdapterError(f"{self.title}'s layers run only on the process groups of its workers. Use another adapter")

    def engine(
        self, model: nn.Module, optimizer: OptimizerFactory, context: ParallelContext, **options: Any
    ) -> NoReturn:
        """Raise `AdapterError` with the reason of the capability `training`."""
        self.capabilities.require("training")
        raise AssertionError(f"{self.name} declares the capability training, but has no engine")

    def shutdown(self, context: ParallelContext) -> None:
        """Do nothing: the engine shuts down its own workers."""
