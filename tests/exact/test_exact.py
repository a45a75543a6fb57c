"""Exact mode: a trainer's log-probabilities are a real engine's, bit for bit."""

import decoder
import pytest
import support.vllm_required  # noqa: F401
import torch
from support import engines
from support.models import exact_models, featured, latent
from support.models.tiny import save_built, save_tiny, tiny_config, tiny_model
from support.workers.on_ranks import full_gradients

import polyshard as ps
from polyshard.adapters.vllm import compat
from polyshard.adapters.vllm import exact as engine_side
from polyshard.adapters.vllm.attention.exact import attention_kernel_name
from polyshard.adapters.vllm.compat.paging import split_queries
from polyshard.adapters.vllm.engines import sampling
from polyshard.adapters.vllm.engines.sampling import SamplingJob
from polyshard.adapters.vllm.exact import CpuOperators, exact_matmuls, exact_serving
from polyshard.attention.rotary import rotate_heads
from polyshard.cli.verify_exact import random_prompts
from polyshard.core.environment import TRACE
from polyshard.core.exact_identity import ExactIdentity, check_same_mode
from polyshard.exact.linear import ExactLinearAdapter
from polyshard.launch.ranks import run_ranks
from polyshard.proof.certificate import TrainerCase, compare, trainer_logprobs

LIBRARIES = ("torch", "megatron", "deepspeed", "fairscale")
SHAPE = {"head_dim": 32, "hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 6}
VOCAB = 131
HALF = ps.Precision(compute=torch.bfloat16)  # float32 parameters
CASES = {  # sizes equal to the server's and not; float32 parameters, which compute in the server's dtype
    ("bfloat16", 1): [
        TrainerCase(adapter="torch", tensor=1),
        TrainerCase(adapter="torch", tensor=2),
        TrainerCase(adapter="torch", tensor=1, pipeline=2),
        TrainerCase(adapter="megatron", tensor=2),
        TrainerCase(adapter="deepspeed", tensor=1, pipeline=2, masters=True),
        TrainerCase(adapter="fairscale", tensor=2, masters=True),
    ],
    ("float32", 2): [
        TrainerCase(adapter="torch", tensor=1),
        TrainerCase(adapter="megatron", tensor=1, pipeline=2),
        TrainerCase(adapter="deepspeed", tensor=2),
        TrainerCase(adapter="fairscale", tensor=1, pipeline=2),
    ],
    ("float16", 1): [TrainerCase(adapter="megatron", tensor=2, masters=True)],
}
CASES = {case: trainers for case, trainers in CASES.items() if getattr(torch, case[0]) in exact_matmuls()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Three query heads share a key: the case in which vLLM's kernel, left to itself, depends on the batch most."""
    return str(save_tiny(tmp_path_factory.mktemp("exact") / "model", "qwen3", **SHAPE))


def job(directory, dtype, **changes):
    settings = {"tokens": 24, "shards": 2, **changes}
    factory = settings.pop("factory", "decoder:build_model")
    return SamplingJob(directory=directory, factory=factory, dtype=dtype, prompts=random_prompts(VOCAB), **settings)


def sample_here(asked, trace=None):
    """By an engine in this process, which has imported vLLM already."""
    options = sampling.register_for(asked)
    with pytest.MonkeyPatch.context() as patch:
        if trace is not None:
            patch.setenv(TRACE.name, str(trace))
        with engines.engine(asked.directory, **options) as llm:
            return sampling.answers_of(llm, asked)


def force(kernel, monkeypatch):
    """Attend by vLLM's kernel in this process, or by the compiled loops where they are."""
    if kernel == "vllm":
        monkeypatch.setenv("POLYSHARD_ATTENTION", kernel)
    else:
        monkeypatch.delenv("POLYSHARD_ATTENTION", raising=False)


@pytest.mark.vllm
@pytest.mark.parametrize(("dtype", "tensor"), CASES)
def test_every_library_at_any_size_gives_the_bits_of_an_engine(directory, dtype, tensor):
    """Chunked prompts beside decoding requests, single requests, cached prefixes; sizes equal and not equal."""
    asked = job(directory, dtype, tensor=tensor)
    answers = sampling.sample(asked) if dtype != "float16" else sample_here(asked)
    for case in CASES[dtype, tensor]:
        found = compare(case, answers, directory, "decoder:build_model", dtype, 2)
        assert found.holds, found
        assert found.tokens == 24 * len(answers)


@pytest.mark.vllm
def test_vllms_kernel_in_pieces_gives_them_too(directory, monkeypatch):
    """By which exact mode attends where the compiled loops are not, or not the fastest."""
    force("vllm", monkeypatch)
    answers = sample_here(job(directory, "float32"))
    told = torch.tensor([value for answer in answers for value in answer.logprobs])
    sequences = [(answer.prompt, answer.tokens) for answer in answers]
    trainer = TrainerCase(adapter="torch", tensor=1), sequences, directory, "decoder:build_model", "float32", 2, True
    assert torch.equal(trainer_logprobs(*trainer), told)
    force("native", monkeypatch)
    if attention_kernel_name(torch.float32) == "native":
        assert not torch.equal(trainer_logprobs(*trainer), told), "another kernel has other bits"


@pytest.mark.vllm
def test_a_model_of_transformers_as_it_is_gives_them_too(directory):
    """Its norms and its rotary frequencies are transformers' own; the trainer is cast to bfloat16."""
    factory = "polyshard:transformers_model"
    answers = sample_here(job(directory, "bfloat16", factory=factory, chunk=16))
    found = compare(TrainerCase(adapter="torch", tensor=2), answers, directory, factory, "bfloat16", 2)
    assert found.holds, found


@pytest.mark.vllm
@pytest.mark.parametrize(("module", "tensor"), [(latent, 2), (featured, 1), (featured, 2)])
def test_every_kind_of_attention_gives_them_too(tmp_path, module, tensor):
    """Latent, whose bottlenecks every rank holds whole; windows, soft-caps, ALiBi, sinks, values of other sizes."""
    directory, factory = str(tmp_path / "model"), f"{module.__name__}:build"
    save_built(directory, module)
    prompts = random_prompts(module.CONFIG["vocab_size"])
    asked = SamplingJob(directory=directory, factory=factory, dtype="float32", prompts=prompts, tokens=24, shards=2)
    found = compare(TrainerCase(adapter="torch", tensor=tensor), sample_here(asked), directory, factory, "float32", 2)
    assert found.holds, found


@pytest.mark.vllm
def test_the_first_operator_that_differs_is_named(directory):
    """What the comparison finds where there is something to find."""
    other = job(directory, "float32", factory="support.models.exact_models:another_eps")
    found = compare(
        TrainerCase(adapter="torch", tensor=1),
        sample_here(other),
        directory,
        "decoder:build_model",
        "float32",
        2,
        trace=lambda folder: sample_here(other, folder),
    )
    assert not found.holds
    assert 0 < found.largest < 0.1
    assert found.first is not None
    layer = f"model.layers.{exact_models.CHANGED}"
    assert (found.first.module, found.first.what) == (f"{layer}.post_attention_layernorm", "output")
    assert found.first.after == f"{layer}.self_attn"
    assert found.first.rows > 0


@pytest.mark.parametrize("dtype", exact_matmuls(), ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(64, 192), (576, 320), (1536, 576)])
def test_a_row_of_a_product_has_the_same_bits_in_every_batch(dtype, inner, outer):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(outer, inner, generator=generator) * inner**-0.5).to(dtype)
    x = torch.randn(700, inner, generator=generator).to(dtype)
    product = CpuOperators().pack(weight)
    whole = product(x)
    for rows in (1, 2, 3, 7, 16, 33, 129, 512):
        for first in (0, 1, 5, 700 - rows):
            assert torch.equal(product(x[first : first + rows]), whole[first : first + rows]), (rows, first)
    half = CpuOperators().pack(weight[outer // 2 :].contiguous())  # what a rank of two multiplies by
    assert torch.equal(half(x), whole[:, outer // 2 :])
    torch.testing.assert_close(
        whole.double(), x.double() @ weight.double().T, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.05
    )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", exact_matmuls(), ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (8, 4, 128), (4, 1, 64), (32, 2, 32)])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kernel", ["native", "vllm"])
def test_attention_of_a_token_depends_on_its_sequence_alone(
    threads, dtype, heads, kv_heads, dim, window, kernel, monkeypatch
):
    """Whatever stands beside it, whatever chunk it comes in; vLLM's own scheduling does not give this."""
    force(kernel, monkeypatch)
    if attention_kernel_name(dtype) != kernel:
        pytest.skip("no compiled loops for this processor, or vLLM's kernel is faster")
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 17, 64, 130, 700]
    total = sum(lengths)
    q, k, v = (torch.randn(total, n, dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))
    settings = {"sliding_window": window, "kernel": "vllm_exact"}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = ps.packed_attention(q, k, v, torch.tensor([0, *lengths]).cumsum(0).int(), **settings)
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            assert torch.equal(ps.packed_attention(q[part], k[part], v[part], **settings), whole[part])
            for chunk in (5, 48):
                for first in range(0, length, 6 * chunk):
                    last = min(first + chunk, length)
                    keys = slice(start, start + last)
                    out = ps.packed_attention(
                        q[start + first : start + last],
                        k[keys],
                        v[keys],
                        torch.tensor([0, last - first], dtype=torch.int32),
                        keys=torch.tensor([0, last], dtype=torch.int32),
                        **settings,
                    )
                    assert torch.equal(out, whole[start + first : start + last]), (length, first)
            start += length
    finally:
        torch.set_num_threads(before)


def test_pieces_of_queries_cover_a_batch_in_order():
    bounds, seen = torch.tensor([0, 1, 11, 11, 14]), torch.tensor([7, 10, 4, 20])
    table = torch.arange(8).view(4, 2)
    cut, keys, blocks = split_queries(bounds, seen, table, 4)
    assert cut.tolist() == [0, 1, 5, 9, 11, 14]
    assert keys.tolist() == [7, 4, 8, 10, 20]
    assert blocks.tolist() == [[0, 1], [2, 3], [2, 3], [2, 3], [6, 7]]
    assert all(part is whole for part, whole in zip(split_queries(bounds, seen, table, 10), (bounds, seen, table)))


def test_the_backward_of_each_operator_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    context = ps.initialize("torch", exact=True, exact_shards=2)
    x = torch.randn(5, 32, generator=generator)
    reference = x.double().requires_grad_()
    x.requires_grad_()

    norm = ps.rms_norm(32, context, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=generator))
    row = ps.row_parallel(32, 24, context, bias=True)
    column = ps.column_parallel(24, 16, context, bias=True)
    out = column(row(norm(x)))
    out.square().sum().backward()

    weights = [p.detach().double().requires_grad_() for m in (norm, row, column) for p in m.parameters()]
    scale, row_weight, row_bias, column_weight, column_bias = weights
    hidden = plain_rms_norm_in_double(reference, scale, 1e-5) @ row_weight.T + row_bias
    (hidden @ column_weight.T + column_bias).square().sum().backward()
    found = [p.grad for m in (norm, row, column) for p in m.parameters()]
    for mine, want in zip([x.grad, *found], [reference.grad, *(w.grad for w in weights)], strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-4, atol=1e-5)

    q = torch.randn(5, 3, 32, generator=generator, requires_grad=True)
    k = torch.randn(5, 1, 32, generator=generator, requires_grad=True)
    cos, sin = ps.RotaryEmbedding(32)(torch.arange(5), torch.float32)
    turned = context.exact.rotate(q, k, cos, sin)
    want = rotate_heads(q, k, cos, sin)
    for mine, other in zip(turned, want):
        torch.testing.assert_close(mine, other)
        direction = torch.randn(mine.shape, generator=generator)
        of = q if mine.shape == q.shape else k
        torch.testing.assert_close(
            torch.autograd.grad((mine * direction).sum(), of, retain_graph=True),
            torch.autograd.grad((other * direction).sum(), of, retain_graph=True),
        )
    ps.shutdown(context)


def plain_rms_norm_in_double(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def gradients(directory, sizes, input_ids, labels):
    """On each rank; what an exact context trains with."""
    context = ps.initialize(timeout=60, **sizes)
    model = decoder.build_model(ps.read_config(directory), context)
    ps.load_checkpoint(model, directory, context)
    model(input_ids, labels=labels).backward()
    found = full_gradients(model, context)
    ps.shutdown(context)
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        {"adapter": "torch"},
        *({"adapter": name, "tensor": 2, "exact_shards": 4} for name in LIBRARIES),
        *({"adapter": name, "tensor": 2, "sequence_parallel": True} for name in ("torch", "megatron")),
    ],
    ids=str,
)
def test_gradients_are_those_of_transformers_in_float64(directory, sizes):
    oracle = tiny_model(tiny_config("qwen3", **SHAPE)).double()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, 13), generator=generator)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    logits = oracle(inputs).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    found = run_ranks(gradients, sizes.get("tensor", 1), directory, {"exact": True, **sizes}, inputs, labels)
    for name, parameter in oracle.named_parameters():
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(found[0][name].double() / scale, parameter.grad / scale, rtol=0, atol=3e-5)


def test_log_probabilities_are_those_of_log_softmax_in_both_modes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, VOCAB, generator=generator, dtype=torch.float32, requires_grad=True)
    ids = torch.randint(VOCAB, (6,), generator=generator)
    for settings in ({}, {"exact": True}):
        context = ps.initialize("torch", **settings)
        for temperature in (1.0, 0.7):
            want = (logits.double() / temperature).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            found = ps.token_logprobs(logits, ids, context, temperature=temperature)
            torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                torch.autograd.grad(found.sum(), logits), torch.autograd.grad(want.sum(), logits), rtol=1e-5, atol=1e-6
            )
        ps.shutdown(context)


def test_frequencies_of_the_rotary_embedding_stay_float32_when_a_model_is_cast():
    """Rounded to bfloat16 they turn every head by a wrong angle."""
    rotary, cast = ps.RotaryEmbedding(64), ps.RotaryEmbedding(64).to(torch.bfloat16)
    positions = torch.arange(200)
    assert torch.equal(rotary(positions, torch.float32)[0], cast(positions, torch.float32)[0])


@pytest.mark.vllm
def test_one_side_alone_in_exact_mode_is_refused(directory):
    ordinary, exact = ps.initialize("torch"), ps.initialize("torch", exact=True, exact_shards=2)
    other = ps.initialize("torch", exact=True)
    config = ps.read_config(directory)
    model = decoder.build_model(config, exact)
    ps.register_model("Exactly", decoder.build_model, exact=True, exact_shards=2)
    ps.register_model("Ordinarily", decoder.build_model)
    with engines.engine(directory, "Exactly") as llm:
        for context, words in ((ordinary, "the trainer's context is not exact"), (other, "exact_shards=1")):
            with pytest.raises(ps.ConfigurationError, match=words):
                ps.WeightSync(decoder.build_model(config, context), context, llm)
        before = engines.greedy(llm, [[1, 2, 3]], 8)
        with ps.WeightSync(model, exact, llm) as sync:
            ps.initialize_weights(model, exact, seed=5)
            sync()
            after = engines.greedy(llm, [[1, 2, 3]], 8)[0]
        assert after != before[0]
        ids = torch.tensor([1, 2, 3, *after[0]])
        logits = model.compute_logits(model(ids))[2:-1]
        assert ps.token_logprobs(logits, ids[3:], exact, vocab_size=VOCAB).tolist() == after[1]
        samples = sampled(llm, [1, 2, 3], 4)
        assert len({tuple(tokens) for tokens, _ in samples}) == 4, "equal bits are no equal draws"
        for tokens, logprobs in samples:
            ids = torch.tensor([1, 2, 3, *tokens])
            logits = model.compute_logits(model(ids))[2:-1]
            assert ps.token_logprobs(logits, ids[3:], exact, vocab_size=VOCAB).tolist() == logprobs
    with (
        engines.engine(directory, "Ordinarily") as llm,
        pytest.raises(ps.ConfigurationError, match="does not serve in exact mode"),
    ):
        ps.WeightSync(model, exact, llm)


def sampled(llm, prompt, samples):
    """Tokens of several samples of one prompt, and their log-probabilities."""
    from vllm import SamplingParams

    parameters = SamplingParams(n=samples, temperature=1.0, max_tokens=8, logprobs=0, ignore_eos=True)
    return engines.generated(llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False))


@pytest.mark.vllm
def test_an_engine_whose_settings_change_the_bits_is_refused(directory, monkeypatch):
    registered = ps.register_model("Exactly", decoder.build_model, exact=True)
    started = engines.engine(directory, "Exactly", kv_cache_dtype="fp8")
    with pytest.raises(ps.RegistrationError, match="rounds keys and values"):
        started.__enter__()
    monkeypatch.setattr(engine_side, "exact_matmuls", lambda: {torch.float32: "vllm"})
    started = engines.engine(directory, "Exactly", dtype="float16")
    with pytest.raises(
        ps.RegistrationError, match=r"does not support torch\.float16 on this CPU \(supported: torch\.float32\)"
    ):
        started.__enter__()

    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(directory, skip_tokenizer_init=True).create_engine_config()
    config.compilation_config.mode = compat.CompilationMode.VLLM_COMPILE  # TORCH_COMPILE_DISABLE took it back
    with pytest.raises(ps.RegistrationError, match="enforce_eager=True"):
        exact_serving(ps.initialize("torch"), registered, config)


def test_two_products_or_kernels_are_refused_and_named():
    one, other = (f"{kind} bfloat16" for kind in ("native", "vllm"))
    trainer = ExactIdentity(2, one, one)
    check_same_mode(trainer, ExactIdentity(*trainer), "an engine")
    for changes, words in (
        ({"matmul": other}, "matmul.* native bfloat16 for the trainer and vllm bfloat16 for .*POLYSHARD_MATMUL"),
        ({"attention": other}, "attention.* native bfloat16 for the trainer and vllm bfloat16 for .*POLYSHARD_ATTENT"),
    ):
        with pytest.raises(ps.ConfigurationError, match=words):
            check_same_mode(trainer, trainer._replace(**changes), "an engine")


def test_the_engine_takes_the_precision_of_exact_mode():
    """The layers cast, so that no autocast is needed, and the server's bits stay."""
    context = ps.initialize("torch", exact=True, precision=HALF)
    engine = ps.load_adapter("torch").engine(ps.column_parallel(8, 8, context), ps.AdamW(), context, precision=HALF)
    x = torch.randn(3, 8).bfloat16()
    assert engine(x).dtype == torch.bfloat16
    with pytest.warns(DeprecationWarning, match="precision=Precision"):
        former = ps.initialize("torch", exact=True, exact_dtype=torch.bfloat16)
    assert former.exact.compute_dtype == context.exact.compute_dtype == torch.bfloat16


def test_wrong_settings_are_named():
    context = ps.initialize("torch", exact=True)
    five = ps.initialize("torch", exact=True, exact_shards=5)
    attention = ps.TrainableFlashAttention(64, 2, parallel_context=context, kernel="chunked")
    column, half = ps.column_parallel(8, 8, context), torch.randn(2, 8).bfloat16()
    with pytest.raises(ps.ConfigurationError, match="Add exact=True"):
        ps.initialize("torch", exact_shards=2)
    double = ps.Precision(parameters=torch.float64, optimizer=torch.float64)
    with pytest.raises(ps.ConfigurationError, match="float32, bfloat16 or float16"):
        ps.initialize("torch", exact=True, precision=double)
    with pytest.raises(ps.ConfigurationError, match="requires exact mode"):
        ps.initialize("torch", precision=ps.Precision())
    with pytest.raises(ps.ConfigurationError, match="the engine and exact mode have different dtypes"):
        ps.load_adapter("torch").engine(column, ps.AdamW(), context, precision=HALF)
    with pytest.raises(ps.LayoutError, match="exact_shards=5"):
        ps.row_parallel(32, 8, five)
    with pytest.raises(ps.RegistrationError, match="Add exact=True"):
        ps.register_model("Exactly", decoder.build_model, exact_shards=2)
    with pytest.raises(ps.RegistrationError, match="positive integer"):
        ps.register_model("Exactly", decoder.build_model, exact=True, exact_shards=0)
    with pytest.raises(ps.ConfigurationError, match="vllm_exact"):
        attention(torch.randn(3, 64))
    with pytest.raises(ps.ConfigurationError, match="Autocast is not exact"):
        column(half)
    with pytest.raises(ps.AdapterError, match="plain_products"):
        ExactLinearAdapter(object(), context.exact)
    with pytest.raises(ps.ConfigurationError, match="got instruction set 'vsx', expected vec"):
        compat.queries_per_chunk("vsx", 1)


def smoothed_in_exact_mode(adapter):
    context = ps.initialize(adapter, exact=True)
    logits, labels = torch.arange(21.0).view(3, 7), torch.tensor([1, 2, 3])
    loss = ps.vocab_parallel_cross_entropy(logits, labels, context, label_smoothing=0.1)
    ps.shutdown(context)
    return loss, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize("adapter", ["torch", "megatron", "deepspeed", "fairscale"])
def test_labels_are_smoothed_in_exact_mode_too(adapter):
    ((found, wanted),) = run_ranks(smoothed_in_exact_mode, 1, adapter)
    assert torch.allclose(found, wanted, rtol=1e-6)
