"""Soak test: random requests to the OpenAI server, including aborts, disconnects and invalid requests.

    python benchmarks/soak.py --requests 2000 --check

Every request must be answered or rejected properly, the memory of the server's processes must not grow, and the output
must equal that of an engine without a server. `--check` exits with status 1 if that fails. The model is SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from polyshard.launch.ranks import free_port

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

LENGTH, TIE, GROWTH = 256, 1e-3, 1.05
FACTORY = f"{EXAMPLES / 'decoder.py'}:build_model"
KINDS = {"whole": 50, "streamed": 20, "aborted": 12, "timed out": 6, "too long": 6, "malformed": 6}  # shares
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH), "--max-num-seqs", "16")


@dataclass
class Outcome:
    """The results: counts of outcomes, the output of each prompt, and memory in MB over time."""

    counts: Counter[str] = field(default_factory=Counter)
    generated: list[tuple[list[int], list[int]]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def smollm2_directory() -> str:
    """Return the model's directory, as printed by the example."""
    command = [sys.executable, str(EXAMPLES / "smollm2.py")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


@contextlib.contextmanager
def server(directory: str, log: Path) -> Any:
    """Run `polyshard serve` and yield it with its port; end it with all its processes."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("polyshard")), "serve", directory, "--factory", FACTORY, *OPTIONS]
    memory = ("--kv-cache-memory-bytes", str(256 << 20))
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *memory, "--port", str(port)], stdout=file, stderr=file, start_new_session=True
        )
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            time.sleep(0.5)
        yield process, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def resident(process: Any) -> float:
    """Return the proportional memory of a process and its children, in MB."""
    found = psutil.Process(process.pid)
    return sum(p.memory_full_info().pss for p in (found, *found.children(recursive=True))) / 2**20


async def ask(client: openai.AsyncOpenAI, model: str, draw: random.Random, outcome: Outcome) -> None:
    """One request of a random kind."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    prompt = [draw.randrange(100, 40000) for _ in range(draw.choice((1, 5, 17, 60, 150)))]
    tokens = draw.randint(1, 24)
    greedy = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": tokens}
    extra = {"return_token_ids": True, "ignore_eos": True}
    try:
        if kind == "whole":
            answer = await client.completions.create(**greedy, extra_body=extra)
            ids = answer.choices[0].model_extra["token_ids"]
        elif kind == "streamed":
            ids = []
            async for chunk in await client.completions.create(**greedy, stream=True, extra_body=extra):
                ids += chunk.choices[0].model_extra.get("token_ids") or []
        elif kind == "aborted":
            greedy["max_tokens"] = 100
            stream = await client.completions.create(**greedy, stream=True, extra_body=extra)
            async for _ in stream:
                if draw.random() < 0.3:
                    break
            await stream.close()
            outcome.counts["aborted by the client"] += 1
            return
        elif kind == "timed out":
            greedy["max_tokens"] = 100
            patient = client.with_options(timeout=draw.uniform(0.01, 0.3), max_retries=0)
            await patient.completions.create(**greedy, extra_body=extra)
            outcome.counts["answered before the client gave up"] += 1
            return
        else:
            greedy |= {"prompt": prompt + [100] * LENGTH} if kind == "too long" else {"temperature": -3}
            await client.completions.create(**greedy)
            outcome.wrong.append(f"a {kind} request was answered")
            return
        if len(ids) != tokens:
            outcome.wrong.append(f"{kind}: {len(ids)} tokens for {tokens}")
        outcome.generated.append((prompt, ids))
        outcome.counts[f"answered ({kind})"] += 1
    except openai.BadRequestError as error:
        if kind not in ("too long", "malformed"):
            outcome.wrong.append(f"{kind}: {error}")
        outcome.counts[f"refused ({kind})"] += 1
    except openai.APITimeoutError:
        if kind != "timed out":
            outcome.wrong.append(f"{kind}: no answer")
        outcome.counts["disconnected by the client"] += 1
    except openai.APIError as error:
        outcome.wrong.append(f"{kind}: {type(error).__name__}: {error}")


async def soak(process: Any, port: int, requests: int, seed: int, outcome: Outcome) -> None:
    """Send all requests, 32 at a time."""
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    model = (await client.models.list()).data[0].id
    draw, gate = random.Random(seed), asyncio.Semaphore(32)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("requests", total=requests)

        async def one(number: int) -> None:
            async with gate:
                await ask(client, model, random.Random(draw.random()), outcome)
                progress.advance(bar)
                if number % max(1, requests // 40) == 0:
                    outcome.memory.append(resident(process))

        await asyncio.gather(*(one(number) for number in range(requests)))
    await client.close()
    outcome.memory.append(resident(process))


def differing(directory: str, generated: list[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """Count outputs that differ from an engine without a server: at a tie of the two best tokens, and otherwise."""
    from vllm import LLM, SamplingParams

    import polyshard as ps

    ps.register_model("Soaked", FACTORY)
    with ps.engine_errors():
        llm = LLM(
            directory,
            hf_overrides={"architectures": ["Soaked"]},
            dtype="float32",
            enforce_eager=True,
            max_model_len=LENGTH,
            kv_cache_memory_bytes=256 << 20,
            disable_log_stats=True,
        )
    settings = [SamplingParams(temperature=0, max_tokens=len(i), ignore_eos=True, logprobs=2) for _, i in generated]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in generated], settings, use_tqdm=True)
    ties = others = 0
    for (_, ids), output in zip(generated, outputs, strict=True):
        found = output.outputs[0]
        first = next((i for i, (a, b) in enumerate(zip(ids, found.token_ids)) if a != b), None)
        if first is not None:
            best = sorted((value.logprob for value in found.logprobs[first].values()), reverse=True)
            tie = best[0] - best[1] < TIE
            ties, others = ties + tie, others + (not tie)
    return ties, others


def main() -> int:
    """Run the soak test, compare the outputs and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    directory, outcome, began = smollm2_directory(), Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, server(directory, Path(folder) / "log") as (process, port):
        asyncio.run(soak(process, port, given.requests, given.seed, outcome))
        alive = process.poll() is None
    seconds = time.monotonic() - began
    ties, others = differing(directory, outcome.generated)
    half = outcome.memory[len(outcome.memory) // 4]
    growth = outcome.memory[-1] / half
    table = Table("what", "value", title=f"{given.requests} requests in {seconds:.0f} s, server's start included")
    for name, count in sorted(outcome.counts.items()):
        table.add_row(name, str(count))
    table.add_row("wrong", str(len(outcome.wrong)))
    table.add_row("differ from the engine alone", f"{others} (and {ties} at a tie of the two best tokens)")
    table.add_row("memory after a quarter, at the end", f"{half:.0f} MB, {outcome.memory[-1]:.0f} MB ({growth:.3f})")
    table.add_row("the server lived to the end", str(alive))
    Console().print(table)
    for line in outcome.wrong[:10]:
        print(line)
    whole = sum(outcome.counts.values()) + len(outcome.wrong) == given.requests or bool(outcome.wrong)
    passed = alive and whole and not outcome.wrong and not others and growth < GROWTH
    if given.json:
        result = {"counts": outcome.counts, "wrong": outcome.wrong, "ties": ties, "differ": others}
        given.json.write_text(json.dumps({**result, "memory_mb": outcome.memory, "seconds": seconds, "passed": passed}))
    return int(given.check and not passed)


if __name__ == "__main__":
    sys.exit(main())
