"""`polyshard verify`: check parity on the user's own machine and model."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from polyshard.checkpoint import read_config
from polyshard.cli.download import local_copy
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.errors import ConfigurationError, LayoutError, PolyshardError


def verify(
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face directory or its URL; by default a small model with a float64 reference."),
    ] = None,
    factory: Annotated[
        str | None, typer.Option(help="The model's factory: module:attribute or file.py:attribute.")
    ] = None,
    adapters: Annotated[str, typer.Option(help="Names separated by commas; by default all that can train here.")] = "",
    tensor_parallel: Annotated[str, typer.Option(help="Sizes, separated by commas.")] = "1,2",
    pipeline_parallel: Annotated[
        str, typer.Option(help="Numbers of pipeline stages of trainers, separated by commas.")
    ] = "1",
    vllm: Annotated[
        bool, typer.Option(help="Also compare log-probabilities with vLLM on each adapter's layers.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Length of the random sequence.")] = 24,
    tolerance: Annotated[float, typer.Option(help="Largest difference that counts as rounding in float32.")] = 1e-4,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    exact: Annotated[
        bool, typer.Option(help="Compare each trainer's log-probabilities with vLLM's, bit for bit, in exact mode.")
    ] = False,
    server_tensor_parallel: Annotated[int, typer.Option(help="vLLM's tensor-parallel size (with --exact).")] = 1,
    dtype: Annotated[str, typer.Option(help="vLLM's dtype (with --exact): float32, bfloat16, float16.")] = "bfloat16",
    certificate: Annotated[
        Path | None, typer.Option(help="Write the certificate here, as JSON (with --exact).")
    ] = None,
    download: Annotated[
        Path | None,
        typer.Option(
            help="Directory that a model is downloaded to if --model is a URL. It is kept, and reused if it holds the "
            "same checkpoint. By default a temporary directory."
        ),
    ] = None,
) -> None:
    """Compare loss, logits and gradients with transformers on each adapter and size; exit status 1 if they differ.

    Without --model, a small model is compared with its float64 reference, and served for --vllm and --exact.
    """
    names = [n.strip() for n in adapters.split(",") if n.strip()] or trainable()
    sizes = parse_sizes(tensor_parallel)
    stages = parse_sizes(pipeline_parallel, "--pipeline-parallel")
    if tokens < (least := 1 if exact else 2):  # the last token of a sequence has no label
        raise ConfigurationError(f"--tokens is invalid: got {tokens}, expected {least} or more")
    if (model is None) != (factory is None):
        raise ConfigurationError("--model and --factory must be passed together")
    if model is None and download is not None:
        raise ConfigurationError("--download needs --model with a URL")
    with tempfile.TemporaryDirectory(prefix="polyshard-verify-") as work:
        oracle: Callable[[list[int]], dict[str, Any]] | None = None
        staged = max(stages) > 1
        directory = None if model is None else local_copy(model, download, Path(work) / "model")
        if (vllm or exact or staged) and directory is None:  # it is loaded from a checkpoint, so save the small model
            from polyshard.proof import small_model

            directory, factory, oracle = (
                small_model.save_small_model(Path(work) / "small"),
                small_model.FACTORY,
                small_model.oracle,
            )
        named = model or (None if directory is None else str(directory))
        if exact:
            from polyshard.cli.verify_exact import certify

            assert directory is not None
            assert factory is not None
            assert named is not None
            certify(
                directory,
                named,
                factory,
                names,
                sizes,
                stages,
                server_tensor_parallel,
                dtype,
                tokens,
                certificate,
                as_json,
            )
            return
        _verify(directory, named, factory, names, sizes, stages, vllm, tokens, tolerance, as_json, oracle)


def _verify(
    model: Path | None,
    named: str | None,
    factory: str | None,
    names: list[str],
    sizes: list[int],
    stages: list[int],
    vllm: bool,
    tokens: int,
    tolerance: float,
    as_json: bool,
    oracle: Callable[[list[int]], dict[str, Any]] | None,
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    ids: list[int] = []
    if model is not None:
        vocab_size = read_config(model).vocab_size
        ids = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    cases: list[tuple[str, str, int, int]] = [
        ("train", name, size, count) for name in names for size in sizes for count in stages_of(name, stages)
    ]
    if vllm:
        cases += [("serve", name, size, 1) for name in ["vllm", *names] for size in sizes]
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reference", total=len(cases) + 1)
        reference = _reference(model, ids) if oracle is None else oracle(ids)
        progress.advance(task)
        for what, name, size, count in cases:
            progress.update(task, description=f"{what}: {name}, tensor-parallel {size}, pipeline-parallel {count}")
            rows.append(judge(what, name, size, count, model, factory, ids, reference, tolerance))
            progress.advance(task)
    if as_json:
        print(
            json.dumps(
                {
                    "model": named,
                    "tokens": tokens,
                    "tolerance": tolerance,
                    "rows": rows,
                },
                indent=2,
            )
        )
    else:
        show(rows, tolerance)
    if not all(row["ok"] for row in rows):
        sys.exit(1)


def trainable() -> list[str]:
    """Return the adapters that can train on this machine."""
    names = []
    for name in adapter_names():
        adapter: Any = load_adapter(name)
        if adapter.capabilities["training"].available and adapter.requirement.version() is not None:
            names.append(name)
    return names


def stages_of(name: str, stages: list[int]) -> list[int]:
    """Return the numbers of stages that an adapter can train; a note on stderr tells why others are left out."""
    answer = load_adapter(name).capabilities["pipeline"]
    if not answer.available and max(stages) > 1:
        print(f"{name} is left out at pipeline-parallel {max(stages)}: {answer.reason}", file=sys.stderr)
    return [count for count in stages if count == 1 or answer.available]


def parse_sizes(text: str, option: str = "--tensor-parallel") -> list[int]:
    """Parse `"1,2,4"`, the value of `option`, to numbers.

    Raises:
        LayoutError: the text is anything else.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise LayoutError(f"{option} is invalid: got {text!r}, expected numbers separated by commas") from None
    if any(size < 1 for size in sizes):
        raise LayoutError(f"{option} is invalid: got {text!r}, expected sizes of 1 or more")
    return sizes


def judge(
    what: str,
    name: str,
    size: int,
    stages: int,
    model: Path | None,
    factory: str | None,
    ids: list[int],
    reference: dict[str, Any],
    tolerance: float,
) -> dict[str, Any]:
    """Return one row of the result: the differences, or the error."""
    from polyshard.launch.ranks import RankError, run_ranks
    from polyshard.proof.parity import compare, run_built_in, run_model
    from polyshard.proof.pipelined import merged, run_stages

    row: dict[str, Any] = {"what": what, "adapter": name, "tensor_parallel": size, "pipeline_parallel": stages}
    try:
        if model is None or factory is None:
            difference = compare(run_built_in(name, size), reference)
            return {**row, **asdict(difference), "ok": difference.within(tolerance)}
        if what == "serve":
            from polyshard.adapters.vllm.engines.score import scores

            logprobs = reference["logits"][:-1].log_softmax(-1)
            want = logprobs.gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
            gap = float((torch.tensor(scores(str(model), factory, name, size, ids)) - want).abs().max())
            return {**row, "logprobs": gap, "ok": gap <= tolerance}
        if stages > 1:
            found = merged(
                run_ranks(run_stages, size * stages, name, size, stages, str(model), factory, ids, timeout=600)
            )
        else:
            found = run_ranks(run_model, size, name, size, str(model), factory, ids, timeout=600)[0]
        difference = compare(found, reference)
        return {**row, **asdict(difference), "ok": difference.within(tolerance)}
    except (RankError, PolyshardError) as error:
        return {**row, "error": str(error).strip().splitlines()[-1], "ok": False}


def show(rows: list[dict[str, Any]], tolerance: float) -> None:
    """Print the rows as a table, in green or red."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "layers", "tensor", "stages", "loss", "logits", "gradients", "log-probabilities", "")
    for row in rows:
        numbers = [f"{row[key]:.1e}" if key in row else "" for key in ("loss", "logits", "gradients", "logprobs")]
        verdict = (
            "[green]equal[/green]" if row["ok"] else f"[red]{row.get('error') or row.get('worst', 'differs')}[/red]"
        )
        what = "train" if row["what"] == "train" else "vLLM"
        sizes = (str(row["tensor_parallel"]), str(row["pipeline_parallel"]))
        table.add_row(what, row["adapter"], *sizes, *numbers, verdict)
    table.caption = f"largest difference to the reference; tolerance {tolerance:.0e}"
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _reference(model: Path | None, ids: list[int]) -> dict[str, Any]:
    from polyshard.proof.parity import oracle_of_built_in, run_transformers

    return oracle_of_built_in() if model is None else run_transformers(model, ids)
