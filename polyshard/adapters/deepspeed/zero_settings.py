"""The ZeRO settings of DeepSpeed's configuration, and what stage 3 excludes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyshard.core.errors import ConfigurationError


def zero_settings(stage: int, config: Mapping[str, Any], compiles: bool) -> dict[str, Any]:
    """Return `zero_optimization` with the stage and the user's fields, such as `overlap_comm`.

    Args:
        stage: the engine's ZeRO stage.
        config: further fields of DeepSpeed's configuration.
        compiles: whether blocks are compiled.

    Raises:
        ConfigurationError: the configuration names another stage, or stage 3 is to be compiled.

    Examples:
        >>> zero_settings(2, {"zero_optimization": {"overlap_comm": True}}, False)
        {'overlap_comm': True, 'stage': 2}
    """
    fields = config.get("zero_optimization", {})
    if fields.get("stage", stage) != stage:
        raise ConfigurationError(
            f"config['zero_optimization']['stage'] does not match zero_stage: got {fields['stage']}, expected {stage}. "
            "Pass the stage as zero_stage."
        )
    if stage == 3 and compiles:
        raise ConfigurationError(
            "compile is unsupported with ZeRO stage 3: DeepSpeed's hooks gather parameters inside of each block, and "
            "torch.compile would leave most of it uncompiled. Use stages 0 to 2, or torch's FSDP2."
        )
    return {**fields, "stage": stage}
