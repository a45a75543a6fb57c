"""transformers' own model of a reduced configuration with random weights: the reference of the trial."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from polyshard.core.errors import ConfigurationError
from polyshard.experts.observed import is_stored_router_bias
from polyshard.transformers.trial.kinds import fewest_layers
from polyshard.transformers.trial.reduced import VOCABULARY, reduced_config, with_fewer_tokens, with_short_windows

LENGTHS = (24, 11)  # tokens of the two sequences
INSTEAD = "Train it with transformers, or write its factory (docs/how-to/bring-a-model.md)."
_FULL_SIZE = 4_000_000  # number of parameters up to which the model itself is run
_TOO_LARGE = 200_000_000

_NAMES = ("_name_or_path", "architectures", "dtype", "transformers_version")  # fields that do not affect logits

_last: dict[str, tuple[Any, Any, list[torch.Tensor]]] = {}  # the last reference, which is often needed again


def trial_inputs(config: Any) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return rows `[2, tokens]`, and two sequences of which the first is the first row."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(config.get_text_config().vocab_size, VOCABULARY)
    first, second = (torch.randint(1, vocabulary, (length,), generator=generator) for length in LENGTHS)
    return torch.stack((first, first.roll(3))), (first, second)


def identity_of(config: Any) -> str:
    """Return a string that is the same for equal configs."""
    fields = {key: value for key, value in config.to_dict().items() if key not in _NAMES}
    return f"{type(config).__name__} {json.dumps(fields, sort_keys=True, default=str)}"


def original_of(
    config: Any, parameters: int, size: int, inputs: tuple[torch.Tensor, ...]
) -> tuple[Any, Any, list[torch.Tensor]]:
    """Return a sufficiently small configuration, transformers' own model of it, and the model's logits.

    Raises:
        ConfigurationError: no reduced configuration can be built and run.
    """
    reductions: list[Callable[[], Any]] = [
        lambda: fewest_layers(reduced_config(config, heads_divide_by=size * 2)),
        lambda: fewest_layers(with_fewer_tokens(config)),
    ]
    if parameters <= _FULL_SIZE:
        reductions.insert(0, lambda: with_short_windows(config))
    reason: Exception | None = None
    identity = identity_of(config)
    if identity in _last:
        return _last[identity]
    for reduction in reductions:
        try:
            small = reduction()
            model = _random_model(small)
            found = small, model, [model(input_ids=ids, use_cache=False).logits for ids in inputs]
            _last.clear()
            if parameters <= _FULL_SIZE:
                _last[identity] = found
            return found
        except Exception as error:  # transformers' code may raise anything for sizes that do not match
            reason = reason or error
    raise ConfigurationError(
        f"{type(config).__name__} cannot be reduced to a size at which the model can be compared with transformers' "
        f"own: {type(reason).__name__}: {reason}. {INSTEAD}"
    ) from reason


def _random_model(config: Any) -> Any:
    """Build transformers' own model with random weights that are far from uniform."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > _TOO_LARGE:
        raise ValueError(f"the reduced model has {count} parameters, expected at most {_TOO_LARGE}")
    config._experts_implementation = "eager"  # grouped_mm does not support float64
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
    _check_windows(model)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            weight.copy_(noise * weight[0].numel() ** -0.5)
        else:
            weight.add_(noise * 0.2)
    for name, buffer in model.named_buffers():
        if is_stored_router_bias(name):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.2)
    return model


def _check_windows(model: nn.Module) -> None:
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if "window" in attribute and type(value) is int and value >= LENGTHS[0] and "layers" not in attribute:
                raise ValueError(f"{path}.{attribute} is {value}, expected less than {LENGTHS[0]} in the reduced model")
