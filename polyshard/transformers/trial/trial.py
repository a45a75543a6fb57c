"""Comparison of a model with polyshard's layers to transformers' own before it is returned.

A module that equals the original in isolation can still be called with another window, rotary embedding or sequence
boundaries. The trial model has the same family and layer pattern. Both versions run on random tokens in float64: rows
longer than every window, a packed pair, and the steps of a serving engine.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError, PolyshardError
from polyshard.core.weight_table import collect_layouts, copy_into_shard
from polyshard.layers.vocabulary import gather_logits
from polyshard.transformers.trial.kinds import kept_modules
from polyshard.transformers.trial.mixing import leaking_modules
from polyshard.transformers.trial.original import INSTEAD, LENGTHS, identity_of, original_of, trial_inputs
from polyshard.transformers.trial.simulation import Exchange, Schedule, on_simulated_ranks, simulated_context
from polyshard.transformers.trial.unsupported import stored_names_of_children, stored_tensors

logger = logging.getLogger(__name__)

_STEPS = (((0, 5), (1, 3)), ((1, 1), (0, 14)), ((0, 1), (1, 7)), ((0, 4),))  # (sequence, tokens) of an engine's steps
_BOUND = 1e-4  # relative to the largest logit; float32 in norms and softmax contributes 1e-6

Build = Callable[[Any, Any], Any]  # (config, context) -> TransformersModel, without a trial


@dataclass(frozen=True, slots=True)
class Verdict:
    """The capabilities of a model beyond rows of one sequence each.

    Attributes:
        packed: why packed sequences are unsupported; None if they are supported.
        kept: modules of the trial model that are transformers' own, as in `kept_modules`.
    """

    packed: str | None = None
    kept: frozenset[str] = frozenset()


_verdicts: dict[str, Verdict | ConfigurationError] = {}


def try_model(config: Any, parameters: int, build: Build, *, sharded: bool, by_heads: bool, served: bool) -> Verdict:
    """Compare a model of this configuration with transformers' own, once in a process for each configuration.

    Args:
        config: a transformers config.
        parameters: number of the model's parameters.
        build: builds the model with polyshard's layers.
        sharded: whether the model runs at a tensor-parallel size above 1.
        by_heads: whether `build` shards the attention that keeps transformers' code.
        served: whether the model runs in a serving engine.

    Raises:
        ConfigurationError: the logits differ, or the two cannot be compared.
    """
    key = f"{identity_of(config)} {sharded} {by_heads} {served}"
    if key not in _verdicts:
        try:
            with _aside():
                _verdicts[key] = _tried(config, parameters, build, 2 if sharded else 1, served)
        except ConfigurationError as error:
            _verdicts[key] = error
    found = _verdicts[key]
    if isinstance(found, ConfigurationError):
        raise ConfigurationError(str(found)) from found.__cause__
    return found


def try_replacement(config: Any, parameters: int, replace: Callable[[nn.Module], Any]) -> None:
    """Compare a model of this configuration before and after the replacement of its attention modules.

    Args:
        config: a transformers config.
        parameters: number of the model's parameters.
        replace: replaces the attention modules of a model in place.

    Raises:
        ConfigurationError: the logits of rows or of a packed pair differ, or the two cannot be compared.
    """
    key = f"{identity_of(config)} replaced"
    if key not in _verdicts:
        with _aside():
            _verdicts[key] = _replacement(config, parameters, replace)
    found = _verdicts[key]
    if isinstance(found, ConfigurationError):
        raise ConfigurationError(str(found))


def _replacement(config: Any, parameters: int, replace: Callable[[nn.Module], Any]) -> Verdict | ConfigurationError:
    rows, (first, second) = trial_inputs(config)
    try:
        _, original, expected = original_of(config, parameters, 1, (rows, second[None]))
        name = type(original).__name__
        ids, positions = (torch.cat(t)[None] for t in ((first, second), [torch.arange(n) for n in LENGTHS]))
        packed = original(input_ids=ids, position_ids=positions, use_cache=False).logits
        replaced = copy.deepcopy(original)
        replace(replaced)

        def run(ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
            return replaced(input_ids=ids, use_cache=False, **positions).logits

        apart = _apart(run, (rows,), expected[0], name, "on rows of one sequence")
        run_packed = functools.partial(run, position_ids=positions)
        for wanted in (torch.cat((expected[0][:1], expected[1]), dim=1), packed):  # gpt-oss's own packed rows leak
            apart_packed = _apart(run_packed, (ids,), wanted, name, "on a packed pair")
            if apart_packed is None:
                break
        apart = apart or apart_packed
    except ConfigurationError as error:
        return error
    if apart is None:
        return Verdict()
    return ConfigurationError(f"the output of {name} changes when its attention modules are replaced: {apart}")


@contextmanager
def _aside() -> Iterator[None]:
    """Use float64, and restore torch's generators afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _tried(config: Any, parameters: int, build: Build, size: int, served: bool) -> Verdict:
    rows, (first, second) = trial_inputs(config)
    small, original, expected = original_of(config, parameters, size, (rows, second[None]))
    name = type(original).__name__
    run = _Runs(small, original, build, size)
    pair = torch.cat((expected[0][0], expected[1][0]))
    if served:
        apart = _apart(run.served, (first, second), pair, name, "in a serving engine")
        if apart is None:
            return Verdict(kept=run.kept)
        raise ConfigurationError(
            f"{name} cannot be served: {run.culprits(first, second) or 'its logits depend on the batch'} "
            f"({apart}). Serve vLLM's own model of the family, or write a factory (docs/how-to/bring-a-model.md)."
        )
    apart = _apart(run.rows, (rows,), expected[0], name, "on rows of one sequence")
    if apart is not None:
        raise ConfigurationError(
            f"{name} with polyshard's layers differs from transformers' own code: {apart}. {INSTEAD}"
        )
    try:
        apart = _apart(run.packed, (first, second), pair, name, "on a packed pair")
    except ConfigurationError as error:
        return Verdict(packed=str(error), kept=run.kept)
    if apart is None:
        return Verdict(kept=run.kept)
    culprits = run.culprits(first, second) or "a module that reads beyond the boundary of a sequence"
    return Verdict(packed=f"{name} does not support packed sequences: it has {culprits} ({apart})", kept=run.kept)


def _apart(run: Callable[..., torch.Tensor], inputs: Any, expected: torch.Tensor, name: str, how: str) -> str | None:
    """Describe the difference of the logits, or return None if they agree.

    Raises:
        ConfigurationError: the model raised an error.
    """
    try:
        got = run(*inputs)
    except PolyshardError as error:
        raise ConfigurationError(str(error) if name in str(error) else f"{name} {how}: {error}") from error
    except Exception as error:
        raise ConfigurationError(
            f"{name} with polyshard's layers cannot be run {how}: {type(error).__name__}: {error}. {INSTEAD}"
        ) from error
    off, largest = float((got - expected).abs().max()), float(expected.abs().max())
    if off <= _BOUND * largest:  # false for NaN
        return None
    return f"logits {how} differ by up to {off:.2g}; the largest is {largest:.2g}"


class _Runs:
    """The model with polyshard's layers and the original's weights, on simulated ranks."""

    def __init__(self, config: Any, original: nn.Module, build: Build, size: int) -> None:
        self.config, self.original, self.build = config, original, build
        self.size, self.vocabulary = size, config.get_text_config().vocab_size
        self.kept: frozenset[str] = frozenset()

    def model(self, context: Any, exchange: Exchange) -> Any:
        """Build one rank's model."""
        with exchange.building:
            model = self.build(copy.deepcopy(self.config), context).eval()
            self.kept = self.kept or kept_modules(model)  # only the first time, since `culprits` runs on one rank
        _copy_weights(self.original, model, context)
        return model

    def logits(self, model: Any, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        """Return the full logits of hidden states."""
        logits = model.compute_logits(hidden)
        return logits if logits.shape[-1] >= self.vocabulary else gather_logits(logits, context, self.vocabulary)

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return logits `[rows, tokens, vocabulary]`."""

        def run(rank: int, exchange: Exchange) -> torch.Tensor:
            context = simulated_context(rank, exchange, None)
            model = self.model(context, exchange)
            return self.logits(model, model(rows), context)

        return on_simulated_ranks(self.size, run)[0]

    def packed(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return logits `[tokens, vocabulary]` of two packed sequences."""

        def run(rank: int, exchange: Exchange) -> torch.Tensor:
            context = simulated_context(rank, exchange, None)
            model = self.model(context, exchange)
            return self.logits(model, _packed(model, torch.cat((first, second)), len(first)), context)

        return on_simulated_ranks(self.size, run)[0]

    def served(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the same logits from the steps of a serving engine."""

        def run(rank: int, exchange: Exchange) -> torch.Tensor:
            schedule = Schedule()
            context = simulated_context(rank, exchange, schedule)
            model = self.model(context, exchange)
            done, found = [0, 0], ([], [])
            for step in _STEPS:
                schedule.step = step
                spans = [(i, done[i], done[i] + count) for i, count in step]
                ids = torch.cat([(first, second)[i][start:end] for i, start, end in spans])
                positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
                logits = self.logits(model, model(ids, positions), context)
                for (i, _, end), part in zip(spans, logits.split([end - start for _, start, end in spans])):
                    found[i].append(part)
                    done[i] = end
            return torch.cat([*found[0], *found[1]])

        return on_simulated_ranks(self.size, run)[0]

    def culprits(self, first: torch.Tensor, second: torch.Tensor) -> str:
        """Name the modules that carry state over the boundary of packed sequences; empty if none is found."""

        def run(rank: int, exchange: Exchange) -> str:
            model = self.model(simulated_context(rank, exchange, None), exchange)
            boundary = len(first)
            return leaking_modules(
                model, lambda ids: _packed(model, ids, boundary), torch.cat((first, second)), boundary
            )

        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            return f"a rotary embedding ({rope['rope_type']}) that depends on the longest sequence in the batch"
        try:
            found = on_simulated_ranks(1, run)[0]
        except Exception as error:
            logger.debug("no module could be identified: %s", error)
            return ""
        return f"{found}, which carries state from token to token" if found else ""


def _packed(model: Any, ids: torch.Tensor, boundary: int) -> torch.Tensor:
    bounds = torch.tensor([0, boundary, len(ids)], dtype=torch.int32)
    return model(ids, cu_seqlens=bounds)


def _copy_weights(original: nn.Module, model: nn.Module, context: Any) -> None:
    stored = stored_names_of_children(original)
    sources: dict[str, torch.Tensor] = {}
    for key, weight in original.named_parameters(remove_duplicate=False):
        child, dot, rest = key.partition(".")
        sources[stored.get(child, child) + dot + rest] = weight
    sources |= stored_tensors(original)  # experts are stored one by one
    parameters = dict(model.named_parameters())
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    for entry in collect_layouts(model).values():
        for index, name in enumerate(entry.checkpoint_names):
            if name not in sources:
                raise ConfigurationError(f"its parameter {name} does not exist in transformers' own model")
            count = len(entry.checkpoint_names)
            copy_into_shard(parameters[entry.parameter], entry.layout, count, index, sources[name], rank, size)
