"""Hugging Face directories: written whole or not at all, loaded exactly or not at all."""

import filecmp
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import decoder
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models.tiny import VOCAB, save_tiny, tiny_config

import polyshard as ps
from polyshard.checkpoint.storage import BUCKET_BYTES
from polyshard.testing import run_ranks
from polyshard.testing.memory import PeakMemory


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "model", "qwen3")


@pytest.fixture
def copy(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load(directory):
    context = ps.initialize("torch")
    model = decoder.build_model(ps.read_config(directory), context)
    ps.initialize_weights(model, context, seed=9)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        ps.load_checkpoint(model, directory, context)
    except ps.CheckpointError:
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters()), "weights were changed"
        raise
    return model, context


DAMAGE = {
    "missing": (
        lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
        r"missing \(1\): .*1.self_attn.k_proj",
    ),
    "extra": (
        lambda t: t.update({"model.extra.weight": torch.ones(2)}),
        r"unexpected \(1\): model.extra.weight",
    ),
    "numbers": (
        lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
        r"wrong dtype, expected float16, bfloat16, .* \(1\): model.norm.weight is int8. Dequantize .* first",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"wrong shape \(1\): model.norm.weight: got \[3\], expected \[48\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(copy, damage):
    change, message = DAMAGE[damage]
    edit(copy, change)
    with pytest.raises(ps.CheckpointError, match=message):
        load(copy)


def test_several_faults_are_told_at_once(copy):
    for change, _ in DAMAGE.values():
        edit(copy, change)
    with pytest.raises(ps.CheckpointError, match=r"missing \(1\).*unexpected \(1\).*wrong shape \(1\)"):
        load(copy)


def test_a_truncated_file_is_recognised(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ps.CheckpointError, match="truncated or not a safetensors file"):
        load(copy)


def test_a_directory_without_weights_or_config(tmp_path):
    with pytest.raises(ps.CheckpointError, match="config.json does not exist"):
        ps.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ps.CheckpointError, match="not valid JSON"):
        ps.read_config(tmp_path)
    shutil.copy(save_tiny(tmp_path / "other", "qwen3") / "config.json", tmp_path)
    with pytest.raises(ps.CheckpointError, match="holds no weights: expected model.safetensors or"):
        load(tmp_path)


def split_in_two(directory):
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:5], names[5:])):
        file = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, weight_map


def test_an_index_is_followed_and_checked(copy, original):
    index, weight_map = split_in_two(copy)
    whole, _ = load(original)
    model, _ = load(copy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters()))

    name = next(iter(weight_map))
    index.write_text(json.dumps({"weight_map": weight_map | {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ps.CheckpointError, match="outside its directory"):
        load(copy)
    index.write_text(json.dumps({"weight_map": weight_map | {name: "model-1.safetensors"}}))
    with pytest.raises(ps.CheckpointError, match="which does not contain it"):
        load(copy)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (copy / "model-1.safetensors").unlink()
    with pytest.raises(ps.CheckpointError, match="names the shard 'model-1.safetensors', which does not exist"):
        load(copy)


def test_a_config_that_the_decoder_does_not_know():
    context = ps.initialize("torch")
    with pytest.raises(ps.ConfigurationError, match="model_type is unsupported: got 'gpt2', expected one of llama"):
        decoder.build_model(transformers.GPT2Config(), context)
    with pytest.raises(ps.ConfigurationError, match="silu only, not hidden_act='gelu'"):
        decoder.build_model(tiny_config("llama", hidden_act="gelu"), context)


def save_on_ranks(source, target, sizes, data_parallel, max_shard_bytes):
    context = ps.initialize("torch", timeout=60, **sizes)
    config = ps.read_config(source)
    model = decoder.build_model(config, context)
    ps.load_checkpoint(model, source, context)
    if data_parallel is not None:
        model = ps.load_adapter("torch").engine(model, ps.AdamW(), context, data_parallel=data_parallel)
    ps.save_checkpoint(
        model,
        target,
        context,
        config=config,
        architecture="MyDecoder",
        factory="decoder:build_model",
        companions=source,
        max_shard_bytes=max_shard_bytes,
    )
    ps.shutdown(context)


@pytest.mark.parametrize(
    ("ranks", "sizes", "data_parallel", "limit"),
    [
        (1, {}, None, 10**9),
        (2, {"tensor": 2}, None, 10**9),
        (2, {"tensor": 2}, None, 30_000),
        (2, {}, "fsdp", 10**9),
        (4, {"tensor": 2}, "fsdp", 30_000),
        (4, {"tensor": 4}, "ddp", 10**9),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_saved_from_any_size_it_is_the_same_directory_bit_for_bit(tmp_path, ranks, sizes, data_parallel, limit, tied):
    source = save_tiny(tmp_path / "source", "qwen3", tie_word_embeddings=tied)
    (source / "tokenizer.json").write_text("{}")
    target = tmp_path / "out" / "saved"
    run_ranks(save_on_ranks, ranks, source, target, sizes, data_parallel, limit)
    files = sorted(p.name for p in target.iterdir())
    assert ("model.safetensors.index.json" in files) == (limit < 10**6)
    assert "tokenizer.json" in files
    tensors = {}
    for path in target.glob("*.safetensors"):
        tensors |= load_file(path)
    want = load_file(source / "model.safetensors")
    assert set(tensors) == set(want)
    assert all(torch.equal(tensors[n], want[n]) for n in want)
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["MyDecoder"]
    assert config["polyshard"] == {"factory": "decoder:build_model"}
    # transformers reads it too
    ids = torch.arange(10)[None]
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits for d in (source, target)
    ]
    assert torch.equal(*logits)
    assert [p.name for p in target.parent.iterdir()] == ["saved"]  # nothing temporary is left
    mode = (target / next(p.name for p in target.glob("*.safetensors"))).stat().st_mode
    assert mode & 0o044, "readable for others, as the umask says"


def fail_to_save(source, target, failing):
    context = ps.initialize("torch", tensor=2, timeout=60)
    config = ps.read_config(source)
    model = decoder.build_model(config, context)
    ps.load_checkpoint(model, source, context)
    if context.rank == failing:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # a full disk, for this rank alone
    try:
        ps.save_checkpoint(model, target, context, config=config)
    except ps.CheckpointError as error:
        ps.shutdown(context)
        return str(error)
    return None


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_save_leaves_the_previous_checkpoint_and_is_told_on_every_rank(original, copy, failing):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    for told in run_ranks(fail_to_save, 2, original, copy, failing):
        assert "failed; nothing was changed" in told
        assert f"rank {failing}: [Errno 27] File too large" in told
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert os.listdir(copy.parent) == [copy.name]


def test_other_files_of_a_directory_are_kept_and_other_weights_are_never_overwritten_or_joined(original, copy):
    model, context = load(original)
    (copy / "logs").mkdir()
    (copy / "logs" / "run.txt").write_text("step 1")
    (copy / "step-1").mkdir()
    shutil.copy(copy / "model.safetensors", copy / "step-1")
    (copy / "here").symlink_to("logs")
    (copy / "gone").symlink_to("missing")
    for _ in range(2):  # over a directory of transformers, and over a checkpoint
        ps.save_checkpoint(model, copy, context, config=ps.read_config(original))
        assert (copy / "here" / "run.txt").read_text() == "step 1"
        assert (copy / "here").is_symlink()
        assert (copy / "gone").is_symlink()
        assert filecmp.cmp(copy / "step-1" / "model.safetensors", original / "model.safetensors", shallow=False)
    load(copy)
    (copy / "adapter_model.safetensors").write_bytes(b"of another program")
    before = sorted(copy.rglob("*"))
    with pytest.raises(ps.CheckpointError, match=r"not part of .*adapter_model.safetensors\. Nothing was"):
        ps.save_checkpoint(model, copy, context, config=ps.read_config(original))
    assert sorted(copy.rglob("*")) == before


def test_other_dtypes_are_converted(original, tmp_path):
    model, context = load(original)
    ps.save_checkpoint(model, tmp_path / "half", context, config=ps.read_config(original), dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load(tmp_path / "half")[0].lm_head.weight.dtype == torch.float32


def test_a_tied_head_may_be_stored_under_its_own_name_if_it_is_equal(tmp_path):
    directory = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(directory)
    edit(directory, lambda t: t.update({"lm_head.weight": torch.zeros(VOCAB, 48)}))
    with pytest.raises(ps.CheckpointError, match="are tied in the model but differ in the checkpoint"):
        load(directory)


def peaks(source, target):
    context = ps.initialize("torch", tensor=3, timeout=120)
    model = decoder.build_model(ps.read_config(source), context)
    found = {}
    with PeakMemory() as peak:
        ps.load_checkpoint(model, source, context)
    found["load"] = peak.bytes
    with PeakMemory() as peak:
        ps.save_checkpoint(model, target, context, config=ps.read_config(source))
    found["save"] = peak.bytes
    found["shard"] = sum(parameter.nbytes for parameter in model.parameters())
    ps.shutdown(context)
    return found


def test_loading_and_saving_take_one_bucket_beside_the_weights(smollm2, tmp_path):
    """SmolLM2 on three ranks: a third of 540 MB in float32 each; whoever gathered would show."""
    for found in run_ranks(peaks, 3, smollm2, tmp_path / "saved", timeout=200):
        # The parameters' own pages may be touched first while they are filled.
        assert found["load"] <= found["shard"] + BUCKET_BYTES + (16 << 20)
        assert found["save"] <= BUCKET_BYTES + (16 << 20)


def test_a_save_to_a_symbolic_link_replaces_the_directory_behind_it(original, copy, tmp_path):
    model, context = load(original)
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to("model")
    dangling.symlink_to(tmp_path / "disk" / "new")
    for path, real in ((link, copy), (dangling, tmp_path / "disk" / "new")):
        ps.save_checkpoint(model, path, context, config=ps.read_config(original))
        assert path.is_symlink()
        assert (real / "polyshard.json").is_file()
        load(path)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "disk", "link", "model"]
