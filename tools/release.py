"""Build the wheel, check its content, install it into an empty environment and run the README's programs there.

    python tools/release.py [--keep DIST]

The environment gets the lock's packages and the wheel, and nothing of this checkout: its programs run in a temporary
directory with an empty PYTHONPATH. Takes four minutes, most of them to install. Exit status 1 on the first failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "polyshard"
EXPECTED = "after 20, 21, 22, 23: [24, 25, 26, 27, 28, 29, 30, 31]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="copy the checked wheel into this folder")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder) / "dist")
        check_version(wheel)
        check_content(wheel)
        python = install(wheel, Path(folder) / "environment")
        run_readme(python, Path(folder) / "programs")
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            print(shutil.copy(wheel, keep))
    print(f"{wheel.name}: built, checked, installed, and the README's programs ran from it")


def build(target: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(target), str(ROOT)], check=True)
    (wheel,) = target.glob("polyshard-*.whl")
    return wheel


def check_version(wheel: Path) -> None:
    """The wheel, the changelog and the citation name the version of polyshard/__init__.py."""
    (version,) = re.findall(r'^__version__ = "([^"]+)"$', (PACKAGE / "__init__.py").read_text(), flags=re.M)
    if wheel.name.split("-")[1] != version:
        sys.exit(f"{wheel.name} is not of version {version}")
    for name, pattern in (("CHANGELOG.md", rf"^## {re.escape(version)}\b"), ("CITATION.cff", rf"^version: {version}$")):
        path = ROOT / name
        if path.exists() and not re.search(pattern, path.read_text(), flags=re.M):
            sys.exit(f"{name} does not name version {version}")


def check_content(wheel: Path) -> None:
    """Every file of the package is in the wheel, C++ sources and py.typed too, and nothing else is."""
    ignored = {"__pycache__"}
    files = {p for p in PACKAGE.rglob("*") if p.is_file() and not ignored & set(p.parts)}
    expected = {p.relative_to(ROOT).as_posix() for p in files}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    for what, names in (("lacks", expected - held), ("holds unexpected", held - expected)):
        if names:
            sys.exit(f"{wheel.name} {what} {', '.join(sorted(names))}")
    kinds = {Path(name).suffix for name in held}
    if not {".py", ".cpp", ".h", ".typed"} <= kinds | {".typed" for name in held if name.endswith("py.typed")}:
        sys.exit(f"{wheel.name} holds only {', '.join(sorted(kinds))}")


def install(wheel: Path, target: Path) -> Path:
    """An environment with the lock's packages and the wheel."""
    venv.create(target, with_pip=True)
    python = target / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "-r", str(ROOT / "requirements" / "cpu.lock")], check=True)
    sources = ["--no-build-isolation", "-r", str(ROOT / "requirements" / "cpu-source.lock")]
    subprocess.run([*pip, *sources], check=True)
    subprocess.run([*pip, str(wheel)], check=True)
    return python


def run_readme(python: Path, folder: Path) -> None:
    """The README's files, written to a folder of their own; trained by torchrun and served by vLLM."""
    folder.mkdir()
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S):
        (folder / block.partition("\n")[0].removeprefix("# ")).write_text(block)
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    environment["POLYSHARD_CACHE"] = str(folder / "cache")
    where = "import polyshard, sys; sys.exit(not polyshard.__file__.startswith(sys.prefix))"
    for command in (
        [str(python), "-c", where],
        ["torchrun", "--nproc-per-node", "2", "train.py"],
        [str(python), "serve.py"],
        ["polyshard", "doctor", "torch", "vllm"],
    ):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        if "serve.py" in command and done.stdout.splitlines()[-1] != EXPECTED:
            sys.exit(f"serve.py printed {done.stdout.splitlines()[-1]!r}, expected {EXPECTED!r}")


if __name__ == "__main__":
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]
    main()
