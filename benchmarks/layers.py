"""A training step with polyshard, relative to the same step written by hand with the library's layers.

    python benchmarks/layers.py [--tensor-parallel 1] [--json FILE] [--check]

A step is the forward pass, the backward pass and torch's AdamW for a Llama-class decoder of about 17 million
parameters. Both models alternate in one process per rank; the ratio is that of the medians. `--check` exits with status
1 if it is above 1.02 and the step takes 50 ms or more.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import polyshard as ps
from polyshard.testing import run_ranks

CONFIG = SimpleNamespace(
    model_type="llama",
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    rope_theta=10000.0,
)
GOAL, SMALLEST = 1.02, 50.0  # ratio; milliseconds
BATCH, LENGTH = 4, 128


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONFIG.hidden_size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps) * self.weight


class Hand(nn.Module):
    """The decoder written by hand; `make` returns one library's layers, whose outputs may be tuples."""

    def __init__(self, make, size):
        super().__init__()
        h, f, d = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.head_dim
        self.heads, self.kv = CONFIG.num_attention_heads // size, CONFIG.num_key_value_heads // size
        total = (CONFIG.num_attention_heads + 2 * CONFIG.num_key_value_heads) * d
        self.embed = make.embedding(CONFIG.vocab_size, h)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Norm(),
                    make.column(h, total),
                    make.row(CONFIG.num_attention_heads * d, h),
                    Norm(),
                    make.column(h, 2 * f),
                    make.row(f, h),
                ]
            )
            for _ in range(CONFIG.num_hidden_layers)
        )
        self.norm, self.head, self.loss = Norm(), make.column(h, CONFIG.vocab_size), make.loss
        frequencies = CONFIG.rope_theta ** (-torch.arange(0, d, 2) / d)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        angles = torch.arange(input_ids.shape[1])[:, None] * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def turn(t):
            a, b = t.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        for norm1, qkv, out, norm2, gate_up, down in self.layers:
            heads = first(qkv(norm1(x))).unflatten(-1, (-1, CONFIG.head_dim))
            q, k, v = heads.split([self.heads, self.kv, self.kv], -2)
            q, k, v = (t.transpose(1, 2) for t in (turn(q), turn(k), v))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + first(out(attended.transpose(1, 2).flatten(-2)))
            gate, up = first(gate_up(norm2(x))).chunk(2, -1)
            x = x + first(down(F.silu(gate) * up))
        return self.loss(first(self.head(self.norm(x))).flatten(0, 1), labels.flatten())


def first(output):
    return output[0] if isinstance(output, tuple) else output


def by_hand(library, context):
    """Return the library's layers and loss, used as in its documentation."""
    group, size = context.get_tensor_parallel_group(), context.get_tensor_parallel_world_size()
    normal = nn.init.normal_
    if library == "megatron":
        from megatron.core import tensor_parallel as tp
        from megatron.core.model_parallel_config import ModelParallelConfig

        from polyshard.adapters.megatron.compat import vocab_parallel_cross_entropy

        common = {
            "config": ModelParallelConfig(tensor_model_parallel_size=size, use_cpu_initialization=True),
            "init_method": normal,
            "tp_group": group,
        }
        row = {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
        return SimpleNamespace(
            column=lambda i, o: tp.ColumnParallelLinear(i, o, bias=False, gather_output=False, **common),
            row=lambda i, o: tp.RowParallelLinear(i, o, **row, **common),
            embedding=lambda v, h: tp.VocabParallelEmbedding(v, h, **common),
            loss=lambda logits, labels: vocab_parallel_cross_entropy(logits, labels, group).mean(),
        )
    if library == "fairscale":
        from fairscale.nn import model_parallel as mp

        return SimpleNamespace(
            column=lambda i, o: mp.ColumnParallelLinear(i, o, bias=False, gather_output=False, init_method=normal),
            row=lambda i, o: mp.RowParallelLinear(i, o, bias=False, input_is_parallel=True, init_method=normal),
            embedding=lambda v, h: mp.VocabParallelEmbedding(v, h, init_method=normal),
            loss=lambda logits, labels: mp.vocab_parallel_cross_entropy(logits, labels).mean(),
        )
    if library == "deepspeed":
        from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer, VocabParallelEmbedding
        from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy as ds_loss

        local = CONFIG.vocab_size // size
        start = context.get_tensor_parallel_rank() * local
        bounds = {"vocab_start_index": start, "vocab_end_index": start + local, "global_vocab_size": CONFIG.vocab_size}
        return SimpleNamespace(
            column=lambda i, o: LinearLayer(nn.Linear(i, o, bias=False), group),
            row=lambda i, o: LinearAllreduce(nn.Linear(i, o, bias=False), group),
            embedding=lambda v, h: VocabParallelEmbedding(nn.Embedding(v, h), group),
            loss=lambda logits, labels: ds_loss(logits, labels, tp_group=group, **bounds),
        )
    # torch by hand: plain layers, and at tensor-parallel 2 the collectives that the model needs
    from polyshard.layers.differentiable import copy_to_region, reduce_from_region

    axis = context.axis("tensor")

    class Column(nn.Linear):
        def forward(self, x):
            return super().forward(copy_to_region(x, axis))

    class Row(nn.Linear):
        def forward(self, x):
            return reduce_from_region(super().forward(x), axis)

    def loss(logits, labels):
        if size == 1:
            return F.cross_entropy(logits, labels)
        return ps.vocab_parallel_cross_entropy(logits, labels, context, vocab_size=CONFIG.vocab_size)

    embedding = nn.Embedding if size == 1 else lambda v, h: ps.vocab_embedding(v, h, context)
    return SimpleNamespace(
        column=lambda i, o: Column(i, o // size, bias=False),
        row=lambda i, o: Row(i // size, o, bias=False),
        embedding=embedding,
        loss=loss,
    )


def measure(library, size, rounds):
    """Return the median milliseconds of a step: with polyshard, and by hand."""
    import decoder

    context = ps.initialize(library, tensor=size, timeout=300)
    torch.manual_seed(0)
    models = {"polyshard": decoder.build_model(CONFIG, context), "hand": Hand(by_hand(library, context), size)}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH + 1))
    times = {name: [] for name in models}
    for turn in range(rounds + 2):  # two to warm up
        for name in models if turn % 2 else reversed(models):
            started = time.perf_counter()
            loss = models[name](ids[:, :-1], labels=ids[:, 1:])
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times[name].append((time.perf_counter() - started) * 1e3)
    ps.shutdown(context)
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 where the goal is missed.")] = False,
    tensor_parallel: str = "1,2",
    rounds: int = 15,
) -> None:
    """Print the ratios."""
    table = Table("layers", "tensor", "polyshard ms", "by hand ms", "ratio")
    rows = []
    cases = [
        (name, int(s)) for name in ("torch", "megatron", "deepspeed", "fairscale") for s in tensor_parallel.split(",")
    ]
    for library, size in track(cases, "measuring", transient=True):
        slowest = max(run_ranks(measure, size, library, size, rounds, timeout=600), key=lambda m: m["polyshard"])
        ratio = slowest["polyshard"] / slowest["hand"]
        counts = slowest["hand"] >= SMALLEST
        table.add_row(library, str(size), f"{slowest['polyshard']:.0f}", f"{slowest['hand']:.0f}", f"{ratio:.3f}")
        rows.append({"layers": library, "tensor_parallel": size, "ratio": ratio, "counts": counts, **slowest})
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"torch": torch.__version__, "goal": GOAL, "rows": rows}, indent=2))
    missed = [row for row in rows if row["counts"] and row["ratio"] > GOAL]
    for row in missed:
        print(f"missed: {row['layers']} at tensor-parallel {row['tensor_parallel']}: {row['ratio']:.3f}")
    if check and missed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
