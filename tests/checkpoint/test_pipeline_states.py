"""States and checkpoints of a pipeline carry the full model: any number of stages reads them, and transformers."""

import pytest
import torch
import transformers
from support.models.tiny import save_tiny
from support.workers.pipeline_states import curve, read, save_and_go_on
from support.workers.pipelines import Case

import polyshard as ps
from polyshard.testing import run_ranks

BFLOAT16 = {"precision": ps.Precision(compute=torch.bfloat16)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "model"
    return str(save_tiny(folder, "llama", tie_word_embeddings=True, num_hidden_layers=4))


@pytest.fixture(scope="module")
def cases(directory):
    one = {"sizes": {}}
    return {
        1: [Case("one", directory, **one)],
        2: [
            Case("two", directory),
            Case("v", directory, {"schedule": "zero-bubble-v"}),
            Case("looped, bfloat16", directory, {"schedule": "interleaved-1f1b"}, options=BFLOAT16),
        ],
        4: [
            Case("fsdp", directory, options={"data_parallel": "fsdp"}),
            Case("oss", directory, adapter="fairscale", layers="fairscale"),
        ],
    }


@pytest.fixture(scope="module")
def saved(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, {ranks: run_ranks(save_and_go_on, ranks, some, folder) for ranks, some in cases.items()}


def test_a_run_goes_on_bit_for_bit_at_the_same_sizes(saved, cases):
    for ranks, results in saved[1].items():
        for case in cases[ranks]:
            for result in (result[case.name] for result in results):
                assert result["resumed"] == result["losses"], case.name
                assert all(torch.equal(result["again"][name], value) for name, value in result["weights"].items())
                assert result["carried"] == ["optimizer", "random", "weights"]
                assert torch.equal(*result["draws"])
    first, second = (result["two"]["draws"][0] for result in saved[1][2])
    assert not torch.equal(first, second), "stages draw different dropout masks"


def test_any_number_of_stages_reads_the_states_of_any_other(saved, cases):
    folder, results = saved
    expected = results[1][0]["one"]["losses"][2:]
    for ranks, sources in ((1, ("two", "v", "fsdp", "oss")), (2, ("one", "oss"))):
        reading = [(case, source) for case in cases[ranks][:2] for source in sources]
        for found in run_ranks(read, ranks, reading, folder):
            for (reader, source), losses in found.items():
                assert losses == pytest.approx(expected, rel=1e-5), (reader, source)


def test_the_files_of_the_weights_are_the_same_and_transformers_reads_them(saved):
    folder, _ = saved
    for source in ("one", "two"):
        written = [path for path in (folder / source).iterdir() if path.name != "state"]
        assert len(written) >= 2
        files = {(path / "model.safetensors").read_bytes() for path in written}
        assert len(files) == 1, source
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "two" / "weights")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "one" / "weights")
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, reference.get_parameter(name), atol=1e-3), name


def test_a_hundred_steps_of_adamw_are_on_the_curve_of_one_process(directory):
    alone = run_ranks(curve, 1, Case("one", directory, sizes={}), 100)[0]
    staged = run_ranks(curve, 2, Case("two", directory), 100)
    assert alone[-1] < 0.7 * alone[0]
    for losses in staged:
        assert losses[:20] == pytest.approx(alone[:20], rel=1e-5)
        assert losses == pytest.approx(alone, rel=1e-3)
