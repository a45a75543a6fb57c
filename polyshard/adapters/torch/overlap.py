"""Settings of DDP and FSDP2 that overlap communication with computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from polyshard.adapters.shared.options import checked_options, ddp_options
from polyshard.core.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpOptions:
    """Options of FSDP2.

    Attributes:
        reshard_after_forward: whether a module's parameters are freed after its forward pass, or the number of ranks
            over which they stay sharded; None for FSDP2's default. For all modules except the root.
        forward_prefetch: how many of the following modules are gathered before a module's forward pass.
        backward_prefetch: the same for the preceding modules and the backward pass; 0 for FSDP2's own order.
    """

    reshard_after_forward: bool | int | None = None
    forward_prefetch: int = 0
    backward_prefetch: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> FsdpOptions:
        """Check the options.

        Raises:
            ConfigurationError: a name is unknown, or a number is negative.
        """
        found = cls(**checked_options("fsdp_options", options, cls.__slots__))
        for name in ("forward_prefetch", "backward_prefetch"):
            value = getattr(found, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{name} is invalid: got {value!r}, expected a number of modules.")
        return found

    def prefetch(self, modules: Sequence[nn.Module]) -> None:
        """Set what each of these FSDP2 modules prefetches; they must be in the order in which they run."""
        for index, module in enumerate(modules):
            wrapped: Any = module
            if self.forward_prefetch:
                wrapped.set_modules_to_forward_prefetch(modules[index + 1 : index + 1 + self.forward_prefetch])
            if self.backward_prefetch:
                before = modules[max(0, index - self.backward_prefetch) : index]
                wrapped.set_modules_to_backward_prefetch(list(reversed(before)))


def overlap_options(
    data_parallel: str, ddp: Mapping[str, Any] | None, fsdp: Mapping[str, Any] | None
) -> tuple[dict[str, Any], FsdpOptions]:
    """Return the checked options of DistributedDataParallel and of FSDP2.

    Raises:
        ConfigurationError: options of the one that is not used, or an unexpected name.
    """
    for name, options, used in (("ddp_options", ddp, "ddp"), ("fsdp_options", fsdp, "fsdp")):
        if options is not None and data_parallel != used:
            raise ConfigurationError(
                f"{name} has no effect: got data_parallel={data_parallel!r}, expected {used!r}. Remove {name}."
            )
    return {"gradient_as_bucket_view": True, **ddp_options(ddp)}, FsdpOptions.of(fsdp)


def reducer_options(options: Mapping[str, Any], precision: object) -> dict[str, Any]:
    """Return the options of `GradientReducer`, which replaces DistributedDataParallel for parameters with masters.

    Raises:
        ConfigurationError: an option that only DistributedDataParallel has.
    """
    others = sorted(set(options) - {"bucket_cap_mb"})
    if others:
        raise ConfigurationError(
            f"ddp_options has names without effect: got {', '.join(others)} with {precision}, expected bucket_cap_mb "
            "only. polyshard reduces these gradients, in the dtype of reduce=."
        )
    return {name: value for name, value in options.items() if value is not None}
