"""A source of several parts is read whole, or refused: whichever part is missing, torn, or of another checkpoint."""

import argparse
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.models.tiny import save_tiny, tiny_config, tiny_model
from support.oracles.conversions import ALLOW, logits, save_gguf, save_module, with_config
from support.oracles.library_checkpoints import save_dcp, save_deepspeed
from support.oracles.megatron_legacy import save_legacy

import polyshard as ps
from polyshard.convert import convert
from polyshard.testing import run_ranks

SHAPE = {
    **{"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64},
}


DEEPSEEK = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32},
    **{"first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
    **{"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama", num_hidden_layers=3, **SHAPE))


@pytest.fixture(scope="module")
def hugging_face(model, tmp_path_factory):
    """In three shards."""
    directory = tmp_path_factory.mktemp("parts") / "hf"
    model.save_pretrained(directory, max_shard_size="200KB")
    assert len(list(directory.glob("model-*.safetensors"))) == 3
    return directory


def _refused(source, tmp_path, message, options=ALLOW):
    with pytest.raises(ps.CheckpointError, match=message):
        convert(source, tmp_path / "out", options=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_shard_of_safetensors_without_its_siblings(tmp_path, hugging_face, part, index):
    source = tmp_path / "source"
    shutil.copytree(hugging_face, source)
    if not index:
        (source / "model.safetensors.index.json").unlink()
    (source / f"model-0000{part}-of-00003.safetensors").unlink()
    _refused(source, tmp_path, f"model-0000{part}-of-00003.safetensors")


def test_shards_without_their_index_are_read_whole(tmp_path, hugging_face):
    source = tmp_path / "source"
    shutil.copytree(hugging_face, source)
    (source / "model.safetensors.index.json").unlink()
    convert(source, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(hugging_face))


def test_a_file_of_weights_that_the_index_does_not_name(tmp_path, hugging_face):
    source = tmp_path / "source"
    shutil.copytree(hugging_face, source)
    save_file({"lm_head.bias": torch.ones(128)}, source / "head.safetensors")
    _refused(source, tmp_path, "head.safetensors is not part of the model")
    (source / "head.safetensors").rename(source / "model.safetensors")
    _refused(source, tmp_path, "holds two models: got model.safetensors, which transformers reads")
    (source / "model.safetensors").rename(source / "head.safetensors")
    (source / "head.safetensors").rename(source / "consolidated.safetensors")
    assert any("left out consolidated.safetensors" in note for note in convert(source, tmp_path / "out").notes)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])  # with a specification here, and without one
def test_an_expert_that_is_missing_doubled_or_not_in_the_configuration(tmp_path, family):
    sizes = {"num_local_experts": 4} if family == "mixtral" else DEEPSEEK
    source = tmp_path / "source"
    tiny_model(transformers.AutoConfig.for_model(family, **SHAPE | sizes, num_hidden_layers=2)).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if ".1." in name and ".experts.3." in name)
    block, _, part = name.partition(".3.")

    def holds(**changed):
        file = {key: tensor for key, tensor in (tensors | changed).items() if tensor is not None}
        save_file(file, source / "model.safetensors", metadata={"format": "pt"})

    holds(**{name: None})
    _refused(source, tmp_path, f"1 parts of experts are missing: {block}.3.{part.partition('.')[0]}")
    holds(**{f"{block}.4.{part}": tensors[name].clone()})
    _refused(source, tmp_path, rf"unexpected experts: got {block}.4, expected experts 0 to 3 by .*experts=4")
    holds(**{f"{block}.down_proj": torch.zeros(4, 64, 96)})
    _refused(source, tmp_path, f"stores experts twice: got {block}.down_proj beside {block}.0")
    holds()
    assert convert(source, tmp_path / "out").tensors == len(tensors)


def test_an_adapter_beside_the_model(tmp_path, hugging_face):
    source = tmp_path / "source"
    shutil.copytree(hugging_face, source)
    (source / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, source / "adapter_model.safetensors")
    _refused(source, tmp_path, "holds an adapter: got adapter_config.json")


@pytest.mark.parametrize("index", [True, False])
def test_a_part_of_several_pickles(tmp_path, hugging_face, model, index):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(hugging_face / "config.json", source)
    names = sorted(model.state_dict())
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        torch.save({name: model.state_dict()[name] for name in names if files[name] == file}, source / file)
    if index:
        import json

        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    convert(source, tmp_path / "whole", options=ALLOW)
    assert torch.equal(logits(tmp_path / "whole"), logits(hugging_face))
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    _refused(source, tmp_path, "pytorch_model-00002-of-00002.bin" if index else "got 1 of 2 files")


def test_safetensors_and_pickles_of_one_model_are_the_users_choice(tmp_path, hugging_face, model):
    source = tmp_path / "source"
    shutil.copytree(hugging_face, source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    _refused(source, tmp_path, "could be .*Pass --from")
    done = convert(source, tmp_path / "out", from_format="huggingface")
    assert any("left out pytorch_model.bin" in note for note in done.notes)


@pytest.fixture
def llama(tmp_path, hugging_face):
    """Meta's files of four ranks' worth of the model, without a config.json beside them."""
    from polyshard.convert.format import Options

    convert(hugging_face, tmp_path / "llama", to_format="llama", options=Options(tensor_parallel=2))
    (tmp_path / "llama" / "config.json").unlink()
    return tmp_path / "llama"


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("with_configuration", [True, False])
def test_one_of_metas_files(tmp_path, llama, model, part, with_configuration):
    (llama / f"consolidated.0{part}.pth").unlink()
    options = with_config(model.config) if with_configuration else ALLOW
    _refused(llama, tmp_path, "consolidated.00.pth is missing" if part == 0 else "is incomplete|wrong shape", options)


def test_one_of_metas_files_of_another_training(tmp_path, llama):
    file = llama / "consolidated.01.pth"
    content = torch.load(file)
    content["norm.weight"] += 1
    torch.save(content, file)
    _refused(llama, tmp_path, "norm.weight is replicated, but its ranks disagree")


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"stages": (1, 2)}, {"tensor": 2, "stages": (2, 1)}])
@pytest.mark.parametrize("arguments", [True, False])
def test_megatrons_ranks(tmp_path, model, hugging_face, layout, arguments):
    """Pipeline stages of unequal depth too; any rank that is missing is told, also the last."""
    stated = argparse.Namespace(
        tensor_model_parallel_size=layout.get("tensor", 1), pipeline_model_parallel_size=len(layout.get("stages", "x"))
    )
    source = save_legacy(tmp_path / "meg", model, **layout, **({"args": stated} if arguments else {}))
    options = with_config(model.config)
    convert(source, tmp_path / "whole", options=options)
    assert torch.equal(logits(tmp_path / "whole"), logits(hugging_face))
    for folder in sorted(source.glob("iter_*/mp_rank_*")):
        folder.rename(tmp_path / "away")
        _refused(source, tmp_path, "missing|incomplete|wrong shape|fewer|rows", options)
        (tmp_path / "away").rename(folder)


def test_megatrons_replicated_tensors_must_agree(tmp_path, model):
    source = save_legacy(tmp_path / "meg", model, tensor=2)
    file = source / "iter_0000010" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file)
    content["model"]["decoder.final_layernorm.weight"] += 1e-3
    torch.save(content, file)
    _refused(source, tmp_path, "decoder.final_layernorm.weight is replicated", with_config(model.config))


def test_megatrons_folders_of_experts_are_refused(tmp_path, model):
    source = save_legacy(tmp_path / "meg", model)
    (source / "iter_0000010" / "mp_rank_00_000_001").mkdir()
    _refused(source, tmp_path, "holds folders that cannot be read: mp_rank_00_000_001", with_config(model.config))


@pytest.mark.parametrize("padding", ["zeros", "trained", "said"])
def test_megatrons_padded_vocabulary_is_cut_where_it_is_known_to_be_padding(tmp_path, model, hugging_face, padding):
    source = save_legacy(tmp_path / "meg", model, padded=160)
    if padding != "zeros":
        file = next(source.glob("iter_*/mp_rank_00/*.pt"))
        content = torch.load(file)
        content["model"]["embedding.word_embeddings.weight"][128:] = 1.0
        torch.save(content, file)
    options = with_config(model.config)
    if padding == "trained":
        _refused(source, tmp_path, "the others are not zeros.*--pad-vocabulary", options)
        return
    if padding == "said":
        from dataclasses import replace

        options = replace(options, padded_vocabulary=80)
    convert(source, tmp_path / "out", options=options)
    assert torch.equal(logits(tmp_path / "out"), logits(hugging_face))


def test_a_virtual_pipeline_of_megatron_is_put_in_order(tmp_path, model, hugging_face):
    """Two chunks on each of two stages hold layers 0, 2 and 1: chunk 1 of stage 0 follows chunk 0 of stage 1."""
    source = save_legacy(tmp_path / "meg", model, stages=(1, 1, 1))
    folders = [source / "iter_0000010" / f"mp_rank_00_00{i}" for i in range(3)]
    first, second, third = (torch.load(folder / "model_optim_rng.pt") for folder in folders)
    shutil.rmtree(folders[2])
    empty = {"model1": {}}
    torch.save({"model0": first["model"], "model1": third["model"]}, folders[0] / "model_optim_rng.pt")
    torch.save({"model0": second["model"], **empty}, folders[1] / "model_optim_rng.pt")
    convert(source, tmp_path / "out", options=with_config(model.config))
    assert torch.equal(logits(tmp_path / "out"), logits(hugging_face))


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    root = tmp_path_factory.mktemp("ranks")
    run_ranks(save_dcp, 2, root / "dcp")
    for stage in (1, 3):
        run_ranks(save_deepspeed, 2, root / f"zero{stage}", stage)
    run_ranks(save_deepspeed, 2, root / "tensor", 0, 2)
    return root


@pytest.mark.parametrize("kind", ["dcp", "zero1", "zero3", "tensor"])
def test_each_ranks_file_of_torch_and_deepspeed(tmp_path, saved_by_two, kind):
    from support.oracles.library_checkpoints import config

    source = tmp_path / kind
    shutil.copytree(saved_by_two / kind, source)
    files = [file for file in sorted(source.rglob("*")) if file.suffix in (".distcp", ".pt")]
    needed = [file for file in files if kind != "tensor" or "optim_states" not in file.name]
    assert len(needed) >= 2
    for file in needed:
        file.rename(tmp_path / "away")
        _refused(
            source, tmp_path, "missing|incomplete|cannot be read|could be|has an unknown format", with_config(config())
        )
        (tmp_path / "away").rename(file)
    convert(source, tmp_path / "whole", options=with_config(config()))


def test_a_torn_file_of_torch(tmp_path, saved_by_two):
    from support.oracles.library_checkpoints import config

    source = tmp_path / "dcp"
    shutil.copytree(saved_by_two / "dcp", source)
    file = sorted(source.glob("*.distcp"))[1]
    file.write_bytes(file.read_bytes()[:-200])
    _refused(source, tmp_path, "is truncated: got", with_config(config()))


def test_deepspeed_says_how_many_ranks_there_were(tmp_path, model):
    source = save_module(tmp_path / "ds", model.state_dict(), mp_world_size=2)
    _refused(source, tmp_path, "2 tensor-parallel ranks saved it, got files of 1", with_config(model.config))


def test_deepspeeds_pipelines_are_refused(tmp_path, model):
    source = save_module(tmp_path / "ds", model.state_dict())
    (source / "step" / "layer_01-model_00-model_states.pt").write_bytes(b"")
    _refused(source, tmp_path, "1 files of pipeline layers", with_config(model.config))


def test_a_compressing_deepspeed_model_is_refused(tmp_path, model):
    settings = {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}}
    source = save_module(tmp_path / "ds", model.state_dict(), ds_config=settings)
    _refused(source, tmp_path, "compresses while it computes", with_config(model.config))


def test_gguf_files_of_several(tmp_path, model):
    save_gguf(tmp_path / "source-a.gguf", model, "llama")
    (tmp_path / "both").mkdir()
    for name in ("q4.gguf", "q8.gguf"):
        shutil.copy(tmp_path / "source-a.gguf", tmp_path / "both" / name)
    _refused(tmp_path / "both", tmp_path, "holds 2 GGUF files: got q4.gguf, q8.gguf, expected one. Name the file")
    part = save_gguf(tmp_path / "m-00001-of-00002.gguf", model, "llama", {"split.count": 2, "split.no": 0})
    _refused(part, tmp_path, "is one part of several: got part 1 of 2, expected one file. Merge them first")


def test_a_universal_folder_that_is_torn(tmp_path, model):
    place = tmp_path / "universal" / "zero"
    for name, value in model.state_dict().items():
        (place / name).mkdir(parents=True)
        torch.save({"param": value}, place / name / "fp32.pt")
    convert(tmp_path / "universal", tmp_path / "whole", options=with_config(model.config), verify=True)
    assert torch.equal(load_file(tmp_path / "whole" / "model.safetensors")["lm_head.weight"], model.lm_head.weight)
    (place / "lm_head.weight" / "fp32.pt").unlink()
    _refused(
        tmp_path / "universal", tmp_path, "lm_head.weight is incomplete: fp32.pt is missing", with_config(model.config)
    )


def test_a_directory_of_one_size_and_a_configuration_of_another(tmp_path):
    """Meta's Llama 2 does not say the vocabulary; the weights and the configuration must agree about the rest."""
    save_tiny(tmp_path / "a", "llama", num_hidden_layers=2, **SHAPE)
    save_tiny(tmp_path / "b", "llama", num_hidden_layers=3, **SHAPE)
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "a")
    _refused(tmp_path / "a", tmp_path, "9 of the model's 30 tensors are missing: model.layers.2")
    save_tiny(tmp_path / "c", "llama", num_hidden_layers=2, **{**SHAPE, "intermediate_size": 80})
    shutil.copy(tmp_path / "c" / "config.json", tmp_path / "a")
    _refused(tmp_path / "a", tmp_path, "has the wrong shape: got .96, 64., expected .80, 64.")
