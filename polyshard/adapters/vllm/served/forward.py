"""The user's forward as one function of tensors, which vLLM compiles where it compiles its own models."""

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

COMPILED = ("vllm", "torch")  # adapters whose layers torch.compile is known to take whole


def make_body(
    registered: RegisteredModel, model: nn.Module, vllm_config: VllmConfig, finished_later: bool
) -> nn.Module:
    """A module `(input_ids, positions, inputs_embeds)` around the user's model, compiled where the engine compiles.

    Where it is finished later, forward is asked to end after the last attention.

    vLLM keeps compiled models on disk under its config and the name of the forward, and torch in the process under the
    code object. All three are made this registration's own, so that no model ever runs another's compiled code.
    """
    asked = {"finish": False} if finished_later else {}
    identity = json.dumps([as_entry(registered), asked], sort_keys=True)
    if is_kept(registered.reference):
        identity += uuid.uuid4().hex  # a closure has no name that would tell it from another
    if isinstance(vllm_config.additional_config, dict):  # part of vLLM's hash of a config
        vllm_config.additional_config["polyshard"] = identity
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    takes_embeddings = forward_takes(model, "inputs_embeds")
    batched = registered.inputs == "batched"

    class Body(nn.Module):
        def __init__(self, *, vllm_config: VllmConfig) -> None:
            super().__init__()
            self.held = (model,)  # in a tuple: its parameters are the served model's, under their own names

        def forward(
            self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
        ) -> torch.Tensor:
            if batched:
                positions = positions.unsqueeze(0)
                input_ids = None if input_ids is None else input_ids.unsqueeze(0)
                inputs_embeds = None if inputs_embeds is None else inputs_embeds.unsqueeze(0)
            if inputs_embeds is None:
                out = self.held[0](input_ids, positions, **asked)
            elif takes_embeddings:
                out = self.held[0](input_ids, positions, inputs_embeds=inputs_embeds, **asked)
            else:
                raise RegistrationError(
                    f"model {registered.name!r}: its forward takes no inputs_embeds, which this request needs"
                )
            if not isinstance(out, torch.Tensor) or out.shape[:-1] != positions.shape:
                got = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
                last = "hidden size" if registered.outputs == "hidden" else "vocabulary"
                raise RegistrationError(
                    f"model {registered.name!r}: forward gave {got}, expected {registered.outputs} "
                    f"{[*positions.shape, last]} for {list(positions.shape)} tokens"
                )
            return out.squeeze(0) if batched else out

    own = Body.forward
    assert isinstance(own, FunctionType)
    own.__code__ = own.__code__.replace(co_name=f"forward_{digest}")
    own.__qualname__ = f"{registered.name}_{digest}.forward"
    if not _compiles(registered, vllm_config):
        return Body(vllm_config=vllm_config)
    dims = {"input_ids": 0, "positions": 0, "inputs_embeds": 0}
    compiled = support_torch_compile(dynamic_arg_dims=dims)(Body)  # pyrefly: ignore  # its overloads lack its arguments
    return compiled(vllm_config=vllm_config)


def _compiles(registered: RegisteredModel, vllm_config: VllmConfig) -> bool:
    if vllm_config.compilation_config.mode in (CompilationMode.NONE, CompilationMode.STOCK_TORCH_COMPILE):
        return False
    if registered.adapter in COMPILED:
        return True
    logger.warning(
        "model %r is not compiled: torch.compile does not take %s's layers whole", registered.name, registered.adapter
    )
    return False


@contextmanager
def traced_whole(name: str) -> Iterator[None]:
    """Around a body's call: the way out in the error where torch.compile cannot trace it."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise RegistrationError(
            f"model {name!r}: torch.compile cannot trace its forward as one graph: {error}. Change what it names, "
            "or start the engine with enforce_eager=True"
        ) from error
