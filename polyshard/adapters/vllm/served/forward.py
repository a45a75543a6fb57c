"""The user's forward as one function of tensors, which vLLM compiles as it compiles its own models."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import nn

from polyshard.adapters.vllm.compat import CompilationMode, VllmConfig, support_torch_compile
from polyshard.core.errors import RegistrationError
from polyshard.core.serving import RegisteredModel, as_entry, forward_takes
from polyshard.registry.in_process import is_kept

logger = logging.getLogger(__name__)

COMPILED = ("vllm", "torch")  # adapters whose layers torch.compile can trace as one graph


def make_model_forward(
    registered: RegisteredModel, model: nn.Module, vllm_config: VllmConfig, early_exit: bool
) -> nn.Module:
    """Return a module `(input_ids, positions, inputs_embeds)` around the user's model, compiled if the engine compiles.

    vLLM caches compiled models on disk by config hash and forward name, and torch caches them in the process by code
    object. All three are made unique per registration, so that no model runs another's compiled code.

    Args:
        registered: the registration.
        model: the user's model.
        vllm_config: vLLM's configuration; the registration is added to its `additional_config`, which vLLM hashes.
        early_exit: make forward end after the last attention.
    """
    options = {"finish": False} if early_exit else {}
    identity = json.dumps([as_entry(registered), options], sort_keys=True)
    if is_kept(registered.reference):
        identity += uuid.uuid4().hex  # closures cannot be told apart by name
    if isinstance(vllm_config.additional_config, dict):  # part of vLLM's hash of a config
        vllm_config.additional_config["polyshard"] = identity
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    takes_embeddings = forward_takes(model, "inputs_embeds")
    batched = registered.inputs == "batched"

    class ModelForward(nn.Module):
        def __init__(self, *, vllm_config: VllmConfig) -> None:
            super().__init__()
            self.held = (model,)  # in a tuple, so that its parameters are registered only in the served model

        def forward(
            self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
        ) -> torch.Tensor:
            if batched:
                positions = positions.unsqueeze(0)
                input_ids = None if input_ids is None else input_ids.unsqueeze(0)
                inputs_embeds = None if inputs_embeds is None else inputs_embeds.unsqueeze(0)
            if inputs_embeds is None:
                out = self.held[0](input_ids, positions, **options)
            elif takes_embeddings:
                out = self.held[0](input_ids, positions, inputs_embeds=inputs_embeds, **options)
            else:
                raise RegistrationError(
                    f"model {registered.name!r}: its forward lacks inputs_embeds, which this request needs. Add "
                    "the argument"
                )
            if not isinstance(out, torch.Tensor) or out.shape[:-1] != positions.shape:
                got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
                last = "hidden size" if registered.outputs == "hidden" else "vocabulary"
                raise RegistrationError(
                    f"model {registered.name!r}: forward gave {got}, expected {registered.outputs} "
                    f"{[*positions.shape, last]} for {list(positions.shape)} tokens"
                )
            return out.squeeze(0) if batched else out

    function = ModelForward.forward
    assert isinstance(function, FunctionType)
    function.__code__ = function.__code__.replace(co_name=f"forward_{digest}")
    function.__qualname__ = f"{registered.name}_{digest}.forward"
    if not _compiles(registered, vllm_config):
        return ModelForward(vllm_config=vllm_config)
    dims = {"input_ids": 0, "positions": 0, "inputs_embeds": 0}
    compiled = support_torch_compile(dynamic_arg_dims=dims)(ModelForward)  # pyrefly: ignore  # incomplete overloads
    return compiled(vllm_config=vllm_config)


def _compiles(registered: RegisteredModel, vllm_config: VllmConfig) -> bool:
    if vllm_config.compilation_config.mode in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE):
        return False
    if registered.adapter in COMPILED:
        return True
    logger.warning(
        "model %r is not compiled: torch.compile cannot trace %s's layers as one graph",
        registered.name,
        registered.adapter,
    )
    return False


@contextmanager
def explain_trace_errors(name: str) -> Iterator[None]:
    """Raise `RegistrationError` with the remedy if torch.compile cannot trace the forward of model `name`."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RegistrationError(
            f"model {name!r}: torch.compile cannot trace its forward as one graph: {error}. Change the code that it "
            "names, or start the engine with enforce_eager=True"
        ) from error
