"""Building of native kernels: a C++ file is built once per machine with the user's compiler, and cached.

It includes no torch headers, so that building takes a second. It links to torch's OpenMP and shares its threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "POLYSHARD_CACHE"
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # storage dtypes; computation is in float32

NUMBER, POINTER, SIZE = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64

NATIVE = Path(__file__).parent  # C++ sources and headers
_FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
_PROCESSORS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
_WIDTHS = {"AVX512": 16, "AVX2": 8}
_MORE = {"AVX512": {"avx512_bf16": "-mavx512bf16"}}  # instructions that only some of these processors have
_SECONDS = 120  # timeout of a compilation


def width() -> int:
    """Return the number of floats in a vector register; 0 for an unsupported processor."""
    return _WIDTHS.get(torch.backends.cpu.get_cpu_capability(), 0)


@functools.cache
def has_instructions(name: str) -> bool:
    """Return whether the processor has instructions that torch knows by this name, such as `amx_bf16`."""
    able = getattr(torch.cpu, "get_capabilities", dict)()  # missing in the oldest supported torch
    return bool(able.get(name, False))


def unavailable_reason(source: Path) -> str | None:
    """Return why the library of a source file is unavailable_reason, or None. The first call may compile."""
    found = _load_or_reason(source)
    return found if isinstance(found, str) else None


def library(source: Path) -> ctypes.CDLL:
    """Return the library of an available source file, built for this processor."""
    found = _load_or_reason(source)
    assert not isinstance(found, str), found
    return found


def supports_tensor(x: torch.Tensor) -> bool:
    """Return whether native kernels support the device and dtype of a tensor."""
    return x.device.type == "cpu" and x.dtype in KINDS


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return `x` as `[rows, size]` with a contiguous last dimension, and its row stride; copies only if needed."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    stride, step = rows.stride()
    return (rows, stride) if step == 1 else (rows.contiguous(), x.shape[-1])


def function(source: Path, name: str, *arguments: Any) -> Any:
    """Return a function of an available library that has no return value, with the C types of its arguments set."""
    found = getattr(library(source), name)
    found.argtypes, found.restype = arguments, None
    return found


@functools.cache
def _load_or_reason(source: Path) -> ctypes.CDLL | str:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _PROCESSORS:
        return f"needs a processor with {' or '.join(_PROCESSORS)}; torch reports {capability}"
    named = shlex.split(os.environ.get("CXX", "g++"))
    compiler = shutil.which(named[0]) if named else None
    if compiler is None:
        return f"needs a C++ compiler: {' '.join(named) or 'that of CXX'} was not found. Install g++ or set CXX"
    command = [compiler, *named[1:], *_FLAGS, *_flags_of_processor(capability)]
    headers = sorted(NATIVE.glob("*.h"))
    texts = [file.read_text() for file in (*headers, source)]
    key = hashlib.sha256("\n".join([*command, *texts]).encode()).hexdigest()[:16]
    try:
        built = _cache() / f"{source.stem}-{capability.lower()}-{key}.so"
        if not built.exists():
            _compile([*command, "-I", str(NATIVE)], source, built)
        return ctypes.CDLL(str(built))
    except subprocess.TimeoutExpired:
        return f"{compiler} did not finish within {_SECONDS} s"
    except subprocess.CalledProcessError as error:
        return f"{compiler} could not compile {source.name}: {error.stderr.strip()[-400:]}"
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        return f"cannot be built or loaded ({error}). Set {ENVIRONMENT_VARIABLE} to another folder"


def _flags_of_processor(capability: str) -> list[str]:
    more = [flag for name, flag in _MORE.get(capability, {}).items() if has_instructions(name)]
    return [*_PROCESSORS[capability], *more]


def _cache() -> Path:
    """Return `$POLYSHARD_CACHE`, or by default a folder in the user's cache directory."""
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyshard"


def _compile(command: list[str], source: Path, built: Path) -> None:
    """Compile into a temporary file and rename it, so that ranks that start together need not wait for each other."""
    built.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        part = Path(folder) / built.name
        subprocess.run(
            [*command, "-o", str(part), str(source)], check=True, capture_output=True, text=True, timeout=_SECONDS
        )
        part.replace(built)
    logger.info("built %s for this processor: %s", source.name, built)
