"""What tests run on each rank. Top-level functions: other processes import them."""

from __future__ import annotations

import os
from pathlib import Path

import decoder
import torch

import polyshard as ps
from polyshard.core.model_weights import gather_over
from polyshard.core.weight_table import stored_parts


def build(directory: Path, context: ps.ParallelContext) -> decoder.Decoder:
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    return model


def full_gradients(model: torch.nn.Module, context: ps.ParallelContext) -> dict[str, torch.Tensor]:
    """Gradients of the logical tensors, by their checkpoint names."""
    axis = context.axis("tensor")
    gradients = {}
    parameters = dict(model.named_parameters())
    for name, entry in ps.collect_layouts(model).items():
        shard = parameters[name].grad
        assert shard is not None, f"{name} has no gradient"
        shards = [shard] if axis.size == 1 else list(axis.collectives.all_gather(shard.unsqueeze(0), 0))
        if entry.layout.dim is None:
            for other in shards[1:]:
                torch.testing.assert_close(other, shards[0], rtol=1e-4, atol=1e-6)  # the same on every rank
        full = entry.layout.assemble(shards)
        if entry.layout.experts is not None:
            full = torch.cat(gather_over(context.axis("expert"), full))
        gradients.update(zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full)))
    return gradients


def loss_and_gradients(directory: Path, inputs: dict, sizes: dict) -> dict:
    """Logits, loss and every gradient, gathered; from the tensor-parallel layout in `sizes`."""
    context = ps.initialize(timeout=60, **sizes)
    model = build(directory, context)
    input_ids, labels, cu_seqlens = inputs["input_ids"], inputs["labels"], inputs.get("cu_seqlens")
    loss = model(input_ids, labels=labels, cu_seqlens=cu_seqlens)
    loss.backward()
    with torch.no_grad():
        hidden = model(input_ids, cu_seqlens=cu_seqlens)
        logits = ps.gather_logits(model.compute_logits(hidden), context, model.config.vocab_size)
    result = {"loss": loss.item(), "logits": logits, "gradients": full_gradients(model, context)}
    rank = context.rank
    ps.shutdown(context)
    return result if rank == 0 else {"loss": result["loss"]}


def training_curve(directory: Path, batches: list, sizes: dict, engine: dict, optimizer: dict) -> dict:
    """Losses and gradient norms of some steps, and the weights after them."""
    context = ps.initialize(timeout=60, **sizes)
    model = build(directory, context)
    trainer = ps.load_adapter(sizes.get("adapter", "torch")).engine(model, ps.AdamW(**optimizer), context, **engine)
    share = context.get_data_parallel_rank()
    losses, norms = [], []
    for input_ids, labels in batches:
        rows = len(input_ids) // context.get_data_parallel_world_size()
        mine = slice(share * rows, (share + 1) * rows)
        loss = trainer(input_ids[mine], labels=labels[mine])
        trainer.backward(loss)
        norms.append(trainer.step().grad_norm)
        total = loss.detach().clone()
        data = context.axis("data")
        if data.size > 1:
            total = data.collectives.all_reduce(total) / data.size
        losses.append(total.item())
    weights = {}
    axis = context.axis("tensor")
    table = trainer.table
    for name, shard in trainer.weights():
        shards = [shard] if axis.size == 1 else list(axis.collectives.all_gather(shard.unsqueeze(0), 0))
        entry = table[name]
        full = entry.layout.assemble(shards)
        if entry.layout.experts is not None:
            full = torch.cat(gather_over(context.axis("expert"), full))
        weights.update(zip(entry.checkpoint_names, stored_parts(entry.layout, len(entry.checkpoint_names), full)))
    trainer.close()
    rank = context.rank
    ps.shutdown(context)
    return {
        "losses": losses,
        "norms": norms,
        "weights": {k: v.clone() for k, v in weights.items()} if rank == 0 else {},
    }


def dropped_logits(directories: list[Path], input_ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Logits of each model without dropout and with it on one rank, and with it over all ranks, from one seed."""
    import transformers

    context = ps.initialize("torch", timeout=60, tensor=int(os.environ["WORLD_SIZE"]))
    alone = ps.GroupContext(layout=ps.ParallelLayout(), device=context.device, linear=context.linear)

    def logits(directory: Path, context: ps.ParallelContext, training: bool) -> torch.Tensor:
        config = transformers.AutoConfig.from_pretrained(directory)
        model = ps.transformers_model(config, context).train(training)
        ps.load_checkpoint(model, directory, context)
        torch.manual_seed(0)
        with torch.no_grad():
            return ps.gather_logits(model.compute_logits(model(input_ids)), context, config.vocab_size)

    cases = ((alone, False), (alone, True), (context, True))
    found = [tuple(logits(directory, *case) for case in cases) for directory in directories]
    ps.shutdown(context)
    return found


def transformers_outcome(directory: Path, input_ids: torch.Tensor, adapter: str) -> dict:
    """Loss, logits and gradients of a transformers model by its own code, sharded over all ranks; and packed."""
    import transformers

    context = ps.initialize(adapter, timeout=60, tensor=int(os.environ["WORLD_SIZE"]))
    config = transformers.AutoConfig.from_pretrained(directory)
    model = ps.transformers_model(config, context).eval()
    ps.load_checkpoint(model, directory, context)
    labels = torch.cat((input_ids[:, 1:], torch.full_like(input_ids[:, :1], -100)), dim=1)
    loss = model(input_ids, labels=labels)
    loss.backward()
    gradients = full_gradients(model, context)
    with torch.no_grad():
        logits = model.compute_logits(model(input_ids))
        if logits.shape[-1] < config.vocab_size:
            logits = ps.gather_logits(logits, context, config.vocab_size)
        bounds = torch.arange(len(input_ids) + 1, dtype=torch.int32) * input_ids.shape[1]
        packed = model(input_ids.flatten(), labels=labels.flatten(), cu_seqlens=bounds)
    ps.shutdown(context)
    return {"loss": loss.item(), "logits": logits, "gradients": gradients, "packed": packed.item()}
