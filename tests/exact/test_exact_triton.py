"""Exact mode's operators on CUDA that need no compiled part of vLLM: a row's bits depend on that row alone.

`test_exact_cuda.py` has the rest: an engine's own attention, and a trainer against an engine.
"""

import decoder
import pytest
import torch
from support.models.tiny import VOCAB, save_tiny
from support.oracles.triton_operators import TritonOperators, exact_training_context

import polyshard as ps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS = (1, 2, 17, 129, 512)
DTYPES = [torch.bfloat16, torch.float16]


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(576, 320), (1024, 3072)], ids=str)
def test_a_row_of_a_product_has_the_same_bits_in_every_batch(sizes, dtype, record_property):
    inputs, outputs = sizes
    weight, x = drawn(outputs, inputs, dtype=dtype, seed=1) * inputs**-0.5, drawn(700, inputs, dtype=dtype)
    product = TritonOperators().pack(weight)
    whole = product(x)
    for rows in ROWS:
        assert torch.equal(product(x[:rows]), whole[:rows])
    error = (whole.double() - x.double() @ weight.double().T).norm() / (x.double() @ weight.double().T).norm()
    record_property("relative_error", float(error))
    assert error < (1e-3 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_a_norm_has_the_same_bits_in_every_batch(dtype):
    x, weight = drawn(700, 1024, dtype=dtype), drawn(1024, dtype=dtype, seed=1)
    norm = TritonOperators().rms_norm
    whole = norm(x, weight, 1e-6)
    for rows in ROWS:
        assert torch.equal(norm(x[:rows], weight, 1e-6), whole[:rows])
    wide = x.double()
    want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert (whole.double() - want).norm() / want.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_attention_of_a_token_depends_on_its_sequence_alone(window, dtype):
    lengths = [1, 17, 130, 700]
    q, k, v = (drawn(sum(lengths), heads, 64, dtype=dtype, seed=heads) for heads in (9, 3, 3))
    options = {"kernel": "torch_varlen", "sliding_window": window}
    bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    whole = ps.packed_attention(q, k, v, bounds, **options)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        assert torch.equal(ps.packed_attention(q[part], k[part], v[part], **options), whole[part])
        start += length


@pytest.mark.parametrize("chunk", [1, 16, 100, 128, 256])
def test_attention_of_a_chunk_has_the_bits_of_the_whole(chunk):
    """A chunked prefill: the last queries of a sequence against all keys so far."""
    q, k, v = (drawn(700, heads, 64, seed=heads) for heads in (8, 2, 2))
    whole = ps.packed_attention(q, k, v, kernel="torch_varlen")
    for start in range(0, 700, chunk):
        end = min(start + chunk, 700)
        bounds = {
            "sequences": torch.tensor([0, end - start], dtype=torch.int32, device="cuda"),
            "keys": torch.tensor([0, end], dtype=torch.int32, device="cuda"),
        }
        part = ps.packed_attention(q[start:end], k[:end], v[:end], kernel="torch_varlen", **bounds)
        assert torch.equal(part, whole[start:end]), f"queries {start} to {end}"


def test_a_trainer_gives_each_sequence_the_same_bits_alone_and_packed(tmp_path):
    shape = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 384, "num_attention_heads": 6}
    directory = save_tiny(tmp_path / "model", "qwen3", **shape)
    context = exact_training_context()
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    model.to(torch.bfloat16)
    lengths = [5, 64, 1, 200, 33]
    ids = torch.randint(VOCAB, (sum(lengths),), generator=torch.Generator().manual_seed(0)).cuda()
    targets = ids.roll(-1)

    def logprobs(parts):
        rows = torch.cat([ids[part] for part in parts])
        wanted = torch.cat([targets[part] for part in parts])
        bounds = torch.tensor([0, *(part.stop - part.start for part in parts)], device="cuda").cumsum(0).int()
        with torch.no_grad():
            return model(rows, cu_seqlens=bounds, targets=wanted).split([part.stop - part.start for part in parts])

    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    parts = [slice(start, start + length) for start, length in zip(starts, lengths)]
    alone = [logprobs([part])[0] for part in parts]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 3)):
        for index, found in zip(order, logprobs([parts[i] for i in order])):
            assert torch.equal(found, alone[index])
