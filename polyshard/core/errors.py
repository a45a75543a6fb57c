"""The exceptions that polyshard raises.

A message names the wrong value, the expected value, and what to do. Errors caused by a user's input are also
`ValueError`; a missing or unsupported package is also an `ImportError`; failures at run time are also `RuntimeError`.
"""

from __future__ import annotations


class PolyshardError(Exception):
    """The base class of all errors that polyshard raises."""


class LayoutError(PolyshardError, ValueError):
    """Sizes that do not match: a world size, a division over ranks, the shape of a parameter."""


class ConfigurationError(PolyshardError, ValueError):
    """A setting or a model configuration that is invalid or unsupported."""


class AdapterError(PolyshardError, ValueError):
    """An adapter that is unknown, or that lacks a feature or method that a model requires."""


class MissingDependencyError(PolyshardError, ImportError):
    """A library that is not installed; the message contains the command that installs it."""


class UnsupportedVersionError(PolyshardError, ImportError):
    """A library in a version that is known to compute something wrong without an error."""


class CheckpointError(PolyshardError, ValueError):
    """A checkpoint that is missing, incomplete, or does not match the model. Nothing has been loaded."""


class WeightSyncError(PolyshardError, RuntimeError):
    """Weights that arrived damaged at a server, or a server whose weight update is incomplete.

    Attributes:
        tensors: names of the affected tensors; empty if unknown.
        ranks: ranks of the affected workers of the server; empty if unknown.
    """

    def __init__(self, message: str, tensors: tuple[str, ...] = (), ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors
        self.ranks = ranks


class RegistrationError(PolyshardError, ValueError):
    """A model factory that cannot be registered with a server, or a model that the server cannot run."""


class RankFailureError(PolyshardError, RuntimeError):
    """A collective that did not finish because a rank crashed, hung, or took a different code path.

    Attributes:
        ranks: the global ranks at fault; empty if unknown.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
