"""The exceptions that polyshard raises.

A message names the wrong value, the expected value, and what to do. Errors caused by a user's input are also
`ValueError`; a missing or unsupported package is also an `ImportError`; failures at run time are also `RuntimeError`.
"""

from __future__ import annotations


class PolyshardError(Exception):
    """The base class of all errors that polyshard raises.

    Examples:
        >>> try:
        ...     ps.load_adapter("unknown")
        ... except ps.PolyshardError as error:
        ...     print(type(error).__name__)
        AdapterError
    """


class LayoutError(PolyshardError, ValueError):
    """Sizes that do not match: a world size, a division over ranks, the shape of a parameter.

    Examples:
        >>> ps.ParallelLayout(tensor=0)
        Traceback (most recent call last):
        polyshard.core.errors.LayoutError: ...
    """


class ConfigurationError(PolyshardError, ValueError):
    """A setting or a model configuration that is invalid or unsupported.

    Examples:
        >>> ps.Precision(parameters=torch.int8)
        Traceback (most recent call last):
        polyshard.core.errors.ConfigurationError: Precision.parameters is unsupported: got torch.int8, ...
    """


class RoutingError(PolyshardError, RuntimeError):
    """A router of a mixture of experts whose logits are not finite.

    Examples:
        >>> ps.Router().route(torch.tensor([[float("nan"), 0.0]]), 1)
        Traceback (most recent call last):
        polyshard.core.errors.RoutingError: The router's logits are not finite for 1 of 1 tokens. ...
    """


class AdapterError(PolyshardError, ValueError):
    """An adapter that is unknown, or that lacks a feature or method that a model requires.

    Examples:
        >>> ps.load_adapter("unknown")
        Traceback (most recent call last):
        polyshard.core.errors.AdapterError: ...
    """


class MissingDependencyError(PolyshardError, ImportError):
    """A library that is not installed; the message contains the command that installs it.

    Examples:
        >>> from polyshard.core import Requirement
        >>> Requirement(title="X", module="x_lib", distributions=("x",), tested=(), install="pip install x").require()
        Traceback (most recent call last):
        polyshard.core.errors.MissingDependencyError: X is not installed...
    """


class UnsupportedVersionError(PolyshardError, ImportError):
    """A library in a version that is known to compute something wrong without an error.

    Examples:
        >>> from polyshard.core import Requirement
        >>> names = {"title": "torch", "module": "torch", "distributions": ("torch",), "tested": ("2.13.0",)}
        >>> Requirement(**names, install="pip install torch", refused=((">=2", "an example"),)).require()
        Traceback (most recent call last):
        polyshard.core.errors.UnsupportedVersionError: torch ...
    """


class CheckpointError(PolyshardError, ValueError):
    """A checkpoint that is missing, incomplete, or does not match the model. Nothing has been loaded.

    Examples:
        >>> ps.read_config("missing")
        Traceback (most recent call last):
        polyshard.core.errors.CheckpointError: ...
    """


class WeightSyncError(PolyshardError, RuntimeError):
    """Weights that arrived damaged at a server, or a server whose weight update is incomplete.

    Attributes:
        tensors: names of the affected tensors; empty if unknown.
        ranks: ranks of the affected workers of the server; empty if unknown.
        engines: names of the engines that failed, of several that are reached over the network; empty otherwise.

    Examples:
        >>> ps.WeightSyncError("embed.weight arrived damaged", ("embed.weight",), (1,)).tensors
        ('embed.weight',)
    """

    def __init__(
        self, message: str, tensors: tuple[str, ...] = (), ranks: tuple[int, ...] = (), engines: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.tensors = tensors
        self.ranks = ranks
        self.engines = engines


class EngineFailureError(PolyshardError, RuntimeError):
    """vLLM engines that died, froze, or cannot be reached, so that no engine is left.

    Attributes:
        engines: names of the engines; empty if unknown.

    Examples:
        >>> ps.EngineFailureError("no engine can be reached", ("http://10.0.0.3:8000",)).engines
        ('http://10.0.0.3:8000',)
    """

    def __init__(self, message: str, engines: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.engines = engines


class RegistrationError(PolyshardError, ValueError):
    """A model factory that cannot be registered with a server, or a model that the server cannot run.

    Examples:
        >>> ps.register_model("not an identifier", print)
        Traceback (most recent call last):
        polyshard.core.errors.RegistrationError: ...
    """


class RankFailureError(PolyshardError, RuntimeError):
    """A collective that did not finish because a rank crashed, hung, or took a different code path.

    Attributes:
        ranks: the global ranks at fault; empty if unknown.

    Examples:
        >>> ps.RankFailureError("rank 3 stopped responding", (3,)).ranks
        (3,)
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks
