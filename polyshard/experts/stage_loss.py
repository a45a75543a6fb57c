"""Balance losses inside pipeline stages, most of which have no loss to which they could be added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from polyshard.experts.observed import router_loss


def add_router_loss(
    output: torch.Tensor, stage: nn.Module, share: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return a pipeline stage's output, whose backward pass also runs that of the stage's balance losses.

    Args:
        output: of the stage's forward pass.
        stage: the stage.
        share: from the balance losses of a micro-batch, a mean over its tokens, to their share in the step's loss.
    """
    loss = router_loss(stage)
    return output if loss is None or not output.requires_grad else _WithLoss.apply(output, share(loss))


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.one = torch.ones_like(loss)
        return output.clone()  # not a view, which torch's schedules could not detach

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradients[0], ctx.one
