"""Senders and receivers that are cut in different ways: each element that a receiver keeps is sent to it once."""

import itertools

import decoder
import pytest
import torch
from support.models.tiny import tiny_config

import polyshard as ps
from polyshard.weights.regions import regions
from polyshard.weights.transfers import (
    Need,
    message_bytes,
    message_order,
    messages_from_json,
    messages_to_json,
    parts_for,
    plan_messages,
    uncovered,
)


@pytest.fixture(scope="module")
def table():
    context = ps.initialize("torch")
    config = ps.ModelConfig(**tiny_config("qwen3", tie_word_embeddings=True).to_dict())
    return ps.collect_layouts(decoder.build_model(config, context))


def needs_of(table, rank, size):
    boxes = {}
    for entry in table.values():
        for region in regions(entry, rank, size):
            boxes.setdefault(region.name, (region.shape, []))[1].append((region.offsets, region.sizes))
    return [Need(name=name, shape=shape, boxes=tuple(parts)) for name, (shape, parts) in boxes.items()]


def held_by(table, rank, size, share, shares):
    """What one of several data-parallel ranks holds, as ZeRO cuts it: a run of each flattened shard."""
    held = {}
    number = 0
    for entry in table.values():
        total = torch.Size(entry.layout.local_shape(rank, size)).numel()
        start, stop = (total * i // shares for i in (share, share + 1))
        for region in regions(entry, rank, size, start, stop):
            if region.first:
                held.setdefault(region.name, []).append((number, region))
                number += 1
    return held


@pytest.mark.parametrize(("tensor", "data", "receivers"), [(1, 1, 2), (2, 1, 1), (2, 3, 4), (4, 2, 2), (1, 5, 2)])
def test_every_receiver_gets_what_it_keeps_and_nothing_else(table, tensor, data, receivers):
    known = {name for entry in table.values() for name in entry.checkpoint_names}
    for receiver in range(receivers):
        needs = needs_of(table, receiver, receivers)
        everything = []
        for rank, share in itertools.product(range(tensor), range(data)):
            parts = parts_for(needs, held_by(table, rank, tensor, share, data), known)
            messages = messages_from_json(messages_to_json(plan_messages(parts, 4, 1000)))
            assert all(message_bytes(message, 4) <= 1000 for message in messages)
            everything += [part for message in messages for part in message]
        assert uncovered(needs, everything) == []
        counts = [torch.zeros(need.shape, dtype=torch.int32) for need in needs]
        for part in everything:
            counts[part.need][tuple(slice(o, o + s) for o, s in zip(part.offsets, part.sizes))] += 1
        for need, count in zip(needs, counts):
            wanted = torch.zeros_like(count)
            for offsets, sizes in need.boxes:
                wanted[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))] = 1
            assert torch.equal(count, wanted), need.name


def test_an_element_that_nobody_sends_is_told(table):
    needs = needs_of(table, 0, 2)
    parts = parts_for(needs, held_by(table, 0, 2, 0, 1), {need.name for need in needs})
    lost = parts.pop()
    have, keep = needs[lost.need].numel - lost.numel, needs[lost.need].numel
    assert uncovered(needs, parts) == [f"{needs[lost.need].name}: {have} of {keep} elements"]


@pytest.mark.parametrize(("senders", "receivers"), [(1, 3), (3, 1), (3, 2), (4, 4), (2, 5)])
@pytest.mark.parametrize("window", [1, 3])
def test_no_order_of_progress_ends_in_a_circle_of_waits(senders, receivers, window):
    """Simulated: a message passes when it is among the first of both its sender and its receiver."""
    counts = {(s, r): 1 + (5 * s + 3 * r) % 4 for s in range(senders) for r in range(receivers)}
    messages = sorted((message_order(i, s, r, receivers), s, r, i) for (s, r), n in counts.items() for i in range(n))
    sending = [[m for m in messages if m[1] == s] for s in range(senders)]
    receiving = [[m for m in messages if m[2] == r] for r in range(receivers)]
    left = len(messages)
    while left:
        ready = [m for queue in sending for m in queue[:window] if m in receiving[m[2]][:window]]
        assert ready, "all wait for each other"
        message = max(ready)  # the least favourable choice
        sending[message[1]].remove(message)
        receiving[message[2]].remove(message)
        left -= 1
