"""`add_lora`: low-rank matrices beside the layers of a model that its factory built, on every library's layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from polyshard.checkpoint.part import StoredPart, part_of
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.precision import HALF
from polyshard.core.stages import Stages
from polyshard.core.weight_sharding import WeightLayout
from polyshard.core.weight_table import WeightTable, collect_layouts, store_layouts
from polyshard.layers.initialization import generator_for
from polyshard.lora.choice import Chosen, candidates, choose, matrix_name
from polyshard.lora.config import check_config, document
from polyshard.lora.layer import LoraLinear, LoraPart

STEM = "adapter_model"
DOCUMENT = "adapter_config.json"
PREFIX = "base_model.model."

Model = TypeVar("Model", bound=nn.Module)


def add_lora(
    model: Model, config: Any, parallel_context: ParallelContext, *, seed: int = 0, autocast_adapter_dtype: bool = True
) -> Model:
    """Add a LoRA adapter to a model, and freeze all other parameters. Call it before an engine wraps the model.

    Targets are names of Hugging Face (`q_proj`), or the model's own (`qkv`); only the targeted projections of a fused
    layer get matrices. The initial matrices depend on `seed` and the names, and are equal at every tensor-parallel size
    and with every library. In a pipeline this is a collective over its axis; else there is no communication.

    Args:
        model: as its factory or `build_stages` built it, with its weights loaded.
        config: a `peft.LoraConfig`. Supported are ranks, scaling (also rsLoRA), dropout, targets by name, pattern and
            layer, and `init_lora_weights` True, False or `"gaussian"`. With `inference_mode=True` the matrices are
            frozen.
        parallel_context: the context that the model was built with.
        seed: of the initial matrices; the same on all ranks.
        autocast_adapter_dtype: as in `peft.get_peft_model`: matrices beside float16 and bfloat16 weights are float32.
            False gives them the dtype of the weights.

    Returns:
        `model`, changed in place.

    Raises:
        ConfigurationError: a field of the config is unsupported, a target does not exist or is an embedding or the
            output projection, a pipeline rank has no target, the model already has an adapter, or the context is a
            server's or in exact mode.

    Examples:
        >>> from peft import LoraConfig
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.ModuleDict({"up_proj": ps.column_parallel(4, 8, context)})
        >>> model = ps.add_lora(model, LoraConfig(r=2, target_modules=["up_proj"]), context)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['up_proj.lora_A.up_proj.weight', 'up_proj.lora_B.up_proj.weight']
    """
    check_config(config)
    _check_model(model, parallel_context)
    stages = list(model) if isinstance(model, Stages) else [model]
    tables = [collect_layouts(stage) for stage in stages]
    choice = choose(config, lambda: [candidates(*pair) for pair in zip(stages, tables)], parallel_context)
    model.requires_grad_(False)
    for stage, table, chosen in zip(stages, tables, choice.stages):
        _add(stage, table, chosen, config, parallel_context, autocast_adapter_dtype, seed)
    part = StoredPart(
        what="LoRA adapter",
        parameters=choice.parameters,
        stem=STEM,
        prefix=PREFIX,
        documents=partial(dict, {DOCUMENT: document(config, choice.projections, choice.other_names)}),
    )
    for stage in stages:
        part.attach(stage)
    return model


@contextmanager
def lora_disabled(model: nn.Module | Any) -> Iterator[None]:
    """Return a context manager in which a model computes without its LoRA adapter, such as for a reference policy.

    Args:
        model: a model with an adapter, or the training engine around one.

    Raises:
        ConfigurationError: the model has no adapter.

    Examples:
        >>> from peft import LoraConfig
        >>> context = ps.initialize("torch")
        >>> model = torch.nn.ModuleDict({"up_proj": ps.column_parallel(4, 8, context)})
        >>> config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
        >>> layer, x = ps.add_lora(model, config, context)["up_proj"], torch.ones(4)
        >>> with lora_disabled(model):
        ...     reference = layer(x)
        >>> torch.equal(reference, layer.base_layer(x)), torch.equal(reference, layer(x))
        (True, False)
    """
    layers = lora_layers(model if isinstance(model, nn.Module) else model.module)
    before = [layer.enabled for layer in layers.values()]
    for layer in layers.values():
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers.values(), before):
            layer.enabled = enabled


def lora_layers(module: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers with low-rank matrices, by name.

    Raises:
        ConfigurationError: there are none.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}
    if not found:
        raise ConfigurationError(f"{type(module).__name__} has no LoRA adapter. Call polyshard.add_lora first.")
    return found


def _check_model(model: nn.Module, context: ParallelContext) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"model is invalid: got {type(model).__name__}, expected a torch.nn.Module. Add the adapter before an "
            "engine wraps the model."
        )
    if part_of(model) is not None:
        raise ConfigurationError(f"{type(model).__name__} already has a LoRA adapter. Build the model again.")
    if context.attention is not None:
        raise ConfigurationError("the context is a server's: pass a LoRA adapter to vLLM as a LoRARequest.")
    if context.exact is not None:
        raise ConfigurationError("LoRA is unsupported in exact mode: vLLM computes it with other kernels.")


def _add(
    stage: nn.Module,
    table: WeightTable,
    chosen: Chosen,
    config: Any,
    context: ParallelContext,
    widen: bool,
    seed: int,
) -> None:
    """Wrap the chosen layers of a stage, and store the layouts of all its parameters under their new names."""
    layouts: dict[str, tuple[str, WeightLayout]] = {}
    for entry in table.values():
        for name, canonical in zip(
            (entry.parameter, *entry.tied_parameters), (entry.name, *entry.tied_names), strict=True
        ):
            layouts[_renamed(name, chosen)] = (canonical, entry.layout)
    for path, (layout, parts) in chosen.items():
        _wrap(stage, path, layout, parts, config, context, widen, seed)
        for part in parts:
            for kind, of_matrix in (("lora_A", part.a), ("lora_B", part.b)):
                layouts[matrix_name(path, kind, part)] = (f"{part.name}.{kind}.weight", of_matrix)
    store_layouts(stage, layouts)


def _renamed(parameter: str, paths: Iterable[str]) -> str:
    """Return the name of a parameter after the layers at `paths` were wrapped."""
    parts = parameter.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:length])
        if path in paths:
            return ".".join((path, "base_layer", *parts[length:]))
    return parameter


def _wrap(
    model: nn.Module,
    path: str,
    layout: WeightLayout,
    parts: list[LoraPart],
    config: Any,
    context: ParallelContext,
    widen: bool,
    seed: int,
) -> None:
    """Replace the layer at `path` by one with matrices, with their initial values."""
    base = model.get_submodule(path)
    dtype = next(p.dtype for name, p in base.named_parameters() if name.rpartition(".")[2] == "weight")
    layer = LoraLinear(
        base,
        layout,
        parts,
        dropout=config.lora_dropout,
        dtype=torch.float32 if widen and dtype in HALF else dtype,
        trained=not config.inference_mode,
        context=context,
    )
    layer.train(base.training)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
    for part in parts:
        for kind, matrix, of_matrix in (
            ("lora_A", layer.lora_A[part.key], part.a),
            ("lora_B", layer.lora_B[part.key], part.b),
        ):
            full = _initial(kind, f"{part.name}.{kind}", of_matrix.shape, config.init_lora_weights, seed)
            local = of_matrix.slice(full, layer.axis.rank, layer.axis.size)
            with torch.no_grad():
                matrix.get_parameter("weight").copy_(local)


def _initial(kind: str, name: str, shape: tuple[int, ...], way: bool | str, seed: int) -> torch.Tensor:
    """Return the full initial matrix, drawn as PEFT does: A uniform or normal, B zero unless `way` is False."""
    if kind == "lora_B" and way is not False:
        return torch.zeros(shape, device="cpu")
    full, generator = torch.empty(shape, device="cpu", dtype=torch.float32), generator_for(name, seed)
    if way == "gaussian":
        return full.normal_(0.0, 1.0 / shape[0], generator=generator)
    return nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
