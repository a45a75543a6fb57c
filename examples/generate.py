"""Generate with a trained checkpoint in an unpatched vLLM, with the same `build_model` that was used for training.

python examples/generate.py CHECKPOINT "What is a decorator?" "What is a generator?"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from decoder import build_model

import polyshard as ps

NAME = "PolyshardDecoder"


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face directory.")],
    questions: Annotated[list[str], typer.Argument(help="Asked one by one, as a chat.")],
    adapter: Annotated[str, typer.Option(help="Whose layers serve: vllm, or torch.")] = "vllm",
    tensor_parallel: int = 1,
    max_tokens: int = 64,
    kv_cache_gib: Annotated[float, typer.Option(help="Memory of the KV cache.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Answer each question."""
    ps.register_model(NAME, build_model, adapter=adapter)

    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": dtype}
    llm = LLM(
        model=str(checkpoint),
        hf_overrides={"architectures": [NAME]},
        tensor_parallel_size=tensor_parallel,
        **options,
        max_model_len=1024,
        enforce_eager=True,
        kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
    )
    chats: list[Any] = [[{"role": "user", "content": question}] for question in questions]
    for question, output in zip(questions, llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=max_tokens))):
        print(f"\n> {question}\n{output.outputs[0].text.strip()}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
