"""`polyshard verify --exact`: create the certificate for the user's own machine and model."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from polyshard.checkpoint import read_config
from polyshard.cli.verify import stages_of
from polyshard.core.errors import ConfigurationError
from polyshard.proof.certificate import Certificate, Comparison, TrainerCase, compare

DTYPES = ("float32", "bfloat16", "float16")


def certify(
    model: Path,
    named: str,
    factory: str,
    adapters: list[str],
    sizes: list[int],
    stages: list[int],
    server_size: int,
    dtype: str,
    tokens: int,
    path: Path | None,
    as_json: bool,
) -> None:
    """Compare every trainer with one engine; print and write the result, and exit with status 1 if a bit differs.

    The certificate has the name of the model in place of its local directory.

    In half precision each library also runs with float32 parameters, as in training.
    """
    from rich.console import Console
    from rich.progress import Progress

    from polyshard.adapters.vllm import adapter as vllm_adapter

    if dtype not in DTYPES:
        raise ConfigurationError(f"--dtype is invalid: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    if server_size < 1:
        raise ConfigurationError(f"--server-tensor-parallel is invalid: got {server_size}, expected 1 or more")
    vllm_adapter.requirement.require()
    from polyshard.adapters.vllm.engines.sampling import SPARE, SamplingJob, sample

    config = read_config(model)
    room = longest_prompt(getattr(config, "max_position_embeddings", None), tokens, SPARE)
    shards = math.lcm(server_size, *sizes)
    job = SamplingJob(
        directory=str(model),
        factory=factory,
        dtype=dtype,
        prompts=random_prompts(config.vocab_size, room),
        tokens=tokens,
        tensor=server_size,
        shards=shards,
    )
    cases = [
        TrainerCase(adapter=name, tensor=size, pipeline=count)
        for name in adapters
        for size in sizes
        for count in stages_of(name, stages)
    ]
    if dtype != "float32":
        cases += [TrainerCase(adapter=name, tensor=sizes[0], masters=True) for name in adapters]
    found: list[Comparison] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"vLLM, tensor-parallel {server_size}", total=len(cases) + 1)
        answers = sample(job)
        progress.advance(task)
        for case in cases:
            sizes_of = f"tensor-parallel {case.tensor}, pipeline-parallel {case.pipeline}"
            progress.update(task, description=f"{case.adapter}, {sizes_of}")
            found.append(
                compare(case, answers, str(model), factory, dtype, shards, trace=lambda folder: sample(job, folder))
            )
            progress.advance(task)
    certificate = Certificate(
        model=named,
        factory=factory,
        exact=True,
        dtype=dtype,
        shards=shards,
        server={
            "tensor_parallel": server_size,
            "max_num_batched_tokens": job.chunk,
            "prefix_caching": True,
            "prompts": [len(prompt) for prompt in job.prompts],
            "sampled": tokens,
        },
        comparisons=found,
    )
    if path is not None:
        certificate.write(path)
    if as_json:
        print(json.dumps({"holds": certificate.holds, **asdict(certificate)}, indent=2))
    else:
        show(certificate)
    if not certificate.holds:
        sys.exit(1)


def random_prompts(vocab_size: int, longest: int | None = None) -> list[list[int]]:
    """Return prompts of one token to more than one chunk; two share a prefix, to hit the prefix cache.

    Args:
        vocab_size: of the model.
        longest: length to which prompts are cut; None for their own.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (5, 1, 64, 130, 17)]
    return [prompt[:longest] for prompt in (*prompts, prompts[3][:96] + prompts[2], prompts[3])]


def longest_prompt(positions: int | None, tokens: int, spare: int) -> int | None:
    """Return the length of the longest prompt, which a note on stderr tells if prompts have to be cut."""
    if positions is None:
        return None
    room = positions - tokens - spare
    if room < 1:
        raise ConfigurationError(
            f"the model has too few positions for --exact: got max_position_embeddings {positions} with --tokens "
            f"{tokens}, expected at least {tokens + spare + 1}. Pass fewer --tokens."
        )
    longest = max(map(len, random_prompts(2)))
    if room < longest:
        print(
            f"prompts are cut to {room} tokens, from {longest}: the model has {positions} positions, of which "
            f"{tokens} are for --tokens and {spare} are spare",
            file=sys.stderr,
        )
    return room


def show(certificate: Certificate) -> None:
    """Print the certificate as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("trainer", "tensor", "stages", "parameters", "tokens", "bits differ in", "by at most", "")
    for row in certificate.comparisons:
        verdict = "[green]equal[/green]" if row.holds else f"[red]{row.error or 'differs'}[/red]"
        parameters = "float32" if row.masters else certificate.dtype
        numbers = (str(row.tokens), str(row.differ), f"{row.largest:.3g}")
        table.add_row(row.adapter, str(row.tensor), str(row.pipeline), parameters, *numbers, verdict)
    server = certificate.server
    table.title = (
        f"{Path(certificate.model).name} in {certificate.dtype}, exact mode, {certificate.shards} shards; vLLM at "
        f"tensor-parallel {server['tensor_parallel']}, chunks of {server['max_num_batched_tokens']}, prefix caching"
    )
    versions = ", ".join(f"{name} {number}" for name, number in certificate.versions.items())
    table.caption = f"{versions}; {certificate.machine['processor']}, {certificate.machine['isa']}"
    console.print(table)
    for row in certificate.comparisons:
        if row.first is not None:
            console.print(f"[red]{row.adapter} at tensor-parallel {row.tensor} differs first in {row.first}[/red]")
        elif row.error is None and row.differ:
            console.print(
                f"[red]{row.adapter} at tensor-parallel {row.tensor}: the recorded values of all modules are equal, so "
                "the head or the log-probabilities differ[/red]"
            )
