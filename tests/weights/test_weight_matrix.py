"""Weights move between any two libraries and any two tensor-parallel sizes, bit for bit."""

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from support.models.tiny import save_tiny
from support.workers.moving import hand_on, matrix

from polyshard.testing import run_ranks

ADAPTERS = ("torch", "megatron", "deepspeed", "fairscale")
SIZES = (1, 2, 4)


def test_every_library_and_size_to_every_other(tmp_path):
    """Two KV heads: at tensor-parallel 4 they are shared; the vocabulary of 131 is padded at 2 and 4."""
    original = save_tiny(tmp_path / "original", "qwen3")
    verdicts = run_ranks(matrix, 4, original, tmp_path, ADAPTERS, SIZES, timeout=280)
    places = [(adapter, size) for adapter in ADAPTERS for size in SIZES]
    table = Table("from \\ to", *(f"{adapter}\n{size}" for adapter, size in places), title="weights, bit for bit")
    for source in places:
        row = ["yes" if all(v[source, target] for v in verdicts) else "NO" for target in places]
        table.add_row(f"{source[0]} {source[1]}", *row)
    Console(width=160).print(table)
    assert len(verdicts[0]) == len(places) ** 2 == 144
    assert all(all(verdict.values()) for verdict in verdicts)


def test_smollm2_at_one_and_three(smollm2, tmp_path):
    """Handed from library to library, at sizes 1 and 3 in turn, the file at the end is that of the beginning."""
    source = smollm2
    for i, adapter in enumerate(ADAPTERS):
        size = (3, 1)[i % 2]
        run_ranks(hand_on, size, source, tmp_path / adapter, adapter, size, timeout=280)
        source = tmp_path / adapter
    want, found = (load_file(path / "model.safetensors") for path in (smollm2, source))
    assert set(found) == set(want)
    assert all((found[name].view(-1) == want[name].view(-1)).all() for name in want)
