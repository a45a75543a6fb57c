"""The order of passes within a step: what libraries require of it, and would answer with wrong gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from polyshard.core.errors import ConfigurationError

logger = logging.getLogger(__name__)


@dataclass
class PassOrder:
    """The passes of a step so far.

    Attributes:
        averages: whether the next backward pass averages gradients over the replicas, because nothing accumulates.
        forward: whether a forward pass with gradients has run since the last backward pass.
        averaging_forward: whether one has run after which the wrapper averages gradients.
        averaged: whether averaged gradients wait for a step.
        gradients: whether any gradients do.
        backwards: the number of backward passes that have begun.
    """

    averages: Callable[[], bool]
    forward: bool = False
    averaging_forward: bool = False
    averaged: bool = False
    gradients: bool = False
    backwards: int = 0

    def note_forward(self) -> None:
        """Note that the engine's forward pass begins."""
        self.forward |= torch.is_grad_enabled()
        self.averaging_forward |= torch.is_grad_enabled() and self.averages()

    def check_wrapper(self, wrapper: str) -> None:
        """Check that the wrapper saw the forward pass of this backward pass, or it would not average the gradients.

        Raises:
            ConfigurationError: it did not.
        """
        if self.averages() and not self.averaging_forward:
            raise ConfigurationError(
                f"the loss does not come from the engine's forward pass: {wrapper} averages gradients in one backward "
                "pass after each call of the engine. Call engine(...) in place of the model, add the losses of several "
                "calls before one engine.backward(loss), and run both passes of a micro-batch under accumulate(), or "
                "neither."
            )
        self.averaging_forward = False

    def check_last_forward(self, library: str) -> None:
        """Check that a forward pass has run since the last backward pass.

        Raises:
            ConfigurationError: none has.
        """
        if not self.forward:
            raise ConfigurationError(
                f"the loss does not come from the engine's last forward pass: {library} adds up one backward pass "
                "after each call of the engine. Run the backward pass of a micro-batch before the forward pass of the "
                "next one, or add their losses before engine.backward(loss)."
            )

    def check_step(self, library: str) -> None:
        """Check that no averaged gradients wait for a step, to which the library would not add those of this pass.

        Raises:
            ConfigurationError: some do.
        """
        if self.averages() and self.averaged:
            raise ConfigurationError(
                f"averaged gradients wait for a step: got another backward pass that averages, whose gradients "
                f"{library} does not add to them. Pass all micro-batches of a step to one train_batch, run all but the "
                "last under engine.accumulate(), or call engine.step() or engine.zero_grad() before."
            )
        self.averaged |= self.averages()

    def note_backward(self) -> None:
        """Note that a backward pass begins."""
        self.gradients = True
        self.backwards += 1

    def note_step(self) -> None:
        """Note that no gradients are left, after a step or because they were discarded."""
        self.averaged = self.gradients = False

    @contextmanager
    def complete(self, discard: Callable[[], None]) -> Iterator[None]:
        """Discard gradients, with a warning, if an error leaves those of some micro-batches only.

        Args:
            discard: clears all gradients of the step. A program that goes on would add the next step's to them.
        """
        before = self.backwards
        try:
            yield
        except BaseException as error:
            if self.backwards > before:
                logger.warning("%s within train_batch: the gradients of this step are discarded", type(error).__name__)
                discard()
            raise
