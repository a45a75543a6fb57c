"""LoRA on every library's layers: the oracle is PEFT on transformers in one process."""

import json

import moe
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.models.experts import save_moe
from support.models.tiny import save_tiny
from support.oracles.transformers_reference import FLOOR, MARGIN
from support.suite_engines import ENGINES
from support.workers.lora import ADAMW, CLIP, FIELDS, STEPS, Case, logits_of, rows, run, saved_and_moved, start, trained
from support.workers.lora_pipelines import trained as trained_in_stages
from torch import nn
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import run_ranks

TENSOR, SEQUENCE, CONTEXT = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"context": 2}
PIPELINE = {"pipeline": 2}
PIPELINES = {"torch": {}, "megatron": {"zero_stage": 0}, "deepspeed": {"zero_stage": 1}, "fairscale": {"zero_stage": 1}}
DROPPED = {"lora_dropout": 0.3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with one KV head, which two tensor-parallel ranks share."""
    return save_tiny(tmp_path_factory.mktemp("lora") / "base", "llama", num_key_value_heads=1)


def with_peft(base, adapter, dtype=torch.float32, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, str(adapter), **options)


class PeftRun:
    """PEFT's training from the start that polyshard draws."""

    def __init__(self, base, first, dtype):
        model = with_peft(base, first, dtype, is_trainable=True)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, **ADAMW)
        figures = []
        for step in range(STEPS):
            ids, labels = rows(step)
            scores = model(ids).logits.to(torch.promote_types(dtype, torch.float32))
            loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten())
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainable, CLIP)
            assert norm > CLIP
            optimizer.step()
            optimizer.zero_grad()
            figures += [loss.detach().double(), norm.double()]
        self.model, self.figures = model, torch.stack(figures)
        self.end = {name: value.detach() for name, value in peft.get_peft_model_state_dict(model).items()}
        self.logits = logits(model)


class Oracle:
    """The run in float64. polyshard may be four times as far from it as PEFT's float32, as elsewhere in the tests."""

    def __init__(self, base, folder):
        context = ps.initialize("torch")
        self.first = ps.save_lora(start(base, context, Case("", {})), folder / "start", context)
        dtypes = (torch.float64, torch.float32, torch.bfloat16)  # of the base: PEFT widens bfloat16 matrices to float32
        exact, rounded, narrow = (PeftRun(base, self.first, dtype) for dtype in dtypes)
        self.figures, self.end = exact.figures, exact.end
        self.figures_bound = MARGIN * worst(rounded.figures, exact.figures) + FLOOR * float(exact.figures.max())
        # In bfloat16 a norm is off by 1% to 4%, with either of transformers' attentions, too: only losses are compared.
        self.narrow_bound = MARGIN * worst(narrow.figures[::2], exact.figures[::2])
        self.bound = MARGIN * max(float((rounded.end[n] - value).abs().max()) for n, value in exact.end.items())
        self.folder = folder / "end"
        rounded.model.save_pretrained(self.folder)
        self.logits = logits(with_peft(base, self.folder, torch.float64))
        self.logits_bound = MARGIN * worst(rounded.logits, self.logits) + FLOOR * float(self.logits.abs().max())


@pytest.fixture(scope="module")
def oracle(base, tmp_path_factory):
    return Oracle(base, tmp_path_factory.mktemp("oracle"))


def layouts_of(adapter):
    """All engines over two replicas, and the last of them in the other layouts."""
    last = ENGINES[adapter][-1]
    sharded = [Case(f"replicas {i}", options) for i, options in enumerate(ENGINES[adapter][:-1])]
    narrow = Case("bfloat16", last, dtype=torch.bfloat16)
    found = [
        ({}, [*sharded, Case("replicas", last, saves=("start", "end", "merged")), narrow]),
        (TENSOR, [Case("tensor", last, saves=("start", "end", "merged"))]),
    ]
    if ps.load_adapter(adapter).capabilities["sequence"].available:
        found.append((SEQUENCE, [Case("sequence", last)]))
    options = PIPELINES[adapter]
    narrow = Case("bfloat16 pipeline", options, dtype=torch.bfloat16, saves=())
    found.append((PIPELINE, [Case("pipeline", options, saves=("start", "end", "merged")), narrow]))
    if adapter == "torch":
        dropped = {"options": {"recompute": "full"}, "fields": DROPPED, "saves": ()}
        found[1][1].append(Case("dropped tensor", **dropped))
        found[2][1].append(Case("dropped sequence", **dropped))
        found.append((CONTEXT, [Case("context", last), Case("dropped context", **dropped)]))
    return found


@pytest.mark.parametrize("adapter", ENGINES)
def test_training_is_that_of_peft(base, oracle, tmp_path, adapter):
    layouts = layouts_of(adapter)
    outcome = run_ranks(trained, 2, base, tmp_path, adapter, layouts, timeout=280)
    cases = [case for _, cases in layouts for case in cases]
    for case in cases:
        for figures, with_state in (of_rank[case.name] for of_rank in outcome):
            assert all(".lora_" in name for name in with_state), "the optimizer holds state of the matrices only"
            if not case.fields:
                found = torch.tensor(figures)
                if case.dtype == torch.float32:
                    assert worst(found, oracle.figures) < oracle.figures_bound, case
                else:
                    assert worst(found[::2], oracle.figures[::2]) < oracle.narrow_bound, case
        if "start" in case.saves:
            assert_close(load_file(tmp_path / case.name / "start" / "adapter_model.safetensors"), first(oracle), 0.0)
        if case.dtype == torch.float32 and "end" in case.saves:
            assert_close(
                load_file(tmp_path / case.name / "end" / "adapter_model.safetensors"), oracle.end, oracle.bound
            )
        if "merged" in case.saves:
            merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / case.name / "merged")
            end = tmp_path / case.name / "end"
            exact, rounded = (logits(with_peft(base, end, dtype)) for dtype in (torch.float64, torch.float32))
            assert worst(logits(merged), exact) < MARGIN * worst(rounded, exact) + FLOOR * exact.abs().max()
    if adapter == "torch":  # with dropout and recomputation, every layout is a single process
        context = ps.initialize("torch")
        alone = run(start(base, context, Case("", {}, DROPPED)), context)
        assert alone != pytest.approx(oracle.figures.tolist(), rel=1e-3)
        for name in ("dropped tensor", "dropped sequence", "dropped context"):
            assert outcome[0][name][0] == pytest.approx(alone, rel=1e-5), name


def logits(model):
    with torch.no_grad():
        return model(rows(0)[0]).logits


def worst(found, exact):
    return float((found - exact).abs().max())


def first(oracle):
    return load_file(oracle.first / "adapter_model.safetensors")


def assert_close(found, wanted, bound):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= bound, name


@pytest.mark.parametrize("sizes", [{}, TENSOR], ids=["one rank", "tensor 2"])
def test_an_adapter_of_peft_is_loaded_at_any_size(base, oracle, sizes):
    for found in run_ranks(logits_of, sizes.get("tensor", 1), base, oracle.folder, sizes):
        assert worst(found, oracle.logits) < oracle.logits_bound


def test_several_stages_of_a_rank_train_as_one_process(tmp_path):
    tied = save_tiny(tmp_path / "tied", "llama", num_hidden_layers=4, tie_word_embeddings=True)
    schedules = ("interleaved-1f1b", "zero-bubble-v", "dualpipe-v")
    outcome = run_ranks(trained_in_stages, 2, tied, schedules, tmp_path)
    context = ps.initialize("torch")
    engine = start(tied, context, Case("", {}))
    alone = run(engine, context)
    ps.save_lora(engine, tmp_path / "alone", context)
    wanted = load_file(tmp_path / "alone" / "adapter_model.safetensors")
    for schedule in schedules:
        found = load_file(tmp_path / schedule / "adapter_model.safetensors")
        assert_close(found, wanted, 1e-5)
        assert_close(load_file(tmp_path / f"{schedule} again" / "adapter_model.safetensors"), found, 0.0)
        config, other = ((tmp_path / name / "adapter_config.json").read_text() for name in (schedule, "alone"))
        assert config == other
    for figures, told in outcome:
        for schedule in schedules:
            assert figures[schedule] == pytest.approx(alone, rel=1e-5), schedule
        assert "does not have or that are excluded: got colour_proj" in told["an unknown target"]
        assert "matches no linear layer: got {'colour_proj'}, expected names among" in told["no target"]
        assert "targets no layer of the pipeline stages on rank 1" in told["a stage without targets"]
        assert "LoRA on an embedding or an output projection is unsupported" in told["the embedding"]


def test_a_training_state_resumes_bit_for_bit_and_moves_between_libraries(base, tmp_path):
    narrow = {"dtype": torch.bfloat16, "widened": False}  # matrices with float32 masters
    in_bfloat16 = ps.Precision(parameters=torch.bfloat16, reduce=torch.bfloat16)  # as FairScale reduces
    kinds = [
        ("torch", {}, Case("", {"data_parallel": "fsdp"})),
        ("torch", {}, Case("", {"data_parallel": "fsdp"})),
        ("megatron", TENSOR, Case("", {"zero_stage": 1})),
        ("torch", PIPELINE, Case("", {})),
        ("deepspeed", {}, Case("", {"zero_stage": 3})),
        ("fairscale", {}, Case("", {"zero_stage": 2})),
        ("megatron", {}, Case("", {"zero_stage": 1}, **narrow)),
        ("megatron", {}, Case("", {"zero_stage": 1}, **narrow)),
        ("torch", TENSOR, Case("", {"data_parallel": "ddp"}, **narrow)),
        ("deepspeed", {}, Case("", {"zero_stage": 2}, **narrow)),
        ("fairscale", {}, Case("", {"zero_stage": 1, "precision": in_bfloat16}, **narrow)),
    ]
    states = [tmp_path / f"step-{i}" for i in range(len(kinds))]
    outcome, _ = run_ranks(saved_and_moved, 2, base, states, kinds, timeout=280)
    assert outcome[1] == outcome[0]
    assert outcome[7] == outcome[6]
    for figures in outcome[2:6]:
        assert figures == pytest.approx(outcome[0], rel=1e-5)
    for figures in outcome[6:]:
        assert figures[::2] == pytest.approx(outcome[0][::2], rel=5e-3)
    # Matrices, and masters after them, pass through all libraries without losing a bit.
    matrices = load_file(states[0] / "adapter_model.safetensors")
    for state in states[1:6]:
        assert_close(load_file(state / "adapter_model.safetensors"), matrices, 0.0)
    masters = {name.removeprefix("base_model.model."): value for name, value in matrices.items()}
    for state in states[6:]:
        assert_close(load_file(state / "training" / "master.safetensors"), masters, 0.0)
    state = states[0]
    assert {path.name for path in state.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "config.json", "polyshard.json", "training")
    }, "the base is not copied"

    context = ps.initialize("torch")
    other = save_tiny(tmp_path / "other", "llama", num_key_value_heads=1, rms_norm_eps=1e-6)
    engine = start(other, context, Case("", {}))
    before = {name: weight.clone() for name, weight in engine.weights()}
    with torch.no_grad():
        engine.module.model.norm.weight[0] += 1.0
    with pytest.raises(ps.CheckpointError, match=r"LoRA adapter was trained over other weights.* 'model.norm.weight'"):
        ps.load_training_state(engine, state, context)
    assert all(torch.equal(w, before[n]) for n, w in engine.weights() if ".lora_" in n), "nothing was loaded"


def model_with(config, directory, **options):
    import decoder

    context = ps.initialize("torch")
    model = decoder.build_model(ps.read_config(directory), context)
    return ps.add_lora(model, config, context, **options), context


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "fields that polyshard does not support: got use_dora=True"),
        ({"bias": "all", "modules_to_save": ["lm_head"]}, "got bias='all', modules_to_save=\\['lm_head'\\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is unsupported: got 'pissa'"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["lm_head"]}, "an embedding or an output projection is unsupported: got target 'lm_head'"),
        ({"target_modules": ["q_proj", "query"]}, "the model does not have or that are excluded: got query"),
        ({"target_modules": "none"}, "matches no linear layer: got 'none', expected names among .*q_proj"),
        ({"r": 2.5}, "LoRA rank of .* is invalid: got 2.5"),
        ({"lora_alpha": 0}, "lora_alpha of .* is invalid: got 0"),
        ({"lora_alpha": "8"}, "lora_alpha of .* is invalid: got '8'"),
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern has a pattern that matches no projection: got 'k_proj'"),
    ],
)
def test_what_is_unsupported_is_refused_by_name(base, fields, message):
    config = peft.LoraConfig(**{**FIELDS, "rank_pattern": {}, **fields})
    with pytest.raises(ps.ConfigurationError, match=message):
        model_with(config, base)


def test_other_methods_of_peft_are_refused_by_name(base):
    config = peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10)
    with pytest.raises(ps.ConfigurationError, match="config is unsupported: got AdaLoraConfig"):
        model_with(config, base)


def test_every_field_of_a_config_is_used_carried_or_refused():
    """A version of PEFT with more fields has to be looked at; until then a value other than the default is refused."""
    from dataclasses import fields

    from polyshard.lora.config import CARRIED, USED

    known = {field.name for field in fields(peft.LoraConfig)}
    assert known >= USED | CARRIED


def test_experts_that_get_no_adapter_are_named(tmp_path, caplog):
    """Layer 0 of this model is dense; the experts of layer 1 have projections of the same names."""
    directory = save_moe(tmp_path / "model", "unnormalized")
    context = ps.initialize("torch")

    def add(targets):
        model = moe.build_model(ps.read_config(directory), context)
        ps.add_lora(model, peft.LoraConfig(r=2, target_modules=targets), context)

    for targets in (["q_proj", "gate_proj"], ["q_proj", "gate_up"], "all-linear"):
        caplog.clear()
        add(targets)
        assert "of experts, which get no adapter and stay frozen" in caplog.text, targets
        assert "model.layers.1.mlp.experts" in caplog.text
    caplog.clear()
    add(["q_proj"])
    assert not caplog.text
    with pytest.raises(ps.ConfigurationError, match="LoRA on the experts of a layer is unsupported: got target"):
        add(r".*\.experts\..*")


def test_targets_are_chosen_as_peft_chooses_them(base):
    """Also by pattern and by layer; `all-linear` leaves the head out."""
    cases = [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(k_proj|down_proj)"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]},
    ]
    for case in cases:
        model, context = model_with(peft.LoraConfig(r=2, **case), base)
        own = set(load_file(ps.save_lora(model, base.parent / "chosen", context) / "adapter_model.safetensors"))
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)
        wanted = peft.get_peft_model_state_dict(peft.get_peft_model(plain, peft.LoraConfig(r=2, **case)))
        assert own == set(wanted), case


def test_without_the_adapter_the_model_is_the_base(base):
    model, _ = model_with(peft.LoraConfig(**FIELDS), base)
    ids = rows(0)[0]
    with torch.no_grad():
        adapted = model(ids)
        with ps.lora_disabled(model):
            plain = model(ids)
        assert torch.equal(model(ids), adapted)
    for layer in [m for m in model.modules() if hasattr(m, "base_layer")]:
        layer.lora_B.apply(lambda matrix: nn.init.zeros_(matrix.weight) if hasattr(matrix, "weight") else None)
    with torch.no_grad():
        assert torch.equal(model(ids), plain)
        assert not torch.equal(adapted, plain)


def test_other_files_and_models_are_refused(base, tmp_path):
    config = peft.LoraConfig(**FIELDS)
    model, context = model_with(config, base)
    saved = ps.save_lora(model, tmp_path / "adapter", context, base_model="the-base")
    fields = json.loads((saved / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "the-base"
    ps.save_lora(model, tmp_path / "adapter", context, base_model=base)
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    with pytest.raises(ps.ConfigurationError, match="base_model is invalid: got 3"):
        ps.save_lora(model, tmp_path / "adapter", context, base_model=3)
    with pytest.raises(ps.ConfigurationError, match="already has a LoRA adapter"):
        ps.add_lora(model, config, context)
    with pytest.raises(ps.CheckpointError, match=r"has a LoRA adapter.*save_lora.*save_merged_lora"):
        ps.save_checkpoint(model, tmp_path / "whole", context, config=ps.read_config(base))
    other, _ = model_with(peft.LoraConfig(**{**FIELDS, "lora_alpha": 16}), base)
    with pytest.raises(ps.CheckpointError, match="has another scaling than the model .*got 4, expected 8"):
        ps.load_lora(other, saved, context)
    fewer, _ = model_with(peft.LoraConfig(**{**FIELDS, "target_modules": ["q_proj"], "rank_pattern": {}}), base)
    with pytest.raises(ps.CheckpointError, match=r"unexpected \(20\): model.layers"):
        ps.load_lora(fewer, saved, context)
    (saved / "adapter_config.json").write_text(json.dumps({**fields, "use_dora": True}))
    with pytest.raises(ps.CheckpointError, match="does not support: got use_dora=True"):
        ps.load_lora(model, saved, context)
    with pytest.raises(ps.CheckpointError, match="holds no LoRA adapter"):
        ps.load_lora(model, base, context)
