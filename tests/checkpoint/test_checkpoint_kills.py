"""A rank that is killed or frozen while saving: the checkpoint before stays whole, and the others say who it was."""

import json
import logging
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from support.workers.killed_save import save_until_hit

import polyshard as ps
from polyshard.adapters.torch import failure
from polyshard.checkpoint.manifest import read_manifest, verify_files
from polyshard.core.ranks import Ranks
from polyshard.testing import run_ranks

pytestmark = pytest.mark.slow

TRIES = 50
AT_ONCE = 4  # they mostly wait


def the_whole_state(root):
    """Its step, after a look at every byte."""
    found = ps.latest_checkpoint(root)
    if found is None:
        return 0
    manifest = read_manifest(found)
    verify_files(found, manifest, Ranks())
    step = manifest.state["step"]
    for name, tensor in load_file(found / "model.safetensors").items():
        assert bool((tensor == step).all()), f"{name} is not all of step {step}"
    return step


def try_many(root, seed):
    """One place, saved to again and again; each time a rank is killed at a random moment."""
    chance = random.Random(seed)
    seen = 0
    for attempt in range(TRIES // AT_ONCE + 1):
        victim = attempt % 2
        results = run_ranks(
            save_until_hit,
            2,
            root / "state",
            seen,
            victim,
            chance.randrange(3),
            chance.uniform(0.0, 1.2),
            signal.SIGKILL,
            30,
            0.5,
            silent=(victim,),
        )
        survivor = results[1 - victim]
        assert survivor is not None, "the survivor hung"
        step, error, *_ = survivor
        assert error == "RankFailureError"
        now = the_whole_state(root)
        assert now in (step - 1, step), f"step {step} was being saved, and {now} is there"
        assert now >= seen, "a checkpoint was lost"
        seen = now
    assert seen > 0, "no save ever finished"
    return attempt + 1


def test_killed_at_any_moment_nothing_is_lost(tmp_path):
    roots = [tmp_path / str(i) for i in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tries = list(pool.map(try_many, roots, range(AT_ONCE)))
    assert sum(tries) >= TRIES
    for root in roots:
        left = [path.name for path in root.iterdir()]
        assert len(left) <= 2, f"each save clears what a killed one left: {left}"
        context = ps.initialize("torch")
        model = torch.nn.Linear(2, 2)
        ps.save_checkpoint(model, root / "state", context, config={})
        assert os.listdir(root) == ["state"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_named_in_time(tmp_path, victim):
    timeout = 12
    arguments = (tmp_path / "state", 0, victim, 2, 0.5, signal.SIGSTOP, timeout, failure.PATIENCE)
    step, error, told, seconds = run_ranks(save_until_hit, 2, *arguments, silent=(victim,))[1 - victim]
    assert error == "RankFailureError"
    assert seconds < timeout + 1
    # Rank 0 of run_ranks keeps the store, as torchrun's agent does elsewhere: frozen, it takes the store with it.
    assert f"rank {victim} crashed, hung, or cannot be reached" in told or "keeps the store" in told
    assert the_whole_state(tmp_path) in (step - 1, step)


def test_without_an_exchange_of_directories_the_old_one_is_found(tmp_path, caplog, monkeypatch):
    """Where the file system cannot exchange two directories, a kill between two renames leaves the old one aside."""
    from polyshard.checkpoint import directory as room

    context = ps.initialize("torch")
    model = torch.nn.Linear(3, 2)
    target = tmp_path / "model"
    ps.save_checkpoint(model, target, context, config={"a": 1})
    monkeypatch.setattr(room, "_exchange", lambda *_: False)
    rename = os.rename

    def killed_at_the_second(source, destination):
        if str(destination) == str(target):
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        ps.save_checkpoint(model, target, context, config={"a": 2})
    monkeypatch.undo()
    assert not target.exists()
    with caplog.at_level(logging.WARNING):
        ps.load_checkpoint(torch.nn.Linear(3, 2), target, context)
        assert ps.read_config(target).a == 1
    assert "a save was killed while replacing it" in caplog.text
    ps.save_checkpoint(model, target, context, config={"a": 3})
    assert json.loads((target / "config.json").read_text())["a"] == 3
