"""Traces of two forward passes: inputs and outputs of every module for each token, and the first difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from polyshard.core.environment import TRACE

_KEYS = "tokens"  # int64 [tokens, 2]: position and token ID


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """The first operator whose values differ, in the order of the first forward pass.

    Attributes:
        module: qualified name in the model as built.
        what: `"output"`, or `"input"` if the operations between the last equal module and this one differ.
        after: the last module whose output is equal; empty if there is none.
        position: position of the first token that differs.
        token: ID of that token.
        rows: number of tokens that differ.
        compared: number of tokens that both sides computed.
        largest: largest absolute difference.
    """

    module: str
    what: str
    after: str
    position: int
    token: int
    rows: int
    compared: int
    largest: float

    def __str__(self) -> str:
        where = f"the {self.what} of {self.module}"
        if self.what == "input":
            where += f" (the operations between {self.after or 'the beginning'} and it)"
        return (
            f"{where}: {self.rows} of {self.compared} tokens, by at most {self.largest:.3g}, first at position "
            f"{self.position} (token {self.token})"
        )


class Recorder:
    """Records the inputs and outputs of every module of a model into one file per forward pass, until it is closed.

    The model's forward must accept `(input_ids, positions)`, packed or batched. Values of modules without one row for
    each token (such as a head that receives selected tokens) are skipped.
    """

    def __init__(self, model: nn.Module, folder: str | Path, rank: int = 0) -> None:
        self._folder, self._rank, self._step = Path(folder), rank, 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, torch.Tensor] = {}
        self._tokens = 0
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._given(name)))
                self._handles.append(module.register_forward_hook(self._gave(name)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("input_ids", "positions"), args)) | kwargs
        ids, positions = named["input_ids"].flatten(), named["positions"].flatten()
        self._tokens = len(ids)
        self._values = {_KEYS: torch.stack((positions.to(torch.int64), ids.to(torch.int64)), dim=1).cpu()}

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        save_file(self._values, self._folder / f"{self._rank:03d}-{self._step:06d}.safetensors")
        self._values, self._tokens = {}, 0
        self._step += 1

    def _given(self, name: str) -> Any:
        return lambda module, args: self._keep(name, "input", args[0] if args else None)

    def _gave(self, name: str) -> Any:
        return lambda module, args, output: self._keep(name, "output", output)

    def _keep(self, name: str, what: str, value: Any) -> None:
        if not self._tokens or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return
        lead = value.shape[:2] if value.dim() > 1 and value.shape[0] == 1 else value.shape[:1]
        if lead.numel() == self._tokens:
            key = f"{len(self._values):06d} {what} {name}"
            self._values[key] = value.detach().reshape(self._tokens, -1).cpu().clone()


def recorder_of(model: nn.Module, rank: int) -> Recorder | None:
    """Return a recorder for a served model if the environment variable is set."""
    folder = TRACE.read()
    return Recorder(model, folder, rank) if folder else None


def first_difference(one: str | Path, other: str | Path, rank: int = 0) -> FirstDifference | None:
    """Return the first module whose values differ between two recordings, or None.

    Tokens are identified by position and ID; tokens that share both are skipped. Modules that exist on one side only,
    or have another width there (shards of another tensor-parallel size), are skipped as well.

    Args:
        one: a folder written by a `Recorder`; modules are compared in its order.
        other: another such folder.
        rank: the rank of both.
    """
    mine, theirs = _read(one, rank), _read(other, rank)
    after = ""
    for key, (keys, values) in mine.items():
        if key not in theirs or theirs[key][1].shape[1] != values.shape[1]:
            continue
        pairs = sorted((token, row, theirs[key][0][token]) for token, row in keys.items() if token in theirs[key][0])
        if not pairs:
            continue
        here = values[[row for _, row, _ in pairs]]
        there = theirs[key][1][[row for _, _, row in pairs]]
        differ = (here != there).any(-1)
        what, name = key
        if bool(differ.any()):
            position, token = pairs[int(differ.nonzero()[0])][0]
            return FirstDifference(
                module=name,
                what=what,
                after=after,
                position=position,
                token=token,
                rows=int(differ.sum()),
                compared=len(pairs),
                largest=float((here.double() - there.double()).abs().max()),
            )
        if what == "output":
            after = name
    return None


Recorded = dict[tuple[str, str], tuple[dict[tuple[int, int], int], torch.Tensor]]


def _read(folder: str | Path, rank: int) -> Recorded:
    """Return, for each kind of value and module, the row of each token that occurs once, and the rows."""
    tokens: dict[tuple[str, str], list[tuple[int, int]]] = {}
    rows: dict[tuple[str, str], list[torch.Tensor]] = {}
    for path in sorted(Path(folder).glob(f"{rank:03d}-*.safetensors")):
        values = load_file(path)
        keys = [tuple(pair) for pair in values.pop(_KEYS).tolist()]
        for numbered in sorted(values):
            _, what, name = numbered.split(" ", 2)
            tokens.setdefault((what, name), []).extend(keys)
            rows.setdefault((what, name), []).append(values[numbered])
    found: Recorded = {}
    for key, seen in tokens.items():
        counts: dict[tuple[int, int], int] = {}
        for token in seen:
            counts[token] = counts.get(token, 0) + 1
        single = {token: row for row, token in enumerate(seen) if counts[token] == 1}
        found[key] = single, torch.cat(rows[key])
    return found
