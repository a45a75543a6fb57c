"""Packed documents and the loader: no token is lost or read twice, at any size, over restarts."""

import itertools
import logging
import random
from collections import Counter

import pytest
import torch
import transformers
from support.models.tiny import VOCAB, save_tiny
from support.workers.loaded import first_loss, loss_at_context_2, read_and_go_on, steps_of
from torchdata.stateful_dataloader import StatefulDataLoader

import polyshard as ps
from polyshard.testing import run_ranks

LENGTH = 12


def documents_of(counts):
    """Documents in which every token is another number, so that its place can be found."""
    numbers = itertools.count(1)
    return [[next(numbers) for _ in range(count)] for count in counts]


@pytest.fixture(scope="module")
def documents():
    chance = random.Random(0)
    return documents_of([chance.choice([1, 2, 3, 5, 7, 11, 12, 13, 30]) for _ in range(50)])


def sequences(row):
    """The token IDs, labels and positions of each sequence of a row."""
    lengths = row["cu_seqlens"].diff().tolist()
    parts = [row[name].split(lengths) for name in ("input_ids", "labels", "positions")]
    return [tuple(part.tolist() for part in sequence) for sequence in zip(*parts)]


@pytest.mark.parametrize("whole", [True, False])
def test_every_token_is_in_one_row_and_the_label_of_one_token(documents, whole):
    rows = ps.PackedDocuments(documents, LENGTH, whole=whole)
    read, labels, padding = Counter(), {}, 0
    for row in rows:
        assert row["input_ids"].shape == (LENGTH,)
        for ids, targets, positions in sequences(row):
            assert positions == list(range(len(ids)))
            if ids[0] == 0:
                assert set(ids) == {0}
                assert set(targets) == {-100}
                padding += len(ids)
                continue
            read.update(ids)
            labels.update(zip(ids, targets))
    tokens = [token for document in documents for token in document]
    assert read == Counter(tokens)
    after = {a: b for document in documents for a, b in zip(document, [*document[1:], -100])}
    assert labels == after
    assert padding == len(rows) * LENGTH - rows.tokens
    if whole:
        assert len(rows) <= 1.1 * rows.tokens / LENGTH + 1
    else:
        assert len(rows) == -(-rows.tokens // LENGTH)


def test_a_document_that_fits_into_a_row_is_in_one_piece(documents):
    pieces = {tuple(ids) for row in ps.PackedDocuments(documents, LENGTH) for ids, _, _ in sequences(row)}
    assert {tuple(document) for document in documents if len(document) <= LENGTH} <= pieces


def test_labels_of_a_document_are_shifted_with_it():
    masked = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    row = ps.PackedDocuments([masked, [9, 10]], 6)[0]
    assert row["labels"].tolist() == [-100, 7, 8, -100, 10, -100]
    with pytest.raises(ps.ConfigurationError, match="document 0 has the wrong shape"):
        ps.PackedDocuments([[1, 2, 3]], 4, lengths=[2])[0]


def test_the_loss_is_that_of_each_document_alone(tmp_path):
    """transformers computes each document by itself; packed rows must not let one attend to another."""
    directory = save_tiny(tmp_path / "model", "llama")
    chance = random.Random(1)
    documents = [[chance.randrange(VOCAB) for _ in range(n)] for n in (9, 5, 7, 3, 4, 12, 2, 6)]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    total, labels = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        with torch.no_grad():
            total += float(oracle(ids, labels=ids).loss) * (len(document) - 1)
        labels += len(document) - 1
    single = first_loss(directory, documents, LENGTH, ps.initialize("torch"))
    assert single == (pytest.approx(total / labels, abs=2e-6), labels)
    for over_context in run_ranks(loss_at_context_2, 2, directory, documents, LENGTH):
        assert over_context == (pytest.approx(total / labels, abs=2e-6), labels)


def test_a_restart_at_another_size_reads_the_same_rows(documents):
    batch, steps = 4, 5
    rows = ps.PackedDocuments(documents, LENGTH)
    assert len(rows) % batch, "the steps must go over the end of an epoch"
    context = ps.initialize("torch")
    loader = ps.StepLoader(rows, context, batch=batch, micro_batch=1, seed=3)
    expected, positions = [], []
    for _ in range(6):
        expected += steps_of(loader, steps)
        positions.append(loader.state_dict())

    (first, saved, error), (second, other_saved, _) = run_ranks(read_and_go_on, 2, documents, LENGTH, batch, steps)
    assert saved == other_saved == positions[:2]
    assert "ranks have different data" in error
    together = [[row for pair in zip(*both) for row in pair] for both in zip(first, second)]
    assert together == expected[: 2 * steps]

    alone = ps.StepLoader(rows, context, batch=batch, seed=3, micro_batch=2)
    alone.load_state_dict(saved[0])
    pairs = [[a + b for a, b in zip(step[::2], step[1::2])] for step in expected[steps:]]
    assert steps_of(alone, 5 * steps) == pairs


def test_rows_at_the_end_of_an_epoch(documents, caplog):
    context, rows = ps.initialize("torch"), ps.PackedDocuments(documents, LENGTH)
    count, batch = len(rows), 4
    over = count % batch
    assert over

    def loader(**options):
        return ps.StepLoader(rows, context, batch=batch, micro_batch=1, **options)

    def read(loader):
        return [tuple(ids) for step in steps_of(loader, 10**9) for ids in step]

    carried = read(loader(epochs=batch))
    assert set(Counter(carried).values()) == {batch}, "each row once in each epoch"
    assert carried[:count] != carried[count : 2 * count], "each epoch has its own order"
    assert set(carried[:count]) == set(carried[count : 2 * count])
    with caplog.at_level(logging.WARNING):
        assert len(read(loader(epochs=1))) == count - over
        assert f"{over} rows are dropped after the last epoch" in caplog.text
        dropped = read(loader(epochs=2, last="drop"))
    assert f"{over} of {count} rows are dropped" in caplog.text
    assert len(dropped) == 2 * (count - over)
    assert dropped[: count - over] == carried[: count - over]
    with pytest.raises(ps.ConfigurationError, match=f"{over} too many"):
        loader(last="error")
    with pytest.raises(ps.ConfigurationError, match="too small"):
        ps.StepLoader(rows, context, batch=100 * batch, last="drop")
    with pytest.raises(ps.ConfigurationError, match="multiple of 1 data-parallel ranks times 3"):
        ps.StepLoader(rows, context, batch=batch, micro_batch=3)


def test_another_batch_size_continues_in_the_same_epoch(documents):
    """Without "carry" no step has rows of two epochs, and the last step of the epoch is not lost."""
    context, rows = ps.initialize("torch"), ps.PackedDocuments(documents, LENGTH)
    loader = ps.StepLoader(rows, context, batch=4, last="drop")
    read = [tuple(ids) for step in steps_of(loader, 2) for ids in step]
    other = ps.StepLoader(rows, context, batch=3, last="drop", epochs=1)
    other.load_state_dict(loader.state_dict())
    read += [tuple(ids) for step in steps_of(other, 10**9) for ids in step]
    assert len(set(read)) == len(read)
    assert sum(map(len, read)) // LENGTH == 8 + (len(rows) - 8) // 3 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 2.0}, "batch is invalid: got 2.0"),
        ({"batch": 2, "micro_batch": 0}, "micro_batch is invalid: got 0"),
        ({"batch": 2, "epochs": -1}, "epochs is invalid: got -1"),
        ({"batch": 2, "workers": -1}, "workers is invalid: got -1"),
        ({"batch": 2, "seed": None}, "seed is invalid: got None"),
    ],
)
def test_settings_that_are_no_counts_are_refused(documents, settings, message):
    with pytest.raises(ps.ConfigurationError, match=message):
        ps.StepLoader(ps.PackedDocuments(documents, LENGTH), ps.initialize("torch"), **settings)


def test_documents_that_are_no_token_ids_are_refused():
    for documents in (["a text"], [[0.5, 1.5]], [{"input_ids": [1, 2], "labels": [0.5, 1.5]}]):
        with pytest.raises(ps.ConfigurationError, match="document 0 holds no token IDs: got (str|torch.float32)"):
            ps.PackedDocuments(documents, LENGTH)[0]
    with pytest.raises(ps.ConfigurationError, match=r"got generator, .*Pass list\(...\) of it"):
        ps.PackedDocuments((ids for ids in [[1, 2]]), LENGTH)
    with pytest.raises(
        ps.ConfigurationError, match="rows are not packed: missing cu_seqlens, positions. Pass collate="
    ):
        ps.packed_batch([{"input_ids": torch.arange(3), "labels": torch.arange(3)}])


def test_a_loader_names_the_argument_that_it_cannot_use(documents):
    context, rows = ps.initialize("torch"), ps.PackedDocuments(documents, LENGTH)
    for build, message in (
        (lambda: ps.StepLoader(rows, None, batch=1), "context of StepLoader is invalid: got NoneType"),
        (lambda: ps.StepLoader(context, rows, batch=1), "context of StepLoader is invalid: got PackedDocuments"),
        (lambda: ps.StepLoader(iter(documents), context, batch=1), "rows is invalid: got list_iterator"),
        (lambda: ps.StepLoader(rows, context, batch=1, collate=None), "collate is invalid: got None"),
        (lambda: ps.StepLoader(rows, context, batch=1, shuffle="yes"), "shuffle is invalid: got 'yes'"),
        (lambda: ps.StepLoader(rows, context, batch=1, seed=2**70), "seed is invalid: got 1180591620717411303424"),
        (lambda: ps.StepLoader(rows, context, batch=1).load_state_dict(None), "the position is invalid: got NoneType"),
        (lambda: next(iter(ps.StepLoader(rows, context, batch=1, collate=list))), "no micro-batch: got list"),
        (lambda: ps.PackedDocuments([1, 2, 3], 2), r"document 0 holds no token IDs: got int.*Pass \[documents\]"),
    ):
        with pytest.raises(ps.ConfigurationError, match=message):
            build()


def test_workers_draw_nothing_from_the_generator_of_dropout(documents):
    loader = ps.StepLoader(ps.PackedDocuments(documents, LENGTH), ps.initialize("torch"), batch=2, workers=1)
    before = torch.get_rng_state()
    steps_of(loader, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_position_in_other_data_is_rejected(documents):
    context = ps.initialize("torch")
    loader = ps.StepLoader(ps.PackedDocuments(documents, LENGTH), context, batch=2)
    others = ps.PackedDocuments(documents, LENGTH, whole=False), ps.PackedDocuments(documents[1:], LENGTH)
    for rows, seed in [*((rows, 0) for rows in others), (ps.PackedDocuments(documents, LENGTH), 1)]:
        with pytest.raises(ps.ConfigurationError, match="the position is of other data"):
            ps.StepLoader(rows, context, batch=2, seed=seed).load_state_dict(loader.state_dict())
    for wrong in ({"row": -1}, {"row": 10**6}, {"epoch": "last"}):  # the first would read no rows, without an end
        with pytest.raises(ps.ConfigurationError, match="the position is invalid"):
            loader.load_state_dict({**loader.state_dict(), **wrong})
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(ps.ConfigurationError, match="being iterated"):
        loader.load_state_dict(loader.state_dict())


def test_a_training_state_holds_loaders_and_other_objects(tmp_path, documents):
    """The loader here and torchdata's, for streams whose position is each rank's own."""
    context = ps.initialize("torch")
    rows = ps.PackedDocuments(documents, LENGTH)
    engine = ps.load_adapter("torch").engine(torch.nn.Linear(2, 2), ps.AdamW(), context)

    def objects():
        stream = StatefulDataLoader(list(range(20)), batch_size=2, shuffle=False)
        return {"loader": ps.StepLoader(rows, context, batch=2), "stream": stream}

    one, other = objects(), objects()
    steps_of(one["loader"], 3)
    read = iter(one["stream"])
    assert next(read).tolist() == [0, 1]
    saved = ps.save_training_state(engine, tmp_path / "a", context, step=1, config={}, data={**one, "note": [1, None]})
    state = ps.load_training_state(engine, saved, context, data=other)
    assert state.data["note"] == [1, None]
    assert steps_of(other["loader"], 2) == steps_of(one["loader"], 2)
    assert next(iter(other["stream"])).tolist() == next(read).tolist() == [2, 3]

    alone = ps.save_training_state(engine, tmp_path / "b", context, step=1, config={}, data=one["loader"])
    ps.load_training_state(engine, alone, context, data=other["loader"])
    before = engine.updates
    for data, message in (
        ({"schedule": other["loader"]}, "no saved state for"),
        (7, "expected an object with load_state_dict"),
    ):
        with pytest.raises(ps.CheckpointError, match=message):
            ps.load_training_state(engine, alone, context, data=data)
    other_rows = ps.StepLoader(ps.PackedDocuments(documents[1:], LENGTH), context, batch=2)
    with pytest.raises(ps.ConfigurationError, match="other data"):
        ps.load_training_state(engine, alone, context, data=other_rows)
    assert engine.updates == before, "nothing was loaded"
    for data in ({1: 2}, {"a": torch.ones(1)}, {"a": object()}):
        with pytest.raises(ps.CheckpointError, match="not plain JSON"):
            ps.save_training_state(engine, tmp_path / "c", context, step=1, config={}, data=data)
    empty = ps.save_training_state(engine, tmp_path / "d", context, step=1, config={})
    with pytest.raises(ps.CheckpointError, match="there is no position for data"):
        ps.load_training_state(engine, empty, context, data=other["loader"])
