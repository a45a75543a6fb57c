"""Records of steps: figures over all ranks, FLOPs as other libraries count them, and files that a restart continues."""

import json
import logging
import math
from dataclasses import replace

import pytest
import torch
import transformers
from support.models import experts
from support.models.tiny import save_tiny
from support.workers.experts import build as build_moe
from support.workers.monitored import SLOW, monitored
from support.workers.on_ranks import build
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

import polyshard as ps
from polyshard.testing import run_ranks


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts_in_transformers(tmp_path, tied):
    directory = save_tiny(tmp_path / "model", "qwen3", tie_word_embeddings=tied)
    rows, length = 2, 24
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    ids = torch.ones(rows, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        oracle(ids, labels=ids).loss.backward()

    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
    flops = ps.model_flops(engine)
    assert len(flops.attention) == oracle.config.num_hidden_layers
    unmasked = replace(flops, attention=tuple(replace(spec, causal=False) for spec in flops.attention))
    assert unmasked([length] * rows) == counter.get_total_flops()

    for parameter in engine.module.parameters():
        parameter.requires_grad_(False)
    assert ps.model_flops(engine).per_token * 3 == flops.per_token * 2


def test_flops_of_experts_are_those_of_the_experts_that_tokens_take(tmp_path):
    directory = experts.save_moe(tmp_path / "model", "qwen3_moe")
    ids = torch.arange(24).reshape(1, 24)
    with FlopCounterMode(display=False) as counter:
        experts.load_reference(directory, torch.float32)(ids, labels=ids).loss.backward()

    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(build_moe(directory, context), ps.AdamW(), context)
    flops = ps.model_flops(engine)
    unmasked = replace(flops, attention=tuple(replace(spec, causal=False) for spec in flops.attention))
    assert unmasked([24]) == counter.get_total_flops()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 30])
def test_masked_pairs_are_not_counted(causal, window):
    spec = ps.core.AttentionSpec(
        num_heads=3, num_kv_heads=1, head_dim=8, value_dim=4, scale=1.0, causal=causal, sliding_window=window
    )
    lengths = (1, 5, 17)
    pairs = 0
    for length in lengths:
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        kept = (j <= i) if causal else torch.ones(length, length, dtype=torch.bool)
        pairs += int((kept & ((i - j).abs() < (window or length))).sum())
    assert ps.ModelFlops(per_token=0, attention=(spec,))(lengths) == 3 * 2 * pairs * 3 * (8 + 4)


def test_flops_that_are_unknown_are_not_guessed(caplog):
    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(torch.nn.Conv1d(2, 2, 3), ps.AdamW(), context)
    with pytest.raises(ps.ConfigurationError, match="the FLOPs of weight are unknown"):
        ps.model_flops(engine)
    layers = torch.nn.ModuleDict({"mixer": torch.nn.MultiheadAttention(8, 2), "mlp": torch.nn.Linear(8, 8)})
    with caplog.at_level(logging.WARNING):
        found = ps.model_flops(ps.load_adapter("torch").engine(layers, ps.AdamW(), context))
    assert "the FLOPs of attention in mixer are not counted" in caplog.text
    assert found.per_token == 6 * (3 + 1 + 1) * 8 * 8


def test_figures_are_of_all_ranks_and_rank_0_writes_them(tmp_path):
    model = save_tiny(tmp_path / "model", "llama")
    (record, sharded), (other, _) = run_ranks(monitored, 2, tmp_path, model)
    assert record == other
    context = ps.initialize("torch")
    whole = ps.model_flops(ps.load_adapter("torch").engine(build(model, context), ps.AdamW(), context))
    assert sharded([5, 7]) == whole([5, 7])
    assert (record.step, record.loss, record.grad_norm, record.learning_rate) == (3, 0.0, 0.5, 1e-3)
    assert (record.tokens, record.labels) == (2 * 8 * (1 + 2), 20)
    assert record.model_flops == record.tokens * 6 * 4 * 4
    for phase in ("data", "save"):
        assert SLOW <= record.seconds[phase] <= record.total_seconds
    assert record.seconds["other"] > 0
    assert record.tokens_per_second == record.tokens / record.total_seconds
    assert record.utilization == pytest.approx(record.model_flops / record.total_seconds / (2 * 1e6))
    assert record.memory > 50e6, "torch alone takes more"

    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, False), (2, True), (3, False)]
    assert lines[-1] == {name: getattr(record, name) for name in lines[-1]}
    assert read_back(tmp_path / "tensorboard", "seconds/data")[-1] == (3, pytest.approx(record.seconds["data"]))

    traces = sorted((tmp_path / "trace").iterdir())
    assert [trace.name for trace in traces] == ["rank-00000.json", "rank-00001.json"]
    for trace in traces:
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert {f"step {i}" for i in range(3)} & names == {"step 2"}


def read_back(directory, name):
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_steps_that_a_restart_does_again_stand_once(tmp_path, caplog):
    def write(*steps):
        sinks = [ps.JsonLines(tmp_path / "steps.jsonl"), ps.TensorBoard(tmp_path / "tensorboard")]
        for step, loss in steps:
            for sink in sinks:
                sink(ps.StepRecord(step=step, loss=loss))
        for sink in sinks:
            sink.close()

    write((1, 5.0), (2, 4.0), (3, 3.5), (4, 3.25))
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while it was writing
    write((3, 3.0), (4, 2.0))
    assert "holds records of step 3 and later: 2 are replaced" in caplog.text
    expected = [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == expected
    assert read_back(tmp_path / "tensorboard", "loss") == expected
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_figures_that_are_not_finite_are_strings_that_float_reads(tmp_path):
    """Strict readers of JSON reject NaN. A skipped step has such a gradient norm."""
    sink = ps.JsonLines(tmp_path / "steps.jsonl")
    sink(ps.StepRecord(step=1, loss=math.nan, grad_norm=math.inf, learning_rate=-math.inf, seconds={"data": math.nan}))
    sink.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((tmp_path / "steps.jsonl").read_text(), parse_constant=refuse)
    assert (found["loss"], found["grad_norm"], found["learning_rate"]) == ("NaN", "Infinity", "-Infinity")
    assert math.isnan(float(found["seconds"]["data"]))


def test_the_terminal_shows_steps_as_lines_if_it_is_none(capsys):
    bar = ps.ProgressBar(10, every=4)
    for step in range(3, 11):
        bar(ps.StepRecord(step=step, loss=1.0, grad_norm=2.0, utilization=0.4, tokens_per_second=7, skipped=step == 5))
    bar.close()
    figures = "loss 1.000  7 tokens/s  gradient norm 2.00  MFU 40.0%"
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"step   5/10  {figures}  skipped", f"step   9/10  {figures}", f"step  10/10  {figures}"]


def test_phases_do_not_overlap():
    monitor = ps.Monitor(ps.initialize("torch"))
    inside = pytest.raises(ps.ConfigurationError, match="'step' inside of 'save'")
    with monitor.phase("save"), inside, monitor.phase("step"):
        pass
    with pytest.raises(ps.ConfigurationError, match="the phase is invalid"), monitor.phase("evaluation"):
        pass


def test_the_peak_of_a_device(monkeypatch):
    cpu = torch.device("cpu")
    assert ps.known_peak_flops(cpu) is None
    before = torch.get_rng_state()
    small, fast = (ps.measured_peak_flops(cpu, torch.float32, size=size, seconds=0.05) for size in (16, 512))
    assert 1e6 < small < fast < 1e13
    assert torch.equal(torch.get_rng_state(), before)
    names = {
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "T1000": None,
    }
    for name, peak in {**names, "NVIDIA RTX A4000": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert ps.known_peak_flops(torch.device("cuda")) == peak
        assert ps.known_peak_flops(torch.device("cuda"), torch.float32) is None
