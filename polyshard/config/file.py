"""Validation of a config.json before anything is built from it. Every error names the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.config.decoder_spec import FAMILIES
from polyshard.core.errors import CheckpointError, ConfigurationError

REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "rms_norm_eps",
)
SIZES = (
    *REQUIRED[:-1],
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "max_window_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "n_group", "topk_group", "first_k_dense_replace"),
)
NUMBERS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "attention_dropout",
    "routed_scaling_factor",
)
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "norm_topk_prob")
NO_FIELDS = ("self", "cls", "to_dict")  # names that configuration classes use themselves


class ConfigFileError(ConfigurationError, CheckpointError):
    """A config.json that does not describe a model."""


class MissingFieldError(ConfigFileError, AttributeError):
    """A field that a model reads but its config.json does not define; `hasattr` and `getattr` defaults keep working."""


def check_fields(fields: Mapping[str, Any], file: object) -> None:
    """Check the names of fields, and the value types of the fields that decoders share.

    Args:
        fields: the fields of a config.json.
        file: its path, for errors.

    Raises:
        ConfigFileError: a key is not a valid field name, or a value has the wrong type. Lists and mappings are
            accepted where other families have them, and null everywhere.

    Examples:
        >>> check_fields({"sliding_window": 2.5}, "out/config.json")
        Traceback (most recent call last):
        polyshard.config.file.ConfigFileError: out/config.json: sliding_window is wrong: got 2.5, expected an \
integer. Correct the file.
    """
    for name in fields:
        if name in NO_FIELDS or name.startswith("__"):
            raise ConfigFileError(f"{file} is wrong: got a key {name!r}, which is not a field. Remove it.")
    for names, kinds, expected in (
        (SIZES, int, "an integer"),
        (NUMBERS, (int, float), "a number"),
        (SWITCHES, bool, "true or false"),
    ):
        for name in names:
            value = fields.get(name)
            wrong = not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
            if value is not None and wrong and not isinstance(value, (list, Mapping)):
                raise ConfigFileError(f"{file}: {name} is wrong: got {value!r}, expected {expected}. Correct the file.")


def check_complete(fields: Mapping[str, Any], file: object) -> None:
    """Check that the config of a supported decoder family is complete; configs of other families are not checked.

    A server would fill missing fields with the defaults of the family's class, which belong to another model.

    Args:
        fields: the fields of a config.json.
        file: its path, for errors.

    Raises:
        ConfigFileError: fields are missing.
    """
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing and fields.get("model_type") in FAMILIES:
        raise ConfigFileError(
            f"{file} is incomplete: {', '.join(missing)} missing, expected every size of the model and the epsilon of "
            "its norms. Add them, with the values that the model was trained with."
        )
