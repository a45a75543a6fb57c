"""The vLLM model loader of a live module, which loads nothing because the module holds its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from polyshard.adapters.vllm.compat import BaseModelLoader, VllmConfig
from polyshard.core.errors import RegistrationError

LOAD_FORMAT = "polyshard"


class SharedWeights(BaseModelLoader):
    """The loader for `load_format="polyshard"`: the model was built over existing weights."""

    def download_model(self, model_config: Any) -> None:
        """Do nothing."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Check that the model shares the weights of a live module; load nothing.

        Raises:
            RegistrationError: it does not, and would be served with uninitialized memory.
        """
        if not getattr(model, "shares_memory", False):
            raise RegistrationError(
                f"load_format={LOAD_FORMAT!r} is only for a module of this process that was passed to "
                f"polyshard.register_model: got {type(model).__name__}. Remove load_format"
            )


def check_load_format(name: str, shares_memory: bool, vllm_config: VllmConfig) -> None:
    """Raise `RegistrationError` if vLLM would write dummy or checkpoint weights into the trainer's memory."""
    load_format = vllm_config.load_config.load_format
    if shares_memory and load_format != LOAD_FORMAT:
        raise RegistrationError(
            f"model {name!r} is a module of this process, and load_format={load_format!r} would overwrite its weights. "
            f"Start the engine with load_format={LOAD_FORMAT!r}"
        )
