"""The environment variables that polyshard reads, with their former names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """An environment variable.

    Attributes:
        name: name of the variable.
        meaning: one sentence for users.
        former_name: a deprecated name that is read, with a DeprecationWarning, if `name` is not set.
        former_values: mapping from deprecated to current values.
        internal: whether polyshard sets the variable for its own processes.
    """

    name: str
    meaning: str
    former_name: str | None = None
    former_values: Mapping[str, str] = field(default_factory=dict)
    internal: bool = False

    def read(self) -> str | None:
        """Return the variable's value, or None if it is unset or empty.

        Examples:
            >>> Variable(name="NOT_SET", meaning="...").read() is None
            True
        """
        name, value = self.name, os.environ.get(self.name)
        if not value and self.former_name is not None:
            name, value = self.former_name, os.environ.get(self.former_name)
            if value:
                deprecated(self.former_name, self.name)
        if value in self.former_values:
            deprecated(f"{name}={value}", f"{self.name}={self.former_values[value]}")
            return self.former_values[value]
        return value or None


def deprecated(former: str, present: str) -> None:
    """Warn that a name is deprecated."""
    message = f"{former} is deprecated and will be removed in polyshard 0.3. Use {present}."
    warnings.warn(message, DeprecationWarning, stacklevel=3)


ATTENTION = Variable(
    name="POLYSHARD_ATTENTION",
    meaning="Name of the attention kernel, in training and in vLLM engines on CPU; default: the fastest kernel that "
    "supports the request.",
)
MATMUL = Variable(
    name="POLYSHARD_MATMUL",
    meaning="Matmul kernel of vLLM engines and of exact mode on CPU: `native` or `vllm`; default: the faster one.",
    former_name="POLYSHARD_PRODUCT",
    former_values={"compiled": "native"},
)
CACHE = Variable(
    name="POLYSHARD_CACHE",
    meaning="Directory of the native kernels that are built at first use; default: `$XDG_CACHE_HOME/polyshard` or "
    "`~/.cache/polyshard`.",
)
BACKEND = Variable(
    name="POLYSHARD_BACKEND",
    meaning="Communication backend, `nccl` or `gloo`; default: NCCL on GPUs and gloo elsewhere.",
)
MODELS = Variable(
    name="POLYSHARD_MODELS",
    meaning='Registered models as JSON, `{"MyDecoder": "module:factory"}`; `register_model` sets it for the processes '
    "that vLLM starts.",
)
TRACE = Variable(
    name="POLYSHARD_TRACE",
    meaning="Directory in which served models of exact mode record their activations, for `polyshard verify --exact`.",
)
FAILURES = Variable(
    name="POLYSHARD_FAILURES",
    meaning="Directory in which vLLM's workers record their exceptions; set by `engine_errors`.",
    internal=True,
)

VARIABLES = (ATTENTION, MATMUL, CACHE, BACKEND, MODELS, TRACE, FAILURES)
