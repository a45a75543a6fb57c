"""The smallest whole adapter: two kinds of layers of its own; all the rest are polyshard's defaults."""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

import polyshard as ps
from polyshard.core import FEATURES, YES, Requirement, no

ABLE = {"tensor", "data", "fsdp", "cpu", "training", "serving"}


class _Sum(torch.autograd.Function):
    """Sum over the axis in one direction, nothing in the other."""

    @staticmethod
    def forward(ctx, x, axis, in_forward):
        ctx.axis, ctx.in_forward = axis, in_forward
        return axis.collectives.all_reduce(x) if in_forward else x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient if ctx.in_forward else ctx.axis.collectives.all_reduce(gradient)), None, None


class Linear(nn.Module):
    def __init__(self, inputs, outputs, axis, bias, row):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.axis, self.row = axis, row

    def forward(self, x):
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        if not self.row:
            return F.linear(_Sum.apply(x, self.axis, False), self.weight, self.bias)
        y = _Sum.apply(F.linear(x, self.weight), self.axis, True)
        return y if self.bias is None else y + self.bias


class ExampleLinear:
    @staticmethod
    def create_column_parallel(input_size, output_size, parallel_context, bias=False):
        axis = parallel_context.axis("tensor")
        return Linear(input_size, output_size // axis.size, axis, bias, row=False)

    @staticmethod
    def create_row_parallel(input_size, output_size, parallel_context, bias=False):
        axis = parallel_context.axis("tensor")
        return Linear(input_size // axis.size, output_size, axis, bias, row=True)


class ExampleAdapter:
    name = "example"
    linear = ExampleLinear
    requirement = Requirement(
        title="torch", module="torch", distributions=("torch",), tested=("2.13.0",), install="pip install torch"
    )
    capabilities = ps.Capabilities(
        "example", {name: YES if name in ABLE else no("notimpl", "an example") for name in FEATURES}
    )

    def initialize(self, layout=None, **options):
        if layout is not None and layout.sequence_parallel:
            self.capabilities.require("sequence")
        return self.adopt(ps.load_adapter("torch").initialize(layout, **options))

    def adopt(self, context):
        return dataclasses.replace(context, linear=self.linear)

    def engine(self, model, optimizer, context, **options):
        return ps.load_adapter("torch").engine(model, optimizer, context, **options)

    def shutdown(self, context):
        ps.shutdown(context)


adapter = ExampleAdapter()
