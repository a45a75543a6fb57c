"""Matrix products of torch's layers in float8, scaled, cast and differentiated by torchao."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from polyshard.adapters.torch.linear import ColumnParallelLinear, RowParallelLinear
from polyshard.core.context import ParallelContext
from polyshard.core.errors import ConfigurationError
from polyshard.core.precision import Float8Recipe
from polyshard.core.requirement import Requirement

logger = logging.getLogger(__name__)

TORCHAO = Requirement(
    title="torchao",
    module="torchao",
    distributions=("torchao",),
    tested=("0.18.0",),
    supported=">=0.18,<0.19",
    install="pip install 'polyshard[float8]'",
)

_MULTIPLE = 16  # torch._scaled_mm needs it of both sizes of a weight, and torchao's filters leave other layers out
_CAPABILITY = (8, 9)  # the first GPUs with float8 matrix products: Ada, then Hopper


@dataclass(frozen=True, slots=True)
class Float8Product:
    """`F.linear` with all three matrix products in float8: output, gradient of the input, gradient of the weight.

    Attributes:
        config: torchao's `Float8LinearConfig`.
        products: torchao's `LinearMMConfig`, which it derives from `config`.
    """

    config: Any
    products: Any

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute `[..., in] -> [..., out]` in the dtype of `x`, or in that of autocast, as Float8Linear of torchao."""
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), self.products, self.config)
        return y if bias is None else y + bias.to(y.dtype)


def apply_float8(model: nn.Module, recipe: Float8Recipe | None, context: ParallelContext) -> Callable[[], None]:
    """Compute the matrix products of torch's tensor-parallel layers in float8, on CPU ranks emulated.

    Scales are computed from the tensors of this rank, in each pass; no communication is added. Embedding, head, norms,
    `replicated_linear`, and layers of other libraries do not change. A layer whose sizes on this rank are not multiples
    of 16 is left out, with a warning that names it.

    Args:
        model: as built.
        recipe: how the inputs of the products are scaled; None changes nothing.
        context: the context that the model was built with.

    Returns:
        A function that undoes it.

    Raises:
        ConfigurationError: exact mode, a GPU without float8 matrix products, or a model without a layer for float8.
        MissingDependencyError: torchao is not installed.

    Examples:
        >>> context = ps.initialize("torch")
        >>> layer, x = ps.column_parallel(16, 16, context), torch.randn(4, 16)
        >>> exact = layer(x)
        >>> undo = apply_float8(layer, "rowwise", context)
        >>> error = (layer(x) - exact).abs().max() / exact.abs().max()
        >>> 0 < error < 0.1
        tensor(True)
        >>> undo()
        >>> torch.equal(layer(x), exact)
        True
    """
    if recipe is None:
        return lambda: None
    if context.exact is not None:
        raise ConfigurationError(
            f"float8 is unsupported in exact mode: got Precision(float8={recipe!r}). The server computes no matrix "
            "products in float8. Omit float8, or exact mode."
        )
    _check_device(context.device)
    TORCHAO.require()
    chosen = _layers(model)
    product = _product(recipe, emulate=context.device.type == "cpu")
    for layer in chosen:
        layer.product = product

    def undo() -> None:
        for layer in chosen:
            layer.__dict__.pop("product", None)

    return undo


def _layers(model: nn.Module) -> list[ColumnParallelLinear | RowParallelLinear]:
    """Return the layers whose sizes float8 admits; name the others in a warning."""
    chosen, left_out = [], []
    for name, module in model.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            if any(size % _MULTIPLE for size in module.weight.shape):
                left_out.append(f"{name or type(module).__name__} {list(module.weight.shape)}")
            else:
                chosen.append(module)
    sizes = f"sizes of weights on a rank must be multiples of {_MULTIPLE}, got {', '.join(left_out)}"
    if not chosen:
        raise ConfigurationError(
            f"float8 finds no layer in {type(model).__name__}: expected tensor-parallel layers of torch"
            + (f"; {sizes}." if left_out else ". Build them with ps.column_parallel and ps.row_parallel.")
        )
    if left_out:
        logger.warning("layers left out of float8: %s", sizes)
    return chosen


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigurationError(
            f"float8 is unsupported by this GPU: got compute capability {found}, expected at least "
            f"{'.'.join(map(str, _CAPABILITY))}. Omit float8 from the precision."
        )


def _product(recipe: Float8Recipe, emulate: bool) -> Float8Product:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(
        Float8LinearConfig.from_recipe_name(recipe),
        emulate=emulate,
        pad_inner_dim=True,  # the gradient of a weight sums over tokens, whose number need not be a multiple of 16
    )
    # torchao's entry point, which also corrects what torch.compile generates for float8 (torchao 0.18).
    with torch.device("meta"):
        converted: Any = convert_to_float8_training(nn.Linear(_MULTIPLE, _MULTIPLE, bias=False), config=config)
    return Float8Product(converted.config, converted.linear_mm_config)
