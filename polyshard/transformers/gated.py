"""Gated MLPs, `down(act(gate x) * up x)`: recognised by running them, and built with a merged gate/up projection."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from polyshard.core.context import ParallelContext
from polyshard.layers.activation import swiglu
from polyshard.layers.linear import column_parallel, row_parallel

_APART = {"gate_proj", "up_proj", "down_proj"}
_FUSED = {"gate_up_proj", "down_proj"}
_TRIED = (4, 6)  # hidden and intermediate size of the trial run


class GatedMLP(nn.Module):
    """`down(act(gate x) * up x)`, with the checkpoint names of the module that it replaces."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        act: nn.Module,
        context: ParallelContext,
        biases: tuple[bool, bool],
        fused: bool,
    ) -> None:
        super().__init__()
        names = None if fused else ["gate_proj", "up_proj"]
        layer = column_parallel(hidden, [intermediate, intermediate], context, bias=biases[0], names=names)
        self.gate_up_proj = layer
        self.down_proj = row_parallel(intermediate, hidden, context, bias=biases[1])
        self.act = act
        with torch.no_grad():
            tried = torch.linspace(-8.0, 8.0, 33, device="cpu", dtype=torch.float32)
            self.is_silu = torch.equal(act(tried), F.silu(tried))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the MLP: `[..., hidden]` to the same shape."""
        if self.is_silu:
            return self.down_proj(swiglu(x, self.gate_up_proj))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


def gated_mlp(module: nn.Module, context: ParallelContext) -> GatedMLP | None:
    """Return the merged and sharded form of a module, or None if it is not a gated MLP of plain linear layers."""
    children = dict(module.named_children())
    linear = {name for name, child in children.items() if type(child) is nn.Linear}
    activations = [child for name, child in children.items() if name not in linear]
    if linear not in (_APART, _FUSED) or len(activations) != 1 or any(True for _ in activations[0].parameters()):
        return None
    fused = linear == _FUSED
    down: Any = children["down_proj"]
    first: Any = children["gate_up_proj" if fused else "gate_proj"]
    biased = {child.bias is not None for name, child in children.items() if name in linear - {"down_proj"}}  # pyrefly: ignore  # linear layers
    if len(biased) > 1 or not _agrees(module, linear, activations[0]):
        return None
    biases = (first.bias is not None, down.bias is not None)
    return GatedMLP(down.out_features, down.in_features, activations[0], context, biases, fused)


@torch.no_grad()
def _agrees(module: nn.Module, linear: set[str], act: nn.Module) -> bool:
    """Return whether the module's own forward, with small layers, computes the same as `GatedMLP`."""
    hidden, intermediate = _TRIED
    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    generator = torch.Generator().manual_seed(0)
    sizes = {"down_proj": (hidden, intermediate), "gate_up_proj": (2 * intermediate, hidden)}
    small: dict[str, torch.Tensor] = {}
    with torch.device("cpu"):
        for name in linear:
            out, inp = sizes.get(name, (intermediate, hidden))
            layer = nn.Linear(inp, out, bias=False, dtype=torch.float32)
            layer.weight.copy_(torch.randn(out, inp, generator=generator, dtype=torch.float32))
            trial._modules[name], small[name] = layer, layer.weight
        x = torch.randn(3, hidden, generator=generator, dtype=torch.float32)
        fused = small.get("gate_up_proj")
        gate, up = (small["gate_proj"], small["up_proj"]) if fused is None else fused.chunk(2)
        expected = (act(x @ gate.T) * (x @ up.T)) @ small["down_proj"].T
        try:
            return torch.allclose(trial(x), expected, rtol=1e-4, atol=1e-4)
        except (RuntimeError, TypeError, ValueError):
            return False
