"""Router replay: how far a trainer is from the server that sampled, with and without the server's experts.

    python benchmarks/replay.py [--json FILE] [--figure FILE] [--check]

A vLLM engine in bfloat16 samples from a Qwen3-MoE model with random weights; a trainer in one process computes the
log-probabilities of the sampled tokens, in bfloat16 and with float32 parameters. `flips` is the share of tokens and
layers whose set of experts differs from the server's, and `KL` the estimate `exp(d) - 1 - d` of the divergence of the
trainer from the sampler. `--check` exits with status 1 if replay does not lower the KL.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from report import Report

import polyshard as ps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # before benchmarks/moe.py
import moe

NAME = "Replayed"
CONFIG = ps.ModelConfig(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    vocab_size=1024,
    hidden_size=256,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=128,
    norm_topk_prob=True,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
)
SAMPLING = {"max_tokens": 96, "samples": 4}


def main(
    prompts: int = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    lines: Annotated[Path | None, typer.Option(help="Append each row here as soon as it is measured.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 if replay does not lower the KL.")] = False,
) -> None:
    """Sample, and compare trainers."""
    report = Report(("trainer", "experts", "KL", "mean difference", "largest", "flips", "flips by layer"), lines)
    context = ps.initialize("torch")
    ps.register_model(NAME, moe.build_model)
    with tempfile.TemporaryDirectory() as folder:
        model = moe.build_model(CONFIG, context)
        ps.initialize_weights(model, context, seed=0, initializer=ps.normal_initializer(0.06))
        ps.save_checkpoint(model, folder, context, config=CONFIG)
        given = torch.randint(CONFIG.vocab_size, (prompts, 32), generator=torch.Generator().manual_seed(0)).tolist()
        options = {"dtype": "bfloat16", "max_model_len": 256, "kv_cache_memory_bytes": 256 << 20}
        with ps.RolloutEngine(folder, NAME, model, context, return_routing=True, **options) as engine:
            groups = engine.generate(given, **SAMPLING)
    rollouts = [rollout for group in groups for rollout in group]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = model.to(dtype)
        found = {}
        for experts, replays in (("its own", False), ("the server's", True)):
            figures = _compared(model, rollouts, replays)
            found[experts] = figures["KL"]
            report.add(trainer=name, experts=experts, **figures)
        if found["its own"] <= found["the server's"]:
            report.missed.append(f"{name}: replay does not lower the KL, {found}")
    report.show()
    report.save(json_file, context.device)
    if figure is not None:
        draw(report.rows, figure)
    if check and report.missed:
        sys.exit(1)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the KL of each trainer, and the share of flipped experts by layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    names = list(dict.fromkeys(row["trainer"] for row in rows))
    for number, experts in enumerate(dict.fromkeys(row["experts"] for row in rows)):
        values = [row["KL"] for row in rows if row["experts"] == experts]
        left.bar([i + 0.4 * number - 0.2 for i in range(len(names))], values, 0.36, label=f"{experts} experts")
    left.set(yscale="log", xticks=range(len(names)), xticklabels=names, xlabel="trainer", ylabel="KL to the sampler")
    left.legend(frameon=False)
    for row in rows:
        if row["experts"] == "its own":
            shares = [float(share.rstrip("%")) for share in row["flips by layer"].split()]
            right.plot(range(len(shares)), shares, marker="o", label=row["trainer"])
    right.set(xlabel="layer", ylabel="tokens with other experts, %", ylim=(0, None))
    right.legend(frameon=False)
    drawing.savefig(file, metadata={"Date": None})


@torch.no_grad()
def _compared(model: Any, rollouts: list[ps.Rollout], replays: bool) -> dict[str, Any]:
    sequences = [rollout.prompt + rollout.tokens for rollout in rollouts]
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).to(torch.int32)
    served = ps.packed_routing(rollouts)
    with ps.replay_routing(model, served) if replays else nullcontext(), ps.record_routing(model) as recorded:
        everything = model(ids, cu_seqlens=bounds, targets=ids.roll(-1))
    (taken,) = recorded
    ends = zip(bounds[1:].tolist(), rollouts)
    sampled = torch.cat([torch.arange(end - len(rollout.tokens), end) for end, rollout in ends])
    told = torch.tensor([value for rollout in rollouts for value in rollout.logprobs])
    difference = (everything[sampled - 1] - told).double()
    seen = next(iter(served.values()))[:, 0] >= 0
    flips = [
        float((taken[name][seen].sort(-1).values != experts[seen].sort(-1).values).any(-1).double().mean())
        for name, experts in served.items()
    ]
    return {
        "KL": float((torch.expm1(difference) - difference).mean()),
        "mean difference": float(difference.abs().mean()),
        "largest": float(difference.abs().max()),
        "flips": sum(flips) / len(flips),
        "flips by layer": " ".join(f"{share:.2%}" for share in flips),
    }


if __name__ == "__main__":
    typer.run(main)
