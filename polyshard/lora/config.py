"""PEFT's `LoraConfig`: the fields that polyshard realizes, and the files that carry it.

Every field is used, carried into the file, or rejected by its name if it differs from PEFT's default, including fields
that a later version of PEFT adds.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Callable, Collection
from typing import Any

from polyshard.core.errors import ConfigurationError
from polyshard.lora.requirement import PEFT

USED = frozenset(
    (
        *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "inference_mode", "peft_type"),
    )
)
# They describe the base model and the task, and change no number here.
CARRIED = frozenset(
    ("task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out")
)
INITIALIZATIONS = (True, False, "gaussian")
ALL_LINEAR = "all-linear"


def check_config(config: Any) -> None:
    """Raise `ConfigurationError`, naming the fields, unless polyshard realizes a `peft.LoraConfig`."""
    PEFT.require()
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ConfigurationError(f"config is invalid: got {type(config).__name__}, expected peft.LoraConfig.")
    if type(config).__name__ != "LoraConfig" and type(config).__module__.startswith("peft."):
        raise ConfigurationError(
            f"config is unsupported: got {type(config).__name__}, another method of PEFT, expected peft.LoraConfig."
        )
    plain = LoraConfig()
    other = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in USED | CARRIED and getattr(config, field.name) != getattr(plain, field.name)
    ]
    if getattr(config, "_custom_modules", None):
        other.append("a custom module")
    if other:
        raise ConfigurationError(
            f"LoraConfig has fields that polyshard does not support: got {', '.join(other)}. Leave them out."
        )
    if config.init_lora_weights not in INITIALIZATIONS:
        raise ConfigurationError(
            f"LoraConfig.init_lora_weights is unsupported: got {config.init_lora_weights!r}, expected True, False or "
            "'gaussian'. The others change the base weights, or read data."
        )
    if config.target_modules is None or not config.target_modules:
        raise ConfigurationError(
            "LoraConfig.target_modules is missing. Name the projections as Hugging Face does (['q_proj', 'v_proj']) or "
            f"as the model does, or pass {ALL_LINEAR!r}."
        )


def matcher(config: Any) -> Callable[[str], bool]:
    """Return a function of a module's name that says whether a config targets it, by PEFT's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    everything = config.target_modules == ALL_LINEAR
    chosen = dataclasses.replace(config, target_modules=".*") if everything else config
    return lambda name: bool(check_target_module_exists(chosen, name))


def rank_and_scale(config: Any, name: str) -> tuple[int, float]:
    """Return the rank of a projection's matrices and the factor of their product, by PEFT's own rules.

    Args:
        config: a `peft.LoraConfig`.
        name: of the projection in a checkpoint.
    """
    from peft.utils.other import get_pattern_key

    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigurationError(f"the LoRA rank of {name!r} is invalid: got {r!r}, expected an integer of at least 1.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or not alpha:
        raise ConfigurationError(
            f"lora_alpha of {name!r} is invalid: got {alpha!r}, expected a number other than 0, which scales the "
            "matrices."
        )
    return r, alpha / (math.sqrt(r) if config.use_rslora else r)


def check_patterns(config: Any, names: Collection[str]) -> None:
    """Raise `ConfigurationError` for a target or pattern that matches no projection.

    Args:
        config: a `peft.LoraConfig`.
        names: by which the chosen projections can be addressed.
    """
    if not isinstance(config.target_modules, str):
        unmatched = [t for t in config.target_modules if not any(n == t or n.endswith(f".{t}") for n in names)]
        if unmatched:
            raise ConfigurationError(
                f"LoraConfig.target_modules names projections that the model does not have or that are excluded: got "
                f"{', '.join(sorted(unmatched))}."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in names):
                raise ConfigurationError(f"LoraConfig.{field} has a pattern that matches no projection: got {key!r}.")


def document(config: Any, chosen: Collection[str], other_names: bool) -> dict[str, Any]:
    """Return adapter_config.json as fields.

    Args:
        config: a `peft.LoraConfig`.
        chosen: the projections with matrices, by their names in a checkpoint.
        other_names: whether targets are names of the model that a checkpoint does not have. The file then lists all
            projections by their full names, as it does for `"all-linear"`.
    """
    fields = {name: _plain(value) for name, value in config.to_dict().items()}
    fields["inference_mode"] = True  # as PEFT saves it
    fields.pop("_custom_modules", None)
    if other_names or fields["target_modules"] == ALL_LINEAR:
        fields |= {"target_modules": sorted(chosen), "exclude_modules": None}
        fields |= {"layers_to_transform": None, "layers_pattern": None}
    return dict(sorted(fields.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value
