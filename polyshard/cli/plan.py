"""`polyshard plan`: the layouts of a model on a cluster."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from polyshard.cli.plan_table import show
from polyshard.core.errors import ConfigurationError
from polyshard.core.parallel_layout import ParallelLayout
from polyshard.planning import Cluster
from polyshard.planning import plan as run
from polyshard.planning.cluster import parse_bytes, parse_links, parse_tokens, read_calibration
from polyshard.planning.strategy import PRECISIONS, SHARDINGS
from polyshard.registry import resolve

MODES = ("none", "selective", "full")


def plan(
    config: Annotated[Path, typer.Argument(help="A config.json, or a Hugging Face model directory.")],
    gpus: Annotated[int, typer.Option(help="Number of GPUs that train.")],
    memory: Annotated[str, typer.Option(help="Memory of one GPU, such as 80GiB.")],
    tokens_per_step: Annotated[str, typer.Option(help="Tokens of a step over all GPUs; 4M is 4 x 1024 x 1024.")],
    sequence_length: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "4096",
    factory: Annotated[
        str | None, typer.Option(help="The model's factory: module:attribute or file.py:attribute.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="GB/s of one GPU: nvlink in both directions together, net in one direction.")
    ] = "nvlink=900,net=50",
    gpus_per_node: Annotated[int, typer.Option(help="GPUs that NVLink connects; the largest tensor size.")] = 8,
    peak_flops: Annotated[float, typer.Option(help="TFLOP/s of dense 16-bit matrix products.")] = 989.0,
    efficiency: Annotated[float, typer.Option(help="Fraction of the peak that a rank reaches while it computes.")] = (
        Cluster.__dataclass_fields__["efficiency"].default
    ),
    calibration: Annotated[
        Path | None,
        typer.Option(help="JSON file with measured rates, as of benchmarks/plan.py; they replace the options above."),
    ] = None,
    reserve: Annotated[str, typer.Option(help="Memory that tensors cannot use: context, buffers, fragmentation.")] = (
        "4GiB"
    ),
    adapters: Annotated[str | None, typer.Option(help="Adapters, comma-separated; all that train by default.")] = None,
    layout: Annotated[
        str | None, typer.Option(help="One layout only: tensor=8,pipeline=16,data=64,sequence_parallel=1.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Sequences of a micro-batch, comma-separated.")] = "1",
    sharding: Annotated[str, typer.Option(help="What replicas share, comma-separated.")] = ",".join(SHARDINGS),
    precision: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PRECISIONS)}.")] = "masters,casts",
    recompute: Annotated[str, typer.Option(help="Modes of recomputation, comma-separated.")] = ",".join(MODES),
    stages_per_rank: Annotated[
        str, typer.Option(help="Pipeline stages on each rank, comma-separated; several are interleaved.")
    ] = "1,2",
    serve: Annotated[int, typer.Option(help="GPUs that serve the model; 0 for none.")] = 0,
    unsupported: Annotated[bool, typer.Option(help="Also layouts that no adapter can run yet.")] = False,
    top: Annotated[int, typer.Option(help="Number of layouts in the table; 0 for all.")] = 12,
    picture: Annotated[Path | None, typer.Option(help="Write a picture of memory and time: .svg or .png.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan here; - prints it.")] = None,
) -> None:
    """Plan a training run: layouts that fit, memory by kind, bytes by axis, and predicted time, the fastest first.

    The model is built on the meta device at each planned size. Exit status 1 if no layout fits.
    """
    from rich.console import Console

    if top < 0:
        raise ConfigurationError(f"--top is invalid: got {top}, expected a number of layouts, or 0 for all.")
    for file in (picture, json_file):
        if file is not None and not file.parent.is_dir():
            raise ConfigurationError(f"{file} cannot be written: there is no directory {file.parent}.")
    cluster = Cluster(
        gpus=gpus,
        memory=parse_bytes(memory),
        gpus_per_node=gpus_per_node,
        peak_flops=peak_flops * 1e12,
        efficiency=efficiency,
        reserve=parse_bytes(reserve),
        **parse_links(link),
    )
    if calibration is not None:
        rates: dict[str, Any] = dict(read_calibration(calibration))
        cluster = replace(cluster, **rates)
    with Console(stderr=True).status("planning") as status:
        found = run(
            read_fields(config),
            cluster=cluster,
            tokens_per_step=parse_tokens(tokens_per_step),
            sequence_length=parse_tokens(sequence_length),
            factory=None if factory is None else resolve(factory),
            adapters=None if adapters is None else adapters.split(","),
            unsupported=unsupported,
            layout=None if layout is None else _layout(layout),
            rows=_numbers("rows", rows),
            shardings=_chosen("sharding", sharding, SHARDINGS),
            precisions=[PRECISIONS[name] for name in _chosen("precision", precision, tuple(PRECISIONS))],
            recompute=_chosen("recompute", recompute, MODES),
            stages_per_rank=_numbers("stages-per-rank", stages_per_rank),
            serve=serve,
            progress=lambda text: status.update(f"planning {text}"),
        )
    if str(json_file) == "-":
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, top or len(found.layouts))
        if json_file is not None:
            json_file.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    if picture is not None:
        from polyshard.cli.plan_picture import draw

        draw(found, picture, top or len(found.layouts))
    if not found.layouts:
        sys.exit(1)


def read_fields(path: Path) -> Any:
    """Return the configuration in a directory, or in a file of any name."""
    from polyshard.checkpoint import ModelConfig, read_config

    if path.is_dir() or path.name == "config.json":
        return read_config(path if path.is_dir() else path.parent)
    try:
        return ModelConfig(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} cannot be read as a config.json: {error}") from None


def _chosen(option: str, text: str, known: tuple[Any, ...]) -> list[Any]:
    names = text.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigurationError(f"--{option} is invalid: got {', '.join(unknown)}, expected {', '.join(known)}.")
    return names


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(count) for count in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--{option} is invalid: got {text!r}, expected numbers such as 1,2.") from None


def _layout(text: str) -> ParallelLayout:
    try:
        sizes: dict[str, Any] = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
        sequence = bool(sizes.pop("sequence_parallel", 0))
        return ParallelLayout(**sizes, sequence_parallel=sequence)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"--layout is invalid: got {text!r}, expected axis=size,... ({error}).") from None
