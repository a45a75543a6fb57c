"""Arguments of a training run that have the wrong type or value: an error or a warning says what to pass instead."""

import logging

import decoder
import pytest
import torch
from support.models.tiny import tiny_config
from torch.optim import lr_scheduler

import polyshard as ps


class Model(torch.nn.Module):
    """A next-token model of one matrix."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

    def forward(self, input_ids):
        return self.layers[0](torch.nn.functional.one_hot(input_ids, 8).float())

    def compute_logits(self, hidden):
        return hidden


IDS = torch.tensor([[1, 2, 3, 4]])
BATCH = {"input_ids": IDS, "labels": torch.tensor([[2, 3, 4, -100]])}
TORCH = ps.load_adapter("torch")
BUILT = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.fixture
def engine():
    return engine_of()


def engine_of(optimizer=None, **options):
    return ps.load_adapter("torch").engine(Model(), optimizer or ps.AdamW(lr=0.1), ps.initialize("torch"), **options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ps.AdamW(lr="1e-4"), "AdamW.lr is invalid: got '1e-4'"),
        (lambda: ps.AdamW(lr=-1.0), "AdamW.lr is invalid: got -1.0"),
        (lambda: ps.AdamW(betas=(0.9, 1.0)), "AdamW.betas is invalid: got 1.0, expected a finite number below 1"),
        (lambda: ps.AdamW(betas=0.9), "AdamW.betas is invalid: got 0.9, expected a pair"),
        (lambda: ps.ParameterGroup(3), "pattern of a ParameterGroup is invalid: got 3"),
        (lambda: ps.Muon(exclude="*embed*"), r"Muon.exclude is invalid.*Pass \('\*embed\*',\)"),
        (lambda: ps.Muon(exclude=(), momentum=2), "Muon.momentum is invalid: got 2"),
        (lambda: ps.Muon(exclude=(), ns_steps=2.5), "Muon.ns_steps is invalid: got 2.5"),
        (lambda: ps.Muon(exclude=(), adjust_lr_fn="rms"), "Muon.adjust_lr_fn is invalid: got 'rms'"),
        (lambda: ps.Muon(exclude=(), adamw=1e-3), "Muon.adamw is invalid: got 0.001"),
        (lambda: engine_of("adamw"), "the optimizer is invalid: got 'adamw'"),
        (lambda: engine_of(lambda named: None), "returns no optimizer: got NoneType"),
        (lambda: engine_of(lambda named: torch.optim.SGD(Model().parameters(), lr=0.1)), "updates other parameters"),
        (lambda: engine_of(ps.TorchOptimizer(torch.optim.SGD, lr=0.1, foo=1)), "SGD rejects its settings.*'foo'"),
        (lambda: TORCH.engine("model", ps.AdamW(), ps.initialize("torch")), "model is invalid: got str"),
        (lambda: TORCH.engine(Model(), ps.initialize("torch"), ps.AdamW()), "parallel context of TorchEngine.*AdamW"),
        (lambda: engine_of(BUILT), "the optimizer has been built: got SGD"),
        (lambda: engine_of(ps.AdamW(groups=ps.ParameterGroup("*"))), "groups are invalid"),
        (lambda: engine_of(scheduler=lr_scheduler.StepLR(BUILT, 1)), "scheduler is invalid: got StepLR"),
        (lambda: engine_of(recompute=True), "recompute is invalid: got True"),
        (lambda: engine_of(recompute=None), "recompute is invalid: got None"),
        (lambda: engine_of(precision=torch.bfloat16), "precision is invalid: got torch.bfloat16"),
        (lambda: engine_of(max_grad_norm="1.0"), "max_grad_norm must be positive, or None, got '1.0'"),
    ],
)
def test_settings_of_an_engine(build, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        build()


def test_a_learning_rate_must_be_a_number(engine):
    for rate in (-1.0, float("nan"), "1e-3"):
        with pytest.raises(ps.ConfigurationError, match="the learning rate is invalid"):
            engine.set_learning_rate(rate)
    assert engine.learning_rate == 0.1


@pytest.mark.parametrize(
    ("micro_batches", "loss", "message"),
    [
        (BATCH, None, r"micro_batches is one micro-batch.*Pass \[micro_batch\]"),
        ([{**BATCH, "labels": BATCH["labels"].float()}], None, "labels have the wrong dtype: got torch.float32"),
        ([{**BATCH, "labels": [[2, 3, 4, 5]]}], None, "labels are no tensor: got list"),
        ([BATCH], lambda output, batch: 3.0, "got 3.0, expected a scalar tensor"),
        ([BATCH], lambda output, batch: torch.zeros(()), "the loss does not depend on the model"),
        ([BATCH], "mean", "loss is invalid: got 'mean'"),
    ],
)
def test_micro_batches_and_losses(engine, micro_batches, loss, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        engine.train_batch(micro_batches, loss)


def test_a_loss_of_the_wrong_shape_is_refused_without_gradients_too(engine):
    with pytest.raises(ps.ConfigurationError, match="the loss has the wrong shape: got 3.0"):
        engine.eval_batch([BATCH], lambda output, batch: 3.0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (12, "tokens is invalid: got 12"),
        (lambda batch: None, "micro-batch 0: got None"),
        (lambda batch: -3, "micro-batch 0: got -3"),
        (lambda batch: float("nan"), "micro-batch 0: got nan"),
        (lambda batch: batch["labels"] != -100, r"micro-batch 0: got shape \(1, 4\)"),
    ],
)
def test_counts_of_tokens(engine, tokens, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        engine.train_batch([BATCH], lambda output, batch: output.sum(), tokens)


def decoder_engine():
    context = ps.initialize("torch")
    model = decoder.build_model(tiny_config("llama"), context)
    ps.initialize_weights(model, context, seed=0)
    return ps.load_adapter("torch").engine(model, ps.AdamW(), context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": IDS.float()}, "input_ids have the wrong dtype: got torch.float32"),
        ({"input_ids": IDS.to(torch.uint8)}, "input_ids have the wrong dtype: got torch.uint8"),
        ({"input_ids": IDS.tolist()}, "input_ids are no tensor: got list"),
        ({"input_ids": IDS[None], "labels": IDS[None]}, r"got tokens \(1, 1, 4\), expected \[batch, seq\]"),
        ({"input_ids": IDS[0], "labels": IDS[0], "cu_seqlens": [0, 4]}, "cu_seqlens is no tensor: got list"),
    ],
)
def test_inputs_of_a_decoder(changes, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        decoder_engine().train_batch([{**BATCH, **changes}])


def test_int32_labels_are_converted(engine):
    loss = engine.train_batch([BATCH]).loss
    assert engine.train_batch([{**BATCH, "labels": BATCH["labels"].int()}]).loss == loss


def test_labels_that_are_not_shifted_are_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        engine_of().train_batch([BATCH])
        engine_of().train_batch([{"input_ids": torch.ones_like(IDS), "labels": torch.ones_like(IDS)}])
        assert not caplog.records
        engine = engine_of()
        for _ in range(2):
            engine.train_batch([{"input_ids": IDS, "labels": IDS}])
    assert [record.message for record in caplog.records if "Shift them by one" in record.message] != []
    assert len(caplog.records) == 1


def test_training_states(engine, tmp_path, caplog):
    context = ps.initialize("torch")
    for step in ("5", 5.0, None, -1):
        with pytest.raises(ps.ConfigurationError, match="step is invalid"):
            ps.save_training_state(engine, tmp_path / "state", context, step=step, config={})
    with pytest.raises(ps.ConfigurationError, match="a training state is that of an engine"):
        ps.save_training_state(engine.module, tmp_path / "state", context, step=1, config={})
    (tmp_path / "notes").write_text("text")
    with pytest.raises(ps.CheckpointError, match="notes is a file"):
        ps.save_training_state(engine, tmp_path / "notes", context, step=1, config={})
    assert (tmp_path / "notes").read_text() == "text"

    state = ps.save_training_state(engine, tmp_path / "state", context, step=1, config={})
    other = engine_of(ps.AdamW(lr=0.01))
    with caplog.at_level(logging.WARNING):
        ps.load_training_state(other, state, context)
    assert other.learning_rate == 0.1
    assert "the learning rate continues at 0.1" in caplog.text
    ps.load_training_state(engine_of(ps.AdamW(lr=0.01)), state, context, scheduler=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype is invalid: got 'bfloat16'"),
        ({"dtype": torch.int8}, "dtype is invalid: got torch.int8, expected None or a floating-point dtype"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is invalid: got 0"),
        ({"max_shard_bytes": "5GB"}, "max_shard_bytes is invalid: got '5GB'"),
        ({"architecture": ["A"]}, r"architecture is invalid: got \['A'\]"),
        ({"factory": "decoder.build_model"}, "factory is invalid: got 'decoder.build_model', expected 'module:attr"),
        ({"factory": Model}, "factory is invalid: got <class"),
    ],
)
def test_checkpoints(engine, tmp_path, options, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        ps.save_checkpoint(engine, tmp_path / "out", ps.initialize("torch"), config={}, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ps.initialize("torch", timeout="60"), "timeout must be positive seconds, got '60'"),
        (lambda: ps.initialize("torch", device="gpu"), "device is invalid: got 'gpu'"),
        (lambda: ps.Dropout("0.1", ps.initialize("torch")), "dropout probability is invalid: got '0.1'"),
        (lambda: ps.model_flops(Model()), "engine is invalid: got Model"),
        (lambda: ps.Monitor(ps.initialize("torch"), lambda record: None), "sinks are invalid"),
        (lambda: ps.Monitor(ps.initialize("torch"), ["steps.jsonl"]), r"sinks are invalid: got \['steps.jsonl'\]"),
    ],
)
def test_parts_of_a_run(call, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        call()


def test_a_file_of_records_must_hold_records(tmp_path):
    (tmp_path / "log.txt").write_text("started\n")
    with pytest.raises(ps.ConfigurationError, match="holds other lines than records: got 'started"):
        ps.JsonLines(tmp_path / "log.txt")(ps.StepRecord(step=1, loss=1.0))
    assert (tmp_path / "log.txt").read_text() == "started\n"


def changed(model, how):
    weight = model.layers[0].weight
    if how == "frozen":
        weight.requires_grad_(False)
    elif how == "cast":
        model.bfloat16()
    else:
        model.layers[0].weight = torch.nn.Parameter(weight.detach().clone())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("frozen", "got requires_grad=False, expected True"),
        ("cast", "got torch.bfloat16, expected torch.float32"),
        ("replaced", "got another tensor, expected the one that the engine trains"),
    ],
)
def test_a_model_that_changes_after_its_engine_was_built(engine, how, message):
    changed(engine.module, how)
    with pytest.raises(ps.ConfigurationError, match=f"was changed after the engine was built: {message}"):
        engine.train_batch([BATCH])


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
def test_training_without_gradients(engine, disabled):
    with disabled(), pytest.raises(ps.ConfigurationError, match="train_batch needs gradients"):
        engine.train_batch([BATCH])


@pytest.mark.parametrize(
    ("message", "start"),
    [
        ("strategy is unknown: got 'FOO', expected one of PACK, ", lambda: ps.run_on_ray(print, 2, strategy="FOO")),
        ("function is invalid: got 2", lambda: ps.run_on_ray(2, print)),
        ("ranks is invalid: got '2', expected a positive integer", lambda: ps.run_on_ray(print, "2")),
        ("restarts is invalid: got -1", lambda: ps.run_on_ray(print, 2, restarts=-1)),
        ("resources is invalid: got 'GPU', expected positive", lambda: ps.run_on_ray(print, 2, resources="GPU")),
        (r"resources is invalid: got {'GPU': -1}", lambda: ps.run_on_ray(print, 2, resources={"GPU": -1})),
        (r"environment is invalid: got {'A': 1}", lambda: ps.run_on_ray(print, 2, environment={"A": 1})),
        (r"resources is invalid: got {'GPU': '1'}", lambda: ps.ray_engine("model", resources={"GPU": "1"})),
        (r"environment is invalid: got \['A'\]", lambda: ps.ray_engine("model", environment=["A"])),
        ("max_restarts is invalid: got -2", lambda: ps.ray_engine("model", max_restarts=-2)),
    ],
)
def test_settings_of_ray(message, start):
    with pytest.raises(ps.ConfigurationError, match=message):
        start()
