"""Recorded micro-batches: FLOPs are torch's, parameters are transformers', and equal blocks are recorded once."""

import dataclasses

import moe
import pytest
import torch
import transformers
from support.planned_cases import CONFIG, LLAMA_405B
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polyshard as ps
from polyshard.planning import trace as traces
from polyshard.planning.decoder import planned_decoder
from polyshard.planning.recorder import _kept_pairs
from polyshard.planning.shapes import ShapeCache
from polyshard.planning.trace import build, record, sizes_of

SMALL = {**CONFIG, "num_hidden_layers": 5}
EXPERTS = {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {
    **{**EXPERTS, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 32, "q_lora_rank": 24},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2},
    **{"num_key_value_heads": 8, "n_group": 2, "topk_group": 1},
}
FAMILIES = {
    "llama": SMALL,
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 16},
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "moe_intermediate_size": 32},
    "deepseek_v3": LATENT,
}


def of_transformers(family, fields):
    config = transformers.AutoConfig.for_model(**{**fields, "model_type": family})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def fields_of(family):
    return ps.ModelConfig(**{**FAMILIES[family], "model_type": family})


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_models_have_the_parameters_of_transformers(family):
    planned = build(planned_decoder, fields_of(family), ps.ParallelLayout(), torch.bfloat16)
    expected = of_transformers(family, FAMILIES[family])
    assert sum(p.numel() for p in planned.parameters()) == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flops_are_those_of_torchs_counter_on_transformers_model(family):
    model = of_transformers(family, FAMILIES[family])
    ids = torch.zeros(2, 64, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    flops = record(planned_decoder, fields_of(family), ps.ParallelLayout(), rows=2, length=64)[0].flops
    # lm_loss computes no other product than the head's; attention's masked pairs are in torch's count.
    assert flops.matmul + flops.attention_square == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_a_model_of_transformers_is_planned_as_the_model_of_its_config(family, tensor):
    fields = {**FAMILIES[family], "model_type": family, "norm_topk_prob": True, "max_position_embeddings": 64}
    own, planned = (
        record(factory, make(**fields), ps.ParallelLayout(tensor=tensor), rows=2, length=64)[0]
        for factory, make in (
            (ps.transformers_model, transformers.AutoConfig.for_model),
            (planned_decoder, ps.ModelConfig),
        )
    )
    assert sorted(own.sizes.dense_each) == sorted(planned.sizes.dense_each)  # the order of modules is another
    assert sorted(own.sizes.expert_each) == sorted(planned.sizes.expert_each)
    assert own.flops == planned.flops
    assert own.traffic == planned.traffic
    assert own.held == pytest.approx(planned.held, rel=0.05)  # its norms and rotary embeddings are other code


class Forgetful(ShapeCache):
    def call(self, func, args, kwargs):
        return func(*args, **kwargs)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_of_earlier_recordings_change_nothing(family, recompute):
    shapes = ShapeCache()
    sizes = []
    for tensor in (1, 2, 2):
        options = {"rows": 2, "length": 64, "recompute": recompute}
        case = planned_decoder, fields_of(family), ps.ParallelLayout(tensor=tensor)
        assert record(*case, shapes=shapes, **options) == record(*case, shapes=Forgetful(), **options)
        sizes.append(len(shapes._known))
    # The same layout asks for no other shapes, but for collectives of other groups.
    assert sizes[2] - sizes[1] < (sizes[1] - sizes[0]) / 4


EXPERT_LAYOUTS = [
    ps.ParallelLayout(),
    ps.ParallelLayout(data=4, expert=4),
    ps.ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=2),
]


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=["one rank", "expert", "sequence and expert"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_factory_with_experts_is_planned_as_the_model_of_its_config(family, layout):
    config = {**FAMILIES[family], "model_type": family, "norm_topk_prob": True, "max_position_embeddings": 64}
    own, planned = (
        record(factory, ps.ModelConfig(**config), layout, rows=1, length=64)[0]
        for factory in (moe.build_model, planned_decoder)
    )
    figures = [(trace.sizes, trace.held, trace.flops, trace.traffic) for trace in (own, planned)]
    assert figures[0] == figures[1]
    if layout.expert > 1:
        rows = 64 * 2  # of all tokens, also under sequence parallel
        assert own.traffic["expert", "all_to_all"] == 5 * 4 * rows * 64 * 2  # to experts and back, and their gradients
        return
    parameters = dict(build(planned_decoder, ps.ModelConfig(**config), layout, torch.bfloat16).named_parameters())
    unused = [p for name, p in parameters.items() if p.dim() == 1 or "embed_tokens" in name]
    multiplied = own.sizes.dense - sum(p.numel() for p in unused) + own.sizes.expert * 2 // 8  # 2 of 8 experts
    assert own.flops.matmul == 6 * 64 * multiplied


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 7)])
def test_kept_pairs_are_those_of_the_mask(queries, keys, causal, window):
    # A bidirectional window counts every key within the window of an inner query.
    i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]
    kept = (j <= i) if causal else torch.ones(queries, keys, dtype=torch.bool)
    if window is not None:
        kept &= (i - j).abs() < window
    counted = _kept_pairs(queries, keys, causal, window)
    assert counted == kept.sum() if causal or window is None else counted >= kept.sum()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "layout",
    [ps.ParallelLayout(), ps.ParallelLayout(tensor=2, sequence_parallel=True), ps.ParallelLayout(context=2)],
    ids=["one rank", "sequence", "context"],
)
def test_blocks_that_are_not_run_are_recorded_as_if_they_were(monkeypatch, recompute, layout):
    options = {"rows": 1, "length": 64, "recompute": recompute}
    short, _ = record(planned_decoder, fields_of("llama"), layout, **options)
    monkeypatch.setattr(traces, "record_equal_blocks_once", lambda model, recorder: None)
    full, _ = record(planned_decoder, fields_of("llama"), layout, **options)
    assert (short.flops, short.traffic, short.held) == (full.flops, full.traffic, full.held)
    for weight in (0, 1, 2, 4):
        peaks = [max(level.live + weight * level.gradients for level in found.levels) for found in (short, full)]
        assert peaks[0] == peaks[1]


def test_blocks_of_several_kinds_are_told_apart():
    """Every second layer has a window, which changes its FLOPs."""
    windows = {**SMALL, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    windows |= {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
    config = ps.ModelConfig(**windows)
    flops = record(planned_decoder, config, ps.ParallelLayout(), rows=1, length=64)[0].flops
    pairs = 4 * (_kept_pairs(64, 64, True, 8) + _kept_pairs(64, 64, True, None))
    assert flops.attention == 6 * pairs * 8 * 2 * 8  # 2 products of 8 heads of 8, forward and twice backward


def test_a_context_of_a_thousand_ranks_needs_no_process_group():
    layout = ps.ParallelLayout(tensor=8, data=128, sequence_parallel=True)
    sizes = sizes_of(build(planned_decoder, ps.ModelConfig(**LLAMA_405B), layout, torch.bfloat16))
    full = sizes_of(build(planned_decoder, ps.ModelConfig(**LLAMA_405B), ps.ParallelLayout(), torch.bfloat16))
    assert full.trainable == 405_853_388_800
    assert full.trainable / 8 < sizes.trainable < full.trainable / 8 * 1.001  # norms are replicated


def test_models_that_build_on_another_device_are_refused():
    with pytest.raises(ps.ConfigurationError, match="the factory builds weight on cpu: expected the context's device"):
        build(lambda config, context: nn.Linear(2, 2), None, ps.ParallelLayout(), torch.bfloat16)


def test_a_selected_kernel_does_not_matter_on_the_meta_device(monkeypatch):
    monkeypatch.setenv("POLYSHARD_ATTENTION", "cpu_flash")
    trace, _ = record(planned_decoder, fields_of("llama"), ps.ParallelLayout(), rows=1, length=64)
    assert trace.flops.attention > 0
    assert dataclasses.is_dataclass(trace)
