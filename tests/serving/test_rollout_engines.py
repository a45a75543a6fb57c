"""Engines that others have started: vLLM's server and an engine here, behind one `RolloutEngine`. They serve a mixture
of experts, and return which ones tokens took."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import moe
import pytest
import support.vllm_required  # noqa: F401
import torch
from support.engines import engine, greedy
from support.models.experts import save_moe
from support.servers import running_script

import polyshard as ps
from polyshard.adapters.vllm.clients.protocol import SampleAnswer, SampleRequest
from polyshard.adapters.vllm.engines.dispatcher import Job
from polyshard.adapters.vllm.engines.rollout import checked_prompts
from polyshard.launch.ranks import free_port, run_ranks

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 2, 3, 4, 5], [7, 9, 11], list(range(40)), list(range(40))]
OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}
CLOSE = {"rtol": 0, "atol": 2e-5}  # trainer and server sum in other orders


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_moe(tmp_path_factory.mktemp("rollouts") / "old", "qwen3_moe", head_dim=32)


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory):
    """vLLM's own server; its URL."""
    port = free_port()
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    arguments = ["serve", str(directory), "--factory", "moe:build_model", *options, "--enforce-eager"]
    arguments += [f"--port={port}", "--host=127.0.0.1", "--enable-scale-out"]
    arguments += ["--weight-transfer-config", json.dumps({"backend": "polyshard"})]
    arguments += [f"--worker-extension-cls={ps.ROUTING_WORKER}"]
    changes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    polyshard = Path(sys.executable).with_name("polyshard")
    with running_script(polyshard, arguments, port, log, {**os.environ, **changes}):
        yield f"http://127.0.0.1:{port}"


def train_and_sync(directory, url, out, trainers):
    """On each rank: train, sync, and sample from the server, with trainers of several libraries and sizes."""
    from support.workers.remote_sync import trainer

    results = []
    for number, (adapter, tensor, options) in enumerate(trainers):
        context, engine, config = trainer(directory, adapter, tensor, options, build=moe.build_model)
        with ps.RolloutEngine(
            None, None, engine, context, engines=[ps.HttpClient(url, timeout=60)], sync_timeout=60
        ) as rollouts:
            rollouts.sync()
            groups = rollouts.generate(PROMPTS, max_tokens=8, temperature=0.0, ignore_eos=True)
        ps.save_checkpoint(engine, f"{out}/{number}", context, config=config)
        results.append([(answer.tokens, answer.logprobs, answer.versions) for (answer,) in groups])
        engine.close()
        for undo in context.on_shutdown:
            undo()
    return results


def test_trainers_of_two_sizes_sync_with_a_server_and_sample_from_it(directory, server, tmp_path):
    """Every rank gets the same answers, and those of an engine that has loaded the trainer's checkpoint."""
    trainers = [("torch", 1, {"data_parallel": "fsdp"}), ("torch", 2, {})]
    first, second = run_ranks(train_and_sync, 2, directory, server, tmp_path, trainers)
    assert first == second
    ps.register_model("Rolled", moe.build_model)
    for number, answers in enumerate(first):
        with engine(tmp_path / str(number), "Rolled") as llm:
            for (tokens, logprobs, versions), (want, wanted) in zip(answers, greedy(llm, PROMPTS, 8)):
                assert list(tokens) == want
                assert versions == ("1",) * 8
                torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(wanted), **CLOSE)


def logprobs_of(model, answer):
    """Log-probabilities of sampled tokens, and the experts that the tokens which they are sampled from take."""
    ids, first = torch.tensor([*answer.prompt, *answer.tokens]), len(answer.prompt) - 1
    with torch.no_grad(), ps.record_routing(model) as recorded:
        logprobs = model(ids[:-1], targets=ids[1:])[first:]
    return logprobs, torch.stack([experts[first:] for experts in recorded[0].values()], dim=1)


def test_a_sync_interrupts_completions_and_an_engine_dies(directory, server, caplog):
    """Each token's log-probability is that of the weights that its version names, also behind an interruption."""
    from vllm import SamplingParams

    context = ps.initialize("torch")
    ps.register_model("Rolled", moe.build_model)
    config = ps.read_config(directory)
    model = moe.build_model(config, context)
    ps.load_checkpoint(model, directory, context)
    models = {}

    def change():
        """Other weights, of which a copy is kept by version."""
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        version = str(len(models) + 1)
        models[version] = moe.build_model(config, context)
        models[version].load_state_dict(model.state_dict())
        assert rollouts.sync().version == version

    def check(groups):
        for group in groups:
            assert len(group) == 3
            assert len({answer.tokens for answer in group}) == 3, "samples with a seed differ from each other"
            for answer in group:
                assert len(answer.tokens) == len(answer.versions) == 150
                assert answer.version == answer.versions[-1]
                want = {version: logprobs_of(models[version], answer) for version in set(answer.versions)}
                own = torch.stack([want[version][0][i] for i, version in enumerate(answer.versions)])
                torch.testing.assert_close(torch.tensor(answer.logprobs), own, **CLOSE)
                taken = torch.stack([want[version][1][i] for i, version in enumerate(answer.versions)])
                routing = torch.stack(list(answer.routing.values()), dim=1)
                assert len(routing) == len(answer.prompt) + 149
                assert torch.equal(routing[len(answer.prompt) - 1 :], taken)

    def ask(batch):
        rollouts.submit(PROMPTS, samples=3, max_tokens=150, temperature=1.0, seed=10 * batch, ignore_eos=True)

    torch.manual_seed(0)
    settings = {"weight_transfer_config": {"backend": "polyshard"}, "worker_extension_cls": ps.ROUTING_WORKER}
    with engine(directory, "Rolled", **settings) as llm:
        near, far = ps.LlmClient(llm, "near"), ps.HttpClient(server, "far", timeout=60)
        with pytest.raises(ps.ConfigurationError, match="unknown sampling parameter 'tempreature': far has "):
            far.generate(SampleRequest("misspelled", (1, 2), {"tempreature": 0.0}))  # the server would ignore it
        left = SamplingParams(max_tokens=200, ignore_eos=True, detokenize=False)  # of a trainer that died
        llm.llm_engine.add_request("left", {"prompt_token_ids": [1, 2, 3]}, left)
        options = {"engines": [near, far], "return_routing": True, "sync_timeout": 30}
        with ps.RolloutEngine(None, None, model, context, **options) as rollouts:
            with pytest.raises(ps.ConfigurationError, match="no weights of this trainer. Call sync first"):
                ask(0)
            change()
            assert not near.unfinished()
            ask(1)
            time.sleep(0.3)  # some tokens of each completion
            change()
            ask(2)
            groups = rollouts.collect()
            check(groups)
            mixed = [answer for group in groups for answer in group if set(answer.versions) == {"1", "2"}]
            assert mixed, "no completion was carried over the sync"
            assert all(list(answer.versions) == sorted(answer.versions) for answer in mixed)

            os.killpg(server_group(server), signal.SIGKILL)  # in the middle of the second batch
            check(rollouts.collect())
            near.forget_cached("another trainer's")
            ((answer,),) = rollouts.generate(PROMPTS[:1], max_tokens=2)
            assert answer.versions == ("2", "2"), "the engine gets this trainer's weights before it answers"
            assert 'it serves weights "another trainer\'s", which this trainer has not sent' in caplog.text
            change()
            ask(3)
            check(rollouts.collect())
            with pytest.raises(ps.ConfigurationError, match="nothing has been submitted. Call submit first"):
                rollouts.collect()
            rollouts.leave("near")
            rollouts._pool._timeout = 1.0
            with pytest.raises(ps.EngineFailureError, match="no engine can be reached: far. None came back") as lost:
                rollouts.sync()
            assert lost.value.engines == ("far",)


def server_group(url):
    """The process group of the server that listens on the URL's port."""
    import psutil

    port = int(url.rpartition(":")[2])
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(c.status == "LISTEN" and c.laddr.port == port for c in process.net_connections()):
                return os.getpgid(process.pid)
    raise AssertionError(f"nobody listens on {port}")


def test_what_does_not_go_together_is_refused(directory):
    context = ps.initialize("torch")
    model = torch.nn.Linear(2, 2)
    client = ps.HttpClient("http://127.0.0.1:1")
    answer = SampleAnswer((7,), (-0.5,), ("1",), "stop")
    with pytest.raises(ps.ConfigurationError, match="a client returned no routing"):
        Job((1, 2), {"max_tokens": 1}, returns_routing=True).take(answer)
    with pytest.raises(ps.ConfigurationError, match="directory and architecture are missing. Pass both, or engines="):
        ps.RolloutEngine(None, None, model, context)
    with pytest.raises(ps.ConfigurationError, match="engines= excludes directory, dtype. Start the engines with"):
        ps.RolloutEngine(directory, None, model, context, engines=[client], dtype="float32")
    for engines in ("http://127.0.0.1:1", ["http://127.0.0.1:1"]):
        for create in (ps.WeightSync, lambda *a: ps.RolloutEngine(None, None, *a[:2], engines=a[2])):
            with pytest.raises(ps.ConfigurationError, match="an engine is invalid: got 'http://.*expected ps.Http"):
                create(ps.rms_norm(2, context), context, engines)
    for prompts, samples, told in (
        (["a text"], 1, "the prompts are invalid: 'str' .* Tokenize texts first"),
        ([1, 2], 1, "the prompts are invalid: 'int' object is not iterable. Expected a list of token IDs for each"),
        ([[1, 2], []], 1, "prompt 1 of 2 is empty"),
        ([[1, 2]], 0, "samples is invalid: got 0, expected at least 1"),
    ):
        with pytest.raises(ps.ConfigurationError, match=told):
            checked_prompts(prompts, samples)
    assert checked_prompts(torch.tensor([[1, 2]]), 1) == [[1, 2]]
    with ps.RolloutEngine(None, None, ps.rms_norm(2, context), context, engines=client) as rollouts:
        pass
    with pytest.raises(ps.ConfigurationError, match="the RolloutEngine is closed. Create another one"):
        rollouts.generate([[1]])
    with pytest.raises(ps.ConfigurationError, match="not a URL: got '10.0.0.3:80', expected http://HOST:PORT"):
        ps.HttpClient("10.0.0.3:80")
