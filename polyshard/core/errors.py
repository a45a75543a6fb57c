"""Every error that polyshard raises on purpose.

A message names the value that was wrong, what was expected, and what to do. Errors that come from a user's
input are also `ValueError`; a missing package is also an `ImportError`; a failed rank is also a `RuntimeError`.
"""

from __future__ import annotations


class PolyshardError(Exception):
    """Base of all errors raised by polyshard."""


class LayoutError(PolyshardError, ValueError):
    """Sizes that do not fit: a world size, a division, the shape of a parameter."""


class ConfigurationError(PolyshardError, ValueError):
    """A setting or a model configuration that cannot be honoured."""


class AdapterError(PolyshardError, ValueError):
    """An adapter that is unknown, or that lacks what a model asks of it."""


class MissingDependencyError(PolyshardError, ImportError):
    """A library that is not installed; the message holds the command that installs it."""


class UnsupportedVersionError(PolyshardError, ImportError):
    """A library in a version in which something is known to be wrong without a word."""


class CheckpointError(PolyshardError, ValueError):
    """A checkpoint that is missing, torn, or does not fit the model. Nothing has been loaded."""


class WeightSyncError(PolyshardError, RuntimeError):
    """Weights did not arrive as they were sent, or an engine holds a half-finished update.

    Attributes:
        tensors: the names that are concerned; empty where none could be told.
        ranks: the ranks of the engine's workers that are concerned.
    """

    def __init__(self, message: str, tensors: tuple[str, ...] = (), ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors
        self.ranks = ranks


class RegistrationError(PolyshardError, ValueError):
    """A model factory that cannot be handed to a serving engine."""


class RankFailureError(PolyshardError, RuntimeError):
    """A collective did not finish because a rank died, hung, or took another path.

    Attributes:
        ranks: the global ranks held responsible; empty where none could be told.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
