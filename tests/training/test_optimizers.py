"""Optimizers, parameter groups and frozen parameters on every engine; the oracle is torch in float64 on transformers.

One run moves through all engines, one step on each: state, rates and schedule go with it.
"""

import json
from fnmatch import fnmatch

import pytest
import torch
import transformers
from support.models.tiny import save_tiny
from support.workers.optimizers import moving_run, rows_of, warmup
from torch.nn import functional as F

import polyshard as ps
from polyshard.adapters.shared.parameter_groups import check_elementwise
from polyshard.testing import run_ranks

FROZEN = ("model.embed_tokens*", "*layers.0.mlp.down_proj*")
GROUPS = (
    ps.ParameterGroup("*norm*", lr_scale=0.25, weight_decay=0.3),
    ps.ParameterGroup("lm_head*", lr_scale=2.0, weight_decay=0.0),
)
# With eps of 1, Adam's update is in proportion to the gradient, so that a wrong factor shows.
ADAMW = ps.AdamW(lr=0.5, eps=1.0, weight_decay=0.1, groups=GROUPS)
SGD = ps.TorchOptimizer(torch.optim.SGD, lr=0.5, momentum=0.9, weight_decay=0.1, groups=GROUPS)
DDP, FSDP, *ZERO = {"data_parallel": "ddp"}, {"data_parallel": "fsdp"}, *({"zero_stage": stage} for stage in range(4))
PLACES = [  # data 2, and tensor 2 in between
    *(("torch", 1, FSDP), ("megatron", 1, ZERO[0]), ("deepspeed", 1, ZERO[3]), ("fairscale", 1, ZERO[1])),
    *(("torch", 2, DDP), ("deepspeed", 1, ZERO[1]), ("megatron", 2, ZERO[0]), ("fairscale", 1, ZERO[2])),
    *(("deepspeed", 1, ZERO[0]), ("torch", 1, DDP), ("deepspeed", 1, ZERO[2]), ("torch", 1, FSDP)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model with one KV head, which tensor-parallel ranks share."""
    return save_tiny(tmp_path_factory.mktemp("optimizers") / "model", "llama", num_key_value_heads=1)


def in_one_process(directory, optimizer, frozen, steps):
    """Gradient norms, and the weights after each step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    groups = []
    for name, parameter in model.named_parameters():
        if any(fnmatch(name, pattern) for pattern in frozen):
            parameter.requires_grad_(False)
            continue
        lr, decay = 0.5, 0.1 if parameter.dim() == 2 else 0.0
        if "norm" in name:
            lr, decay = 0.125, 0.3
        elif name.startswith("lm_head"):
            lr, decay = 1.0, 0.0
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    if optimizer is ADAMW:
        made = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1.0, fused=False)
    else:
        made = torch.optim.SGD(groups, momentum=0.9)
    scheduler = warmup(made)
    outcomes = []
    for step in range(steps):
        rows = rows_of(step)
        F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        made.step()
        scheduler.step()
        made.zero_grad()
        outcomes.append((norm, {name: p.detach().clone() for name, p in model.named_parameters()}))
    return outcomes


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_groups_frozen_weights_and_schedule_go_through_every_engine(directory, optimizer, tmp_path):
    places = PLACES
    if optimizer is ADAMW:
        places = [(n, t, ZERO[1] if (n, t) == ("megatron", 2) else options) for n, t, options in PLACES]
    outcomes = run_ranks(moving_run, 2, directory, tmp_path, places, optimizer, FROZEN, timeout=280)[0]
    check(directory, places, outcomes, optimizer)
    start = dict(transformers.AutoModelForCausalLM.from_pretrained(directory).named_parameters())
    unmoved = [name for name, value in outcomes[-1][1].items() if torch.equal(value, start[name])]
    assert unmoved == ["model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"]


def check(directory, places, outcomes, optimizer):
    """Norms and weights after each step are those of one process."""
    for place, (norm, weights), (norm64, weights64) in zip(
        places, outcomes, in_one_process(directory, optimizer, FROZEN, len(places)), strict=True
    ):
        assert norm == pytest.approx(norm64, rel=2e-5), place
        assert weights.keys() == weights64.keys()
        for name, value in weights.items():
            assert (value.double() - weights64[name]).abs().max() < 5e-6, (place, name)


OFFLOAD = {"offload": "optimizer"}
OFFLOADED = [
    *(("deepspeed", 2, ZERO[1] | OFFLOAD), ("torch", 1, FSDP | OFFLOAD), ("deepspeed", 1, ZERO[2] | OFFLOAD)),
    *(("deepspeed", 2, ZERO[3] | OFFLOAD), ("deepspeed", 1, ZERO[3] | OFFLOAD), ("torch", 1, FSDP)),
]


def test_offload_changes_no_number(directory, tmp_path):
    """On CPU ranks: the libraries take their own paths for it, with gradient norms and accumulation of their own."""
    outcomes = run_ranks(moving_run, 2, directory, tmp_path, OFFLOADED, ADAMW, FROZEN, 2, timeout=280)[0]
    check(directory, OFFLOADED, outcomes, ADAMW)


@pytest.mark.parametrize("adapter", ["torch", "deepspeed", "megatron", "fairscale"])
def test_offload_is_refused_where_there_is_none(adapter):
    context = ps.initialize(adapter)
    options = {"zero_stage": 0} if adapter == "deepspeed" else {}
    message = {
        "torch": "expected data_parallel='fsdp' with several replicas",
        "deepspeed": "expected zero_stage 1 to 3",
        "megatron": "'megatron' does not support optimizer state and update on the CPU.*: its HybridDeviceOptimizer",
        "fairscale": "'fairscale' does not support optimizer state and update on the CPU.*: OSS keeps the state",
    }
    with pytest.raises(ps.PolyshardError, match=message[adapter]):
        ps.load_adapter(adapter).engine(torch.nn.Linear(2, 2), ps.AdamW(), context, offload="optimizer", **options)
    ps.shutdown(context)


def engine_of(optimizer, model=None, **options):
    context = ps.initialize("torch")
    return context, ps.load_adapter("torch").engine(model or torch.nn.Linear(3, 2), optimizer, context, **options)


def steps(engine, count):
    for number in range(count):
        engine.backward(engine(torch.full((1, 3), 1.0 + number)).sum())
        engine.step()
    return {name: value.clone() for name, value in engine.weights()}


OTHERS = [
    ps.TorchOptimizer(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True),
    ps.TorchOptimizer(torch.optim.NAdam, lr=0.1),  # keeps a product of rates
    ps.TorchOptimizer(torch.optim.ASGD, lr=0.1),  # keeps two numbers
    ps.TorchOptimizer(torch.optim.Rprop, lr=0.1),  # a state that begins at the rate
    ps.TorchOptimizer(torch.optim.RMSprop, lr=0.1, weight_decay=0.5, centered=True),
    ps.TorchOptimizer(torch.optim.Adagrad, lr=0.1),
    ps.Muon(exclude=(), lr=0.1),
]


@pytest.mark.parametrize("optimizer", OTHERS, ids=lambda o: getattr(o, "cls", type(o)).__name__)
def test_any_optimizer_is_resumed_bit_for_bit(optimizer, tmp_path):
    """Also when its state was saved before the first update, where it is that of a new optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    expected = steps(engine_of(optimizer, model)[1], 4)

    for saved_at in (0, 2):
        model.load_state_dict(start)
        context, engine = engine_of(optimizer, model)
        for number in range(saved_at):
            engine.backward(engine(torch.full((1, 3), 1.0 + number)).sum())
            engine.step()
        directory = tmp_path / str(saved_at)
        ps.save_training_state(engine, directory, context, step=saved_at, config={})
        context, other = engine_of(optimizer)
        steps(other, 3)  # an optimizer with a state of its own
        ps.load_training_state(other, directory, context)
        for resumed in (engine, other):  # a save changes nothing, and a load restores all
            for number in range(saved_at, 4):
                resumed.backward(resumed(torch.full((1, 3), 1.0 + number)).sum())
                resumed.step()
            assert all(torch.equal(value, expected[name]) for name, value in resumed.weights()), saved_at


def test_state_that_cannot_be_stored_is_refused(tmp_path):
    context, engine = engine_of(ps.TorchOptimizer(torch.optim.Adafactor, lr=0.1))
    steps(engine, 1)
    with pytest.raises(ps.CheckpointError, match=r"state 'col_var' of Adafactor cannot be stored: got shape \(1, 3\)"):
        ps.save_training_state(engine, tmp_path / "state", context, step=1, config={})


def test_a_state_of_other_trained_parameters_is_refused(tmp_path):
    context, engine = engine_of(ps.AdamW())
    steps(engine, 1)
    ps.save_training_state(engine, tmp_path / "state", context, step=1, config={})
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    context, other = engine_of(ps.AdamW(), model)
    with pytest.raises(ps.CheckpointError, match=r"is of other parameters: missing \[\], unexpected \['bias'\]"):
        ps.load_training_state(other, tmp_path / "state", context)
    ps.load_training_state(other, tmp_path / "state", context, optimizer=False)


def test_masters_of_trained_parameters_load_beside_frozen_weights(tmp_path):
    model = torch.nn.Linear(3, 2).bfloat16()
    model.bias.requires_grad_(False)
    context, engine = engine_of(ps.AdamW(), model)
    engine.backward(engine(torch.ones(1, 3, dtype=torch.bfloat16)).sum())
    engine.step()
    ps.save_training_state(engine, tmp_path / "state", context, step=1, config={})
    wide = torch.nn.Linear(3, 2)
    wide.bias.requires_grad_(False)
    context, other = engine_of(ps.AdamW(), wide)
    ps.load_training_state(other, tmp_path / "state", context)
    assert torch.equal(wide.bias, model.bias.float())
    masters = [piece.values for piece in engine.optimizer_state().pieces if piece.slot == "master"]
    assert torch.equal(wide.weight.flatten(), masters[0])


def test_a_state_of_an_earlier_version_is_read(tmp_path):
    """Its manifest has neither groups nor schedule."""
    context, engine = engine_of(ps.AdamW(lr=0.1))
    steps(engine, 2)
    ps.save_training_state(engine, tmp_path / "state", context, step=2, config={})
    path = tmp_path / "state" / "polyshard.json"
    manifest = json.loads(path.read_text())
    optimizer = manifest["state"]["optimizer"]
    manifest["state"]["optimizer"] = {name: optimizer[name] for name in ("kind", "step", "lr", "slots")}
    path.write_text(json.dumps(manifest))
    context, other = engine_of(ps.AdamW(lr=0.2))
    ps.load_training_state(other, tmp_path / "state", context)
    assert other.learning_rate == 0.1
    expected = steps(engine, 2)
    assert all(torch.equal(value, expected[name]) for name, value in steps(other, 2).items())


def test_groups_keep_their_ratio_when_the_rate_is_set():
    groups = (ps.ParameterGroup("bias", lr_scale=0.5),)
    _, engine = engine_of(ps.AdamW(lr=0.1, groups=groups))
    engine.set_learning_rate(0.3)
    assert engine.learning_rate == 0.3
    assert sorted(group["lr"] for group in engine.optimizer.param_groups) == [0.15, 0.3]

    def by_hand(named):
        weight, bias = (parameter for _, parameter in named)
        return torch.optim.SGD([{"params": [weight], "lr": 0.4}, {"params": [bias], "lr": 0.1}])

    _, engine = engine_of(by_hand)
    engine.set_learning_rate(0.8)
    assert [group["lr"] for group in engine.optimizer.param_groups] == [0.8, 0.2]


def test_a_parameter_that_an_optimizer_leaves_out_must_be_frozen():
    # Nothing would clear its gradient, which would count in the norm of every later step.
    def first_only(named):
        return torch.optim.SGD([next(parameter for _, parameter in named)], lr=0.1)

    with pytest.raises(ps.ConfigurationError, match="SGD leaves out parameters that require a gradient: .*bias"):
        engine_of(first_only)


def test_the_first_group_that_matches_counts():
    groups = (ps.ParameterGroup("bias", weight_decay=0.7), ps.ParameterGroup("*", lr_scale=0.5))
    made = ps.AdamW(lr=0.1, groups=groups)(torch.nn.Linear(3, 2).named_parameters())
    assert [(group["lr"], group["weight_decay"], group["params"][0].dim()) for group in made.param_groups] == [
        (0.1, 0.7, 1),
        (0.05, 0.1, 2),
    ]


def test_what_has_no_effect_or_another_one_is_refused():
    with pytest.raises(ps.ConfigurationError, match=r"pattern '\*norn\*' matches no parameter: got weight, bias"):
        engine_of(ps.AdamW(groups=(ps.ParameterGroup("*norn*"),)))
    tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ps.ConfigurationError, match=r"matches no parameter.*1.weight is tied to 0.weight"):
        engine_of(ps.AdamW(groups=(ps.ParameterGroup("1.weight"),)), tied)
    with pytest.raises(ps.ConfigurationError, match="nothing to train"):
        engine_of(ps.AdamW(), torch.nn.Linear(3, 2).requires_grad_(False))
    with pytest.raises(ps.ConfigurationError, match="LBFGS is unsupported"):
        engine_of(ps.TorchOptimizer(torch.optim.LBFGS))
    with pytest.raises(ps.ConfigurationError, match="Rprop has no weight decay"):
        engine_of(ps.TorchOptimizer(torch.optim.Rprop, groups=(ps.ParameterGroup("bias", weight_decay=0.1),)))
    with pytest.raises(ps.ConfigurationError, match="expected a subclass of torch.optim.Optimizer"):
        ps.TorchOptimizer(torch.nn.Linear)
    for wrong in ({"lr_scale": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ps.ConfigurationError, match="is invalid: got"):
            ps.ParameterGroup("*", **wrong)


def test_optimizers_that_need_whole_matrices_are_refused_on_parts():
    context = ps.initialize("torch")
    layer = torch.nn.Sequential(ps.column_parallel(4, [2, 2], context, bias=False, names=["gate", "up"]))
    muon = ps.TorchOptimizer(torch.optim.Muon, lr=0.1)
    with pytest.raises(ps.ConfigurationError, match=r"got 2 matrices fused in 0.weight. Use polyshard.Muon"):
        engine_of(muon, layer)
    with pytest.raises(ps.ConfigurationError, match=r"rejects the model or its settings: .*Use polyshard.Muon"):
        engine_of(muon)  # it has a bias
    for cls, tensor, held, message in (
        (torch.optim.Muon, 2, "whole", "Muon needs whole matrices: got a shard of weight. Use polyshard.Muon."),
        (torch.optim.Adafactor, 1, "rows", "Adafactor needs whole matrices: got the parts of them that FSDP or ZeRO"),
        (torch.optim.Adagrad, 1, "flat", "Adagrad is unsupported with ZeRO: DeepSpeed builds it again"),
        (torch.optim.Rprop, 1, "rows", "Rprop is unsupported with FSDP2"),
    ):
        layer = ps.column_parallel(4, 4, context, bias=False)
        built = ps.TorchOptimizer(cls, lr=0.1)(layer.named_parameters())
        with pytest.raises(ps.ConfigurationError, match=message):
            check_elementwise(built, ps.collect_layouts(layer).values(), dict(layer.named_parameters()), tensor, held)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_a_save_before_every_parameter_has_had_a_gradient_changes_nothing(tmp_path, cls, caplog):
    context = ps.initialize("torch")

    def weights(save):
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        settings = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        engine = ps.load_adapter("torch").engine(model, ps.TorchOptimizer(cls, lr=0.1, **settings), context)
        for step in range(4):
            hidden = model[0](torch.arange(8.0).view(2, 4) + step)
            engine.backward((model[1](hidden) if step > 2 else hidden).sin().sum())
            engine.step()
            if save:
                ps.save_training_state(engine, tmp_path / "state", context, step=step, config={})
        return [parameter.detach() for parameter in model.parameters()]

    for plain, saved in zip(weights(False), weights(True)):
        assert torch.equal(plain, saved)
    assert ("parameters have had 1 to 4 updates" in caplog.text) == (cls is not torch.optim.SGD)  # which counts none
