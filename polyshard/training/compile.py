"""torch.compile of a model's blocks in training."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError
from polyshard.core.pipeline_plan import SPLIT_BACKWARD
from polyshard.core.stages import Stages
from polyshard.training.blocks import chosen_modules, replace_forwards

logger = logging.getLogger(__name__)

Compile = bool | Callable[[nn.Module], bool]

_SETTINGS = {
    "capture_dynamic_output_shape_ops": True,  # attention saves a tensor whose size depends on the sequences' lengths
    "optimize_ddp": False,  # blocks are compiled one by one, so DDP's buckets need not split their graphs
    "recompile_limit": 64,  # of one code object, over all models of the process; beyond it torch runs it eagerly
}


def apply_compile(model: nn.Module, compile: Compile, *, exact: bool = False) -> Callable[[], None]:
    """Compile blocks one by one, for inputs of any length; equal blocks share one graph.

    Blocks are the items of every `ModuleList`. Their `forward` is replaced on the instance, so that parameters keep
    their names. Call it before recomputation is applied, and before a model is wrapped for data parallelism.

    Args:
        model: as built, or the pipeline stages of this rank.
        compile: True compiles the blocks, False nothing. A function chooses modules; a module inside a chosen one is
            compiled as its part.
        exact: whether the model computes in exact mode, which cannot be compiled.

    Returns:
        A function that undoes it.

    Raises:
        ConfigurationError: another value, no module to compile, exact mode, or a pipeline schedule that splits the
            backward pass.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> undo = apply_compile(model, lambda module: isinstance(module, torch.nn.Linear))
        >>> undo()
    """
    if not isinstance(compile, bool) and not callable(compile):
        raise ConfigurationError(
            f"compile is invalid: got {compile!r}, expected True, False or a function of a module."
        )
    if compile is False:
        return lambda: None
    if exact:
        raise ConfigurationError(
            "compile is unsupported in exact mode: torch.compile fuses operations and rounds differently than the "
            "server. Omit compile, or exact mode."
        )
    if isinstance(model, Stages) and model.plan.schedule in SPLIT_BACKWARD:
        # A compiled block is one node of autograd's graph, which torch's split (pipelining/_backward.py, 2.13) cannot
        # cut: measured, each block's backward ran twice, and Inductor's only with donated buffers switched off. torch
        # itself rejects stages with an OptimizedModule (schedules.py, _check_torch_compile_compatibility).
        raise ConfigurationError(
            f"compile is unsupported with {model.plan.schedule}: the schedule runs the backward pass for inputs and "
            "for weights at different times, and torch would run that of a compiled block both times in full. Use "
            "1f1b or interleaved-1f1b."
        )
    if torch._dynamo.config.disable:
        logger.warning("compile has no effect: TORCH_COMPILE_DISABLE, or torch._dynamo.config.disable, is set")
    modules = _outermost(chosen_modules(model, "compile", compile, compile if callable(compile) else None))
    breaks: Counter[str] = Counter()
    undo = replace_forwards(modules, lambda forward: _compiled(forward, breaks))
    kinds = ", ".join(sorted({type(module).__name__ for module in modules}))

    def report(*_: object) -> None:
        if breaks:
            remove_hooks()
            reasons = "; ".join(f"{reason} ({count} times)" for reason, count in breaks.most_common())
            logger.warning(
                "torch.compile cannot take the forward pass of %d modules (%s) as one graph: it runs the code at %d "
                "graph breaks without compiling it. Reasons: %s",
                len(modules),
                kinds,
                breaks.total(),
                reasons,
            )

    hooks = [part.register_forward_hook(report) for part in (model if isinstance(model, Stages) else [model])]

    def remove_hooks() -> None:
        for hook in hooks:
            hook.remove()

    def undo_all() -> None:
        remove_hooks()
        undo()

    return undo_all


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inside = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inside]


def _compiled(forward: Callable[..., Any], breaks: Counter[str]) -> Callable[..., Any]:
    compiled = torch.compile(forward)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a part of what somebody else compiles
            return forward(*args, **kwargs)
        # Not dynamic=True: then numbers of a module that FSDP2 manages would be dynamic, such as the size of a head.
        for tensor in _tensors((args, kwargs)):
            for dim in range(tensor.dim()):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        seen: Counter[str] = torch._dynamo.utils.counters["graph_break"]
        before = seen.copy()
        with torch._dynamo.config.patch(_SETTINGS):
            outputs = compiled(*args, **kwargs)
        if seen.total() != before.total():
            for text, count in (seen - before).items():
                breaks[_reason(text)] += count
        return outputs

    return run


def _reason(text: str) -> str:
    """Return the first line of Dynamo's text on a graph break, with its explanation."""
    first, *lines = (line.strip() for line in text.splitlines())
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    return re.sub(r" at 0x[0-9a-f]+", "", ": ".join((first, *explained)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments: in tuples, lists, dictionaries and dataclasses, too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
