"""`polyshard convert`: convert a checkpoint from one format to another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from polyshard.checkpoint.location import as_path, is_remote
from polyshard.convert import convert as run
from polyshard.convert.format import Options, config_fields_of
from polyshard.convert.formats import detect
from polyshard.core.errors import ConfigurationError


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint: a file, a directory, or a URL of fsspec.")],
    target: Annotated[str, typer.Argument(help="A new directory, or for huggingface a URL of fsspec.")],
    from_format: Annotated[str | None, typer.Option("--from", help="Format of SOURCE; detected by default.")] = None,
    to_format: Annotated[str, typer.Option("--to", help="huggingface, megatron-torch-dist, or llama.")] = "huggingface",
    tensor_parallel: Annotated[int, typer.Option(help="Ranks to write for (llama), or to pad for (Megatron).")] = 1,
    pad_vocabulary: Annotated[
        int, typer.Option(help="Multiple to which Megatron's vocabulary is padded; the padding is removed on reading.")
    ] = 1,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; unchanged by default. A value out of range is an error."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="config.json of the model, for formats without one. It must not contradict the source."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option(help="Read pickle files: only tensors and plain data; other types are not imported.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Read the target back, and compare every tensor, and logits with independent readers.")
    ] = False,
) -> None:
    """Convert SOURCE, of any format that polyshard reads, to TARGET."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    if tensor_parallel < 1 or pad_vocabulary < 1:
        raise ConfigurationError(
            f"--tensor-parallel and --pad-vocabulary must be 1 or more: got {tensor_parallel} and {pad_vocabulary}"
        )
    console = Console(stderr=True)
    path = as_path(source)
    if from_format is None and not is_remote(path):
        console.print(f"found {detect(path)[1]}", markup=False, highlight=False, soft_wrap=True)
    options = Options(
        config=None if config is None else config_fields_of(config),
        allow_pickle=allow_pickle,
        tensor_parallel=tensor_parallel,
        padded_vocabulary=pad_vocabulary,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("writing", total=None)
        result = run(
            source,
            target,
            from_format=from_format,
            to_format=to_format,
            options=options,
            dtype=_dtype(dtype),
            verify=verify,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if from_format is None and is_remote(path):
        console.print(f"found {result.found}", markup=False, highlight=False, soft_wrap=True)
    for note in result.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    proof = ""
    if result.verified is not None:
        proof = f"; verified: {result.verified} fingerprints equal"
        if result.logits is not None:
            proof += ", logits equal" if result.logits == 0 else f", logits equal within {result.logits:.1e}"
        for line in result.compared:
            console.print(f"compared {line}", markup=False, highlight=False, soft_wrap=True)
        for line in result.not_compared:
            console.print(f"not compared: {line}", markup=False, highlight=False, soft_wrap=True)
    print(f"{result.source} -> {result.target}: {result.tensors} tensors, {result.nbytes / 1e6:.1f} MB{proof}")


def _dtype(name: str | None) -> torch.dtype | None:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return None
    if name not in known:
        raise ConfigurationError(f"--dtype is invalid: got {name!r}, expected one of {', '.join(known)}")
    return known[name]
