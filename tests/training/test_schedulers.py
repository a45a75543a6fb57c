"""Schedulers of torch on the engines: each gives the rates that it gives torch's own optimizer, also after a resume."""

import logging

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

import polyshard as ps
from polyshard.training.schedule import Schedule

SCHEDULERS = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5, 5]),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20, cycle_momentum=False),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.StepLR(optimizer, 2)], [3]
    ),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "transformers": lambda optimizer: transformers.get_cosine_schedule_with_warmup(optimizer, 2, 10),
}


def rates_of_torch(scheduler, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    made, rates = SCHEDULERS[scheduler](optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


def engine_with(scheduler):
    context = ps.initialize("torch")
    model = torch.nn.Linear(2, 2)
    optimizer = ps.AdamW(lr=0.1, groups=(ps.ParameterGroup("bias", lr_scale=0.5),))
    factory = SCHEDULERS.get(scheduler, scheduler)
    return context, ps.load_adapter("torch").engine(model, optimizer, context, scheduler=factory)


def step(engine, value=1.0):
    engine.backward(engine(torch.full((1, 2), value)).sum())
    return engine.step()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rates_are_those_of_torch_and_groups_scale_them(scheduler, tmp_path):
    rates = rates_of_torch(scheduler, 8)
    context, engine = engine_with(scheduler)
    for number, rate in enumerate(rates):
        assert engine.learning_rate == rate
        by_scale = {group["lr_scale"]: group["lr"] for group in engine.optimizer.param_groups}
        assert by_scale == {1.0: rate, 0.5: 0.5 * rate}
        step(engine)
        if number == 3:  # goes on in another engine
            ps.save_training_state(engine, tmp_path / "state", context, step=4, config={})
            context, engine = engine_with(scheduler)
            ps.load_training_state(engine, tmp_path / "state", context)


def test_a_skipped_step_does_not_advance_the_schedule():
    rates = rates_of_torch("cosine", 3)
    _, engine = engine_with("cosine")
    assert not step(engine).skipped
    assert step(engine, float("inf")).skipped
    assert engine.learning_rate == rates[1]
    assert not step(engine).skipped
    assert engine.learning_rate == rates[2]


def test_what_cannot_set_the_rate_is_refused():
    for scheduler, message in (
        (lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau needs a metric"),
        (
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=9),
            "sets the momentum.* cycle_momentum=F",
        ),
        (lambda optimizer: None, "got NoneType, expected one of torch.optim.lr_scheduler"),
        (lambda optimizer: SCHEDULERS["cosine"](torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])), "returns no"),
    ):
        with pytest.raises(ps.ConfigurationError, match=message):
            engine_with(scheduler)
    _, engine = engine_with("cosine")
    with pytest.raises(ps.ConfigurationError, match="the engine's scheduler sets the learning rate"):
        engine.set_learning_rate(0.1)


def test_a_scheduler_in_the_configuration_of_deepspeed_is_refused():
    """DeepSpeed would build it, and a resumed run would begin it anew."""
    context = ps.initialize("deepspeed")
    config = {"scheduler": {"type": "WarmupLR"}}
    with pytest.raises(ps.ConfigurationError, match=r"config sets the scheduler: .* Pass scheduler= to the engine"):
        ps.load_adapter("deepspeed").engine(torch.nn.Linear(2, 2), ps.AdamW(), context, config=config)
    ps.shutdown(context)


def test_a_state_of_another_schedule_is_refused_unless_it_is_left_out(tmp_path):
    context, engine = engine_with("cosine")
    step(engine)
    ps.save_training_state(engine, tmp_path / "state", context, step=1, config={})
    for scheduler, message in (
        (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=9), "got T_max 9 for 8"),
        ("steps", r"got class torch.optim.lr_scheduler.MultiStepLR for .*CosineAnnealingLR"),
        (None, "got none for a saved one"),
    ):
        context, other = engine_with(scheduler)
        rate, weights = other.learning_rate, {name: value.clone() for name, value in other.weights()}
        with pytest.raises(ps.CheckpointError, match=message):
            ps.load_training_state(other, tmp_path / "state", context)
        assert all(torch.equal(value, weights[name]) for name, value in other.weights())
        ps.load_training_state(other, tmp_path / "state", context, scheduler=False)
        assert other.learning_rate == rate
        assert other.optimizer_state().step == 1


def test_the_schedule_survives_json():
    """Keys that are numbers (MultiStepLR) and tuples keep their types."""
    schedule = Schedule(SCHEDULERS["steps"], 0.1)
    for _ in range(3):
        schedule.step()
    other = Schedule(SCHEDULERS["steps"], 0.1)
    other.load(schedule.state())
    for _ in range(3):
        schedule.step()
        other.step()
    assert other.lr == schedule.lr == pytest.approx(1e-4)


def test_changed_groups_are_named(tmp_path, caplog):
    context, engine = engine_with("cosine")
    step(engine)
    ps.save_training_state(engine, tmp_path / "state", context, step=1, config={})
    other = ps.load_adapter("torch").engine(
        torch.nn.Linear(2, 2), ps.AdamW(lr=0.1), context, scheduler=SCHEDULERS["cosine"]
    )
    with caplog.at_level(logging.WARNING):
        ps.load_training_state(other, tmp_path / "state", context)
    assert "bias has {'lr_scale': 1.0, 'weight_decay': 0.0}, had {'lr_scale': 0.5" in caplog.text
