"""What a library holds in memory besides what every library does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from polyshard.core.zero_elements import ElementsOf
from polyshard.planning.strategy import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What a library holds in memory besides what every library does, and what it always shards.

    Attributes:
        bucket: elements of the buffers in which it reduces gradients under ZeRO (DeepSpeed's `reduce_bucket_size`); 0
            without.
        zero_elements: what a rank holds under ZeRO stages 1 and 2, if the shares of the ranks are unequal.
        copies_logits: whether its loss needs a copy of float32 logits.
        least_sharding: the sharding that it cannot do without.
        reduces_as_stored: whether it reduces gradients in the dtype of the parameters only.
    """

    bucket: int = 0
    zero_elements: ElementsOf | None = None
    copies_logits: bool = False
    least_sharding: str = "data"
    reduces_as_stored: bool = False

    @classmethod
    def of(cls, adapter: Any) -> Library:
        """Return what an adapter tells; every attribute of it is optional."""
        return cls(
            bucket=getattr(adapter, "zero_bucket", 0),
            zero_elements=getattr(adapter, "zero_elements", None),
            copies_logits=getattr(adapter, "copies_logits", False),
            least_sharding=getattr(adapter, "least_sharding", "data"),
            reduces_as_stored=getattr(adapter, "reduces_as_stored", False),
        )

    def strategy(self, wanted: Strategy) -> Strategy:
        """Return a strategy in the precision in which the library runs it."""
        precision = wanted.precision
        if not self.reduces_as_stored or precision.reduce == precision.parameters:
            return wanted
        return replace(wanted, precision=replace(precision, reduce=precision.parameters))
