"""Exact mode on CUDA: what its operators promise, and a real engine. Not yet run: docs/how-to/gpu.md."""

import os

import pytest
import support.vllm_required  # noqa: F401
import torch
from support.models.tiny import save_tiny

import polyshard as ps
from polyshard.adapters.vllm.engines.sampling import SamplingJob, sample
from polyshard.adapters.vllm.exact import CudaOperators
from polyshard.cli.verify_exact import random_prompts
from polyshard.proof.certificate import TrainerCase, compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_row_of_a_product_has_the_same_bits_in_every_batch():
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(320, 576, generator=generator, device="cuda").bfloat16() * 576**-0.5
    x = torch.randn(700, 576, generator=generator, device="cuda").bfloat16()
    product = CudaOperators().pack(weight)
    whole = product(x)
    for rows in (1, 2, 17, 129, 512):
        assert torch.equal(product(x[:rows]), whole[:rows])


def test_attention_of_a_token_depends_on_its_sequence_alone():
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [1, 17, 130, 700]
    q, k, v = (torch.randn(sum(lengths), n, 64, generator=generator, device="cuda").bfloat16() for n in (9, 3, 3))
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    whole = ps.packed_attention(q, k, v, bounds, kernel="vllm_exact")
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        assert torch.equal(ps.packed_attention(q[part], k[part], v[part], kernel="vllm_exact"), whole[part])
        start += length


@pytest.mark.vllm
def test_a_trainer_gives_the_bits_of_an_engine(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "VLLM_BATCH_INVARIANT", "1")
    shape = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6}
    directory = str(save_tiny(tmp_path / "model", "qwen3", **shape))
    factory = "decoder:build_model"
    job = SamplingJob(directory=directory, factory=factory, dtype="bfloat16", prompts=random_prompts(131), tokens=24)
    found = compare(TrainerCase(adapter="torch", tensor=1), sample(job), directory, factory, "bfloat16", None)
    assert found.holds, found
