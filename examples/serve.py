"""Serve a trained checkpoint with vLLM's OpenAI-compatible server. All further options are passed to vLLM.

    python examples/serve.py CHECKPOINT --port 8000

`polyshard serve CHECKPOINT --factory examples/decoder.py:build_model` does the same without Python code.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import polyshard as ps

NAME = "PolyshardDecoder"


def main() -> None:
    """Register the model, then replace this process by vLLM's server, whose processes inherit the registration."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    checkpoint, *options = sys.argv[1:]
    ps.register_model(NAME, f"{Path(__file__).with_name('decoder.py')}:build_model")
    overrides = json.dumps({"architectures": [NAME]})
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    os.execv(server[0], [*server, "--model", checkpoint, "--hf-overrides", overrides, *options])


if __name__ == "__main__":
    main()
