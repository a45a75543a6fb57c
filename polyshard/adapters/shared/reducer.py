"""Gradients of narrow parameters, accumulated in a wider dtype and averaged over the replicas while backward runs.

DistributedDataParallel accumulates and reduces in the dtype of the parameters. In bfloat16, the sum over 64
micro-batches then has a relative error of 5.7e-3, against 1.3e-3 here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from polyshard.adapters.shared.masters import Masters
from polyshard.core.errors import ConfigurationError

BUCKET_MB = 25  # as DistributedDataParallel's default


class _Bucket:
    """Parameters whose gradients are reduced in one message."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.names: list[str] = []
        self.missing: set[str] = set()  # of the backward pass under way
        self.message: torch.Tensor | None = None
        self.work: dist.Work | None = None


class GradientReducer:
    """Moves each parameter's gradient to its master, over the replicas.

    Buckets follow the reverse order of the parameters, about that in which backward computes them, and are sent in
    one order on every rank. A parameter without a gradient on this rank counts as zero. A parameter of one rank that is
    its own master is left to autograd.

    Args:
        named_parameters: of the model.
        masters: whose `grad` gets the averages.
        dtype: in which gradients are added up and sent.
        groups: of the ranks that hold each parameter, by its name; None for one rank.
        bucket_cap_mb: largest size of a message, in MiB.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        masters: Masters,
        dtype: torch.dtype,
        groups: Mapping[str, dist.ProcessGroup | None],
        bucket_cap_mb: float = BUCKET_MB,
    ) -> None:
        self.sends = True  # False while all but the last micro-batch accumulate
        self._masters, self._dtype = masters, dtype
        self._sums: dict[str, torch.Tensor] = {}
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[str, _Bucket] = {}
        self._next = 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._hooks: list[RemovableHandle] = []
        capacity = int(bucket_cap_mb * (1 << 20))
        filled = capacity
        for name, parameter in reversed([(n, p) for n, p in named_parameters if p.requires_grad]):
            if groups[name] is None and masters[name] is parameter and parameter.dtype == dtype:
                continue  # autograd accumulates where the optimizer reads
            nbytes = parameter.numel() * dtype.itemsize
            if filled + nbytes > capacity or self._buckets[-1].group is not groups[name]:
                self._buckets.append(_Bucket(groups[name]))
                filled = 0
            filled += nbytes
            self._buckets[-1].names.append(name)
            self._bucket_of[name] = self._buckets[-1]
            self._parameters[name] = parameter
            self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._add, name)))
        self._restart()

    def _restart(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.missing, bucket.message, bucket.work = set(bucket.names), None, None

    def _add(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is None:  # the hook of another reducer took it
            raise ConfigurationError(
                f"the gradient of {name} went to another engine of this model. Call close() on that engine before you "
                "build the next one."
            )
        gradient, parameter.grad = parameter.grad, None
        held = self._sums.get(name)
        self._sums[name] = gradient.to(self._dtype) if held is None else held.add_(gradient)
        if self.sends:
            self._bucket_of[name].missing.discard(name)
            while self._next < len(self._buckets) and not self._buckets[self._next].missing:
                self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        if bucket.group is None:
            return
        parts = [self._sums[n] if n in self._sums else torch.zeros_like(self._masters[n]) for n in bucket.names]
        bucket.message = torch.cat([part.to(self._dtype).reshape(-1) for part in parts])
        bucket.work = dist.all_reduce(bucket.message, group=bucket.group, async_op=True)

    def finish(self) -> None:
        """Send what is left, wait, and add the averages to the masters' gradients. After a backward pass that sends."""
        while self._next < len(self._buckets):
            self._send()
        for bucket in self._buckets:
            replicas = 1 if bucket.group is None else dist.get_world_size(bucket.group)
            averages = {name: self._sums[name] for name in bucket.names if name in self._sums}
            if bucket.work is not None and bucket.message is not None:
                bucket.work.wait()
                sizes = [self._masters[name].numel() for name in bucket.names]
                split = bucket.message.div_(replicas).split(sizes)
                averages = {name: part.view_as(self._masters[name]) for name, part in zip(bucket.names, split)}
            for name, average in averages.items():
                master = self._masters[name]
                average = average.to(master.dtype)
                master.grad = average if master.grad is None else master.grad.add_(average)
        self._sums.clear()
        self._restart()

    def collect(self) -> None:
        """Take gradients that autograd has left in parameters without running their hooks, as `autograd.grad` does."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._add(name, parameter)

    def clear(self) -> None:
        """Forget sums that have not been sent."""
        self._sums.clear()
        self._restart()

    def close(self) -> None:
        """Leave the gradients of later backward passes in the parameters."""
        for hook in self._hooks:
            hook.remove()
