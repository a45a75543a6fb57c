"""Functions of the conformance suite that run on each rank. Each returns data, which the suite checks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch

from polyshard.attention.context_parallel.shards import context_shard, context_unshard
from polyshard.core.context import GroupContext, ParallelAxis, ParallelContext
from polyshard.core.discovery import load_adapter
from polyshard.core.errors import LayoutError, RankFailureError
from polyshard.core.optimizer import AdamW
from polyshard.core.weight_table import collect_layouts, copy_into_shard, stored_parts
from polyshard.launch import initialize, shutdown
from polyshard.layers.initialization import initialize_weights
from polyshard.layers.linear import column_parallel, qkv_parallel, row_parallel
from polyshard.layers.logprobs import token_logprobs
from polyshard.layers.vocabulary import gather_logits, vocab_parallel_cross_entropy
from polyshard.testing.model import SuiteConfig, SuiteModel
from polyshard.testing.reference import reference_weights
from polyshard.weights.gather import gather_shards

Named = dict[str, torch.Tensor]


def tokens(config: SuiteConfig, rows: int = 4, length: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input IDs and labels `[rows, length]`; one label is ignored."""
    ids = torch.randint(0, config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].clone()
    labels[0, 0] = -100
    return ids[:, :-1], labels


def batches(config: SuiteConfig, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches that follow a learnable rule: each token is the previous one plus seven."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for _ in range(steps):
        ids = (
            torch.randint(0, config.vocab_size, (4, 1), generator=generator) + 7 * torch.arange(9)
        ) % config.vocab_size
        result.append((ids[:, :-1], ids[:, 1:]))
    return result


def placed(context: ParallelContext, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Move tensors to this rank's device."""
    return [tensor.to(context.device) for tensor in tensors]


def build(config: SuiteConfig, context: ParallelContext) -> SuiteModel:
    """Build the suite's model with the reference's weights."""
    model = SuiteModel(config, context)
    full = reference_weights(config, dtype=torch.float32)
    rank, size = context.get_tensor_parallel_rank(), context.get_tensor_parallel_world_size()
    parameters = dict(model.named_parameters())
    for entry in collect_layouts(model).values():
        count = len(entry.checkpoint_names)
        for index, name in enumerate(entry.checkpoint_names):
            copy_into_shard(parameters[entry.parameter], entry.layout, count, index, full[name], rank, size)
    return model


def gathered(shards: Any, model: SuiteModel, context: ParallelContext) -> Named:
    """Return full tensors by checkpoint name, from pairs of name and shard."""
    axis, table = context.axis("tensor"), collect_layouts(model)
    result: Named = {}
    for name, shard in shards:
        layout, names = table[name].layout, table[name].checkpoint_names
        parts = stored_parts(layout, len(names), gather_shards(shard, layout, axis))
        result.update(zip(names, (part.clone() for part in parts)))
    return result


def layers(adapter: str, tensor: int, sequence_parallel: bool, context_size: int = 1) -> dict[str, Named]:
    """Return loss, logits and gradients, untied and tied, the loss under autocast, and initial weights."""
    context = initialize(adapter, tensor=tensor, context=context_size, sequence_parallel=sequence_parallel, timeout=60)
    results: dict[str, Named] = {}
    for tied in (False, True):
        config = SuiteConfig(tied=tied)
        input_ids, labels = (context_shard(x, context, dim=1) for x in placed(context, tokens(config)))
        model = build(config, context)
        loss = model(input_ids, labels)
        loss.backward()
        with torch.no_grad():
            logits = gather_logits(model(input_ids), context, config.vocab_size)
            logits = context_unshard(logits, context, dim=1)
            with torch.autocast(context.device.type, torch.bfloat16):
                rough = model(input_ids, labels)
        gradients = [(name, _mean(p.grad, context.axis("context"))) for name, p in model.named_parameters()]
        found = gathered(gradients, model, context)
        results["tied" if tied else "untied"] = {"loss": loss.detach(), "logits": logits, "autocast": rough, **found}
    model = SuiteModel(SuiteConfig(), context)
    initialize_weights(model, context, seed=11)
    results["initial"] = gathered(((n, p.detach()) for n, p in model.named_parameters()), model, context)
    shutdown(context)
    return results


def training(
    adapter: str, tensor: int, context_size: int, engine: dict[str, Any], steps: int, settings: dict[str, float]
) -> dict[str, Any]:
    """Return losses, gradient norms and the final weights; every other step uses two micro-batches."""
    context = initialize(adapter, tensor=tensor, context=context_size, timeout=60)
    config = SuiteConfig()
    model = build(config, context)
    optimizer = AdamW(lr=settings["lr"], weight_decay=settings["weight_decay"])
    options = {"max_grad_norm": settings["max_grad_norm"], **engine}
    trainer = load_adapter(adapter).engine(model, optimizer, context, **options)
    share, rank = context.get_data_parallel_world_size(), context.get_data_parallel_rank()
    losses, norms = [], []
    for step, (input_ids, labels) in enumerate(batches(config, steps)):
        mine, targets = (context_shard(x[rank::share], context, dim=1) for x in placed(context, (input_ids, labels)))
        parts = list(zip(mine.chunk(2), targets.chunk(2))) if step % 2 else [(mine, targets)]
        total = torch.zeros((), device=context.device)
        for ids, wanted in parts[:-1]:
            with trainer.accumulate():
                loss = trainer(ids, wanted) / len(parts)
                trainer.backward(loss)
            total = total + loss.detach()
        loss = trainer(*parts[-1]) / len(parts)
        trainer.backward(loss)
        total = total + loss.detach()
        norms.append(trainer.step().grad_norm)
        losses.append(float(_mean(total, context.axis("data"))))
    weights = gathered(trainer.weights(), model, context)
    trainer.close()
    shutdown(context)
    return {"losses": losses, "norms": norms, "weights": weights}


# Number of labels in each of four rows, by step: unequal over ranks and micro-batches, ranks without labels, one label.
UNEVEN = ((8, 1, 0, 3), (5, 0, 8, 0), (0, 0, 0, 1))


def uneven_batches(config: SuiteConfig) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return input IDs and labels `[4, 8]`; only the last labels of each row count, as many as in `UNEVEN`."""
    result = []
    for step, kept in enumerate(UNEVEN):
        ids, labels = tokens(config, seed=10 + step)
        labels = torch.where(labels < 0, torch.zeros_like(labels), labels)
        for row, count in enumerate(kept):
            labels[row, : labels.shape[1] - count] = -100
        result.append((ids, labels))
    return result


def uneven(adapter: str, tensor: int, context_size: int, engine: dict[str, Any]) -> dict[str, Any]:
    """Return losses and weights of steps with unequal numbers of labels on ranks and micro-batches of one row."""
    context = initialize(adapter, tensor=tensor, context=context_size, timeout=60)
    config = SuiteConfig()
    model = build(config, context)
    # With this epsilon a wrong gradient scale changes the weights; with the usual one AdamW hides it.
    optimizer = AdamW(lr=1.0, eps=1.0, weight_decay=0.0)
    trainer = load_adapter(adapter).engine(model, optimizer, context, max_grad_norm=None, **engine)
    share, rank = context.get_data_parallel_world_size(), context.get_data_parallel_rank()

    def summed(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        return vocab_parallel_cross_entropy(
            logits, batch["labels"], context, vocab_size=config.vocab_size, reduction="sum"
        )

    losses, counts, updates = [], [], [trainer.updates]
    for ids, labels in uneven_batches(config):
        rows = [context_shard(x[rank::share], context, dim=1) for x in placed(context, (ids, labels))]
        micro_batches = [{"input_ids": row, "labels": wanted} for row, wanted in zip(*(x.split(1) for x in rows))]
        found = trainer.train_batch(micro_batches, summed)
        trainer.step()
        losses.append(float(found.loss))
        counts.append(float(found.tokens))
        updates.append(trainer.updates)
    weights = gathered(trainer.weights(), model, context)
    trainer.close()
    shutdown(context)
    return {"losses": losses, "tokens": counts, "weights": weights, "updates": updates}


def _mean(value: Any, axis: ParallelAxis) -> Any:
    return value if axis.collectives is None else axis.collectives.all_reduce(value) / axis.size


def pieces(adapter: str) -> dict[str, Any]:
    """Run small checks on two ranks: loss, dropout, foreign groups, invalid sizes, another parallel size."""
    library = load_adapter(adapter)
    results: dict[str, Any] = {}
    context = initialize(adapter, tensor=2, timeout=60)
    results["loss"] = _loss_contract(context)
    results["dropout"] = _dropout(context)
    results["refused"] = _wrong_sizes(context)
    results["ids"] = _wrong_ids(context) if context.device.type == "cpu" else {}
    shutdown(context)

    foreign = load_adapter("torch").initialize(_layout(2), timeout=60)
    adopted = library.adopt(foreign)
    assert isinstance(adopted, GroupContext)
    results["adopted"] = build(SuiteConfig(), adopted)(*placed(adopted, tokens(SuiteConfig()))).detach()
    shutdown(adopted)

    context = initialize(adapter, timeout=60)  # the same processes, another tensor-parallel size
    ids = placed(context, tokens(SuiteConfig()))
    results["again"] = build(SuiteConfig(), context)(*ids).detach()
    results["dropout alone"] = _dropout(context)
    torch.manual_seed(100 + context.get_data_parallel_rank())
    results["dropout of a replica"] = build(SuiteConfig(dropout=0.3), context)(*ids).detach()
    shutdown(context)
    return results


def dies(adapter: str, timeout: float) -> tuple[float, str, tuple[int, ...]] | None:
    """Let the last rank crash; return the first rank's error, and the seconds until it was raised."""
    context = initialize(adapter, tensor=2, timeout=timeout)
    model = build(SuiteConfig(), context)
    input_ids, labels = placed(context, tokens(SuiteConfig()))
    model(input_ids, labels).backward()
    if context.get_tensor_parallel_rank() == 1:
        os._exit(7)
    started = time.monotonic()
    try:
        # polyshard cannot guard collectives inside a library's layers; an engine guards its whole step.
        trainer = load_adapter(adapter).engine(model, AdamW(), context, **({"max_grad_norm": 1.0}))
        trainer.backward(trainer(input_ids, labels))
    except RankFailureError as error:
        return time.monotonic() - started, str(error), error.ranks
    return None


def _layout(tensor: int) -> Any:
    from polyshard.core.parallel_layout import ParallelLayout

    return ParallelLayout.for_world(int(os.environ["WORLD_SIZE"]), tensor=tensor)


def _loss_contract(context: ParallelContext) -> dict[str, Any]:
    logits = 4 * torch.randn(12, 11, generator=torch.Generator().manual_seed(4))
    targets = torch.tensor([3, -100, 10, 0, 5, 1, 2, -100, 4, 6, 7, 8])
    padded = torch.cat((logits, torch.full((12, 1), -torch.inf)), dim=1)
    rank = context.get_tensor_parallel_rank()
    found: dict[str, Any] = {"logits": logits, "targets": targets, "no labels": {}}
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            local = padded.chunk(2, dim=1)[rank].to(context.device, copy=True).requires_grad_()
            before = local.detach().clone()
            loss = vocab_parallel_cross_entropy(
                local,
                targets.to(context.device),
                context,
                vocab_size=11,
                reduction=reduction,
                label_smoothing=smoothing,
            )
            loss.sum().backward()
            untouched = torch.equal(local.detach(), before)
            found[f"{reduction} {smoothing}"] = (loss.detach(), local.grad, untouched)
            local = local.detach().clone().requires_grad_()
            none = vocab_parallel_cross_entropy(
                local,
                torch.full_like(targets, -100).to(context.device),
                context,
                vocab_size=11,
                reduction=reduction,
                label_smoothing=smoothing,
            )
            none.sum().backward()
            found["no labels"][f"{reduction} {smoothing}"] = (none.detach(), local.grad)
    return found


def _dropout(context: ParallelContext) -> torch.Tensor:
    model = build(SuiteConfig(dropout=0.3), context)
    input_ids, labels = placed(context, tokens(SuiteConfig()))
    torch.manual_seed(9)
    first = model(input_ids, labels).detach()
    torch.manual_seed(9)
    second = model(input_ids, labels).detach()
    return torch.stack((first, second, model(input_ids, labels).detach()))


def _wrong_ids(context: ParallelContext) -> dict[str, str]:
    """Return the errors for IDs and labels outside the vocabulary, including those of its padding."""
    config = SuiteConfig()
    model = build(config, context)
    ids = placed(context, tokens(config))[0]
    found = {}
    with torch.no_grad():
        logits = model(ids)
    for wrong in (config.vocab_size, 100_000, -1):
        bad = ids.clone()
        bad[1, 2] = wrong
        calls = {
            "embedding": lambda bad=bad: model(bad),
            "loss": lambda bad=bad: vocab_parallel_cross_entropy(
                logits, bad, context, vocab_size=config.vocab_size, reduction="none"
            ),
            "loss without vocab_size": lambda bad=bad: vocab_parallel_cross_entropy(logits, bad, context),
            "log-probability": lambda bad=bad: token_logprobs(logits, bad, context, vocab_size=config.vocab_size),
            "log-probability without vocab_size": lambda bad=bad: token_logprobs(logits, bad, context),
        }
        for name, call in calls.items():
            try:
                found[f"{name} of {wrong}"] = f"accepted: {call()}"
            except (IndexError, ValueError) as error:
                found[f"{name} of {wrong}"] = str(error)
    return found


def _wrong_sizes(context: ParallelContext) -> list[str]:
    messages = []
    for make in (
        lambda: column_parallel(4, 7, context),
        lambda: row_parallel(9, 4, context),
        lambda: qkv_parallel(12, 3, 3, 4, context),
    ):
        try:
            make()
        except LayoutError as error:
            messages.append(str(error))
    return messages
