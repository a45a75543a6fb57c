"""Memory for the modules of a model on the meta device that were not replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def give_memory(model: Any, device: torch.device) -> None:
    """Allocate every tensor on the meta device, and initialize it as transformers does.

    Args:
        model: a transformers model. Layers that have memory are left unchanged, and shared weights stay shared.
        device: the target device.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        fresh = False
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    new = torch.zeros_like(parameter, device=device)
                    made[id(parameter)] = nn.Parameter(new, requires_grad=parameter.requires_grad)
                    fresh = True
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
                fresh = True
        if fresh:
            with torch.device(device):
                model._init_weights(module)
