"""`ps.plan`: published layouts fit, capabilities decide what is shown, and what is impossible has a reason."""

from functools import partial
from types import SimpleNamespace

import moe
import pytest
from decoder import build_model
from support.planned_cases import CONFIG, LLAMA_405B
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

import polyshard as ps
from polyshard.adapters.deepspeed.settings import check_precision as deepspeed_refuses
from polyshard.adapters.fairscale.engine import _check_precision as fairscale_refuses
from polyshard.core.capabilities import YES, Capabilities
from polyshard.planning import training_adapters
from polyshard.planning.contexts import planned_context
from polyshard.planning.decoder import PlannedDecoder, _settings, planned_decoder
from polyshard.planning.library import Library
from polyshard.planning.memory import memory_of, passes_under_way
from polyshard.planning.strategy import MASTERS, PRECISIONS, Strategy, reason_against, strategies
from polyshard.planning.trace import record

GIB = 2**30
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
}
SMALL = ps.ModelConfig(**CONFIG)


def small_plan(**changes):
    options = {"cluster": ps.Cluster(gpus=8, memory=8 * GIB), "tokens_per_step": 8 * 512, "sequence_length": 256}
    return ps.plan(SMALL, **{**options, **changes})


# Sources: "The Llama 3 Herd of Models" (2024), table 4; "DeepSeek-V3 Technical Report" (2024), section 3.2. Both have
# 80 GB per GPU. Their layers recompute less: they are fused, and keep fewer activations than torch's operators.
PUBLISHED = {
    "Llama 3 405B": (
        LLAMA_405B,
        {"gpus": 8192, "tokens_per_step": 2048 * 8192, "sequence_length": 8192},
        ps.ParallelLayout(tensor=8, pipeline=16, data=64, sequence_parallel=True),
    ),
    "DeepSeek-V3": (
        DEEPSEEK_V3,
        {"gpus": 2048, "tokens_per_step": 15360 * 4096, "sequence_length": 4096},
        ps.ParallelLayout(pipeline=16, data=128, expert=64),
    ),
}


@pytest.mark.parametrize(
    ("name", "factory"), [("Llama 3 405B", None), ("DeepSeek-V3", None), ("DeepSeek-V3", moe.build_model)]
)
def test_published_layouts_fit_where_they_ran(name, factory):
    config, options, layout = PUBLISHED[name]
    found = ps.plan(
        ps.ModelConfig(**config),
        cluster=ps.Cluster(gpus=options["gpus"], memory=80 * 10**9),
        factory=factory,
        adapters=["megatron"],
        layout=layout,
        unsupported=True,
        shardings=("zero1",),
        precisions=(MASTERS,),
        recompute=("full",),
        stages_per_rank=(1,),
        tokens_per_step=options["tokens_per_step"],
        sequence_length=options["sequence_length"],
    )
    (fits,) = found.layouts
    assert 20 * GIB < fits.memory.total < 74 * GIB
    # The full model does not fit on one GPU, nor do its optimizer states without ZeRO.
    assert fits.memory.parameters + fits.memory.optimizer < 80 * 10**9 < 2 * found.parameters


def test_engines_accept_the_planned_precisions_and_stages():
    """Each engine's own checks, of what its adapter is planned to run."""
    refuses = {
        "deepspeed": partial(deepspeed_refuses, config={}),
        "fairscale": lambda precision, _: fairscale_refuses(precision),
    }
    found = small_plan(
        cluster=ps.Cluster(gpus=4, memory=8 * GIB), adapters=list(refuses), recompute=("full",), stages_per_rank=(1,)
    )
    for planned in (*found.layouts, *found.too_large):
        strategy = planned.strategy
        stage = {"data": 0 if strategy.replicas > 1 else 1, "zero1": 1, "zero2": 2, "zero3": 3}[strategy.sharding]
        for adapter in planned.adapters:
            refuses[adapter](strategy.precision, stage)
            assert strategy.layout.pipeline == 1 or stage < 2
    (half, full) = (
        next(
            p
            for p in found.layouts
            if p.strategy.sizes == "d4" and p.strategy.sharding == "zero1" and name in p.adapters
        )
        for name in ("fairscale", "deepspeed")
    )
    assert half.strategy.dtypes == "masters, reduce bfloat16"
    # Parameters in 2 bytes are gathered, and gradients reduced in 2 or in 4.
    assert half.sent["replica"] / full.sent["replica"] == pytest.approx((2 + 2) / (2 + 4))


def test_features_that_a_library_does_not_combine_are_refused():
    strategy = Strategy(layout=ps.ParallelLayout(data=2, expert=2), sharding="zero3")
    assert reason_against(strategy, ps.load_adapter("deepspeed").capabilities) == "expert: not with zero3"


def test_layouts_that_no_adapter_can_run_are_refused_with_the_adapters_reasons():
    found = small_plan(adapters=["fairscale"], recompute=("full",))
    assert {planned.strategy.layout.sequence_parallel for planned in found.layouts} == {False}
    assert all(planned.adapters for planned in found.layouts)
    reason = ps.load_adapter("fairscale").capabilities["sequence"].reason
    assert f"fairscale: sequence: {reason}" in found.refused
    assert "fairscale: data: its engine shards at least as zero1" in found.refused
    times = [planned.time.total for planned in found.layouts]
    assert times == sorted(times)


def test_layouts_appear_when_an_adapter_says_that_it_can_run_them(monkeypatch):
    able = Capabilities("new", dict.fromkeys(ps.load_adapter("torch").capabilities.support, YES))
    adapter = SimpleNamespace(capabilities=able, pipeline_schedules=("1f1b", "interleaved-1f1b"))
    monkeypatch.setattr(training_adapters, "load_adapter", lambda name: adapter)
    cluster = ps.Cluster(gpus=8, gpus_per_node=2, memory=8 * GIB)
    found = small_plan(cluster=cluster, adapters=["new"], shardings=("zero1",), recompute=("none",))
    pipelines = [planned for planned in found.layouts if planned.strategy.layout.pipeline == 4]
    assert pipelines
    assert all(planned.adapters == ("new",) for planned in pipelines)
    assert all(planned.sent["pipeline"] > 0 and planned.time.bubble > 0 for planned in pipelines)


def test_an_interleaved_schedule_has_a_smaller_bubble_and_more_messages_and_activations():
    layout = ps.ParallelLayout(pipeline=2, data=2)
    options = {"cluster": ps.Cluster(gpus=4, memory=8 * GIB), "tokens_per_step": 16 * 256, "layout": layout}
    options["precisions"] = (ps.Precision(),)
    found = small_plan(**options, adapters=["torch", "deepspeed"], shardings=("data",), recompute=("none",))
    once, twice = sorted(found.layouts, key=lambda planned: planned.strategy.stages_per_rank)
    assert (once.strategy.sizes, once.adapters) == ("p2 d2", ("torch", "deepspeed"))
    assert (twice.strategy.sizes, twice.adapters) == ("p2 v2 d2", ("torch",))
    alone = small_plan(**options, adapters=["deepspeed"], shardings=("data",), recompute=("none",))
    assert "deepspeed: interleaved-1f1b: its pipelines run 1f1b" in alone.refused
    assert twice.sent["pipeline"] == 2 * once.sent["pipeline"]
    assert (once.flops, once.memory.parameters) == (twice.flops, twice.memory.parameters)
    assert twice.memory.activations > once.memory.activations
    work = [planned.time.compute + sum(planned.time.communication.values()) for planned in (once, twice)]
    idle = [planned.time.bubble / seconds for planned, seconds in zip((once, twice), work)]
    assert idle == pytest.approx([1 / 8, 1 / 16], rel=0.2)


@pytest.mark.parametrize(("ranks", "several", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (4, 4, 4)])
def test_passes_under_way_are_those_of_torchs_schedule(ranks, several, micro_batches):
    schedule = ScheduleInterleaved1F1B.__new__(ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = ranks, several, micro_batches
    schedule.number_of_rounds = max(1, micro_batches // ranks)
    schedule.microbatches_per_round = micro_batches // schedule.number_of_rounds
    strategy = Strategy(layout=ps.ParallelLayout(pipeline=ranks), micro_batches=micro_batches, stages_per_rank=several)
    for rank in range(ranks):
        held = most = 0
        for action in schedule._calculate_single_rank_operations(rank):
            name = "" if action is None else action.computation_type.name
            held += {"FORWARD": 1, "FULL_BACKWARD": -1, "": 0}[name]
            most = max(most, held)
        assert passes_under_way(strategy, rank) == most


def test_a_factory_that_ignores_pipeline_stages_is_refused():
    def everywhere(config, context):
        return build_model(config, planned_context(ps.ParallelLayout()))

    layout = ps.ParallelLayout(pipeline=2, data=4)
    found = small_plan(factory=everywhere, layout=layout, unsupported=True, shardings=("zero1",), recompute=("none",))
    assert not found.layouts
    assert any("the factory builds the full model on each pipeline stage" in reason for reason in found.refused)


def test_a_users_factory_is_planned_as_the_default_one():
    layout = ps.ParallelLayout(tensor=2, data=4, sequence_parallel=True)
    options = {"recompute": ("selective",), "layout": layout, "adapters": ["torch", "megatron"]}
    own, default = small_plan(factory=build_model, **options), small_plan(**options)
    assert [(p.strategy, p.memory, p.flops) for p in own.layouts] == [
        (p.strategy, p.memory, p.flops) for p in default.layouts
    ]
    assert own.parameters == default.parameters


def test_a_model_that_depends_on_values_is_refused_with_the_reason():
    class Choosing(PlannedDecoder):
        def forward(self, input_ids, inputs_embeds=None):
            return super().forward(input_ids[: int(input_ids.max())])

    def factory(config, context):
        return Choosing(_settings(config), context)

    found = small_plan(factory=factory, layout=ps.ParallelLayout(data=8), shardings=("zero1",), recompute=("none",))
    assert not found.layouts
    assert any("Choosing cannot be recorded on the meta device" in reason for reason in found.refused)


def test_sizes_that_do_not_divide_the_model_are_refused_with_the_layers_reason():
    config = ps.ModelConfig(**{**CONFIG, "num_attention_heads": 4, "num_key_value_heads": 4})
    options: dict = {"cluster": ps.Cluster(gpus=8, memory=8 * GIB), "tokens_per_step": 8 * 256, "sequence_length": 256}
    found = ps.plan(config, **options, shardings=("zero1",), recompute=("none",))
    assert any("cannot be divided by tensor-parallel size 8" in reason for reason in found.refused)


def test_layouts_that_do_not_fit_say_what_they_need():
    options = {"layout": ps.ParallelLayout(data=8), "recompute": ("full",)}
    found = small_plan(cluster=ps.Cluster(gpus=8, memory=GIB, reserve=GIB - 1000), **options)
    assert not found.layouts
    assert found.too_large[0].memory.total > GIB


def test_recomputation_costs_flops_and_saves_memory_and_the_models_flops_stay():
    found = small_plan(layout=ps.ParallelLayout(data=8), shardings=("fsdp",), adapters=["torch"], rows=(2,))
    by_mode = {planned.strategy.recompute: planned for planned in found.layouts}
    none, full = by_mode["none"], by_mode["full"]
    assert none.model_flops == full.model_flops == none.flops * 8
    assert 1.2 < full.flops / none.flops < 1.34  # the blocks' forward passes again, without the head
    assert full.memory.activations < none.memory.activations


def test_a_step_must_be_a_whole_number_of_sequences():
    with pytest.raises(ps.ConfigurationError, match="got 1000, expected a multiple of the sequence length 256"):
        small_plan(tokens_per_step=1000)


def test_models_of_unknown_families_need_a_factory():
    with pytest.raises(ps.ConfigurationError, match="model_type 'gpt2' cannot be planned without its factory"):
        ps.plan(
            {"model_type": "gpt2"},
            cluster=ps.Cluster(gpus=1, memory=5 * GIB),
            tokens_per_step=256,
            sequence_length=256,
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequence_length": 0}, "sequence_length is invalid: got 0, expected at least 1"),
        ({"rows": (0,)}, "rows is invalid: got 0, expected at least 1"),
        ({"stages_per_rank": (0,)}, "stages_per_rank is invalid: got 0"),
        ({"serve": -1}, "serve is invalid: got -1"),
        ({"factory": lambda *_: None}, "the factory does not build a model: got None, expected a torch.nn.Module"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, told):
    with pytest.raises(ps.ConfigurationError, match=told):
        small_plan(**changes)


@pytest.mark.parametrize("name", ["n_routed_experts", "num_experts_per_tok", "rms_norm_eps", "v_head_dim"])
def test_configs_with_experts_must_be_complete(name):
    """Without its number of experts the model would be planned as a dense one."""
    config = ps.ModelConfig(**{field: value for field, value in DEEPSEEK_V3.items() if field != name})
    with pytest.raises(ps.ConfigurationError, match=f"'deepseek_v3' is incomplete: .*{name}.* missing"):
        _settings(config)


def test_replicas_that_do_not_divide_a_step_are_a_reason():
    found = small_plan(cluster=ps.Cluster(gpus=8, memory=8 * GIB, gpus_per_node=1), tokens_per_step=256)
    assert {p.strategy.layout.data for p in (*found.layouts, *found.too_large)} <= {1}
    assert "the replicas do not divide the 1 sequences of a step into equal micro-batches" in found.refused


def test_strategies_use_every_rank_and_every_token():
    made = strategies(
        24,
        48 * 4096,
        4096,
        layers=4,
        experts=4,
        axes=("tensor", "sequence", "context", "pipeline", "expert"),
        max_tensor=8,
        rows=(1, 2),
        shardings=("zero1",),
        precisions=(MASTERS,),
        recompute=("full",),
    )
    found = list(made)
    assert len(set(found)) == len(found) > 20
    for strategy in found:
        assert strategy.layout.world_size == 24
        assert strategy.layout.data * strategy.rows * strategy.micro_batches == 48


def test_serving_counts_weights_and_cache():
    found = small_plan(serve=1, layout=ps.ParallelLayout(data=8), recompute=("full",))
    (plan,) = found.serving
    assert plan.weights == 2 * found.parameters
    assert plan.cache_per_token == 2 * 4 * 2 * 4 * 8  # bytes, layers, keys and values, KV heads, head size
    assert plan.cache_tokens == (int(0.9 * 8 * GIB) - plan.weights) // plan.cache_per_token


@pytest.mark.parametrize(("name", "counted"), [("masters", 208_977_225), ("float32", 241_779_657)])
def test_stage_3_of_deepspeed_holds_a_bucket_and_its_copy(name, counted):
    """Tensors of a step on two ranks with `reduce_bucket_size` 2,000,000, as a dispatch mode has counted them."""
    config = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
    config |= {"model_type": "llama", "vocab_size": 4096, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    strategy = Strategy(
        layout=ps.ParallelLayout(data=2), sharding="zero3", precision=PRECISIONS[name], recompute="full", rows=2
    )
    options = {"rows": 2, "length": 512, "recompute": "full", "dtype": strategy.precision.compute_dtype}
    trace, _ = record(planned_decoder, ps.ModelConfig(**config), strategy.layout, **options)
    planned = memory_of(strategy, trace, library=Library(bucket=2_000_000))
    assert 0.97 * counted < planned.total < 1.02 * counted
