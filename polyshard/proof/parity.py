"""Loss, logits and gradients of a model on any adapter at any size, which `polyshard verify` compares."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from polyshard.checkpoint import load_checkpoint, read_config
from polyshard.core.context import ParallelContext
from polyshard.core.serving import build_model, check_served_interface
from polyshard.core.weight_table import collect_layouts, stored_parts
from polyshard.launch import initialize, shutdown
from polyshard.launch.ranks import run_ranks
from polyshard.layers.vocabulary import gather_logits, vocab_parallel_cross_entropy
from polyshard.registry import resolve
from polyshard.testing import checks
from polyshard.testing.model import SuiteConfig
from polyshard.testing.reference import reference_run
from polyshard.transformers.replaced.requirement import TRANSFORMERS
from polyshard.weights.gather import gather_shards

Named = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest differences from the reference.

    Attributes:
        loss: absolute difference.
        logits: relative to the largest logit.
        gradients: relative to the largest entry of each tensor; that of the worst tensor.
        worst: name of the worst tensor.
    """

    loss: float
    logits: float
    gradients: float
    worst: str

    def within(self, tolerance: float) -> bool:
        """Return whether all differences are at most `tolerance`."""
        return max(self.loss, self.logits, self.gradients) <= tolerance


def run_model(adapter: str, tensor: int, directory: str, factory: str, token_ids: list[int]) -> Named | None:
    """Return `loss`, `logits` `[tokens, vocabulary]` and each gradient by checkpoint name; runs on each rank.

    The tokens are one sequence in which each token predicts the next. Only the first rank returns a result.
    """
    context = initialize(adapter, tensor=tensor, timeout=300)
    config = read_config(directory)
    model: Any = build_model(resolve(factory), config, context, factory)
    check_served_interface(model, factory)
    load_checkpoint(model, directory, context)
    ids = torch.tensor(token_ids, device=context.device)
    positions = torch.arange(len(token_ids), device=context.device)
    local = model.compute_logits(model(ids, positions))
    loss = vocab_parallel_cross_entropy(local[:-1], ids[1:], context, vocab_size=config.vocab_size)
    loss.backward()
    logits = gather_logits(local.detach(), context, config.vocab_size)
    first = context.get_tensor_parallel_rank() == 0
    found = _full_gradients(model, context, first)
    shutdown(context)
    return {"loss": loss.detach().cpu(), "logits": logits.cpu(), **found} if first else None


def _full_gradients(model: torch.nn.Module, context: ParallelContext, keep: bool) -> Named:
    axis, table, found = context.axis("tensor"), collect_layouts(model), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        entry = table[name]
        full = gather_shards(parameter.grad, entry.layout, axis, context.axis("expert"))
        if keep:
            parts = stored_parts(entry.layout, len(entry.checkpoint_names), full)
            found.update((n, part.detach().cpu().clone()) for n, part in zip(entry.checkpoint_names, parts))
    return found


def run_transformers(directory: Path, token_ids: list[int]) -> Named:
    """Return the same for the reference: transformers' own implementation in float32, in this process.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    TRANSFORMERS.require()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([token_ids])
    logits = model(ids).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
    loss.backward()
    return {"loss": loss.detach(), "logits": logits.detach(), **_stored_gradients(model)}


def _stored_gradients(model: Any) -> Named:
    """Return the gradients of a model of transformers by checkpoint name."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if all(gradient is not None and gradient.dim() < 3 for gradient in gradients.values()):
        return gradients
    # Experts are stored one by one, but transformers holds them as one tensor. It divides them when it saves.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    with tempfile.TemporaryDirectory(prefix="polyshard-gradients-") as folder:
        model.save_pretrained(folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        return {name: gradient for file in files for name, gradient in load_file(file).items()}


def run_built_in(adapter: str, tensor: int) -> Named:
    """Return `loss`, `logits` and each gradient of the conformance suite's model on an adapter."""
    found = run_ranks(checks.layers, tensor, adapter, tensor, False, timeout=300)[0]["untied"]
    return {name: tensor for name, tensor in found.items() if name != "autocast"}


def oracle_of_built_in() -> Named:
    """Return the same from the suite's float64 reference."""
    config = SuiteConfig()
    return reference_run(config, *checks.tokens(config))


def compare(found: Named, reference: Named) -> Difference:
    """Return the largest differences; a gradient that exists on one side only counts as infinite."""
    names = (set(found) | set(reference)) - {"loss", "logits"}
    errors = {name: _relative(found.get(name), reference.get(name)) for name in names}
    worst = max(errors, key=lambda name: errors[name])
    loss = float((found["loss"] - reference["loss"]).abs())
    return Difference(loss, _relative(found["logits"], reference["logits"]), errors[worst], worst)


def _relative(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
