"""A training run goes on from its saved state. The conformance suite has the same sizes, this file all others."""

import json
import logging
import random
import shutil

import decoder
import numpy
import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny import tiny_config

import polyshard as ps
from polyshard.testing import run_ranks
from polyshard.testing.resuming import first_half, make, second_half, steps, straight

HALF, ALL = 10, 20
ENGINES = {
    "torch ddp": ("torch", {"data_parallel": "ddp"}),
    "torch fsdp": ("torch", {"data_parallel": "fsdp"}),
    "megatron zero 0": ("megatron", {"zero_stage": 0}),
    "megatron zero 1": ("megatron", {"zero_stage": 1}),
    "deepspeed zero 0": ("deepspeed", {"zero_stage": 0}),
    "deepspeed zero 1": ("deepspeed", {"zero_stage": 1}),
    "deepspeed zero 2": ("deepspeed", {"zero_stage": 2}),
    "deepspeed zero 3": ("deepspeed", {"zero_stage": 3}),
    "fairscale zero 1": ("fairscale", {"zero_stage": 1}),
    "fairscale zero 2": ("fairscale", {"zero_stage": 2}),
}


@pytest.fixture(scope="module")
def reference():
    return run_ranks(straight, 1, "torch", 1, {}, ALL)[0][0]


MOVES = [
    ("torch fsdp", 4, 2, "megatron zero 1", 2, 1),
    ("megatron zero 1", 2, 1, "deepspeed zero 3", 4, 2),
    ("deepspeed zero 3", 2, 1, "fairscale zero 2", 2, 2),
    ("fairscale zero 2", 2, 1, "deepspeed zero 1", 2, 2),
    ("deepspeed zero 2", 2, 1, "torch fsdp", 2, 1),
    ("torch ddp", 1, 1, "torch fsdp", 4, 2),
]


@pytest.mark.parametrize(("source", "ranks", "tensor", "target", "new_ranks", "new_tensor"), MOVES)
def test_at_another_size_and_on_another_library_it_goes_on_within_rounding(
    reference, tmp_path, source, ranks, tensor, target, new_ranks, new_tensor
):
    adapter, options = ENGINES[source]
    begun = run_ranks(first_half, ranks, adapter, tensor, options, HALF, tmp_path / "state")
    adapter, options = ENGINES[target]
    ended = run_ranks(second_half, new_ranks, adapter, new_tensor, options, HALF, ALL, tmp_path / "state")
    losses = torch.tensor(begun[0] + ended[0][0])
    # A new optimizer instead of the saved one is 2 % off in the second step already.
    assert torch.allclose(losses, torch.tensor(reference), rtol=2e-4)
    assert "optimizer" in ended[0][4]


def test_an_asynchronous_save_holds_the_weights_of_its_moment(tmp_path):
    for asynchronous in (False, True):
        run_ranks(first_half, 2, "torch", 2, {}, 3, tmp_path / f"{asynchronous}", 0.0, asynchronous)
    for name in ("model", "training/exp_avg", "training/exp_avg_sq"):
        first, second = (load_file(tmp_path / f"{a}" / f"{name}.safetensors") for a in (False, True))
        assert set(first) == set(second)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_state_without_the_gradients_of_an_unfinished_step_says_so(tmp_path, caplog):
    context, engine = make("torch", 1, {})
    for finished in (True, False):
        engine.backward(engine.module.embed.weight.square().sum())
        if finished:
            engine.step()
        caplog.clear()
        ps.save_training_state(engine, tmp_path / f"{finished}", context, step=1, config={})
        assert ("leaves out the gradients of a step that is not finished" in caplog.text) is not finished
    ps.shutdown(context)


def in_bfloat16(adapter, options, directory):
    """Losses of three steps in bfloat16 with fp32 copies, of the same again from a saved state, and the slots."""
    context, engine = make(adapter, 1, options, dtype=torch.bfloat16)
    steps(engine, context, 0, 3)
    ps.save_training_state(engine, directory, context, step=3, config={})
    whole = steps(engine, context, 3, 6)
    engine.close()
    ps.shutdown(context)
    context, engine = make(adapter, 1, options, dtype=torch.bfloat16)
    ps.load_training_state(engine, directory, context)
    again = steps(engine, context, 3, 6)
    slots = {piece.slot for piece in engine.optimizer_state().pieces}
    ps.shutdown(context)
    return whole, again, slots


def in_float32(directory):
    context, engine = make("torch", 1, {})
    ps.load_training_state(engine, directory, context)
    return {name: value.clone() for name, value in engine.weights()}


BFLOAT16 = {
    "megatron": {"zero_stage": 1},
    "deepspeed": {"zero_stage": 3},
}


@pytest.mark.parametrize("adapter", BFLOAT16)
def test_bfloat16_weights_go_on_with_their_float32_copies(adapter, tmp_path):
    for whole, again, slots in run_ranks(in_bfloat16, 2, adapter, BFLOAT16[adapter], tmp_path / "state"):
        assert again == whole
        assert "master" in slots
    # A float32 engine takes the copies, and not the rounded weights.
    masters = load_file(tmp_path / "state" / "training" / "master.safetensors")
    rounded = load_file(tmp_path / "state" / "model.safetensors")
    found = in_float32(tmp_path / "state")["norm.weight"]
    assert torch.equal(found, masters["norm.weight"])
    assert not torch.equal(found, rounded["norm.weight"].float())


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "step-00000002"
    run_ranks(first_half, 1, "torch", 1, {}, 2, directory)
    return directory


def test_everything_is_plain_safetensors_and_json(state):
    files = {str(path.relative_to(state)) for path in state.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "model.safetensors",
        "polyshard.json",
        "training/exp_avg.safetensors",
        "training/exp_avg_sq.safetensors",
        "training/random.safetensors",
    }
    manifest = json.loads((state / "polyshard.json").read_text())
    assert set(manifest["files"]) == files - {"polyshard.json"}
    optimizer = manifest["state"]["optimizer"]
    decays = {name: group["weight_decay"] for group in optimizer.pop("groups") for name in group["parameters"]}
    assert decays["embed.weight"] == 0.05
    assert decays["norm.weight"] == 0.0
    assert optimizer == {
        "kind": "adam",
        "step": 2,
        "lr": 3e-3,
        "slots": ["exp_avg", "exp_avg_sq"],
        "started": True,
        "scalars": {},
        "schedule": None,
        "loss_scale": None,
    }
    assert set(load_file(state / "model.safetensors")) == set(load_file(state / "training/exp_avg.safetensors"))


def engine_alone(optimizer=None):
    context, engine = make("torch", 1, {})
    if optimizer is not None:
        engine = ps.load_adapter("torch").engine(engine.module, optimizer, context)
    return context, engine


def damage_shard(directory):
    path = directory / "training" / "exp_avg.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def truncate(directory):
    path = directory / "training" / "exp_avg.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


FAULTS = {
    "altered": (damage_shard, r"is damaged: the checksum of training/exp_avg.safetensors is not the recorded one"),
    "truncated": (truncate, "is truncated"),
    "missing": (lambda d: (d / "training" / "exp_avg_sq.safetensors").unlink(), "exp_avg_sq.*is missing"),
    "no manifest": (
        lambda d: (d / "polyshard.json").unlink(),
        "is not a complete training state: polyshard.json is missing",
    ),
    "manifest": (lambda d: (d / "polyshard.json").write_text('{"version": 1, "fi'), "truncated or not a manifest"),
    "later": (
        lambda d: (d / "polyshard.json").write_text(
            (d / "polyshard.json").read_text().replace('"version": 2', '"version": 9')
        ),
        "has an unsupported version: got 9, expected at most 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_torn_or_altered_state_is_refused_before_anything_is_changed(state, tmp_path, fault):
    copy = shutil.copytree(state, tmp_path / "copy")
    damage, message = FAULTS[fault]
    damage(copy)
    context, engine = engine_alone()
    before = {piece.parameter: piece.values.clone() for piece in engine.weight_pieces()}
    with pytest.raises(ps.CheckpointError, match=message):
        ps.load_training_state(engine, copy, context)
    assert all(torch.equal(before[piece.parameter], piece.values) for piece in engine.weight_pieces())
    assert engine.optimizer_state().step == 0


def test_another_optimizer_is_refused_with_what_can_be_carried_over(state):
    def sgd(named):
        return torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9)

    context, engine = engine_alone(sgd)
    with pytest.raises(ps.CheckpointError, match=r"got 'adam'.*expected 'torch.optim.sgd.SGD'.*Pass optimizer=False"):
        ps.load_training_state(engine, state, context)
    found = ps.load_training_state(engine, state, context, optimizer=False)
    assert found.carried == {"weights", "random"}
    want = load_file(state / "model.safetensors")["norm.weight"]
    assert torch.equal(engine.module.norm.weight, want)


def test_any_torch_optimizer_is_carried_over_to_itself(tmp_path):
    def sgd(named):
        return torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9, weight_decay=0.1)

    context, engine = engine_alone(sgd)
    ids = torch.arange(8)[None]
    for _ in range(2):
        engine.backward(engine(ids, ids))
        engine.step()
    ps.save_training_state(engine, tmp_path / "sgd", context, step=2, config={})
    _, other = engine_alone(sgd)
    ps.load_training_state(other, tmp_path / "sgd", context)
    for mine, theirs in zip(engine.optimizer_state().pieces, other.optimizer_state().pieces, strict=True):
        assert mine.slot == "momentum_buffer"
        assert torch.equal(mine.values, theirs.values)


def test_the_latest_whole_one_is_found(state, tmp_path, caplog):
    assert ps.latest_checkpoint(tmp_path / "nowhere") is None
    for step, age in ((2, 0), (10, 1), (9, 2)):
        copy = shutil.copytree(state, tmp_path / f"step-{step}")
        text = (copy / "polyshard.json").read_text()
        (copy / "polyshard.json").write_text(
            text.replace('"step": 2,\n  "optimizer"', f'"step": {step},\n  "optimizer"')
        )
        del age
    assert ps.latest_checkpoint(tmp_path) == tmp_path / "step-10"
    truncate(tmp_path / "step-10")
    shutil.copytree(state, tmp_path / ".step-11.saving-host-1-ab")
    with caplog.at_level(logging.WARNING):
        assert ps.latest_checkpoint(tmp_path) == tmp_path / "step-9"
    assert "skipping" in caplog.text
    assert "exp_avg.safetensors has the wrong size" in caplog.text


def test_positions_that_json_cannot_hold_are_refused(tmp_path):
    context, engine = engine_alone()
    with pytest.raises(ps.CheckpointError, match="data is not plain JSON"):
        ps.save_training_state(engine, tmp_path / "x", context, step=1, config={}, data={1, 2})
    assert not (tmp_path / "x").exists()


def draws():
    return torch.rand(2).tolist(), random.random(), numpy.random.rand()


def saved_and_drawn(directory):
    context, engine = make("torch", 1, {})
    ps.manual_seed(11, context)
    draws()
    ps.save_training_state(engine, directory, context, step=1, config={}, data={"row": 2})
    found = draws()
    ps.shutdown(context)
    return found


def loaded_and_drawn(directory, tensor):
    context, engine = make("torch", tensor, {})
    state = ps.load_training_state(engine, directory, context)
    found = draws()
    ps.shutdown(context)
    return found, sorted(state.carried), state.data


def test_a_resumed_run_draws_what_the_unbroken_one_would_have(tmp_path):
    """At other sizes by the documented rule: from the position's own states, or from a seed of its own."""
    (unbroken,) = run_ranks(saved_and_drawn, 1, tmp_path / "state")
    everything, but_random = ["optimizer", "random", "weights"], ["optimizer", "weights"]
    assert run_ranks(loaded_and_drawn, 1, tmp_path / "state", 1) == [(unbroken, everything, {"row": 2})]
    assert run_ranks(loaded_and_drawn, 2, tmp_path / "state", 2) == 2 * [(unbroken, everything, {"row": 2})]
    first, second = run_ranks(loaded_and_drawn, 2, tmp_path / "state", 1)
    assert first == (unbroken, everything, {"row": 2})
    assert second[1:] == (but_random, {"row": 2}), "one data position, which all can take"
    assert second[0] != unbroken
    assert second == run_ranks(loaded_and_drawn, 2, tmp_path / "state", 1)[1]


def not_stored():
    raise ps.CheckpointError("the state 'eta' cannot be stored")


def bad_states(directory):
    """What each rank says of a state that is missing, and of one that rank 1 cannot store."""
    context, engine = make("torch", 1, {})
    told = []
    with pytest.raises(ps.CheckpointError) as error:
        ps.load_training_state(engine, "/nonexistent/state", context)
    told.append(str(error.value))
    if context.rank == 1:
        engine.optimizer_state = not_stored
    with pytest.raises(ps.CheckpointError) as error:
        ps.save_training_state(engine, directory, context, step=1, config={})
    return [*told, str(error.value)]


def test_an_error_of_one_rank_is_one_on_every_rank(tmp_path):
    for missing, stored in run_ranks(bad_states, 2, tmp_path / "state"):
        assert "/nonexistent/state is not a directory" in missing
        assert "the state 'eta' cannot be stored" in stored, "and no rank waits for the timeout"


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_model_that_computes_differently_than_when_it_was_saved_is_named(tmp_path, caplog, eps):
    context = ps.initialize("torch")
    fields = tiny_config("llama").to_dict()

    def engine(**changes):
        model = decoder.build_model(ps.ModelConfig(**{**fields, **changes}), context)
        return ps.load_adapter("torch").engine(model, ps.AdamW(), context)

    ps.save_training_state(engine(), tmp_path / "state", context, step=1, config=fields)
    ps.load_training_state(engine(rms_norm_eps=eps), tmp_path / "state", context)
    told = "eps of the layer of 'model.layers.0.input_layernorm.weight' is 1e-05 in the state and 0.001 in the engine's"
    assert (told in caplog.text) == (eps != 1e-5)
    ps.shutdown(context)
