"""Log-probabilities of given tokens in a real vLLM engine, in a separate process.

python -m polyshard.adapters.vllm.engines.score DIRECTORY FACTORY ADAPTER TENSOR_PARALLEL TOKENS_AS_JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from polyshard.adapters.vllm.engines.scratch import engine_folder
from polyshard.core.errors import PolyshardError
from polyshard.registry import register_model

NAME = "PolyshardVerified"
_MARK = "polyshard-scores:"


def engine_environment(tensor: int, folder: str) -> dict[str, str]:
    """Return the environment of a process that runs one engine for a comparison.

    The process logs only errors and does not compile. It runs the engine without child processes if it can, and creates
    its sockets in `folder`.
    """
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "TORCH_COMPILE_DISABLE": "1", "TMPDIR": folder}
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if tensor == 1:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return environment


def scores(directory: str, factory: str, adapter: str, tensor: int, token_ids: list[int]) -> list[float]:
    """Return the log-probability of each token except the first, given the tokens before it.

    Raises:
        PolyshardError: the engine failed; the message holds the end of its output.
    """
    command = [sys.executable, "-m", __name__, directory, factory, adapter, str(tensor), json.dumps(token_ids)]
    with engine_folder() as folder:
        environment = engine_environment(tensor, folder)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise PolyshardError(f"vLLM with {adapter}'s layers at tensor-parallel {tensor} failed:\n{done.stderr[-2000:]}")


def _main() -> None:
    directory, factory, adapter, tensor, token_text = sys.argv[1:]
    token_ids = json.loads(token_text)
    register_model(NAME, factory, adapter=adapter)
    from vllm import LLM, SamplingParams

    llm = LLM(
        directory,
        hf_overrides={"architectures": [NAME]},
        tensor_parallel_size=int(tensor),
        dtype="float32",
        max_model_len=len(token_ids) + 16,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=256 << 20,
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    output = llm.generate({"prompt_token_ids": token_ids}, parameters, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    logprobs = [step[i].logprob for step, i in zip(output.prompt_logprobs[1:], token_ids[1:]) if step is not None]
    print(_MARK + json.dumps(logprobs), flush=True)


if __name__ == "__main__":
    _main()
