"""Random numbers under parallelism: one mask where an activation is shared, other masks where it is not."""

import logging
import random

import numpy
import pytest
import torch
from support.models.tiny import VOCAB, save_tiny
from support.workers.on_ranks import build
from torch.utils.checkpoint import checkpoint

import polyshard as ps
from polyshard.testing import run_ranks
from polyshard.training.generators import all_states, mixed, restore

LIBRARIES = ["torch", "megatron", "deepspeed", "fairscale"]
BATCH, TOKENS, CHANNELS = 2, 8, 12


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("random") / "model", "llama")


def dropped(region="residual", seed=3, **sizes):
    """What two draws leave of ones, of a batch and of packed tokens: this rank's part."""
    context = ps.initialize("torch", timeout=60, **sizes)
    ps.manual_seed(seed, context)
    dropout = ps.Dropout(0.4, context, region=region)
    axis, cut = context.axis("tensor"), context.layout.sequence_parallel and region == "residual"
    found = []
    for shape, dim in (((BATCH, TOKENS, CHANNELS), 1), ((TOKENS, CHANNELS), 0)):
        x = ps.context_shard(torch.ones(shape), context, dim=dim)
        if cut:
            x = x.chunk(axis.size, dim)[axis.rank]
        if region == "parallel":
            x = x.chunk(axis.size, -1)[axis.rank]
        found.append(dropout(x))
    after = torch.rand(())
    ps.shutdown(context)
    return [*found, after]


@pytest.fixture(scope="module")
def whole():
    return run_ranks(dropped, 1)[0]


def test_tensor_parallel_ranks_drop_alike(whole):
    for found in run_ranks(_tensor, 2):
        assert all(torch.equal(a, b) for a, b in zip(found, whole))


def _tensor():
    return dropped(tensor=2)


def test_cut_activations_get_their_part_of_one_processs_mask(whole):
    for function, cut in ((_sequence, (1, 0)), (_channels, (-1, -1))):
        first, second = run_ranks(function, 2)
        for index, dim in enumerate(cut):
            assert torch.equal(torch.cat((first[index], second[index]), dim), whole[index]), (function, index)
        assert first[2] == second[2] == whole[2], "the generators went apart"


def _sequence():
    return dropped(tensor=2, sequence_parallel=True)


def _channels():
    return dropped("parallel", tensor=2)


def test_context_parallel_ranks_get_the_mask_of_their_tokens(whole):
    results = run_ranks(_context, 4)
    order = torch.cat([torch.arange(TOKENS).chunk(4)[i] for i in (0, 3, 1, 2)]).argsort()
    for tensor_rank in (0, 1):
        parts = [results[tensor_rank], results[tensor_rank + 2]]
        for index, dim in ((0, 1), (1, 0)):
            found = torch.cat([part[index] for part in parts], dim).index_select(dim, order)
            assert torch.equal(found, whole[index])


def _context():
    return dropped(tensor=2, context=2)


def test_each_data_parallel_rank_has_masks_of_its_own(whole):
    first, second = run_ranks(dropped, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, whole))
    assert not torch.equal(first[0], second[0])
    alone = run_ranks(_seeded, 1, mixed(3, 1))[0]
    assert all(torch.equal(a, b) for a, b in zip(second, alone))


def _seeded(seed):
    return dropped(seed=seed)


def test_the_share_that_is_dropped_and_its_independence():
    context = ps.initialize("torch")
    torch.manual_seed(0)
    x = torch.ones(400, 300, dtype=torch.bfloat16)
    out = ps.Dropout(0.25, context)(x)
    assert out.dtype == torch.bfloat16
    keep = (out != 0).float()
    assert abs(keep.mean() - 0.75) < 0.005
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75).bfloat16())}
    for axis in (0, 1):  # 4 standard deviations of rows and columns of independent draws
        assert (keep.mean(axis) - 0.75).abs().max() < 5 * (0.1875 / keep.shape[axis]) ** 0.5
    correlation = torch.corrcoef(keep[:50])
    assert (correlation - torch.eye(50)).abs().max() < 0.3
    assert not ps.Dropout(1.0, context)(torch.ones(3, 3)).any()
    assert torch.equal(ps.Dropout(0.0, context)(x), x)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ps.ConfigurationError, match=r"the dropout probability is invalid: got"):
            ps.Dropout(wrong, context)
    with pytest.raises(ps.ConfigurationError, match="region is unsupported: got 'all', expected one of"):
        ps.Dropout(0.1, context, region="all")


@pytest.mark.parametrize("what", ["Dropout", "sharded_random"])
def test_recomputation_draws_the_same_mask(what):
    context = ps.initialize("torch")
    dropout, plain = ps.Dropout(0.5, context), torch.nn.Dropout(0.5)

    def block(x):
        y = torch.sin(x)
        if what == "Dropout":
            return dropout(y) * torch.cos(x)
        with ps.sharded_random(context):
            y = plain(y)
        return y * torch.cos(x)

    gradients = []
    for again in (False, True):
        torch.manual_seed(1)
        x = torch.linspace(0, 1, 128).view(8, 16).requires_grad_()
        (checkpoint(block, x, use_reentrant=False) if again else block(x)).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.usefixtures("compiles")
def test_a_compiled_graph_draws_the_same_mask():
    torch._dynamo.reset()
    context = ps.initialize("torch")
    dropout = ps.Dropout(0.3, context)
    compiled = torch.compile(dropout, fullgraph=True)
    outs = []
    for call in (dropout, compiled):
        with torch._inductor.config.patch(fallback_random=True):
            torch.manual_seed(2)
            outs.append(call(torch.ones(16, 32)))
    assert torch.equal(*outs)


def regions():
    context = ps.initialize("torch", tensor=2, timeout=60)
    ps.manual_seed(0, context)
    with ps.sharded_random(context):
        inside = torch.rand(4)
    outside = torch.rand(4)
    ps.shutdown(context)
    return inside, outside


def test_a_sharded_region_draws_other_numbers_on_each_rank_and_leaves_the_stream_as_it_was():
    (inside, outside), (other, same) = run_ranks(regions, 2)
    assert not torch.equal(inside, other)
    assert torch.equal(outside, same)


def test_all_generators_are_seeded_and_their_states_saved():
    context = ps.initialize("torch")
    before = all_states()

    def draws():
        return [torch.rand(3).tolist(), [random.random(), random.gauss(0, 1)], numpy.random.randn(3).tolist()]

    ps.manual_seed(5, context)
    first, state = draws(), all_states()
    second = draws()
    ps.manual_seed(5, context)
    assert draws() == first
    restore(state)
    assert draws() == second
    restore(before)
    for wrong in (-1, 1.5, True):
        with pytest.raises(ps.ConfigurationError, match="the seed is invalid: got"):
            ps.manual_seed(wrong, context)


def trained(directory, adapter, seeds, options, sizes, place):
    """The last norm's weight after two steps of a model with torch's own dropout in its residual stream."""
    context = ps.initialize(adapter, timeout=60, **sizes)
    model = build(directory, context)
    dropout = torch.nn.Dropout(0.3 if place else 0.0)
    model.model.layers[0].extra = dropout
    for block in model.model.layers:
        feed = block.feed
        block.feed = lambda x, feed=feed: dropout(feed(x)) if place else feed(x)
    error = None
    try:
        engine = ps.load_adapter(adapter).engine(model, ps.AdamW(lr=1e-2), context, **options)
        if seeds == "polyshard":
            ps.manual_seed(7, context)
        else:
            torch.manual_seed(7 + (context.rank if seeds == "by rank" else 0))
        for step in range(2):
            ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(step))
            engine.train_batch([{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}])
            engine.step()
        weight = model.model.norm.weight.detach().clone()
    except ps.ConfigurationError as problem:
        error, weight = str(problem), None
    ps.shutdown(context)
    return error, weight


@pytest.mark.parametrize("adapter", LIBRARIES)
def test_generators_that_differ_over_tensor_parallel_ranks_are_refused_before_the_first_update(directory, adapter):
    tensor = {"tensor": 2}
    for error, _ in run_ranks(trained, 2, directory, adapter, "by rank", {}, tensor, True):
        assert "random generators differ over the tensor-parallel ranks" in error
        assert "Call polyshard.manual_seed(seed, context)" in error
    (error, first), (_, second) = run_ranks(trained, 2, directory, adapter, "polyshard", {}, tensor, True)
    assert error is None
    assert torch.equal(first, second)


def test_what_the_check_leaves_alone(directory):
    tensor = {"tensor": 2}
    off = run_ranks(trained, 2, directory, "torch", "by rank", {"check_random": False}, tensor, True)
    assert not torch.equal(off[0][1], off[1][1]), "without the check, replicated weights drift apart"
    for error, _ in run_ranks(trained, 2, directory, "torch", "by rank", {}, tensor, False):
        assert error is None, "a model that draws nothing may have any seeds"


def test_torchs_dropout_is_refused_where_tokens_are_cut_over_ranks(directory):
    sizes = {"tensor": 2, "sequence_parallel": True}
    for error, _ in run_ranks(trained, 2, directory, "torch", "polyshard", {}, sizes, True):
        assert error.startswith("model.layers.0.extra is a torch.nn.Dropout, which would draw the same mask")


def warned(directory, seeds):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("polyshard.training.generators").addHandler(handler)
    trained(directory, "torch", seeds, {}, {}, True)
    return records


def test_data_parallel_ranks_that_draw_alike_are_told(directory):
    for records in run_ranks(warned, 2, directory, "one seed"):
        assert any("all data-parallel ranks draw the same random numbers" in record for record in records)
    for records in run_ranks(warned, 2, directory, "polyshard"):
        assert not records
