"""column_parallel and its kin: adapters of users, mixing, bad sizes, the loss, initial weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import polyshard as ps
from polyshard.testing import run_ranks


@pytest.fixture
def context():
    return ps.initialize("torch")


# The seed's class as it is written there: static methods, a library's layer with tuple outputs behind it.
class TupleLinear(nn.Module):
    """Stands in the place of Megatron's ColumnParallelLinear: same constructor idea, same (output, bias) tuple."""

    def __init__(self, input_size, output_size, bias):
        super().__init__()
        self.inner = nn.Linear(input_size, output_size, bias=bias)

    def forward(self, x):
        return self.inner(x), None


class MegatronLinearAdapter:
    """User-defined adapter to bridge Megatron and vLLM."""

    @staticmethod
    def create_column_parallel(input_size, output_size, parallel_context, bias=False):
        size = parallel_context.get_tensor_parallel_world_size() * parallel_context.get_pipeline_parallel_world_size()
        return TupleLinear(input_size, output_size // size, bias)


@pytest.mark.parametrize("adapter", [MegatronLinearAdapter, MegatronLinearAdapter()])
def test_the_seeds_adapter_satisfies_the_protocol_as_it_stands(context, adapter):
    assert isinstance(adapter, ps.LinearAdapter)
    layer = ps.column_parallel(8, [6, 6], context, bias=True, names=["gate", "up"], linear=adapter)
    assert layer(torch.ones(2, 8)).shape == (2, 12)  # the tuple is unwrapped
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.gate_up = layer
    table = ps.collect_layouts(model)
    entry = table["mlp.gate_up.inner.weight"]
    assert entry.name == "mlp.gate_up.weight"
    assert entry.checkpoint_names == ("mlp.gate.weight", "mlp.up.weight")


def test_a_minimal_adapter_is_told_what_it_lacks(context):
    with pytest.raises(ps.AdapterError, match="MegatronLinearAdapter has no row-parallel layers. Add a method"):
        ps.row_parallel(8, 8, context, linear=MegatronLinearAdapter)
    with pytest.raises(
        ps.AdapterError, match="object is not a LinearAdapter: the method create_column_parallel is missing"
    ):
        ps.column_parallel(8, 8, context, linear=object())


def test_an_adapter_whose_shard_has_the_wrong_shape_is_refused(context):
    class Wrong:
        @staticmethod
        def create_column_parallel(input_size, output_size, parallel_context, bias=False):
            return nn.Linear(input_size, output_size + 1, bias=bias)

    with pytest.raises(ps.AdapterError, match=r"local shape .* got \(9, 4\), expected \(8, 4\) for rank 0 of 1"):
        ps.column_parallel(4, 8, context, linear=Wrong)


def sizes_that_do_not_divide():
    context = ps.initialize("torch", tensor=2, timeout=30)
    messages = []
    for make in (
        lambda: ps.column_parallel(4, 7, context),
        lambda: ps.row_parallel(9, 4, context),
        lambda: ps.qkv_parallel(576, 9, 3, 64, context),
        lambda: ps.qkv_parallel(64, 8, 3, 8, context),
    ):
        try:
            make()
        except ps.LayoutError as error:
            messages.append(str(error))
    ps.shutdown(context)
    return messages


def test_sizes_that_do_not_divide_are_named():
    messages = run_ranks(sizes_that_do_not_divide, 2)[0]
    assert "column_parallel: 7 cannot be divided by tensor-parallel size 2" in messages[0]
    assert "row_parallel: 9 cannot be divided" in messages[1]
    assert "q_proj: 9 blocks of 64 cannot be divided by tensor-parallel size 2" in messages[2]
    assert "8 query heads cannot share 3 key-value heads evenly" in messages[3]


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.02), (0.1, 0.02)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_cross_entropy_equals_torchs(smoothing, z_loss, reduction, tensor):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 4, 11, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 11, (3, 4), generator=generator)
    targets[0, 1] = targets[2, 2] = -100
    leaf = logits.clone().requires_grad_()
    want = F.cross_entropy(leaf.transpose(1, 2), targets, reduction=reduction, label_smoothing=smoothing)
    squares = z_loss * leaf.logsumexp(-1).square() * (targets != -100)
    squares = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / (targets != -100).sum()}[reduction]
    want = want + squares
    want.sum().backward()
    results = run_ranks(parallel_loss, tensor, logits, targets, tensor, reduction, smoothing, z_loss)
    for loss, square, gradient, untouched in results:
        torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(square, squares.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)
        assert untouched


def parallel_loss(logits, targets, tensor, reduction, smoothing, z_loss):
    context = ps.initialize("torch", tensor=tensor, timeout=30)
    layout = ps.WeightLayout(shape=(11,), dim=0, segments=(ps.Segment(size=11, pad_multiple=1),))
    moved = logits.movedim(-1, 0)
    padded = torch.full((12, *moved.shape[1:]), float("-inf"), dtype=logits.dtype) if tensor == 2 else moved.clone()
    padded[:11] = moved
    local = padded.chunk(tensor)[context.get_tensor_parallel_rank()].movedim(0, -1).contiguous().requires_grad_()
    before = local.detach().clone()
    settings = {"vocab_size": 11, "reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss}
    loss, square = ps.vocab_parallel_cross_entropy(local, targets, context, return_z_loss=True, **settings)
    loss.sum().backward()
    untouched = torch.equal(local.detach(), before)
    shards = local.grad.movedim(-1, 0)
    axis = context.axis("tensor")
    gathered = shards if tensor == 1 else axis.collectives.all_gather(shards.contiguous(), 0)
    assert not square.requires_grad
    result = loss.detach(), square, gathered[:11].movedim(0, -1), untouched
    assert layout.shape == (11,)
    ps.shutdown(context)
    return result


def test_bad_targets_and_settings_of_the_loss(context):
    logits = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="label 5 is outside the vocabulary: expected 0 to 4, or -100 for no label"):
        ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 5]), context)
    with pytest.raises(ValueError, match="reduction is invalid"):
        ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2]), context, reduction="median")
    with pytest.raises(ValueError, match=r"targets have the wrong shape: got \(3,\)"):
        ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3]), context)
    with pytest.raises(ValueError, match=r"label_smoothing is invalid: got .*, expected a number in \[0, 1\]"):
        ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2]), context, label_smoothing=2.0)
    for factor in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=f"z_loss is invalid: got {factor}, expected 0 or a positive number"):
            ps.vocab_parallel_cross_entropy(logits, torch.tensor([1, 2]), context, z_loss=factor)


def initial_weights(tensor, constructed):
    import decoder
    from support.models.tiny import tiny_config

    context = ps.initialize("torch", tensor=tensor, timeout=30)
    torch.manual_seed(7)
    model = decoder.build_model(tiny_config("qwen3"), context)
    if not constructed:
        ps.initialize_weights(model, context, seed=3)
    axis = context.axis("tensor")
    weights = {}
    for name, entry in ps.collect_layouts(model).items():
        shard = model.get_parameter(name).detach()
        shards = [shard] if tensor == 1 else list(axis.collectives.all_gather(shard.unsqueeze(0), 0))
        weights[entry.name] = entry.layout.assemble(shards).clone()
    ps.shutdown(context)
    return weights


@pytest.mark.parametrize("constructed", [True, False], ids=["as built", "initialize_weights"])
def test_initial_weights_are_the_same_at_every_size(constructed):
    one = run_ranks(initial_weights, 1, 1, constructed)[0]
    for tensor in (2, 4):
        for other in run_ranks(initial_weights, tensor, tensor, constructed):
            assert set(other) == set(one)
            assert all(torch.equal(other[name], one[name]) for name in one)


def test_initial_weights_do_not_depend_on_fusing(context):
    fused, apart = nn.Module(), nn.Module()
    fused.gate_up = ps.column_parallel(8, [6, 6], context, names=["gate", "up"])
    apart.gate, apart.up = ps.column_parallel(8, 6, context), ps.column_parallel(8, 6, context)
    for model in (fused, apart):
        ps.initialize_weights(model, context, seed=1)
    assert torch.equal(fused.gate_up.weight, torch.cat((apart.gate.weight, apart.up.weight)))


@pytest.mark.usefixtures("compiles")
def test_a_compiled_embedding_checks_its_ids_too(context):
    embedding = torch.compile(ps.vocab_embedding(10, 4, context), fullgraph=True, backend="aot_eager")
    assert embedding(torch.tensor([3, 9])).shape == (2, 4)
    with pytest.raises(RuntimeError, match="a token ID is outside the vocabulary of 10"):
        embedding(torch.tensor([3, 10]))


def out_of_range_ids():
    context = ps.initialize("torch", tensor=2, timeout=30)
    embedding = ps.vocab_embedding(10, 4, context)
    with pytest.raises(IndexError, match="token ID 10 is outside the vocabulary: expected 0 to 9"):
        embedding(torch.tensor([3, 10]))
    sequence_parallel = ps.GroupContext(
        layout=ps.ParallelLayout(tensor=2, sequence_parallel=True),
        device=context.device,
        linear=context.linear,
        axes=context.axes,
    )
    with pytest.raises(
        ps.LayoutError, match="sequence parallel: 3 tokens .* cannot be divided by tensor-parallel size 2"
    ):
        ps.vocab_embedding(10, 4, sequence_parallel)(torch.tensor([1, 2, 3]))
    ps.shutdown(context)


def test_ids_out_of_range_and_odd_sequences_are_refused():
    run_ranks(out_of_range_ids, 2)
