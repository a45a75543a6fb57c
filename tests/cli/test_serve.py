"""The OpenAI-compatible server, from the command line alone."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import support.vllm_required  # noqa: F401
from support.models.tiny import save_tiny
from support.oracles.greedy import greedy_transformers
from support.paths import EXAMPLES
from support.servers import ENGINE_WITHOUT_WORKER_PROCESS, running_script

import polyshard as ps
from polyshard.adapters.vllm.clients.protocol import SampleRequest
from polyshard.launch.ranks import free_port

pytestmark = pytest.mark.vllm

VLLM_SERVER = Path(importlib.util.find_spec("vllm.entrypoints.openai").origin).with_name("api_server.py")
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", str(64 << 20)]


@contextlib.contextmanager
def server(script, arguments, log, **environment):
    """A client of a running server; its whole process group is ended afterwards."""
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", **ENGINE_WITHOUT_WORKER_PROCESS, **environment}
    with running_script(script, [*arguments, *OPTIONS, "--port", str(port)], port, log, env):
        from openai import OpenAI

        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")


CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16}


def ask(client):
    answer = client.chat.completions.create(model=client.models.list().data[0].id, **CHAT)
    return answer.choices[0].message.content


def streamed(client):
    for chunk in client.chat.completions.create(model=client.models.list().data[0].id, stream=True, **CHAT):
        if chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


@pytest.fixture
def checkpoint(smollm2, tmp_path):
    """SmolLM2 under an architecture that vLLM does not know."""
    directory = Path(shutil.copytree(smollm2, tmp_path / "model", copy_function=os.symlink))
    config = json.loads((smollm2 / "config.json").read_text()) | {"architectures": ["OnlyPolyshardKnows"]}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_polyshard_serve(checkpoint, tmp_path):
    polyshard = Path(sys.executable).with_name("polyshard")
    config = json.loads((checkpoint / "config.json").read_text())
    config["polyshard"] = {"factory": f"{EXAMPLES / 'decoder.py'}:build_model"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    arguments = ["serve", str(checkpoint), "--trust-checkpoint", "--enable-scale-out"]
    with server(polyshard, arguments, tmp_path / "log", VLLM_SERVER_DEV_MODE="1") as client:
        rollouts = ps.HttpClient(str(client.base_url).removesuffix("/v1/"))
        with pytest.raises(ps.ConfigurationError, match="keeps no routing .* Start the server with --worker-extension"):
            rollouts.generate(SampleRequest("routed", (1, 2, 3), {"max_tokens": 2}, routing_from=0))
        answer = ask(client)
        assert "Paris" in answer
        pieces = list(streamed(client))
        assert len(pieces) > 3
        assert "".join(pieces) == answer


def test_data_parallel_engines_of_plain_vllm_by_the_environment_variable(tmp_path):
    directory = save_tiny(tmp_path / "model", "llama", hidden_size=96, head_dim=32)
    prompts = [[1, 2, 3 + i] for i in range(8)]
    config = json.loads((directory / "config.json").read_text()) | {"architectures": ["OnlyPolyshardKnows"]}
    (directory / "config.json").write_text(json.dumps(config))
    models = {"OnlyPolyshardKnows": {"factory": f"{EXAMPLES / 'decoder.py'}:build_model", "adapter": "torch"}}
    environment = {"POLYSHARD_MODELS": json.dumps(models), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    arguments = ["--model", str(directory), "--data-parallel-size", "2", "--skip-tokenizer-init"]
    with server(VLLM_SERVER, arguments, tmp_path / "log", **environment) as client:

        def generated(prompt):
            more = {"return_token_ids": True}
            return client.completions.create(
                model=str(directory), prompt=prompt, max_tokens=4, temperature=0, extra_body=more
            )

        with ThreadPoolExecutor(len(prompts)) as pool:
            got = [answer.choices[0].token_ids for answer in pool.map(generated, prompts)]
        metrics = urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=5).read().decode()
    assert got == [tokens for tokens, _ in greedy_transformers(directory, prompts, 4)]
    finished = re.findall(r'vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\d+)', metrics)
    assert {engine for engine, count in finished if int(count)} == {"0", "1"}
    assert sum(int(count) for _, count in finished) == len(prompts)
