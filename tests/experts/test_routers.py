"""Routers against transformers' own, and the errors of layers that cannot be."""

from dataclasses import replace

import pytest
import torch
import transformers
from support.models import transformers_configs
from torch.nn import functional as F
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeSparseMoeBlock, Ernie4_5_MoeTopKRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.lfm2_moe.modeling_lfm2_moe import Lfm2MoeTopKRouter
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

import polyshard as ps
from polyshard.core.context import ParallelAxis
from polyshard.training.recompute import apply_recomputation
from polyshard.transformers.mixtures import find_mixtures

HIDDEN, SIZE, EXPERTS = 32, 24, 8
CONTEXT = ps.initialize("torch")
SIZES = {"hidden_size": HIDDEN, "intermediate_size": SIZE, "num_experts_per_tok": 3}


def layer(router, **options):
    return ps.mixture_of_experts(HIDDEN, SIZE, EXPERTS, options.pop("per_token", 3), CONTEXT, router=router, **options)


def blocks():
    """Transformers' block, polyshard's layer, and parameters of the first by those of the second."""
    config = transformers.OlmoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=False)
    yield "olmoe", OlmoeSparseMoeBlock(config), layer(ps.Router()), {}
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=EXPERTS, moe_intermediate_size=SIZE, shared_expert_intermediate_size=40
    )
    shared = ps.SharedExperts(size=40, gated=True, name="shared_expert")
    yield "qwen2_moe", Qwen2MoeSparseMoeBlock(config), layer(ps.Router(), shared=shared), {}
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "n_shared_experts": 2}
    sizes = {**SIZES, "n_routed_experts": EXPERTS, "moe_intermediate_size": SIZE, "topk_method": "group_limited_greedy"}
    config = transformers.DeepseekV2Config(**sizes, **groups)
    router = ps.Router(scale=2.5, groups=4, chosen_groups=2, best_of_group=1, dtype=torch.float32)
    yield "deepseek_v2", DeepseekV2Moe(config), layer(router, shared=ps.SharedExperts(size=2 * SIZE)), {}
    config = transformers.DeepseekV3Config(**SIZES, n_routed_experts=EXPERTS, moe_intermediate_size=SIZE, **groups)
    router = ps.Router(
        score="sigmoid", normalize=True, scale=2.5, groups=4, chosen_groups=2, correction_bias=True, dtype=torch.float32
    )
    yield "deepseek_v3", DeepseekV3MoE(config), layer(router, shared=ps.SharedExperts(size=2 * SIZE)), {}
    config = Llama4TextConfig(**{**SIZES, "num_experts_per_tok": 1}, num_local_experts=EXPERTS)
    stacked = ps.ExpertStorage(stacked="gate_up_proj", down="down_proj")
    router = ps.Router(score="sigmoid", scale_input=True)
    shared = ps.SharedExperts(size=SIZE, name="shared_expert")
    ours = layer(router, per_token=1, shared=shared, storage=stacked, router_name="router")
    yield "llama4", Llama4TextMoe(config), ours, {}
    config = transformers.GptOssConfig(**SIZES, num_local_experts=EXPERTS)
    stacked = ps.ExpertStorage(stacked="gate_up_proj", down="down_proj", interleaved=True)
    options = {"storage": stacked, "bias": True, "activation": ps.ClampedSwiglu(), "router_name": "router"}
    yield "gpt_oss", GptOssMLP(config), layer(ps.Router(score="softmax_of_chosen", bias=True), **options), {}

    config = transformers.GraniteMoeConfig(**SIZES, num_local_experts=EXPERTS)
    stacked = ps.ExpertStorage(stacked="gate_up_proj", down="down_proj", transposed=False)
    ours = layer(ps.Router(score="softmax_of_chosen"), storage=stacked, router_name="router")
    yield "granitemoe", GraniteMoeMoE(config), ours, {}
    config = transformers.Ernie4_5_MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=SIZE, moe_num_experts=EXPERTS, moe_k=3, moe_num_shared_experts=2
    )
    router = ps.Router(normalize=True, least_sum=1e-12, correction_bias=True, dtype=torch.float32)
    ours = layer(router, shared=ps.SharedExperts(size=2 * SIZE))
    names = {"gate.e_score_correction_bias": "gate.moe_statics.e_score_correction_bias"}
    yield "ernie4_5_moe", Ernie4_5_MoeSparseMoeBlock(config), ours, names


def copied(block, ours, renamed):
    """Pairs of parameters, by the canonical names of ours; both get the same random values."""
    theirs = {**dict(block.named_parameters()), **{n: b for n, b in block.named_buffers() if "correction" in n}}
    pairs = []
    for name, parameter in ours.named_parameters():
        names = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj", **renamed}
        names |= {f"{ours_}_bias": f"{theirs_}_bias" for ours_, theirs_ in names.items()}
        source = names.get(name, name)
        if source.endswith("gate_up.weight"):  # of shared experts, fused in ours
            pairs.append(([theirs[source.replace("gate_up", f"{part}_proj")] for part in ("gate", "up")], parameter))
        else:
            pairs.append(([theirs[source]], parameter))
    for parts, parameter in pairs:
        for part in parts:
            torch.nn.init.normal_(part, std=0.3)
        with torch.no_grad():
            parameter.copy_(torch.cat(list(parts)).view_as(parameter))
    assert sum(len(parts) for parts, _ in pairs) == len(theirs)
    return pairs


@pytest.mark.parametrize("case", blocks(), ids=lambda case: case[0])
def test_output_and_gradients_equal_transformers(case):
    _, block, ours, renamed = case
    torch.manual_seed(0)
    pairs = copied(block, ours, renamed)
    x = torch.randn(2, 9, HIDDEN)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [block(inputs[0]), ours(inputs[1])]
    theirs, mine = (out[0] if isinstance(out, tuple) else out for out in outputs)
    weight = torch.randn_like(x)
    (theirs.view_as(x) * weight).sum().backward()
    (mine * weight).sum().backward()
    compared = [(theirs.view_as(x), mine), (inputs[0].grad, inputs[1].grad)]
    compared += [(torch.cat([p.grad for p in parts]), q.grad) for parts, q in pairs if q.requires_grad]
    for expected, found in compared:
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 * expected.abs().max().item())


def test_low_scores_are_normalized_with_the_familys_epsilon():
    config = transformers.Lfm2MoeConfig(**SIZES, num_experts=EXPERTS)
    theirs, ours = Lfm2MoeTopKRouter(config), ps.Router(score="sigmoid", normalize=True, epsilon=1e-6)
    torch.manual_seed(0)
    theirs.weight.data.uniform_(-1, 0)
    x, bias = torch.rand(20, HIDDEN), torch.rand(EXPERTS)  # logits of about -8
    _, weights, experts = theirs(x, bias)
    found = ours.route(F.linear(x, theirs.weight), 3, bias)
    assert torch.equal(found.experts, experts)
    torch.testing.assert_close(found.weights, weights, rtol=1e-5, atol=0)
    with pytest.raises(ps.ConfigurationError, match="got best_of_group=0, epsilon=None and least_sum=0.0"):
        ps.Router(best_of_group=0)


def test_weights_are_divided_by_a_least_sum_if_the_bias_chooses_experts_without_scores():
    config = transformers.Ernie4_5_MoeConfig(hidden_size=HIDDEN, moe_num_experts=EXPERTS, moe_k=3)
    theirs, router = Ernie4_5_MoeTopKRouter(config), ps.Router(normalize=True, least_sum=1e-12, correction_bias=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(theirs.weight, std=10.0)
    x, bias = torch.randn(20, HIDDEN), 20 * torch.rand(EXPERTS)
    theirs.moe_statics.e_score_correction_bias.copy_(bias)
    _, weights, experts = theirs(x)
    found = router.route(F.linear(x, theirs.weight), 3, bias)
    assert torch.equal(found.experts, experts)
    assert 0 < weights.sum(-1).min() < 1e-3
    torch.testing.assert_close(found.weights, weights, rtol=1e-5, atol=0)


def test_the_sum_over_experts_is_float32_in_bfloat16():
    torch.manual_seed(0)
    wide = layer(ps.Router(normalize=True))
    narrow = layer(ps.Router(normalize=True)).bfloat16()
    narrow.load_state_dict(wide.bfloat16().state_dict())
    x = torch.randn(16, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(16)])
    narrow.replay = wide.replay = ids
    exact = wide.double()(x.double())
    assert (narrow(x).double() - exact).abs().max() < 2**-7 * exact.abs().max()  # two roundings to 8 bits


def test_the_backward_pass_keeps_outputs_of_experts_in_their_own_dtype():
    narrow, kept = layer(ps.Router(normalize=True)).bfloat16(), []

    def keep(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        narrow(torch.randn(16, HIDDEN, dtype=torch.bfloat16, requires_grad=True))
    rows = 16 * 3 * HIDDEN
    assert (torch.bfloat16, rows) in kept
    assert (torch.float32, rows) not in kept


def test_an_engine_keeps_a_router_in_float32_that_the_family_keeps_there():
    """ERNIE 4.5: transformers keeps its matrix in float32 in models of any dtype."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers_configs.EXPERTS["ernie4_5_moe"])
    assert all(mixture.router.float32_weight for mixture in find_mixtures(model).values())
    router, x = ps.Router(dtype=torch.float32, float32_weight=True), torch.randn(5, 16, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layers = [
            ps.mixture_of_experts(16, 8, 4, 2, context, router=router)
            for context in (CONTEXT, replace(CONTEXT, attention=lambda *_: None))
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    trained, served = layers
    assert (trained.gate.weight.dtype, served.gate.weight.dtype) == (torch.bfloat16, torch.float32)
    assert served.experts.gate_up.dtype == torch.bfloat16
    assert torch.equal(served.gate(x), x.float() @ served.gate.weight.T)
    assert served(x).dtype == torch.bfloat16


def test_replayed_experts_are_taken_and_weighted_by_the_logits():
    torch.manual_seed(0)
    ours = layer(ps.Router(normalize=True))
    x = torch.randn(5, HIDDEN)
    ours.replay = torch.tensor([[0, 1, 2]]).expand(5, 3)
    out = ours(x)
    weights = F.linear(x, ours.gate.weight).softmax(-1)[:, :3]
    experts = ours.experts
    each = [ps.swiglu(x @ experts.gate_up[e].T) @ experts.down[e].T for e in range(3)]
    expected = sum(w[:, None] * y for w, y in zip((weights / weights.sum(-1, keepdim=True)).unbind(1), each))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert ours.gate.weight.grad.abs().max() > 0
    ours.replay = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(ps.ConfigurationError, match=r"replayed experts have the wrong shape: got \(4, 3\)"):
        ours(x)


@pytest.mark.parametrize("score", ["softmax", "softmax_of_chosen"])
def test_the_router_chooses_where_replayed_experts_are_missing(score):
    torch.manual_seed(0)
    ours = layer(ps.Router(score=score))
    x = torch.randn(5, HIDDEN)
    with ps.record_routing(ours) as own:
        ours(x)
    given = own[0][""].clone()
    given[1] = (given[1] + 1) % EXPERTS
    given[3:] = -1
    with ps.replay_routing(ours, {"": given}), ps.record_routing(ours) as taken:
        ours(x)
    assert torch.equal(taken[0][""], torch.where(given < 0, own[0][""], given))
    given[0, 0] = EXPERTS
    with (
        pytest.raises(ps.ConfigurationError, match=f"out of range: got -1 to {EXPERTS}, expected -1 to {EXPERTS - 1}"),
        ps.replay_routing(ours, {"": given}),
    ):
        pass


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("experts per token is invalid: got 9, expected 1 to 8", {"router": ps.Router(), "per_token": 9}),
        ("got 3 groups of 8 experts", {"router": ps.Router(groups=3)}),
        ("got 4 groups of 8 experts, of which 1", {"router": ps.Router(groups=4)}),
        ("biases are unsupported: got storage expert by expert", {"router": ps.Router(), "bias": True}),
        ("activation is unknown: got 'gelu'", {"router": ps.Router(), "activation": "gelu"}),
        ("router is invalid: got 'softmax', expected a ps.Router", {"router": "softmax"}),
        ("balance is invalid: got 0.01, expected a ps.Balance", {"router": None, "balance": 0.01}),
        ("shared is invalid: got 2, expected a ps.SharedExperts", {"router": None, "shared": 2}),
        ("storage is invalid: got 'w1', expected a ps.ExpertStorage", {"router": None, "storage": "w1"}),
        ("experts_per_token is invalid: got '2', expected a positive integer", {"router": None, "per_token": "2"}),
    ],
)
def test_a_layer_that_cannot_be_is_refused(message, options):
    with pytest.raises(ps.ConfigurationError, match=message):
        layer(**options)


def test_a_router_that_cannot_be_is_refused():
    with pytest.raises(ps.ConfigurationError, match="score is unknown: got 'tanh'"):
        ps.Router(score="tanh")
    with pytest.raises(ps.ConfigurationError, match="got 3 chosen of 2"):
        ps.Router(groups=2, chosen_groups=3)
    with pytest.raises(ps.ConfigurationError, match="contradictory"):
        ps.Router(score="softmax_of_chosen", normalize=True)
    for field, value in {"scale": float("nan"), "groups": "2", "dtype": "float32", "epsilon": "1"}.items():
        with pytest.raises(ps.ConfigurationError, match=f"Router.{field} is invalid: got {value!r}, expected"):
            ps.Router(**{field: value})
    with pytest.raises(ps.ConfigurationError, match="Balance.batch is invalid: got '1', expected 0 or more"):
        ps.Balance(batch="1")
    with pytest.raises(ps.ConfigurationError, match="SharedExperts.size is invalid: got -1"):
        ps.SharedExperts(size=-1)


def test_experts_that_do_not_divide_are_refused():
    messages = {"expert": "8 experts cannot be divided by expert-parallel size 3", "tensor": "gate_proj: 25"}
    for name, message in messages.items():
        axes = {name: ParallelAxis(name=name, ranks=(0, 1, 2))}
        context = ps.GroupContext(layout=CONTEXT.layout, device=CONTEXT.device, linear=CONTEXT.linear, axes=axes)
        with pytest.raises(ps.LayoutError, match=f"mixture_of_experts: {message}"):
            ps.mixture_of_experts(HIDDEN, 25, EXPERTS, 2, context)


def test_nan_in_the_router_is_named():
    ours = layer(ps.Router())
    x = torch.randn(5, HIDDEN)
    x[3, 1] = float("nan")
    with pytest.raises(ps.RoutingError, match="not finite for 1 of 5 tokens"):
        ours(x)
    ours = layer(ps.Router(score="sigmoid", correction_bias=True))
    with torch.no_grad():
        ours.correction[2] = float("nan")
    with pytest.raises(ps.RoutingError, match=f"correction bias is not finite for 1 of {EXPERTS} experts"):
        ours(torch.randn(5, HIDDEN))


def test_recomputation_replays_the_experts_of_its_forward_pass():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"mlp": layer(ps.Router(normalize=True))})
    x = torch.randn(5, HIDDEN, requires_grad=True)
    with ps.record_routing(model) as recorded:
        model["mlp"](x)
    experts = {"mlp": (recorded[0]["mlp"] + 1) % EXPERTS}
    gradients = []
    for run in (model["mlp"], lambda x: torch.utils.checkpoint.checkpoint(model["mlp"], x, use_reentrant=False)):
        with ps.replay_routing(model, experts):
            out = run(x)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with (
        pytest.raises(ps.ConfigurationError, match=r"missing \['mlp'\], unexpected \['other'\]"),
        ps.replay_routing(model, {"other": experts["mlp"]}),
    ):
        pass


def test_recomputation_by_an_engine_keeps_forward_passes_apart():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"mlp": layer(ps.Router(normalize=True))})
    inputs = torch.randn(2, 5, HIDDEN, requires_grad=True)
    routes = [torch.rand(5, EXPERTS).topk(3).indices for _ in range(2)]

    def gradients():
        loss = torch.zeros(())
        for x, experts in zip(inputs, routes):  # both forward passes come before the backward pass
            with ps.replay_routing(model, {"mlp": experts}):
                loss = loss + model["mlp"](x).square().sum()
        return torch.autograd.grad(loss, [inputs, *model.parameters()])

    expected = gradients()
    undo = apply_recomputation(model, lambda module: module is model["mlp"])
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
    undo()


@pytest.mark.parametrize(
    ("message", "count", "changed"),
    [
        ("experts of 2 micro-batches are replayed in a forward pass of your own", 2, lambda experts: experts),
        ("the replayed experts are empty. Pass one mapping for each micro-batch", 0, lambda experts: experts),
        (
            r"of micro-batch 0 are invalid: got \(5, 3\) torch.float32, expected int64",
            1,
            lambda experts: experts.float(),
        ),
        (
            r"the layer of micro-batch 1 are out of range: got 8 to 15, expected -1 to 7",
            2,
            lambda experts: experts % 8 + 8,
        ),
        ("micro-batch 0 are contradictory for 5 of 5 tokens: got an expert twice", 1, lambda experts: experts // 8 * 8),
        (
            "micro-batch 0 are contradictory for 2 of 5 tokens: .* or -1 beside",
            1,
            lambda experts: experts.where(experts > 0, -1),
        ),
    ],
)
def test_experts_that_cannot_be_replayed_are_refused(message, count, changed):
    ours = layer(ps.Router())
    experts = torch.arange(15).view(5, 3) % EXPERTS
    given = [{"": experts}, {"": experts}][:count]
    if given:
        given[-1] = {"": changed(experts)}
    with pytest.raises(ps.ConfigurationError, match=message), ps.replay_routing(ours, given):
        ours(torch.randn(5, HIDDEN))


ROUTED = {"prompt": (1, 2), "tokens": (7,), "logprobs": (-0.5,), "finished": True, "version": "4"}


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("experts is invalid: got NoneType, expected a mapping", lambda model: replay(model, None)),
        ("experts is invalid: got Tensor, expected a mapping", lambda model: replay(model, torch.zeros(5, 3).long())),
        (r"experts\[1\] is invalid: got NoneType", lambda model: replay(model, [{"": torch.zeros(5, 3)}, None])),
        ("the layer are invalid: got list, expected an int64 tensor", lambda model: replay(model, {"": [[0, 1, 2]]})),
        ("the layer are invalid: got .* torch.bool", lambda model: replay(model, {"": torch.ones(5, 3).bool()})),
        ("rollouts is invalid: got NoneType", lambda model: ps.packed_routing(None)),
        (r"rollouts\[0\] is invalid: got list, .* Flatten the groups", lambda model: ps.packed_routing([[]])),
        (
            r"rollouts\[1\] has routing of other layers: got \['b'\], expected \['a'\]",
            lambda model: ps.packed_routing(
                [ps.Rollout(**ROUTED, routing={name: torch.zeros(2, 3).long()}) for name in "ab"]
            ),
        ),
        ("got Engine, expected a torch.nn.Module. .* engine's `module`", lambda model: replay(Engine(), {})),
        ("got Engine, expected a torch.nn.Module", lambda model: ps.record_routing(Engine()).__enter__()),
        ("got Engine, expected a torch.nn.Module", lambda model: ps.router_loss(Engine())),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(message, wrong):
    with pytest.raises(ps.ConfigurationError, match=message):
        wrong(layer(ps.Router()))


class Engine:
    """No module, as a training engine."""


def replay(model, experts):
    with ps.replay_routing(model, experts):
        model(torch.randn(5, HIDDEN))


def test_engines_that_average_experts_over_all_replicas_refuse_distributed_ones():
    from polyshard.adapters.fairscale.engine import FairscaleEngine

    class AveragingEngine(FairscaleEngine):
        _trains_distributed_experts = False

    axes = {"expert": ParallelAxis(name="expert", ranks=(0, 1))}
    context = ps.GroupContext(layout=CONTEXT.layout, device=CONTEXT.device, linear=CONTEXT.linear, axes=axes)
    experts = ps.mixture_of_experts(HIDDEN, SIZE, EXPERTS, 2, context)
    with pytest.raises(ps.ConfigurationError, match="AveragingEngine cannot train experts that are distributed"):
        AveragingEngine(experts, ps.AdamW(), context)
    with pytest.raises(ps.ConfigurationError, match=r"Use polyshard.initialize\('fairscale', ...\)"):
        FairscaleEngine(experts, ps.AdamW(), context)
    with pytest.raises(ps.AdapterError, match=r"Use polyshard.initialize\('megatron', ...\)"):
        ps.mixture_of_experts(HIDDEN, SIZE, EXPERTS, 2, context, linear=ps.load_adapter("megatron").linear)
