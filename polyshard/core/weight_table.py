"""Weight tables: the weight layouts of a built model, keyed by qualified parameter name.

Each layer stores its layouts in a module attribute. The table is collected from the model before a training engine
wraps it: attributes of a Parameter do not survive torch's `fully_shard`, and ZeRO-3 empties the Parameter itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from polyshard.core.errors import AdapterError, LayoutError
from polyshard.core.weight_sharding import WeightLayout, replicated

# Shell patterns of tensors in old checkpoints that are not parameters: constants that the config determines.
IGNORED_TENSORS = ("*rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")

_RENAMED = "checkpoint_names_of_children"  # {child: its name in checkpoints}
_ATTRIBUTE = "weight_layouts"  # {name inside the module: (canonical name inside the module, layout)}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """One parameter of a model.

    Attributes:
        parameter: qualified name in the built model.
        name: canonical qualified name: the path of the layer in the user's model, then `weight` or `bias`, without the
            modules that a library puts in between.
        layout: how the logical tensor is sharded.
        checkpoint_names: names of the segments' tensors in a checkpoint; one name for a tensor that is stored as one.
            Of experts that are stored one by one, the segments of all experts, expert after expert.
        tied_names: canonical names of the other places where the model uses the same parameter.
        tied_parameters: the names of these places in the built model.

    Examples:
        >>> names = ["gate_proj", "up_proj"]
        >>> layer = ps.column_parallel(4, [8, 8], ps.initialize("torch"), names=names)
        >>> ps.collect_layouts(nn.ModuleDict({"gate_up": layer}))["gate_up.weight"].checkpoint_names
        ('gate_proj.weight', 'up_proj.weight')
    """

    parameter: str
    name: str
    layout: WeightLayout
    checkpoint_names: tuple[str, ...]
    tied_names: tuple[str, ...] = ()
    tied_parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightTable(Mapping[str, WeightEntry]):
    """The entries of all parameters of a model, by their names in the built model, in the model's order.

    Examples:
        >>> table = ps.collect_layouts(nn.Sequential(ps.column_parallel(4, 8, ps.initialize("torch"))))
        >>> list(table), table["0.weight"].layout.dim
        (['0.weight'], 0)
    """

    entries: Mapping[str, WeightEntry]

    def __getitem__(self, parameter: str) -> WeightEntry:
        return self.entries[parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def by_checkpoint_name(self) -> dict[str, tuple[WeightEntry, int]]:
        """Return, for the name of each checkpoint tensor, its parameter's entry and the index of its segment.

        Raises:
            LayoutError: two parameters have the same checkpoint name.
        """
        targets: dict[str, tuple[WeightEntry, int]] = {}
        for entry in self.entries.values():
            for index, name in enumerate(entry.checkpoint_names):
                if name in targets:
                    raise LayoutError(
                        f"Parameters {targets[name][0].parameter!r} and {entry.parameter!r} "
                        f"have the same checkpoint name {name!r}. Give their segments different names."
                    )
                targets[name] = (entry, index)
        return targets


def attach_layouts(module: nn.Module, layouts: Mapping[str, WeightLayout], tensor_rank: int, tensor_size: int) -> None:
    """Store the layouts of a layer's parameters on the layer.

    A library may nest its parameter (`layer.weight` inside a wrapper): a key of `layouts` matches the one parameter
    whose name ends in it. A module that already has the attribute `weight_layouts` is left unchanged.

    Args:
        module: the layer.
        layouts: the layouts, keyed by `weight` and `bias`.
        tensor_rank: this process's position along the tensor axis.
        tensor_size: the size of that axis.

    Raises:
        AdapterError: no parameter or several match a key, or a parameter does not have the shape of the shard.
    """
    if hasattr(module, _ATTRIBUTE):
        return
    found: dict[str, tuple[str, WeightLayout]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for canonical, layout in layouts.items():
        matches = [name for name in parameters if name.rsplit(".", 1)[-1] == canonical]
        if len(matches) != 1:
            raise AdapterError(
                f"The parameter {canonical!r} of {type(module).__name__} is ambiguous or missing: got "
                f"{matches or 'none'} among {sorted(parameters)}, expected one. Set the attribute {_ATTRIBUTE!r} on "
                "the layer to {name in the layer: (canonical name, layout)}."
            )
        expected = layout.local_shape(tensor_rank, tensor_size)
        actual = tuple(parameters[matches[0]].shape)
        if actual != expected:
            raise AdapterError(
                f"The local shape of {type(module).__name__}.{matches[0]} is wrong: got {actual}, expected {expected} "
                f"for rank {tensor_rank} of {tensor_size} and the logical shape {layout.shape}. Let the adapter create "
                "this rank's shard."
            )
        found[matches[0]] = (canonical, layout)
    setattr(module, _ATTRIBUTE, found)


def set_layouts(module: nn.Module, layouts: Mapping[str, tuple[str, WeightLayout]]) -> None:
    """Store canonical names and layouts of a layer's parameters on the layer, by their names in it. Others are kept."""
    setattr(module, _ATTRIBUTE, {**getattr(module, _ATTRIBUTE, {}), **layouts})


def store_as(owner: nn.Module, child: str, name: str) -> None:
    """Store the parameters of a child of `owner` in checkpoints under the name `name` instead of the child's.

    Args:
        owner: the module that contains the layer.
        child: the attribute of `owner` that is the layer; its parameters must have layouts.
        name: the name in checkpoints; empty to store the parameters as the owner's own.
    """
    known: dict[str, tuple[str, WeightLayout]] = vars(getattr(owner, child)).pop(_ATTRIBUTE)
    prefix = f"{name}." if name else ""
    moved = {f"{child}.{inner}": (f"{prefix}{canonical}", layout) for inner, (canonical, layout) in known.items()}
    set_layouts(owner, moved)


def rename_in_checkpoints(owner: nn.Module, child: str, name: str) -> None:
    """Store everything inside a child of `owner` in checkpoints under the name `name` instead of the child's.

    Args:
        owner: the module that contains the child.
        child: the attribute of `owner` that is a module; its parameters need not have layouts.
        name: the name in checkpoints.
    """
    setattr(owner, _RENAMED, {**getattr(owner, _RENAMED, {}), child: name})


def layer_paths(model: nn.Module) -> dict[str, str]:
    """Return the name of the layer of each parameter that has a layout, by the parameter's name.

    Examples:
        >>> layer_paths(nn.Sequential(ps.row_parallel(8, 4, ps.initialize("torch"))))
        {'0.weight': '0'}
    """
    found: dict[str, str] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, (canonical, _) in getattr(module, _ATTRIBUTE, {}).items():
            child = name.partition(".")[0] if "." in canonical else ""  # `store_as` moves layouts to the owner
            found[f"{module_name}.{name}" if module_name else name] = ".".join(filter(None, (module_name, child)))
    return found


def store_layouts(model: nn.Module, layouts: Mapping[str, tuple[str, WeightLayout]]) -> None:
    """Replace all layouts that a model's layers have by these, for a model whose layers were wrapped.

    Args:
        model: the whole model.
        layouts: canonical name and layout, by the parameter's name.
    """
    for module in model.modules():
        vars(module).pop(_ATTRIBUTE, None)
    setattr(model, _ATTRIBUTE, dict(layouts))


def collect_layouts(model: nn.Module) -> WeightTable:
    """Return the weight table of a built model. Parameters without a layout are replicated.

    Examples:
        >>> table = collect_layouts(nn.Sequential(ps.row_parallel(8, 4, ps.initialize("torch"))))
        >>> table["0.weight"].layout.shape, table["0.weight"].layout.local_shape(rank=0, tensor_size=2)
        ((4, 8), (4, 4))
    """
    known: dict[str, tuple[str, WeightLayout]] = {}
    stored: dict[str, str] = {}  # prefix of each module's parameters in checkpoints
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        stored.setdefault(prefix, prefix)
        for child, _ in module.named_children():
            name = getattr(module, _RENAMED, {}).get(child, child)
            stored[f"{prefix}{child}."] = f"{stored[prefix]}{name}."
        for name, (canonical, layout) in getattr(module, _ATTRIBUTE, {}).items():
            known[prefix + name] = (stored[prefix] + canonical, layout)

    def stored_name(parameter: str) -> str:
        module, dot, leaf = parameter.rpartition(".")
        return stored[module + dot] + leaf

    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for parameter, tensor in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(tensor), parameter)
        if owner != parameter:
            tied.setdefault(owner, []).append(parameter)

    entries: dict[str, WeightEntry] = {}
    for parameter, tensor in model.named_parameters():
        canonical, layout = known.get(parameter) or (stored_name(parameter), replicated(tensor.shape))
        entries[parameter] = WeightEntry(
            parameter=parameter,
            name=canonical,
            layout=layout,
            checkpoint_names=checkpoint_names(canonical, layout),
            tied_names=tuple(known.get(other, (stored_name(other), None))[0] for other in tied.get(parameter, ())),
            tied_parameters=tuple(tied.get(parameter, ())),
        )
    return WeightTable(entries)


def checkpoint_names(canonical: str, layout: WeightLayout) -> tuple[str, ...]:
    """Return the names under which a checkpoint stores a parameter.

    A parameter with named segments has one for each: `mlp.gate_up.weight` with segments gate_proj and up_proj is stored
    as `mlp.gate_proj.weight` and `mlp.up_proj.weight`. A parameter with unnamed segments is stored as one tensor under
    its canonical name. Experts with named segments are stored one by one: `mlp.experts.gate_up.weight` as
    `mlp.experts.0.gate_proj.weight` and so on.
    """
    names = [segment.name for segment in layout.segments]
    if not any(names):
        return (canonical,)
    module, leaf = canonical.rsplit(".", 1)
    parent = module.rsplit(".", 1)[0] + "." if "." in module else ""
    if layout.experts is not None:
        return tuple(f"{parent}{i}.{name}.{leaf}" for i in range(layout.experts.total) for name in names)
    return tuple(f"{parent}{name}.{leaf}" for name in names)


def stored_parts(layout: WeightLayout, count: int, full: torch.Tensor) -> list[torch.Tensor]:
    """Split a full tensor into the `count` tensors that a checkpoint stores."""
    if count == 1:
        return [full]
    if layout.experts is None:
        return layout.split(full)
    return [part for expert in full.unbind(0) for part in layout.of_one_expert().split(expert)]


def stored_shape(layout: WeightLayout, count: int, index: int) -> tuple[int, ...]:
    """Return the shape of tensor `index` of the `count` tensors that a checkpoint stores for a parameter."""
    if count == 1:
        return layout.shape
    if layout.experts is None:
        return layout.segment_shape(index)
    return layout.of_one_expert().segment_shape(index % len(layout.segments))


def is_stored_here(layout: WeightLayout, count: int, index: int) -> bool:
    """Return whether tensor `index` of `count` contributes to this rank's shard: False for another rank's expert."""
    return layout.experts is None or count == 1 or index // len(layout.segments) in layout.experts


def local_part(
    layout: WeightLayout, count: int, index: int, full: torch.Tensor, rank: int, tensor_size: int
) -> tuple[torch.Tensor, int, int]:
    """Return a stored tensor's contribution to a rank's shard: the values, and start and length along `layout.dim`.

    Start and length are 0 for a replicated parameter.
    """
    if layout.dim is None:
        return full, 0, 0
    if count == 1:
        local = layout.slice(full, rank, tensor_size)
        return local, 0, local.shape[layout.dim]
    start, length = layout.local_offset(index, rank, tensor_size)
    return layout.slice_segment(full, index, rank, tensor_size), start, length


def copy_into_shard(
    parameter: torch.Tensor,
    layout: WeightLayout,
    count: int,
    index: int,
    full: torch.Tensor,
    rank: int,
    tensor_size: int,
) -> None:
    """Copy a stored tensor's part into a rank's shard, converting the dtype; nothing of another rank's expert."""
    if layout.experts is not None:
        if count == 1:
            full = full.narrow(0, layout.experts.first, layout.experts.count)
            layout = layout.of_local_experts()
        else:
            expert, index = divmod(index, len(layout.segments))
            if expert not in layout.experts:
                return
            parameter = parameter[expert - layout.experts.first]
            count, layout = len(layout.segments), layout.of_one_expert()
    values, start, length = local_part(layout, count, index, full, rank, tensor_size)
    with torch.no_grad():
        target = parameter if layout.dim is None else parameter.narrow(layout.dim, start, length)
        target.copy_(values)
