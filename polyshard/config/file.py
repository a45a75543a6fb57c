"""What a config.json must hold before anything is built from it: every error names the file and the field."""

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
)
NUMBERS = ("rms_norm_eps", "layer_norm_eps", "rope_theta", "partial_rotary_factor", "attention_dropout")
SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
NO_FIELDS = ("self", "cls", "to_dict")  # names that classes of configurations need for themselves


class ConfigFileError(ConfigurationError, CheckpointError):
    """A config.json that describes no model."""


class MissingFieldError(ConfigFileError, AttributeError):
    """A field that a model reads and its config.json lacks; `getattr` with a default and `hasattr` work as always."""


def check_fields(fields: Mapping[str, Any], file: object) -> None:
    """Check names of fields, and the kind of value of those that decoders share.

    Args:
        fields: of a config.json.
        file: it, for errors.

    Raises:
        ConfigFileError: a key is no field, or a value is of another kind. Other families may have lists where a
            decoder has one number, and null everywhere.

    Example:
        >>> check_fields({"sliding_window": 2.5}, "out/config.json")
        Traceback (most recent call last):
        polyshard.config.file.ConfigFileError: out/config.json: sliding_window is wrong: got 2.5, expected an \
integer. Correct the file.
    """
    for name in fields:
        if name in NO_FIELDS or name.startswith("__"):
            raise ConfigFileError(f"{file} is wrong: got a key {name!r}, which is no field. Take it out.")
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
    """Check that a decoder of one of polyshard's families lacks no field; others are left to their own code.

    A server would fill in the defaults of the family's class, which are those of another model.

    Args:
        fields: of a config.json.
        file: it, for errors.

    Raises:
        ConfigFileError: fields are missing.
    """
    missing = [name for name in REQUIRED if fields.get(name) is None]
    if missing and fields.get("model_type") in FAMILIES:
        raise ConfigFileError(
            f"{file} is incomplete: got no {', '.join(missing)}, expected every size of the model and the epsilon of "
            "its norms. Add it, with the value that the model was trained with."
        )
