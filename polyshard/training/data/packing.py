"""Documents packed into rows of a fixed length, with the boundaries that attention needs."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from polyshard.core.batch import IGNORED
from polyshard.core.errors import ConfigurationError
from polyshard.training.data.order import is_count

Row = dict[str, torch.Tensor]
Span = tuple[int, int, int]  # document, first token, one past the last


class PackedDocuments(Dataset[Row]):
    """Rows of `length` tokens, made of documents that do not attend to each other.

    Every token of every document is in exactly one row, and every token but a document's first is the label of exactly
    one token. A document that is longer than a row is cut into pieces; each piece is a sequence of its own, and the
    label of its last token is the first token of the next piece. No label crosses from one document into another.

    Item `i` is row `i`: int64 `input_ids`, `labels` and `positions`, each `[length]`, and int32 `cu_seqlens`
    `[sequences + 1]`. Tokens after the last document of a row are padding: one more sequence, with labels of -100.

    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best-fit packing).

    Args:
        documents: token IDs of each document, one-dimensional; or a mapping of `input_ids`, and `labels` that are -100
            at tokens that must not be predicted, as in transformers.
        length: tokens of a row.
        whole: keep documents in one piece where they fit into a row, by best-fit decreasing; rows then end in padding.
            False cuts the concatenated documents at the end of each row, so that only the last row is padded.
        lengths: numbers of tokens of the documents; default: read every document once.
        pad_id: token ID of padding.

    Attributes:
        tokens: the number of tokens of all documents.
        fingerprint: a hash of the rows' boundaries; equal on every rank that has the same documents' lengths.

    Raises:
        ConfigurationError: the length is not positive, there are no tokens, or a document has other tokens than
            `lengths` says.

    Examples:
        >>> rows = PackedDocuments([[1, 2, 3, 4], [5, 6], [7, 8, 9]], length=6)
        >>> len(rows), rows[0]["input_ids"], rows[0]["labels"]
        (2, tensor([1, 2, 3, 4, 5, 6]), tensor([   2,    3,    4, -100,    6, -100]))
        >>> rows[1]["cu_seqlens"]  # the second sequence is padding
        tensor([0, 3, 6], dtype=torch.int32)
    """

    def __init__(
        self,
        documents: Sequence[Any],
        length: int,
        *,
        whole: bool = True,
        lengths: Sequence[int] | None = None,
        pad_id: int = 0,
    ) -> None:
        if not is_count(length, 1):
            raise ConfigurationError(f"length is invalid: got {length!r}, expected an integer of at least 1 token.")
        if not hasattr(documents, "__len__") or not hasattr(documents, "__getitem__"):
            raise ConfigurationError(
                f"documents is invalid: got {type(documents).__name__}, expected a sequence with __len__ and "
                "__getitem__. Pass list(...) of it."
            )
        counts = _counts(documents) if lengths is None else [int(n) for n in lengths]
        if len(counts) != len(documents):
            raise ConfigurationError(f"lengths is invalid: got {len(counts)}, expected one of each document.")
        plan = (_best_fit if whole else _cut)(counts, length)
        if not plan:
            raise ConfigurationError("the documents are empty: got no tokens. Pass documents with at least one token.")
        self.documents, self.length, self.pad_id = documents, length, pad_id
        self.tokens = sum(counts)
        self._counts = counts
        # Tensors and not lists: worker processes share them instead of copying every Python object that they count.
        self._spans = torch.tensor([span for row in plan for span in row])
        self._first = torch.tensor([0, *(len(row) for row in plan)]).cumsum(0)
        hashed = hashlib.sha256(f"{length} {len(plan)} ".encode())
        hashed.update(self._spans.numpy().tobytes())
        self.fingerprint = hashed.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is out of range: got {len(self)} rows")
        first, last = self._first[index : index + 2].tolist()
        ids, labels, lengths = [], [], []
        for document, begin, end in self._spans[first:last].tolist():
            tokens, targets = self._document(document)
            after = targets[begin + 1 : end + 1]
            ids.append(tokens[begin:end])
            labels.extend([after, after.new_full((end - begin - len(after),), IGNORED)])
            lengths.append(end - begin)
        padding = self.length - sum(lengths)
        if padding:
            ids.append(torch.full((padding,), self.pad_id))
            labels.append(torch.full((padding,), IGNORED))
            lengths.append(padding)
        return {
            "input_ids": torch.cat(ids),
            "labels": torch.cat(labels),
            "positions": torch.cat([torch.arange(n) for n in lengths]),
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        }

    def _document(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a document's tokens and, unshifted, its labels."""
        document = self.documents[index]
        tokens = _integers(_ids(document), index)
        own = document.get("labels") if isinstance(document, Mapping) else None
        labels = tokens if own is None else _integers(own, index)
        if tokens.shape != (self._counts[index],) or labels.shape != tokens.shape:
            raise ConfigurationError(
                f"document {index} has the wrong shape: got input_ids {tuple(tokens.shape)} and labels "
                f"{tuple(labels.shape)}, expected ({self._counts[index]},)."
            )
        return tokens, labels


def packed_batch(rows: Sequence[Mapping[str, torch.Tensor]]) -> Row:
    """Concatenate packed rows into one micro-batch.

    Args:
        rows: items of `PackedDocuments`.

    Returns:
        `input_ids`, `labels` and `positions` `[rows * length]`, and int32 `cu_seqlens` of all sequences.

    Raises:
        ConfigurationError: the rows are not packed.

    Examples:
        >>> rows = ps.PackedDocuments([[1, 2], [3, 4], [5]], length=2)
        >>> packed_batch([rows[0], rows[1]])["cu_seqlens"]
        tensor([0, 2, 4], dtype=torch.int32)
    """
    missing = sorted({"input_ids", "labels", "positions", "cu_seqlens"} - set(rows[0]))
    if missing:
        raise ConfigurationError(
            f"rows are not packed: missing {', '.join(missing)}. Pass collate=, which makes a micro-batch of a list of "
            "your rows, or use PackedDocuments."
        )
    batch = {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "labels", "positions")}
    lengths = torch.cat([row["cu_seqlens"].diff() for row in rows])
    batch["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return batch


def _counts(documents: Sequence[Any]) -> list[int]:
    """Return the number of tokens of each document."""
    counts = []
    for index, document in enumerate(documents):
        ids = _ids(document)
        if isinstance(ids, (str, bytes)) or not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) != 1:
            hint = "Pass [documents] of one document." if isinstance(ids, int) else "Tokenize the documents first."
            raise ConfigurationError(
                f"document {index} holds no token IDs: got {type(ids).__name__}, expected a sequence of integers. "
                f"{hint}"
            )
        counts.append(len(ids))
    return counts


def _ids(document: Any) -> Any:
    return document["input_ids"] if isinstance(document, Mapping) else document


def _integers(values: Any, index: int) -> torch.Tensor:
    """Return the tokens or labels of a document; torch would convert fractions without a word."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or (found.numel() and (found.is_floating_point() or found.dtype == torch.bool)):
        got = type(values).__name__ if found is None else str(found.dtype)
        raise ConfigurationError(
            f"document {index} holds no token IDs: got {got}, expected integers. Tokenize the documents first."
        )
    return found.to(torch.int64)


def _best_fit(counts: Sequence[int], length: int) -> list[list[Span]]:
    """Put each piece, the longest first, into the row with the least room that is enough."""
    pieces = [
        (begin, min(begin + length, count), document)
        for document, count in enumerate(counts)
        for begin in range(0, count, length)
    ]
    pieces.sort(key=lambda piece: piece[0] - piece[1])  # stable: ties stay in the documents' order
    rows: list[list[Span]] = []
    rooms: list[int] = []  # sorted; the sizes of room that some row has
    with_room: dict[int, list[int]] = {}
    for begin, end, document in pieces:
        size = end - begin
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append((document, begin, end))
        left = room - size
        if left:
            if left not in with_room:
                bisect.insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return rows


def _cut(counts: Sequence[int], length: int) -> list[list[Span]]:
    """Concatenate the documents and cut them at the end of each row."""
    rows: list[list[Span]] = []
    room = 0
    for document, count in enumerate(counts):
        begin = 0
        while begin < count:
            if not room:
                rows.append([])
                room = length
            end = min(count, begin + room)
            rows[-1].append((document, begin, end))
            room -= end - begin
            begin = end
    return rows
