"""`polyshard doctor`: report which parts of polyshard can be used on this machine, and why others cannot."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from polyshard import __version__
from polyshard.adapters.torch.float8 import TORCHAO
from polyshard.attention.kernels.cpu import native_paged as paged
from polyshard.attention.selection import explain
from polyshard.core.attention import AttentionSpec
from polyshard.core.capabilities import Accepted, Rejected
from polyshard.core.discovery import adapter_names, load_adapter
from polyshard.core.requirement import Requirement
from polyshard.lora.requirement import PEFT
from polyshard.native.matmul import unsupported_reason
from polyshard.transformers.replaced.requirement import TRANSFORMERS


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        kind: `adapter`, `models`, `kernel`, `engine on CPU`, `serving` or `platform`.
        name: name of the adapter, kernel, engine or fact.
        usable: whether it can be used on this machine.
        version: the installed version; None if there is none.
        detail: supported versions, or why it cannot be used and how to install it.
    """

    kind: str
    name: str
    usable: bool
    version: str | None
    detail: str


def doctor(
    names: Annotated[list[str] | None, typer.Argument(help="Adapters, kernels or engines that must be usable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Report on every adapter, attention kernel and engine; exit status 1 if one of NAMES is not usable."""
    findings = [*platform_facts(), *adapters(), *kernels(), *compiled_parts()]
    known = {f.name for f in findings}
    unknown = [name for name in names or [] if name not in known]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings)
    if unknown:
        typer.secho(f"unknown: {', '.join(unknown)}. Pass one of: {', '.join(sorted(known))}", fg="red", err=True)
        sys.exit(1)
    missing = [f for name in names or [] for f in findings if f.name == name and not f.usable]
    for finding in missing:
        typer.secho(f"{finding.name} is not usable: {finding.detail}", fg="red", err=True)
    if missing:
        sys.exit(1)


def platform_facts() -> list[Finding]:
    """Return the findings about Python, torch, the device and the communication backends."""
    cuda = torch.cuda.is_available()
    distributed = torch.distributed.is_available()
    gloo = distributed and torch.distributed.is_gloo_available()
    nccl = distributed and torch.distributed.is_nccl_available()
    device = torch.cuda.get_device_name(0) if cuda else "no CUDA device: everything runs on the CPU"
    return [
        Finding("platform", "polyshard", True, __version__, f"Python {platform.python_version()}"),
        Finding("platform", "cuda", cuda, torch.version.cuda, device),
        Finding("platform", "gloo", gloo, None, "ranks on CPUs" if gloo else "this torch was built without it"),
        Finding("platform", "nccl", nccl, None, "ranks on GPUs" if nccl else "this torch was built without it"),
    ]


def adapters() -> list[Finding]:
    """Return a finding for every registered adapter; an adapter that cannot be loaded is reported, not raised."""
    findings = []
    for name in adapter_names():
        try:
            adapter: Any = load_adapter(name)
            kind = "adapter" if adapter.capabilities["training"].available else "serving"
            findings.append(installed(kind, name, adapter.requirement))
        except Exception as error:
            findings.append(Finding("adapter", name, False, None, f"{type(error).__name__}: {error}"))
    others = (("models", "transformers", TRANSFORMERS), ("lora", "peft", PEFT), ("float8", "torchao", TORCHAO))
    return [*findings, *(installed(*other) for other in others)]


def installed(kind: str, name: str, requirement: Requirement) -> Finding:
    """Return a finding about a library: whether it is installed, and whether its version is supported."""
    version = requirement.version()
    if version is None:
        return Finding(kind, name, False, None, f"not installed: {requirement.install}")
    reason = requirement.refusal(version)
    if reason is not None:
        return Finding(kind, name, False, version, f"unsupported: {reason}; supported: {requirement.supported}")
    if version.split("+")[0] in requirement.tested:
        return Finding(kind, name, True, version, "a version that polyshard is tested with")
    within = "in" if requirement.supports(version) else "outside of"
    detail = f"{within} the supported range {requirement.supported}; tested: {', '.join(requirement.tested)}"
    return Finding(kind, name, True, version, detail)


def kernels() -> list[Finding]:
    """Return each attention kernel's verdict on a plain request on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, scale=0.125)
    findings = []
    for verdict in explain(spec, device, dtype, training=True):
        match verdict:
            case Accepted(name):
                findings.append(Finding("kernel", name, True, None, f"trains on {device.type} in {dtype}"))
            case Rejected(name, reason):
                findings.append(Finding("kernel", name, False, None, reason))
    return findings


def compiled_parts() -> list[Finding]:
    """Return findings about the native matmul and attention of engines and exact mode on CPU."""
    heads = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, scale=0.125)
    parts = {
        "native matmul": unsupported_reason(torch.float32),
        "native attention": paged.unsupported_reason(heads),
    }
    return [
        Finding("engine on CPU", name, reason is None, None, reason or "used if it is faster than vLLM's own kernel")
        for name, reason in parts.items()
    ]


def show(findings: list[Finding]) -> None:
    """Print the findings as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "", "version", "usable", "")
    previous = ""
    for finding in findings:
        mark = "[green]yes[/green]" if finding.usable else "[red]no[/red]"
        kind = finding.kind if finding.kind != previous else ""
        previous = finding.kind
        table.add_row(kind, finding.name, finding.version or "", mark, escape(finding.detail))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
