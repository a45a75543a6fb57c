"""The loop of reinforcement learning as a user runs it: generate, score, step, sync."""

import json
import os
import signal
import time
from pathlib import Path

import decoder
import pytest
import torch
from support import forked
from support.models.tiny import save_tiny
from support.paths import EXAMPLES
from support.scripts import on_engine_ranks
from support.servers import ENGINE_WITHOUT_WORKER_PROCESS
from support.warm_spawn import descendants

import polyshard as ps

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # set by the example itself, which is forked after torch was imported
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
EXAMPLE = EXAMPLES / "rl.py"
SMALL = ["--prompts", "8", "--samples", "8"]


def run(folder: Path, *options: str) -> list[dict]:
    """Run the example to its end; the metrics of each step."""
    done = forked.run(EXAMPLE, [str(folder), *SMALL, *options], {**os.environ, **ENVIRONMENT}, timeout=280)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return metrics_of(folder)


def run_on_ranks(folder: Path, *options: str) -> list[dict]:
    """Run the example on two ranks with torchrun's environment variables; the metrics of each step."""
    on_engine_ranks(forked.script_of_rank, 2, EXAMPLE, [str(folder), *SMALL, *options], ENVIRONMENT)
    return metrics_of(folder)


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def is_exact(metrics: list[dict]) -> bool:
    return all(step["kl"] == 0.0 and step["bits_differ"] == 0.0 and step["ratio"] == 1.0 for step in metrics)


def test_rewards_rise_and_trainer_and_sampler_agree_bit_for_bit(tmp_path):
    """bfloat16 in the engine, float32 parameters in the trainer; started again, the run goes on from its last state."""
    run(tmp_path, "--steps", "110", "--dtype", "bfloat16", "--every", "50")
    metrics = run(tmp_path, "--steps", "150", "--dtype", "bfloat16", "--every", "50")
    assert [step["step"] for step in metrics] == list(range(1, 151))
    assert is_exact(metrics)
    first, last = (sum(step["reward"] for step in part) / 20 for part in (metrics[:20], metrics[-20:]))
    assert first < 0.2
    assert last > max(2 * first, first + 0.1)  # a mean of 20 steps of 64 answers scatters by 0.01


@pytest.mark.parametrize(
    "options",
    [["--adapter", "megatron", "--tensor-parallel", "2"], ["--adapter", "deepspeed"]],
    ids=["tensor parallel 2", "data parallel 2"],
)
def test_two_ranks_share_their_processes_with_the_engine(tmp_path, options):
    assert is_exact(run_on_ranks(tmp_path, "--steps", "12", *options))


def test_ranks_that_share_an_engine_sample_the_same_tokens_without_exact_mode(tmp_path):
    """The ranks' generators differ, since sharded weights were drawn with them."""
    metrics = run_on_ranks(tmp_path, "--steps", "4", "--ordinary", "--tensor-parallel", "2")
    assert len(metrics) == 4
    assert all(abs(step["kl"]) < 1e-6 and step["bits_differ"] > 0 for step in metrics), metrics


def test_a_mixture_of_experts_replays_the_samplers_experts(tmp_path):
    metrics = run(tmp_path, "--steps", "4", "--task", "experts", "--ordinary", "--replay", "--dtype", "bfloat16")
    assert [step["step"] for step in metrics] == [1, 2, 3, 4]
    found = [(step["kl"], step["bits_differ"]) for step in metrics]
    assert all(abs(kl) < 2e-3 and differ > 0 for kl, differ in found), found  # not exact mode


def test_a_dead_engine_is_replaced_and_goes_on_with_the_trainers_weights(tmp_path):
    """Killed in the middle of a run: the next answers come from the same weights, and still agree bit for bit."""
    arguments = [str(tmp_path), *SMALL, "--separate", "--steps", "30"]
    errors = tmp_path / "errors"
    env = {**os.environ, **ENVIRONMENT, **ENGINE_WITHOUT_WORKER_PROCESS}
    process = forked.start(EXAMPLE, arguments, env, tmp_path / "printed", errors)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() or len(metrics_of(tmp_path)) < 5:
            assert time.monotonic() < deadline
            assert process.is_alive(), errors.read_text()[-3000:]
            time.sleep(0.05)
        (core,) = descendants(process.pid)
        os.kill(core, signal.SIGKILL)
        process.join(150)
    finally:
        process.kill()
    assert process.exitcode == 0, errors.read_text()[-3000:]
    metrics = metrics_of(tmp_path)
    assert [step["step"] for step in metrics] == list(range(1, 31))
    assert (metrics[0]["restarted"], metrics[-1]["restarted"]) == (0, 1)
    assert is_exact(metrics)


def test_answers_carry_what_was_sampled(tmp_path):
    """In this process: every field of a rollout, versions, and what a wrong call is told."""
    directory = save_tiny(tmp_path / "model", "llama", head_dim=32)
    context = ps.initialize("torch", exact=True)
    ps.register_model("Rolled", decoder.build_model, exact=True)
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    settings = {"max_model_len": 64, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32"}
    with ps.RolloutEngine(directory, "Rolled", model, context, **settings) as engine:
        assert engine.sync().version == "1"
        groups = engine.generate([[1, 2, 3], [5]], samples=3, max_tokens=6, temperature=1.0)
        assert [len(group) for group in groups] == [3, 3]
        for prompt, group in zip([(1, 2, 3), (5,)], groups):
            for answer in group:
                assert answer.prompt == prompt
                assert (answer.finished, answer.version) == (False, "1")
                ids = torch.tensor([*answer.prompt, *answer.tokens])
                with torch.no_grad():
                    own = model(ids[:-1], targets=ids[1:])[len(prompt) - 1 :]
                assert own.tolist() == list(answer.logprobs)
        with torch.no_grad():
            model.model.norm.weight.zero_()  # now every token is as likely as any other
        engine.sync("flat")
        (answer,) = engine.generate([[1, 2]], max_tokens=3)[0]
        assert answer.version == "flat"
        assert len(set(answer.logprobs)) == 1
        (answer,) = engine.generate([[1, 2]], max_tokens=50, stop_token_ids=list(range(131)))[0]
        assert answer.finished
        assert len(answer.tokens) == 1
        with pytest.raises(ps.ConfigurationError, match="prompt 1 of 2 is empty"):
            engine.generate([[1], []])
        for name, value, reason in (
            ("logprobs", 3, "log-probability of each sampled token and of no other"),
            ("n", 2, "use samples="),
            ("prompt_logprobs", 1, "use ps.token_logprobs for prompts"),
        ):
            with pytest.raises(ps.ConfigurationError, match=f"does not take {name}={value}: .*{reason}"):
                engine.generate([[1]], **{name: value})
        with pytest.raises(ps.ConfigurationError, match="unknown sampling parameter 'temprature': expected samples or"):
            engine.generate([[1]], temprature=1.0)
        folder = Path(engine._folder.name)
        assert folder.is_dir()
    assert not folder.exists(), "the engine's temporary files were left behind"
