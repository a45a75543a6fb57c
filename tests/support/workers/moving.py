"""Moves of weights between libraries and sizes, for the matrix."""

import decoder
import torch
from safetensors.torch import load_file

import polyshard as ps
from polyshard.core.weight_table import stored_parts
from polyshard.weights.gather import gather_shards


def start(adapter, tensor, source, dtype=torch.float32):
    context = ps.initialize(adapter, tensor=tensor, timeout=120)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return context, decoder.build_model(ps.read_config(source), context)
    finally:
        torch.set_default_dtype(before)


def full_weights(model, context):
    """The logical tensors by stored name, gathered through the layouts, not through a checkpoint."""
    result = {}
    parameters = dict(model.named_parameters())
    for name, entry in ps.collect_layouts(model).items():
        full = gather_shards(parameters[name].detach(), entry.layout, context.axis("tensor"))
        result |= zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full))
    return result


def matrix(original, root, adapters, sizes):
    """Save from every library at every size, then load each of these into every library at every size."""
    want = load_file(original / "model.safetensors")
    places = [(adapter, tensor) for adapter in adapters for tensor in sizes]
    for adapter, tensor in places:
        context, model = start(adapter, tensor, original)
        ps.load_checkpoint(model, original, context)
        ps.save_checkpoint(model, root / f"{adapter}-{tensor}", context, config=ps.read_config(original))
        ps.shutdown(context)
    verdicts = {}
    for adapter, tensor in places:
        context, model = start(adapter, tensor, original)
        for source in places:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(7.0)
            ps.load_checkpoint(model, root / f"{source[0]}-{source[1]}", context)
            found = full_weights(model, context)
            verdicts[source, (adapter, tensor)] = set(found) == set(want) and all(
                torch.equal(found[name], want[name]) for name in want
            )
        ps.shutdown(context)
    return verdicts


def hand_on(source, target, adapter, tensor):
    """Load a checkpoint on this library at this size, and save it again."""
    context, model = start(adapter, tensor, source, torch.bfloat16)
    ps.load_checkpoint(model, source, context)
    ps.save_checkpoint(model, target, context, config=ps.read_config(source))
    ps.shutdown(context)
