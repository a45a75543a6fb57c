"""Every causal language model of the installed transformers: equal to transformers alone, or refused by name.

`make test-families` takes all of them, other runs one in three.
"""

import importlib
import re
import sys

import pytest
import torch
import transformers
from support.paths import ROOT, TOOLS
from support.workers.on_families import families_outcomes, original_outcome, token_ids

import polyshard as ps
from polyshard.testing import run_ranks

pytestmark = pytest.mark.slow

# Of the families whose attention keeps transformers' code at tensor-parallel 2, these stand for the others: a gate,
# fused projections, replicated heads, norms of heads.
KEPT = ("afmoe", "gpt_neox", "minimax_m2", "phi, norms of heads")

LOCK = ROOT / "requirements" / "cpu.lock"
sys.path.insert(0, str(TOOLS))
families = importlib.import_module("model_families")
tool = importlib.import_module("transformers_models")


@pytest.fixture(scope="module")
def whole(request):
    return request.config.getoption("--all-families")


@pytest.fixture(scope="module")
def outcomes(whole):
    transformers.utils.logging.disable_progress_bar()
    names = families.families()
    return tool.outcomes(names if whole else sorted({*names[::3], *KEPT}))


@pytest.fixture(scope="module")
def saved(outcomes, tmp_path_factory):
    """A directory that transformers wrote for each family that is not refused."""
    directories = {}
    for name, found in outcomes.items():
        if found.cells["rows"] == tool.YES:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(families.small_config(name))
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
                else:
                    weight.data += 0.2 * torch.randn_like(weight)
            for key, buffer in model.named_buffers():
                if key.endswith(("e_score_correction_bias", "expert_bias")):
                    buffer.normal_(std=0.2)
            directories[name] = tmp_path_factory.mktemp("families") / "model"
            model.save_pretrained(directories[name])
    return directories


@pytest.fixture(scope="module")
def originals(saved):
    return {name: original_outcome(directory) for name, directory in saved.items()}


def near(got, expected):
    off, largest = float((got - expected).abs().max()), float(expected.abs().max())
    return off <= 1e-4 * largest + 1e-6  # a key's bias has no gradient but rounding


def problems(name, got, expected):
    found = []
    if not near(got["logits"], expected["logits"]):
        found.append("logits")
    if abs(got["loss"] - expected["loss"]) > 1e-5:
        found.append("loss")
    missing = set(expected["gradients"]) - set(got["gradients"])
    if missing:
        found.append(f"no gradient of {sorted(missing)}")
    found += [
        f"gradient of {weight}"
        for weight, gradient in expected["gradients"].items()
        if weight in got["gradients"] and not near(got["gradients"][weight], gradient)
    ]
    if not isinstance(got["packed"], str) and not near(got["packed"], expected["packed"]):
        found.append("packed")
    return [f"{name}: {problem}" for problem in found]


def test_the_page_in_the_docs_is_current(outcomes, whole):
    page = tool.PAGE.read_text()
    (locked,) = re.findall(r"^transformers==(.+)$", LOCK.read_text(), re.MULTILINE)
    assert f"transformers {locked}," in page
    if transformers.__version__ != locked:
        return
    supported = [tool.row(name, found) for name, found in outcomes.items() if found.cells["rows"] == tool.YES]
    assert [row for row in supported if row not in page.splitlines()] == [], "run python tools/transformers_models.py"
    assert not whole or tool.page(outcomes) == page, "run python tools/transformers_models.py"


def test_no_family_is_left_out():
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert set(names) <= set(families.families())


def test_logits_gradients_and_packed_rows_equal_transformers(outcomes, saved, originals):
    got = families_outcomes(saved)
    assert [p for name in saved for p in problems(name, got[name], originals[name])] == []
    for name in saved:
        refused = outcomes[name].cells["packed"] != tool.YES
        assert isinstance(got[name]["packed"], str) == refused
        if refused:
            assert "Pass one sequence in each row" in got[name]["packed"]
    for name in saved:  # what polyshard saved is what transformers loads
        again = transformers.AutoModelForCausalLM.from_pretrained(
            saved[name] / "again", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        with torch.no_grad():
            logits = again.eval()(token_ids(again.config)[0], use_cache=False).logits
        assert near(logits, originals[name]["logits"]), name


def test_the_same_at_tensor_parallel_2(outcomes, saved, originals, whole):
    everywhere = {name: saved[name] for name in saved if outcomes[name].cells["sharded"].startswith(tool.YES)}
    assert len(everywhere) > (60 if whole else 20)
    sharded = {name: saved[name] for name in everywhere if name in KEPT or not outcomes[name].keeps_attention}
    got = run_ranks(families_outcomes, 2, sharded, timeout=280)[0]
    assert [p for name in sharded for p in problems(name, got[name], originals[name])] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "phimoe",
            "a mixture of experts that is not recognised .*PhimoeSparseMoeBlock: in training it adds noise",
        ),
        (
            "jetmoe",
            "JetMoeForCausalLM has a mixture of experts that is not recognised .*JetMoeMoE without gate_up_proj",
        ),
        ("deepseek_v2", "DeepseekV2Moe: the number of experts per token is unknown"),  # transformers cannot run it
        ("hy_v4", "HYV4MoE: checkpoints store its tensors under other names: shared_experts.linear_gate.weight"),
        ("zaya", "it has no router with one matrix"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM with polyshard's layers differs from transformers'"),
        ("gemma3", "Gemma3Config is not the config of a plain text decoder: it has text_config, vision_config"),
        ("apertus", "stores .* buffers beside its parameters .model.layers.0.mlp.act_fn.beta"),
    ],
)
def test_what_is_refused_is_named_before_memory_is_taken(name, words):
    with pytest.raises(ps.ConfigurationError, match=words):
        ps.transformers_model(families.CONFIG_MAPPING[name](), ps.initialize())  # at its default, real size


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lfm2", r"it has Lfm2ShortConv \(model.layers.0.conv\), which carries state"),
        ("mamba2", r"it has Mamba2Mixer \(backbone.layers.0.mixer\), which carries state"),
        ("bamba", r"it has BambaMixer \(model.layers.0.mamba\), which carries state"),
        ("phi3, longrope", r"a rotary embedding \(longrope\) that depends on the longest sequence"),
    ],
)
def test_layers_that_carry_state_are_named_for_packed_rows(name, words):
    model = ps.transformers_model(families.small_config(name), ps.initialize())
    ids = torch.arange(10)
    model(ids[None])
    for inputs in ({"cu_seqlens": torch.tensor([0, 4, 10])}, {"positions": torch.arange(10) % 5}):
        with pytest.raises(ps.ConfigurationError, match=words):
            model(ids, **inputs)
