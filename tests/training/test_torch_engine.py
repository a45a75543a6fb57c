"""The torch adapter's training engine: accumulation, skipped steps, loading, settings."""

import logging

import pytest
import torch
from support.models.tiny import VOCAB, save_tiny
from support.workers.on_ranks import build

import polyshard as ps
from polyshard.testing import run_ranks


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("engine") / "model", "llama")


def rows(count):
    return torch.randint(0, VOCAB, (count, 9), generator=torch.Generator().manual_seed(0))


def accumulated(directory, data_parallel, parts):
    """The gradient norm and the weights after one step over eight rows in `parts` micro-batches."""
    context = ps.initialize("torch", timeout=60)
    engine = ps.load_adapter("torch").engine(
        build(directory, context), ps.AdamW(lr=1e-2), context, data_parallel=data_parallel
    )
    mine = rows(8)[context.get_data_parallel_rank() :: context.get_data_parallel_world_size()]
    batches = mine.chunk(parts)
    for i, part in enumerate(batches):
        last = i + 1 == len(batches)
        if last:
            loss = engine(part[:, :-1], labels=part[:, 1:]) / parts
            engine.backward(loss)
        else:
            with engine.accumulate():
                engine.backward(engine(part[:, :-1], labels=part[:, 1:]) / parts)
    norm = engine.step().grad_norm
    weights = {name: w.clone() for name, w in engine.weights()}
    ps.shutdown(context)
    return norm, weights


@pytest.mark.parametrize(("ranks", "data_parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_micro_batches_add_up_to_the_batch(directory, ranks, data_parallel):
    norm, weights = run_ranks(accumulated, 1, directory, "ddp", 1)[0]
    for got_norm, got in run_ranks(accumulated, ranks, directory, data_parallel, 2):
        assert got_norm == pytest.approx(norm, rel=1e-5)
        for name in weights:
            # Adam's first step is lr * sign(gradient): where a gradient is rounding, its sign is chance.
            close = (got[name] - weights[name]).abs() < 1e-4
            assert close.float().mean() > 0.999, name


@pytest.mark.parametrize("shape", [(0, 8), (2, 0), (0,)])
def test_a_micro_batch_without_tokens_contributes_nothing(directory, shape):
    ids = rows(2)
    full = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    empty = {name: value.new_zeros(shape) for name, value in full.items()}
    context, found = ps.initialize("torch"), []
    for micro_batches in ([full], [empty, full]):
        engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
        found.append((float(engine.train_batch(micro_batches).loss), engine.step().grad_norm))
    assert found[0] == found[1]


def test_a_gradient_that_is_not_finite_leaves_the_weights(directory, caplog):
    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
    before = [p.clone() for p in engine.module.parameters()]
    ids = rows(2)
    loss = engine(ids[:, :-1], labels=ids[:, 1:])
    engine.backward(loss * float("nan"))
    with caplog.at_level(logging.WARNING):
        result = engine.step()
    assert result.skipped
    assert "this step is skipped" in caplog.text
    assert engine.updates == 0, "a skipped step is no update"
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters()))
    assert all(p.grad is None for p in engine.module.parameters())


def test_clipping_bounds_the_update_and_none_does_not_clip(directory):
    ids = rows(2)
    updates = {}
    for bound in (1e-3, None):
        context = ps.initialize("torch")
        engine = ps.load_adapter("torch").engine(
            build(directory, context),
            lambda named: torch.optim.SGD([p for _, p in named], lr=1.0),
            context,
            max_grad_norm=bound,
        )
        before = torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])
        engine.backward(engine(ids[:, :-1], labels=ids[:, 1:]))
        norm = engine.step().grad_norm
        after = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
        updates[bound] = (after - before).norm().item()
    assert updates[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert updates[None] == pytest.approx(norm, rel=1e-4)


def test_the_learning_rate_can_be_set(directory):
    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
    engine.set_learning_rate(0.0)
    before = [p.clone() for p in engine.module.parameters()]
    ids = rows(2)
    engine.backward(engine(ids[:, :-1], labels=ids[:, 1:]))
    engine.step()
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters()))


def loaded_after_wrapping(directory, data_parallel, sizes):
    import decoder

    context = ps.initialize("torch", timeout=60, **sizes)
    model = decoder.build_model(ps.read_config(directory), context)
    ps.initialize_weights(model, context, seed=5)
    engine = ps.load_adapter("torch").engine(model, ps.AdamW(), context, data_parallel=data_parallel)
    ps.load_checkpoint(engine, directory, context)
    loaded = {name: w.clone() for name, w in engine.weights()}
    reference = dict(build(directory, context).named_parameters())
    assert all(torch.equal(loaded[name], reference[name]) for name in reference)
    with pytest.raises(ps.LayoutError, match=r"shard of this rank has the wrong shape: got .* expected"):
        engine.load_weights([("model.norm.weight", torch.ones(3))])
    ps.shutdown(context)


@pytest.mark.parametrize(
    ("ranks", "data_parallel", "sizes"), [(2, "fsdp", {}), (2, "ddp", {}), (4, "fsdp", {"tensor": 2})]
)
def test_a_checkpoint_loads_into_a_wrapped_model(directory, ranks, data_parallel, sizes):
    run_ranks(loaded_after_wrapping, ranks, directory, data_parallel, sizes)


def test_settings_that_are_wrong_or_passed_over(directory, caplog):
    context = ps.initialize("torch")
    make = ps.load_adapter("torch").engine
    with pytest.raises(ps.ConfigurationError, match="data_parallel must be 'ddp' or 'fsdp', got 'zero'"):
        make(build(directory, context), ps.AdamW(), context, data_parallel="zero")
    with pytest.raises(ps.ConfigurationError, match="max_grad_norm must be positive, or None, got 0"):
        make(build(directory, context), ps.AdamW(), context, max_grad_norm=0)
    with pytest.raises(ps.ConfigurationError, match="timeout must be positive"):
        ps.initialize("torch", timeout=0)
    with caplog.at_level(logging.WARNING):
        make(build(directory, context), ps.AdamW(), context, data_parallel="fsdp")
        ps.initialize("torch", sequence_parallel=True)
    assert "fsdp does nothing at data-parallel size 1" in caplog.text
    assert "sequence_parallel does nothing at tensor-parallel size 1" in caplog.text


def unequal_numbers_of_micro_batches(directory):
    context = ps.initialize("torch", timeout=60)
    engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
    ids = rows(1 + context.get_data_parallel_rank())
    try:
        engine.train_batch([{"input_ids": row[:, :-1], "labels": row[:, 1:]} for row in ids.split(1)])
    except ps.ConfigurationError as error:
        return str(error)
    finally:
        ps.shutdown(context)


def test_unequal_numbers_of_micro_batches_are_refused_on_every_rank(directory):
    for rank, message in enumerate(run_ranks(unequal_numbers_of_micro_batches, 2, directory)):
        assert f"unequal numbers of micro-batches: got {1 + rank} on this rank, 3 on all 2" in message


def test_train_batch_takes_packed_rows_and_names_what_is_missing(directory):
    """By default the loss is the cross-entropy of `compute_logits`, whatever the forward returns with labels."""
    context = ps.initialize("torch")
    model = build(directory, context)
    engine = ps.load_adapter("torch").engine(model, ps.AdamW(), context)
    ids = rows(2)
    bounds = torch.tensor([0, 8, 16], dtype=torch.int32)
    packed = {"input_ids": ids[:, :-1].flatten(), "cu_seqlens": bounds, "labels": ids[:, 1:].flatten()}
    found = engine.train_batch([packed])
    assert float(found.tokens) == 16
    assert float(found.loss) == pytest.approx(model(ids[:, :-1], labels=ids[:, 1:]).item(), rel=1e-6)
    with pytest.raises(ps.ConfigurationError, match="micro_batches is empty"):
        engine.train_batch([])
    with pytest.raises(ps.ConfigurationError, match="has no labels: got input_ids"):
        engine.train_batch([{"input_ids": ids}])
    with pytest.raises(ps.ConfigurationError, match=r"the loss has the wrong shape: got \(2, 8"):
        engine.train_batch([{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}], lambda out, batch: out)
    bare = ps.load_adapter("torch").engine(torch.nn.Linear(2, 2), ps.AdamW(), context)
    with pytest.raises(ps.ConfigurationError, match="Linear has no compute_logits. Pass loss="):
        bare.train_batch([{"labels": ids}])


def good_and_bad_step(directory, adapter):
    context = ps.initialize(adapter)
    engine = ps.load_adapter(adapter).engine(build(directory, context), ps.AdamW(), context)
    ids = rows(2)
    batch = [{"input_ids": ids[:, :-1], "labels": ids[:, 1:]}]
    engine.train_batch(batch)
    good, first = engine.step().skipped, engine.updates
    weights = [p.clone() for p in engine.module.parameters()]
    engine.train_batch(batch, lambda out, batch: out.sum() * float("nan"))
    bad, second = engine.step().skipped, engine.updates
    unchanged = all(torch.equal(a, b) for a, b in zip(weights, engine.module.parameters()))
    engine.close()
    ps.shutdown(context)
    return good, bad, first, second, unchanged


@pytest.mark.parametrize("adapter", ["megatron", "fairscale", "deepspeed"])
def test_updates_count_steps_that_changed_the_weights(directory, adapter):
    """A library that updates with a gradient that is not finite has changed the weights."""
    ((good, bad, first, second, unchanged),) = run_ranks(good_and_bad_step, 1, directory, adapter)
    assert (good, first) == (False, 1)
    assert second == (1 if bad else 2)
    assert unchanged is bad


def test_deepspeeds_own_accumulation_is_refused(directory):
    context = ps.initialize("deepspeed")
    model = build(directory, context)
    with pytest.raises(ps.ConfigurationError, match="gradient_accumulation_steps'] must be 1"):
        ps.load_adapter("deepspeed").engine(model, ps.AdamW(), context, config={"gradient_accumulation_steps": 2})
    ps.shutdown(context)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_between_micro_batches_leaves_no_gradients_to_the_next_step(directory, caplog, error):
    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(build(directory, context), ps.AdamW(), context)
    batch = {"input_ids": rows(2)[:, :-1], "labels": rows(2)[:, 1:]}

    def count(batch):
        return (batch["labels"] != -100).sum()

    def loss(output, batch):
        if batch is second:
            raise error
        return ps.lm_loss(output, engine.module.compute_logits, batch["labels"], context, reduction="sum")

    first, second = {**batch}, {**batch}
    with pytest.raises(error):
        engine.train_batch([first, second], loss, count)
    assert "the gradients of this step are discarded" in caplog.text
    assert not engine.has_gradients
    assert all(parameter.grad is None for parameter in engine.module.parameters())


def test_masters_follow_values_written_into_the_model(directory):
    context = ps.initialize("torch")
    model = build(directory, context).bfloat16()
    engine = ps.load_adapter("torch").engine(model, ps.AdamW(lr=0.0, weight_decay=0.0), context)
    batch = {"input_ids": rows(2)[:, :-1], "labels": rows(2)[:, 1:]}
    loaded = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    engine.train_batch([batch])
    engine.step()
    assert model.model.norm.weight.eq(2.0).all()
    assert all(value.eq(0.25).all() for name, value in model.state_dict().items() if name != "model.norm.weight")


def test_float64_models_train_in_float64(directory):
    context = ps.initialize("torch")
    engine = ps.load_adapter("torch").engine(build(directory, context).double(), ps.AdamW(), context)
    engine.train_batch([{"input_ids": rows(2)[:, :-1], "labels": rows(2)[:, 1:]}])
    squares = [parameter.grad.square().sum() for parameter in engine.module.parameters()]
    assert engine.step().grad_norm == pytest.approx(float(sum(squares).sqrt()), rel=1e-6)
