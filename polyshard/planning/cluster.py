"""The machines that a run is planned for: memory, compute and links of one GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from polyshard.core.errors import ConfigurationError

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_COUNTS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_LINKS = ("nvlink", "net")
_RATES = ("peak_flops", "efficiency", "memory_bandwidth", "nvlink", "net", "link_efficiency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The GPUs of a planned run. Defaults describe an H100 with SXM and one 400 Gbit/s adapter per GPU.

    Attributes:
        gpus: number of GPUs.
        memory: bytes of one GPU.
        gpus_per_node: GPUs that the fast link connects.
        nvlink: GB/s of one GPU inside a node, both directions together, as on data sheets.
        net: GB/s of one GPU between nodes, in one direction.
        peak_flops: FLOPs per second of dense 16-bit matrix products.
        memory_bandwidth: GB/s of a GPU's memory.
        efficiency: fraction of `peak_flops` that a rank reaches while it computes.
        link_efficiency: fraction of a link's bandwidth that collectives reach.
        reserve: bytes that tensors cannot use: CUDA context, communication buffers, fragmentation.

    Raises:
        ConfigurationError: a size is not positive, or a fraction is not in (0, 1].

    Examples:
        >>> from polyshard.planning import Cluster
        >>> cluster = Cluster(gpus=1024, memory=80 * 2**30)
        >>> cluster.bandwidth(span=8), cluster.bandwidth(span=16)
        (360000000000.0, 40000000000.0)
    """

    gpus: int
    memory: int
    gpus_per_node: int = 8
    nvlink: float = 900.0
    net: float = 50.0
    peak_flops: float = 989e12
    memory_bandwidth: float = 3350.0
    efficiency: float = 0.6
    link_efficiency: float = 0.8
    reserve: int = 4 * 2**30

    def __post_init__(self) -> None:
        for name in ("gpus", "memory", "gpus_per_node", "nvlink", "net", "peak_flops", "memory_bandwidth"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is invalid: got {getattr(self, name)}, expected a positive number.")
        for name in ("efficiency", "link_efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is invalid: got {getattr(self, name)}, expected a number in (0, 1].")
        if not 0 <= self.reserve < self.memory:
            raise ConfigurationError(
                f"reserve is invalid: got {self.reserve} bytes, expected less than the memory of {self.memory} bytes."
            )

    def bandwidth(self, span: int) -> float:
        """Return the bytes per second that a rank sends in a group whose ranks lie within `span` neighbouring GPUs."""
        inside = span <= self.gpus_per_node and self.gpus_per_node % span == 0
        return (self.nvlink / 2 if inside else self.net) * 1e9 * self.link_efficiency


def read_calibration(path: Path) -> Mapping[str, float]:
    """Return measured rates as fields of `Cluster`, from the `calibration` of a benchmark's JSON file.

    Raises:
        ConfigurationError: the file cannot be read, has no calibration, or holds other fields than rates.

    Examples:
        >>> _ = Path("plan.json").write_text('{"calibration": {"efficiency": 0.45}}')
        >>> read_calibration(Path("plan.json"))
        {'efficiency': 0.45}
    """
    try:
        found = json.loads(path.read_text())["calibration"]
        rates = {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} holds no calibration: got {type(error).__name__}: {error}, expected the JSON file of "
            'benchmarks/plan.py, or {"calibration": {"efficiency": 0.5}}.'
        ) from None
    unknown = sorted(set(rates) - set(_RATES))
    if unknown:
        raise ConfigurationError(
            f"{path}: the calibration is unknown: got {', '.join(unknown)}, expected {', '.join(_RATES)}."
        )
    return rates


def parse_bytes(text: str) -> int:
    """Return a number of bytes: `80GiB`, `80GB`, `1000`.

    Examples:
        >>> parse_bytes("80GiB") == 80 * 2**30
        True
    """
    return _parse(text, _BYTES, "a number of bytes such as 80GiB")


def parse_tokens(text: str) -> int:
    """Return a number of tokens: `8K` is 8192, and `4M` is 4194304, as lengths and batches are usually given.

    Examples:
        >>> parse_tokens("4M")
        4194304
    """
    return _parse(text, _COUNTS, "a number of tokens such as 4M")


def parse_links(text: str) -> Mapping[str, float]:
    """Return the bandwidths of `nvlink=900,net=50`, as fields of `Cluster`.

    Examples:
        >>> parse_links("nvlink=900,net=50")
        {'nvlink': 900.0, 'net': 50.0}
    """
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigurationError(f"The link is invalid: got {part!r}, expected NAME=GB/s.") from None
    unknown = sorted(set(found) - set(_LINKS))
    if unknown:
        raise ConfigurationError(f"The link is unknown: got {', '.join(unknown)}, expected {', '.join(_LINKS)}.")
    return found


def _parse(text: str, units: Mapping[str, int], expected: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in units:
        raise ConfigurationError(f"The size is invalid: got {text!r}, expected {expected}.")
    return round(float(match.group(1)) * units[unit])
