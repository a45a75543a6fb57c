"""Import this first in a test file whose other imports need vLLM: without it, the whole file is skipped."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM")
