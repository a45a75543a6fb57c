"""Training on CUDA: the conformance suite and a model as users write it.

Over NCCL each rank has its own GPU; one GPU runs the tests of one rank. Over gloo two ranks share a GPU.
"""

import decoder
import pytest
import torch
from support.models.tiny import VOCAB, save_tiny
from support.suite_engines import ENGINES
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import AdapterSuite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class TestTorch(AdapterSuite):
    adapter, engines = "torch", ENGINES["torch"]
    gpus = True


class TestMegatron(AdapterSuite):
    adapter, engines = "megatron", ENGINES["megatron"]
    gpus = True


class TestDeepspeed(AdapterSuite):
    adapter, engines = "deepspeed", ENGINES["deepspeed"]
    gpus = True


class TestFairscale(AdapterSuite):
    adapter, engines = "fairscale", ENGINES["fairscale"]
    gpus = True


class TestTorchShared(AdapterSuite):
    adapter, engines = "torch", ENGINES["torch"]
    gpus, max_ranks = "shared", 2


class TestMegatronShared(AdapterSuite):
    adapter, engines = "megatron", ENGINES["megatron"]
    gpus, max_ranks = "shared", 2


class TestDeepspeedShared(AdapterSuite):
    adapter, engines = "deepspeed", ENGINES["deepspeed"]
    gpus, max_ranks = "shared", 2


class TestFairscaleShared(AdapterSuite):
    adapter, engines = "fairscale", ENGINES["fairscale"]
    gpus, max_ranks = "shared", 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_built_by_its_factory_trains_where_its_context_says(tmp_path, dtype):
    """Nothing is moved by hand but the tokens. Oracle: transformers in float64 on the CPU."""
    import transformers

    directory = save_tiny(tmp_path / "model", "qwen3", hidden_size=64, head_dim=32, tie_word_embeddings=True)
    ids = torch.randint(VOCAB, (4, 33), generator=torch.Generator().manual_seed(0))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    wanted = F.cross_entropy(oracle(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    wanted.backward()
    gradients = dict(oracle.named_parameters())

    context = ps.initialize("torch")
    assert context.device.type == "cuda"
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    model.to(dtype)
    bounds = torch.arange(5, dtype=torch.int32, device="cuda") * 32
    rows, labels = ids[:, :-1].cuda(), ids[:, 1:].cuda()
    batched = model(rows, labels=labels)
    packed = model(rows.flatten(), cu_seqlens=bounds, labels=labels.flatten())
    packed.backward()
    close = 1e-5 if dtype == torch.float32 else 2e-2
    for loss in (batched, packed):
        assert abs(loss.item() - wanted.item()) < close * wanted.item()
    want = gradients["model.embed_tokens.weight"].grad
    got = model.model.embed_tokens.weight.grad[:VOCAB].cpu().double()
    assert (got - want).norm() < 3 * close * want.norm()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_products_are_those_that_torchao_emulates_on_the_cpu(recipe):
    """Of 21 tokens, which are no multiple of 16, as the gradient of a weight needs it."""
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with float8 matrix products")
    found = {}
    for device in ("cpu", "cuda"):
        context = ps.initialize("torch", device=device)
        torch.manual_seed(0)
        layer = ps.column_parallel(64, 96, context)
        x, gradient = (torch.randn(21, size, generator=torch.Generator().manual_seed(1)) for size in (64, 96))
        x = x.to(device, torch.bfloat16).requires_grad_()
        engine = ps.load_adapter("torch").engine(
            layer.bfloat16(), ps.AdamW(), context, precision=ps.Precision(parameters=torch.bfloat16, float8=recipe)
        )
        y = engine(x)
        of_input, of_weight = torch.autograd.grad(y, [x, layer.weight], gradient.to(y))
        found[device] = [tensor.float().cpu() for tensor in (y, of_input, of_weight)]
        ps.shutdown(context)
    for value, wanted in zip(found["cuda"], found["cpu"]):
        assert (value - wanted).norm() < 1e-2 * wanted.norm()
