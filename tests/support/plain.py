"""A model that knows nothing of packing, gives logits, and has names of its own."""

import decoder
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, config, parallel_context, *, temperature):
        super().__init__()
        self.network = decoder.build_model(config, parallel_context)
        self.temperature = temperature

    def forward(self, input_ids, position_ids):
        assert input_ids.dim() == position_ids.dim() == 2
        return self.network.compute_logits(self.network(input_ids, position_ids)) / self.temperature


class GivesTooMuch(Plain):
    def forward(self, input_ids, position_ids):
        return torch.cat([super().forward(input_ids, position_ids)] * 2, dim=1)


def under_network(name):
    return f"network.{name}"
