"""The weight layouts of a built model, keyed by qualified parameter name.

Layers carry their layouts as a module attribute, set when they are made. The table is collected from the built
model before any wrapping: attributes on a Parameter do not survive torch's `fully_shard`, and ZeRO-3 empties the
Parameter itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from polyshard.core.errors import AdapterError, LayoutError
from polyshard.core.weight_layout import WeightLayout, replicated

# Shell patterns of stored tensors that no parameter takes: constants of older files, which follow from the config.
IGNORED_TENSORS = ("*rotary_emb.inv_freq", "*.masked_bias", "*.attn.bias")

_ATTRIBUTE = "weight_layouts"  # {name inside the module: (canonical name inside the module, layout)}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightEntry:
    """One parameter of a model.

    Attributes:
        parameter: qualified name in the model as built.
        name: canonical qualified name: where the user put the layer, then `weight` or `bias`, whatever modules
            a library puts in between.
        layout: how the logical tensor is cut.
        checkpoint_names: name of each segment's tensor in a checkpoint; one for an unsegmented tensor.
        tied_names: canonical names of the same parameter elsewhere in the model.
        tied_parameters: its names there in the model as built.
    """

    parameter: str
    name: str
    layout: WeightLayout
    checkpoint_names: tuple[str, ...]
    tied_names: tuple[str, ...] = ()
    tied_parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightTable(Mapping[str, WeightEntry]):
    """All parameters of a model, by their names in the model as built, in the model's order."""

    entries: Mapping[str, WeightEntry]

    def __getitem__(self, parameter: str) -> WeightEntry:
        return self.entries[parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def by_checkpoint_name(self) -> dict[str, tuple[WeightEntry, int]]:
        """For each tensor of a checkpoint, the parameter and the index of the segment that it fills.

        Raises:
            LayoutError: two parameters claim one name.
        """
        targets: dict[str, tuple[WeightEntry, int]] = {}
        for entry in self.entries.values():
            for index, name in enumerate(entry.checkpoint_names):
                if name in targets:
                    raise LayoutError(
                        f"parameters {targets[name][0].parameter!r} and {entry.parameter!r} "
                        f"are both stored as {name!r}: give their segments different names"
                    )
                targets[name] = (entry, index)
        return targets


def attach_layouts(module: nn.Module, layouts: Mapping[str, WeightLayout], tensor_rank: int, tensor_size: int) -> None:
    """Record the layouts of a layer's parameters on the layer; `layouts` is keyed by `weight` and `bias`.

    A library may keep its parameter deeper (`layer.weight` inside a wrapper): the one parameter whose last name
    part matches is taken. A module that already has the attribute `weight_layouts` is left as it is.

    Raises:
        AdapterError: no parameter or several match, or the local shape is not the shard's.
    """
    if hasattr(module, _ATTRIBUTE):
        return
    found: dict[str, tuple[str, WeightLayout]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for canonical, layout in layouts.items():
        matches = [name for name in parameters if name.rsplit(".", 1)[-1] == canonical]
        if len(matches) != 1:
            raise AdapterError(
                f"{type(module).__name__}: expected one parameter named {canonical!r}, found {matches or 'none'} "
                f"among {sorted(parameters)}; set the attribute {_ATTRIBUTE!r} on the layer to say which is which"
            )
        expected = layout.local_shape(tensor_rank, tensor_size)
        actual = tuple(parameters[matches[0]].shape)
        if actual != expected:
            raise AdapterError(
                f"{type(module).__name__}.{matches[0]}: local shape {actual}, but rank {tensor_rank} of "
                f"{tensor_size} should hold {expected} of the logical {layout.shape}"
            )
        found[matches[0]] = (canonical, layout)
    setattr(module, _ATTRIBUTE, found)


def store_as(owner: nn.Module, child: str, name: str) -> None:
    """Let the parameters of `owner`'s child be stored as if it was called `name`.

    Args:
        owner: of the layer.
        child: the layer's attribute; its parameters have layouts.
        name: in a checkpoint, in place of it.
    """
    known: dict[str, tuple[str, WeightLayout]] = vars(getattr(owner, child)).pop(_ATTRIBUTE)
    moved = {f"{child}.{inner}": (f"{name}.{canonical}", layout) for inner, (canonical, layout) in known.items()}
    setattr(owner, _ATTRIBUTE, {**getattr(owner, _ATTRIBUTE, {}), **moved})


def collect_layouts(model: nn.Module) -> WeightTable:
    """The table of a built model. Parameters without a layout are held whole by every rank."""
    known: dict[str, tuple[str, WeightLayout]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        for name, (canonical, layout) in getattr(module, _ATTRIBUTE, {}).items():
            known[prefix + name] = (prefix + canonical, layout)

    first: dict[int, str] = {}
    tied: dict[str, list[str]] = {}
    for parameter, tensor in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(tensor), parameter)
        if owner != parameter:
            tied.setdefault(owner, []).append(parameter)

    entries: dict[str, WeightEntry] = {}
    for parameter, tensor in model.named_parameters():
        canonical, layout = known.get(parameter) or (parameter, replicated(tensor.shape))
        entries[parameter] = WeightEntry(
            parameter=parameter,
            name=canonical,
            layout=layout,
            checkpoint_names=checkpoint_names(canonical, layout),
            tied_names=tuple(known.get(other, (other, None))[0] for other in tied.get(parameter, ())),
            tied_parameters=tuple(tied.get(parameter, ())),
        )
    return WeightTable(entries)


def checkpoint_names(canonical: str, layout: WeightLayout) -> tuple[str, ...]:
    """`mlp.gate_up.weight` with segments named gate_proj and up_proj: `mlp.gate_proj.weight`, `mlp.up_proj.weight`.

    Segments without names are stored together under the canonical name, which needs them to be one tensor; a
    layout of several unnamed segments is stored as one tensor too, and gives one name.
    """
    names = [segment.name for segment in layout.segments]
    if not any(names):
        return (canonical,)
    module, leaf = canonical.rsplit(".", 1)
    parent = module.rsplit(".", 1)[0] + "." if "." in module else ""
    return tuple(f"{parent}{name}.{leaf}" for name in names)


def stored_parts(layout: WeightLayout, count: int, full: torch.Tensor) -> list[torch.Tensor]:
    """The full tensor as the `count` tensors that a checkpoint stores it as."""
    return [full] if count == 1 else layout.split(full)


def stored_shape(layout: WeightLayout, count: int, index: int) -> tuple[int, ...]:
    """Shape of the `index`-th of the `count` tensors that a checkpoint stores a parameter as."""
    return layout.shape if count == 1 else layout.segment_shape(index)


def local_part(
    layout: WeightLayout, count: int, index: int, full: torch.Tensor, rank: int, tensor_size: int
) -> tuple[torch.Tensor, int, int]:
    """What a stored tensor puts into a rank's shard: the values, and their start and length along `layout.dim`."""
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
    """Write a stored tensor's part into a rank's shard, converting the dtype."""
    values, start, length = local_part(layout, count, index, full, rank, tensor_size)
    with torch.no_grad():
        target = parameter if layout.dim is None else parameter.narrow(layout.dim, start, length)
        target.copy_(values)
