"""vLLM's loading of a module that exists in this process: none, since it has its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyshard.adapters.vllm.compat import BaseModelLoader, VllmConfig
from polyshard.core.errors import RegistrationError

LOAD_FORMAT = "polyshard"


class SharedWeights(BaseModelLoader):
    """`load_format="polyshard"`: the model was built over weights that are there."""

    def download_model(self, model_config: Any) -> None:
        """Nothing."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Nothing, for a model that says that its weights are there.

        Raises:
            RegistrationError: it is another one, and would be served with whatever its memory holds.
        """
        if not getattr(model, "shares_memory", False):
            raise RegistrationError(
                f"load_format={LOAD_FORMAT!r} is for a module of this process that was given to "
                f"polyshard.register_model, and {type(model).__name__} is none: leave it out"
            )


def check_load_format(name: str, shares_memory: bool, vllm_config: VllmConfig) -> None:
    """Raise `RegistrationError` where vLLM would write into the trainer's memory: dummy weights, or a checkpoint's."""
    found = vllm_config.load_config.load_format
    if shares_memory and found != LOAD_FORMAT:
        raise RegistrationError(
            f"model {name!r} is a module of this process, and load_format={found!r} would write over its weights: "
            f"start the engine with load_format={LOAD_FORMAT!r}"
        )
