"""A sync of SmolLM2's weights over the network, relative to one gloo stream of the same bytes on the same interface.

    python benchmarks/network.py [--interface eth0] [--rounds 5] [--json FILE] [--check]

Trainer and engine are in this process, and weights pass through gloo as between machines. Each round sends the bytes
through one plain gloo connection to another process, in messages of 16 MiB, and then syncs. `sync` is the whole call.
`transfer` is a sync without the packing of vLLM's CPU layers, which is no part of the network; both ends compute all
fingerprints. The best round counts. `--check` exits with status 1 if a transfer carries less than half of the stream.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import support.engines  # noqa: F401  # environment variables, before vLLM is imported
import torch
import typer
from decoder import build_model
from report import Report
from smollm2 import smollm2_directory

import polyshard as ps
from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm.engines.start import DEFAULTS, start_colocated
from polyshard.adapters.vllm.transfer.link import CHUNK_BYTES, Link, local_address, make_store, open_store

GOAL = 0.5  # of one gloo stream
COLUMNS = ("dtype", "megabytes", "stream_MB_s", "transfer_MB_s", "sync_MB_s", "ratio")


def sink(port: int, address: str, rounds: int, messages: int) -> None:
    """Receive what `stream` sends."""
    link = Link(open_store(address, port, 60), 1, 2, 600, address)
    link.connect()
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(3)]
    for _ in range(rounds):
        works = []
        for index in range(messages):
            if index >= len(buffers):
                works[index - len(buffers)].wait()
            works.append(link.receive(buffers[index % len(buffers)], 0, index))
        for work in works[-len(buffers) :]:
            work.wait()


def stream(link: Link, messages: int) -> float:
    """Send messages of 16 MiB, and return the seconds."""
    buffers = [torch.ones(CHUNK_BYTES, dtype=torch.uint8) for _ in range(3)]
    started = time.perf_counter()
    works = []
    for index in range(messages):
        if index >= len(buffers):
            works[index - len(buffers)].wait()
        works.append(link.send(buffers[index % len(buffers)], 1, index))
    for work in works[-len(buffers) :]:
        work.wait()
    return time.perf_counter() - started


def main(
    interface: Annotated[str | None, typer.Option(help="Network interface or address.")] = None,
    rounds: int = 5,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    check: Annotated[bool, typer.Option(help="Exit with status 1 if the goal is missed.")] = False,
) -> None:
    report = Report(COLUMNS)
    address = local_address(interface, "127.0.0.1")
    context = ps.initialize("torch")
    ps.register_model("Far", build_model)
    directory = smollm2_directory()
    model = build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    packing = compat.process_after_loading
    for dtype in ("float32", "bfloat16"):
        model.to(getattr(torch, dtype))
        options = {**DEFAULTS, "dtype": dtype, "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}
        options["weight_transfer_config"] = {"backend": "polyshard"}
        client = ps.LlmClient(start_colocated(str(directory), "Far", 1, options), dtype)
        with ps.WeightSync(model, context, client, interface=interface) as sync:
            nbytes = sync().nbytes  # connects
            messages = -(-nbytes // CHUNK_BYTES)
            store = make_store(60)
            arguments = (store.port, address, 2 * rounds + 1, messages)
            peer = multiprocessing.get_context("spawn").Process(target=sink, args=arguments, daemon=True)
            peer.start()
            link = Link(store, 0, 2, 600, address)
            link.connect()
            stream(link, messages)
            streams, syncs, transfers = [], [], []
            for times, action in ((syncs, packing), (transfers, lambda module: None)):
                compat.process_after_loading = action
                for _ in range(rounds):
                    streams.append(stream(link, messages))
                    times.append(sync().seconds)
            compat.process_after_loading = packing
            peer.join(60)
        plain = messages * CHUNK_BYTES / min(streams) / 1e6
        transfer = nbytes / min(transfers) / 1e6
        report.add(
            dtype=dtype,
            megabytes=nbytes / 1e6,
            stream_MB_s=plain,
            transfer_MB_s=transfer,
            sync_MB_s=nbytes / min(syncs) / 1e6,
            ratio=transfer / plain,
        )
        if transfer < GOAL * plain:
            report.missed.append(
                f"a sync in {dtype} carries {transfer / plain:.2f} of one gloo stream, less than {GOAL}"
            )
    report.show()
    report.save(json, torch.device("cpu"))
    raise typer.Exit(1 if check and report.missed else 0)


if __name__ == "__main__":
    typer.run(main)
