"""The experts that a served model took, kept by what a token and the tokens before it are.

vLLM's own `enable_return_routed_experts` needs its model runner V2, which has no CPU version (0.32), and vLLM's own
experts. Here each worker keeps the choices of its layers by a hash of the prefix, so that tokens which come from the
prefix cache have theirs, and no request ID is needed. `RoutingWorker` adds the call that returns them to vLLM's workers
(`worker_extension_cls`).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.layers.experts import ServedExperts
from polyshard.adapters.vllm.served.pipeline import any_stage
from polyshard.core.errors import RegistrationError
from polyshard.experts.observed import expert_layers

CAPACITY = 4_000_000  # tokens whose choices a worker keeps; the oldest are dropped


class RoutingRecorder:
    """The choices of a model's mixture-of-experts layers in one worker.

    Args:
        model: the user's model, or this worker's stage of it.
        block_size: tokens of a cache block.

    Raises:
        RegistrationError: no pipeline stage has such a layer.
    """

    def __init__(self, model: nn.Module, block_size: int) -> None:
        self._layers = dict(expert_layers(model))
        if not any_stage(bool(self._layers)):
            raise RegistrationError("routing was requested of a model without a mixture of experts")
        if max((layer.bank.num_experts for layer in self._layers.values()), default=0) > 32768:
            raise RegistrationError("routing is kept as int16: a layer has more than 32768 experts")
        for layer in self._layers.values():
            _source(layer).records = True
        self._block_size = block_size
        self._prefixes = torch.zeros(0, dtype=torch.int64)  # hash of the prefix that ends in each cache slot
        self._sizes = {name: layer.experts_per_token for name, layer in self._layers.items()}
        self._steps: dict[int, torch.Tensor] = {}  # of each step: int16 [tokens, experts per token of all layers]
        self._dropped, self._tokens = 0, 0
        self._places: dict[int, tuple[int, int]] = {}  # step and row of each prefix

    def add(self, input_ids: torch.Tensor | None, positions: torch.Tensor) -> None:
        """Keep the choices of the step that has just run.

        Every pipeline stage gets the token IDs from vLLM.

        Raises:
            RegistrationError: the step cannot be attributed to tokens.
        """
        if not self._layers:  # a stage of dense layers
            return
        batch = compat.batch_of_step()
        if batch is None:  # a profiling run
            return
        if input_ids is None or positions.dim() != 1:
            raise RegistrationError("routing of prompts given as embeddings cannot be returned. Pass token IDs")
        bounds, table, slots = (tensor.cpu().long() for tensor in batch)
        count = int(bounds[-1])
        tokens, at, slots = input_ids[:count].cpu().long(), positions[:count].cpu().long(), slots[:count]
        rows = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
        if not torch.equal(self._slots(table, rows, at), slots):
            raise RegistrationError("routing cannot be returned: cache slots do not follow from vLLM's block table")
        if count and int(slots.max()) >= len(self._prefixes):
            grown = torch.zeros(2 * int(slots.max()) + 1, dtype=torch.int64)
            grown[: len(self._prefixes)] = self._prefixes
            self._prefixes = grown
        first = bounds[:-1][bounds.diff() > 0]  # the first token of each sequence in this step
        inner = first[at[first] > 0]
        last = self._slots(table, rows[inner], at[inner] - 1)  # of the tokens before this step's
        sums = _mixed(tokens, at).cumsum(0)
        start = torch.zeros(len(bounds) - 1, dtype=torch.int64)
        start[rows[first]] = sums[first] - _mixed(tokens[first], at[first])
        prefixes = self._add_prefixes(sums - start[rows], rows, rows[inner], last, slots)
        step = self._dropped + len(self._steps)
        recorded = [_source(layer).recorded[:count].to(torch.int16) for layer in self._layers.values()]
        self._steps[step] = torch.cat(recorded, dim=1).cpu()
        self._places.update(zip(prefixes.tolist(), ((step, row) for row in range(count))))
        self._tokens += count
        while self._tokens > CAPACITY and len(self._steps) > 1:
            self._tokens -= len(self._steps.pop(self._dropped))
            self._dropped += 1
            if self._dropped % 1024 == 0:
                self._places = {key: place for key, place in self._places.items() if place[0] >= self._dropped}

    def _add_prefixes(
        self, sums: torch.Tensor, rows: torch.Tensor, inner: torch.Tensor, last: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Keep and return the hashes of the prefixes that end in this step's tokens.

        A prompt may continue a block that another prompt of the same step computes: vLLM has it in the prefix cache as
        soon as it is scheduled. Then the hashes of that one come first.

        Args:
            sums: of the hashes of the sequence's tokens in this step, up to each token.
            rows: the sequence of each token.
            inner: the sequences that continue earlier tokens.
            last: the cache slots of the last of these.
            slots: the cache slots of the tokens.
        """
        before = torch.zeros(int(rows.max()) + 1 if len(rows) else 0, dtype=torch.int64)
        chained = bool(torch.isin(last, slots).any())
        while True:
            before[inner] = self._prefixes[last]
            prefixes = sums + before[rows]
            self._prefixes[slots] = prefixes
            if not chained or torch.equal(before[inner], self._prefixes[last]):
                return prefixes

    def take(self, sequences: Sequence[Sequence[int]], starts: Sequence[int] = ()) -> dict[str, Any]:
        """Return the choices of all tokens but the last of each sequence by layer of this stage: int16, in base64.

        `missing` is the number of tokens that this worker has not computed, or no longer has.

        Args:
            sequences: token IDs.
            starts: the first token of each sequence of which choices are returned; by default 0.
        """
        found: dict[str, list[str]] = {name: [] for name in self._layers}
        missing = 0
        if not self._layers:
            return {"missing": 0, "per_token": {}, "experts": {}}
        for sequence, start in zip(sequences, starts or [0] * len(sequences), strict=True):
            ids = torch.tensor(sequence[:-1], dtype=torch.int64)
            keys = _mixed(ids, torch.arange(len(ids))).cumsum(0)[start:].tolist()
            places = [self._places.get(key, (-1, 0)) for key in keys]
            missing += sum(step < self._dropped for step, _ in places)
            if missing:
                continue
            chosen = [self._steps[step][row] for step, row in places]
            rows = torch.stack(chosen) if chosen else torch.zeros(0, sum(self._sizes.values()), dtype=torch.int16)
            for name, part in zip(found, rows.split(list(self._sizes.values()), dim=1)):
                found[name].append(base64.b64encode(part.contiguous().numpy().tobytes()).decode())
        return {"missing": missing, "per_token": self._sizes, "experts": found}

    def _slots(self, table: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = self._block_size
        return table[rows, positions // size] * size + positions % size


class RoutingWorker:
    """The methods that vLLM's workers get by `worker_extension_cls`."""

    model_runner: Any

    def polyshard_routing(self, sequences: list[list[int]], starts: Sequence[int] = ()) -> dict[str, Any]:
        """Return the experts that the tokens of sequences took; see `RoutingRecorder.take`."""
        recorder = getattr(self.model_runner.get_model(), "routing", None)
        if recorder is None:
            raise RegistrationError("the served model keeps no routing: it is not a model registered with polyshard")
        return recorder.take(sequences, starts)


def _source(layer: Any) -> Any:
    """Return the object that records a layer's choices: the served operator, which torch.compile does not trace."""
    served = getattr(layer.experts, "quant_method", None)
    return served if isinstance(served, ServedExperts) else layer


def _mixed(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return 64 well-mixed bits for each token at its position (splitmix64); sums of them identify a prefix."""
    x = tokens * 0x1000003 + positions + 1
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = x * -0x61C8864680B583EB
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
