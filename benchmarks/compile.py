"""A training step with compiled blocks, relative to the eager step.

    python benchmarks/compile.py [--tokens 512] [--layers 4] [--times 9] [--json FILE]

A step is `train_batch` and `step` of torch's engine in one process, for a decoder with SmolLM2's width. Both engines
alternate; the ratio is that of the medians. The first step of the compiled engine is reported apart.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import decoder

import polyshard as ps

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def seconds(engine: Any, batch: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    engine.train_batch([batch])
    engine.step()
    return time.perf_counter() - start


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 4,
    times: Annotated[int, typer.Option(help="Steps of each engine.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers here.")] = None,
) -> None:
    """Compare both engines."""
    context = ps.initialize("torch")
    config = ps.ModelConfig(
        model_type="llama",
        vocab_size=4096,
        num_hidden_layers=layers,
        max_position_embeddings=tokens,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        **SIZES,
    )
    engines = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        model = decoder.build_model(config, context)
        ps.initialize_weights(model, context, seed=0)
        engines[name] = ps.load_adapter("torch").engine(model, ps.AdamW(), context, compile=compiled)
    ids = torch.randint(0, 4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    first = {name: seconds(engine, batch) for name, engine in engines.items()}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(times):
        for name, engine in engines.items():
            steps[name].append(seconds(engine, batch))
    medians = {name: statistics.median(values) for name, values in steps.items()}
    found = {
        "first_compiled_s": first["compiled"],
        **{f"{name}_ms": 1000 * value for name, value in medians.items()},
        "ratio": medians["compiled"] / medians["eager"],
    }
    for name, value in found.items():
        print(f"{name:18s} {value:8.2f}")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
