"""Throughput of a registered model in vLLM, relative to vLLM's own implementation of the same architecture.

    python benchmarks/serving.py [MODEL] [--dtype bfloat16] [--tensor-parallel 1] [--compiled] [--json FILE] [--check]

MODEL is a Hugging Face directory of a Llama-class model (default: SmolLM2-135M, which `examples/smollm2.py` writes), or
`qwen3` for a Qwen3 with half a billion random weights, `qwen3-moe` for a mixture of experts with a third of a billion
(`examples/moe.py`), or `llama-8b` for the shape of Llama 3.1 8B. On a GPU use more concurrent requests (`--times 8`);
the weights of all engines must fit into its memory. Each engine runs in its own process, and all stay alive. They run
the loads alternately, and each ratio is that of the medians. `--check` exits with status 1 if a goal is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MARK = "benchmark:"


@dataclass(frozen=True)
class Load:
    """A set of requests that are submitted together.

    Attributes:
        name: the name in the table.
        requests: (prompt tokens, tokens to generate) of each request.
    """

    name: str
    requests: tuple[tuple[int, int], ...]


LOADS = (
    Load("prefill: 8 x 384 in, 2 out", ((384, 2),) * 8),
    Load("decode: 16 x 16 in, 48 out", ((16, 48),) * 16),
    Load("mixed: 12 x 16..256 in, 8..32 out", tuple((16 + 240 * i // 11, 32 - 24 * i // 11) for i in range(12))),
    Load("long: 1 x 3072 in, 32 out", ((3072, 32),)),
    Load("first token: 1 x 128 in, 1 out", ((128, 1),)),
)
GOALS = {("bfloat16", False): 1.15, ("float32", False): 1.05, ("bfloat16", True): 1.10, ("float32", True): 1.10}
ADOPTED_GOAL, TRANSFORMERS_GOAL = 0.95, 1.05
EXPERTS_GOAL = 1.0  # both compute the experts with vLLM's fused kernel


# Models with random weights: (model type, architecture, sizes).
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3": (
        "qwen3",
        "Qwen3ForCausalLM",
        {
            "vocab_size": 32768,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            "vocab_size": 32768,
            "hidden_size": 576,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 384,
            "norm_topk_prob": True,
        },
    ),
    "llama-8b": (
        "llama",
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
}


@dataclass(frozen=True)
class Engine:
    """One side of the comparison; `adapter` None is vLLM without polyshard."""

    name: str
    adapter: str | None = None
    factory: str = "decoder:build_model"
    options: tuple[tuple[str, Any], ...] = ()
    exact: bool = False


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("native"),
        Engine("transformers", options=(("model_impl", "transformers"),)),
        Engine("polyshard", "vllm"),
        Engine("transformers' code", "vllm", "polyshard:transformers_model"),
        Engine("exact", "vllm", exact=True),
        Engine("adopted torch", "torch"),
        Engine("adopted megatron", "megatron"),
        Engine("adopted deepspeed", "deepspeed"),
        Engine("adopted fairscale", "fairscale"),
    )
}


def main(
    model: Annotated[str, typer.Argument(help="Directory, qwen3, qwen3-moe or llama-8b.")] = "",
    dtype: str = "bfloat16",
    tensor_parallel: int = 1,
    compiled: Annotated[bool, typer.Option(help="With torch.compile, as vLLM does it.")] = False,
    engines: Annotated[str, typer.Option(help="Comma-separated.")] = "native,transformers,polyshard,adopted torch",
    rounds: Annotated[int, typer.Option(help="After one to warm up, with each set of processes.")] = 3,
    restarts: Annotated[int, typer.Option(help="Sets of processes: memory lies better in some than in others.")] = 3,
    threads: Annotated[int, typer.Option(help="OpenMP threads of each rank.")] = 1,
    times: Annotated[int, typer.Option(help="How often each load's requests are asked for at once.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    check: Annotated[bool, typer.Option(help="Exit status 1 where a goal is missed.")] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the comparison."""
    options = Options(dtype, tensor_parallel, compiled, threads, times)
    if worker is not None:
        serve(ENGINES[worker], model, options)
        return
    names = engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown or "native" not in names:
        raise typer.BadParameter(f"engines are {', '.join(ENGINES)}, native among them; got {engines}")
    seconds, started = measure(names, model, options, rounds, restarts)
    goal = EXPERTS_GOAL if model == "qwen3-moe" else GOALS[dtype, compiled]
    report(names, seconds, started, dtype, compiled, goal, json_file, check)


@dataclass(frozen=True)
class Options:
    """The settings that all engines of a comparison share; see `main`."""

    dtype: str
    tensor: int = 1
    compiled: bool = False
    threads: int = 1
    times: int = 1


def measure(
    names: list[str], model: str, options: Options, rounds: int, restarts: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[float]]]:
    """Return the seconds of each engine for each load, run alternately, and of each start."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as open_engines:
        directory = prepare(model, Path(scratch))
        times: dict[str, dict[str, list[float]]] = {name: {load.name: [] for load in LOADS} for name in names}
        started: dict[str, list[float]] = {name: [] for name in names}
        for again in range(restarts):
            running = {}
            order = names[again % len(names) :] + names[: again % len(names)]
            for name in track(order, f"starting engines, {again + 1} of {restarts}"):
                running[name] = Running(name, directory, options)
                open_engines.callback(running[name].close)
                started[name].append(running[name].seconds)
            for index in track(range(rounds + 1), "rounds"):
                for place in range(len(LOADS)):
                    for name in names[index % len(names) :] + names[: index % len(names)]:
                        seconds = running[name].run(place)
                        if index:  # the first round warms up
                            times[name][LOADS[place].name].append(seconds)
            open_engines.close()
    return times, started


def prepare(model: str, scratch: Path) -> Path:
    """Return a directory with the model's weights."""
    if model in SHAPES:
        from transformers import AutoConfig

        kind, architecture, shape = SHAPES[model]
        config = AutoConfig.for_model(kind, max_position_embeddings=4096, architectures=[architecture], **shape)
        config.save_pretrained(scratch)
        return scratch
    if model:
        return Path(model)
    sys.path.insert(0, str(EXAMPLES))
    printed = subprocess.run(
        [sys.executable, str(EXAMPLES / "smollm2.py")], check=True, capture_output=True, text=True
    ).stdout
    return Path(printed.strip().splitlines()[-1])


def environment_of(asked: Options) -> dict[str, str]:
    """Return the environment of an engine's process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(asked.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if asked.tensor == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not asked.compiled:
        environment["TORCH_COMPILE_DISABLE"] = "1"
    return environment


class Running:
    """A process with one engine."""

    def __init__(self, name: str, directory: Path, asked: Options) -> None:
        options = ["--dtype", asked.dtype, "--tensor-parallel", str(asked.tensor), "--times", str(asked.times)]
        options += ["--compiled"] if asked.compiled else []
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(directory), *options, "--worker", name],
            env=environment_of(asked),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.seconds = self._answer()

    def run(self, place: int) -> float:
        """Return the seconds that a load takes."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{place}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return float(line.removeprefix(MARK))
        self.errors.seek(0)
        raise SystemExit(f"engine {self.name!r} ended:\n{self.errors.read()[-3000:]}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(engine: Engine, directory: str, asked: Options) -> Any:
    """Return a function that starts the engine in this process, after all imports."""
    sys.path.insert(0, str(EXAMPLES))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    options: dict[str, Any] = dict(engine.options)
    if engine.adapter is not None:
        import polyshard as ps

        mixture = ps.read_config(directory).model_type == "qwen3_moe"
        factory = engine.factory.replace("decoder:", "moe:") if mixture else engine.factory
        ps.register_model("PolyshardDecoder", factory, adapter=engine.adapter, exact=engine.exact)
        options["hf_overrides"] = {"architectures": ["PolyshardDecoder"]}
    from vllm import LLM

    if not list(Path(directory).glob("*.safetensors")):
        options["load_format"] = "dummy"
    on_gpu = torch.cuda.is_available()
    if on_gpu:  # the fraction of memory that must be free at the start; vLLM's default would not leave room
        options["gpu_memory_utilization"] = 0.25
    return partial(
        LLM,
        directory,
        dtype=asked.dtype,
        tensor_parallel_size=asked.tensor,
        max_model_len=4096,
        max_num_batched_tokens=2048,
        enforce_eager=not asked.compiled,
        kv_cache_memory_bytes=(4096 if on_gpu else 512) << 20,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )


def serve(engine: Engine, directory: str, asked: Options) -> None:
    """Print the seconds of the start, then those of each load that is named on stdin."""
    from vllm import SamplingParams

    starting = start(engine, directory, asked)
    before = time.perf_counter()
    llm = starting()
    print(f"{MARK}{time.perf_counter() - before}", flush=True)
    for line in sys.stdin:
        requests = LOADS[int(line)].requests * asked.times
        prompts = [
            {"prompt_token_ids": [(7 * i + j) % 5000 + 10 for j in range(n)]} for i, (n, _) in enumerate(requests)
        ]
        parameters = [
            SamplingParams(temperature=0, max_tokens=out, ignore_eos=True, detokenize=False) for _, out in requests
        ]
        before = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        print(f"{MARK}{time.perf_counter() - before}", flush=True)


def report(
    names: list[str],
    times: dict[str, dict[str, list[float]]],
    started: dict[str, list[float]],
    dtype: str,
    compiled: bool,
    polyshard_goal: float,
    json_file: Path | None,
    check: bool,
) -> None:
    """Print the table; with `check`, exit with status 1 if a goal is missed."""
    table = Table(title=f"speed over vLLM's native model ({dtype}, {'compiled' if compiled else 'eager'}); medians")
    table.add_column("load")
    for name in names:
        table.add_column(name, justify="right")
    missed = []
    ratios: dict[str, dict[str, float]] = {name: {} for name in names}
    for load in LOADS:
        medians = {name: statistics.median(times[name][load.name]) for name in names}
        cells = []
        for name in names:
            ratio = ratios[name][load.name] = medians["native"] / medians[name]
            cells.append(f"{1000 * medians[name]:.0f} ms" if name == "native" else f"{ratio:.2f}")
        table.add_row(load.name, *cells)
        first_token = load.name.startswith("first")
        for name in names:
            if name == "polyshard":
                goal = 1.0 if first_token else polyshard_goal
                over = medians.get("transformers", 0.0) / medians[name]
                if "transformers" in names and not first_token and over < TRANSFORMERS_GOAL:
                    missed.append(f"{load.name}: {over:.2f} of the Transformers backend, goal {TRANSFORMERS_GOAL}")
            elif name.startswith("adopted"):
                goal = ADOPTED_GOAL
            else:
                continue
            if ratios[name][load.name] < goal:
                missed.append(f"{load.name}: {name} {ratios[name][load.name]:.2f}, goal {goal}")
    table.add_row("engine start", *(f"{statistics.median(started[name]):.1f} s" for name in names))
    Console(width=120).print(table)
    for line in missed:
        print("missed:", line)
    if json_file is not None:
        figures = {"dtype": dtype, "compiled": compiled, "ratios": ratios, "seconds": times, "start": started}
        json_file.write_text(json.dumps(figures, indent=2))
    if check and missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
