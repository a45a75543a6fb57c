"""GGUF files, read by transformers."""

from __future__ import annotations

from pathlib import Path

from polyshard.core.errors import CheckpointError, MissingDependencyError
from polyshard.core.foreign import Foreign, Options, lazy

_MAGIC = b"GGUF"


class GgufFormat:
    """One `.gguf` file; quantized weights are dequantized to float32."""

    name = "gguf"
    writes = False

    def detect(self, path: Path) -> str | None:
        """By the file's first bytes."""
        file = _file(path)
        return f"a GGUF file of {file.stat().st_size / 1e6:.0f} MB" if file is not None else None

    def read(self, path: Path, options: Options) -> Foreign:
        """Weights and configuration as transformers understands them."""
        file = _file(path)
        assert file is not None
        try:
            import transformers
        except ImportError:
            raise MissingDependencyError(
                "GGUF needs transformers and gguf: pip install 'polyshard[examples]'"
            ) from None
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(f"transformers cannot read {file}: {str(error).splitlines()[0]}") from None
        fields = dict(options.config or model.config.to_dict())
        for name in ("quantization_config", "_name_or_path"):
            fields.pop(name, None)
        fields["architectures"] = [type(model).__name__]
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
        tensors = {name: lazy(value) for name, value in model.state_dict().items() if name not in tied}
        return Foreign(tensors=tensors, config=fields)

    def write(self, foreign: Foreign, path: Path, options: Options) -> None:
        """Never."""
        raise CheckpointError("GGUF is read, not written: llama.cpp's convert_hf_to_gguf.py writes it")


def _file(path: Path) -> Path | None:
    files = [path] if path.is_file() else sorted(path.glob("*.gguf")) if path.is_dir() else []
    for file in files[:1]:
        with file.open("rb") as stream:
            if stream.read(4) == _MAGIC:
                return file
    return None
