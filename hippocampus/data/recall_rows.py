"""Rows of synthetic examples, to train on and to score: `RecallRows`, `RecallWindows`.

A row has `context` tokens and holds as many examples of one kind as fit, each a document of its
own, so that none sees another. Only answers have weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64

from hippocampus.data.batches import Batch
from hippocampus.data.permutation import mix, permute
from hippocampus.data.synthetic import Examples
from hippocampus.errors import ConfigError


@dataclass(frozen=True, eq=False)
class RecallRows:
    """An endless shuffled stream of rows, cut into batches by step number.

    Every epoch visits each row of each kind once, in an order of its own; a batch may straddle two
    epochs.

    Attributes:
        examples: of every kind.
        context: T, tokens in a row.
        batch_size: B, rows in a batch.
        seed: which order.
    """

    examples: Sequence[Examples]
    context: int
    batch_size: int
    seed: int

    @property
    def windows_per_epoch(self) -> int:
        """Rows in every epoch."""
        return int(self._first_rows[-1])

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Return the batch of one step; the same one whenever it is asked for.

        Args:
            step: number of the step, from 0.
            rows: which rows of it, for a host that feeds only some; None: all.

        Returns:
            A batch of numpy arrays, [rows, context], with document ids and positions.
        """
        sequence = step * self.batch_size + np.arange(self.batch_size)[rows or slice(None)]
        epoch, index = np.divmod(sequence, self.windows_per_epoch)
        key = mix(mix(np.uint64(self.seed % 2**64)) ^ epoch.astype(np.uint64))
        row = permute(index, self.windows_per_epoch, key)
        kind = np.searchsorted(self._first_rows, row, side="right") - 1
        batch = _empty(len(row), self.context)
        for one in np.unique(kind):
            of_kind = np.flatnonzero(kind == one)
            _fill(batch, of_kind, self.examples[one], row[of_kind] - self._first_rows[one])
        return Batch(**batch)

    @cached_property
    def _first_rows(self) -> Int64[np.ndarray, " K+1"]:
        """Number of each kind's first row, and of all rows."""
        return np.cumsum([0, *(n_rows(e, self.context) for e in self.examples)])


@dataclass(frozen=True, eq=False)
class RecallWindows:
    """Held-out examples in order, kind by kind; every batch holds one kind.

    Attributes:
        examples: of every kind.
        context: T, tokens in a row.
        batch_size: B, rows in a batch; the last batch of a kind is filled up with rows of weight 0.
        max_windows: at most so many rows, an equal share of every kind; 0: all of them.
    """

    examples: Sequence[Examples]
    context: int
    batch_size: int
    max_windows: int = 0

    def __post_init__(self) -> None:
        longest = max(e.kind.length for e in self.examples)
        if longest > self.context:
            raise ConfigError(f"examples of {longest} tokens do not fit into windows of "
                              f"{self.context}", "raise the context")

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, numpy arrays [batch_size, context]."""
        for examples, rows in zip(self.examples, self._rows, strict=True):
            for first in range(0, rows, self.batch_size):
                chosen = np.arange(first, min(first + self.batch_size, rows))
                batch = _empty(self.batch_size, self.context)
                _fill(batch, np.arange(len(chosen)), examples, chosen)
                yield Batch(**batch)

    @property
    def parts(self) -> tuple[str, ...]:
        """The kind of each batch."""
        return tuple(examples.kind.name
                     for examples, rows in zip(self.examples, self._rows, strict=True)
                     for _ in range(-(-rows // self.batch_size)))

    @property
    def stride(self) -> int:
        """0: rows have nothing in common."""
        return 0

    @property
    def n_windows(self) -> int:
        """Rows that are scored."""
        return sum(self._rows)

    @property
    def n_targets(self) -> int:
        """Answers in all batches together."""
        return sum(int((e.answers_NL[:rows * (self.context // e.kind.length)] > 0).sum())
                   for e, rows in zip(self.examples, self._rows, strict=True))

    @property
    def _rows(self) -> list[int]:
        most = max(1, self.max_windows // len(self.examples)) if self.max_windows else 2**62
        return [min(most, n_rows(examples, self.context)) for examples in self.examples]


def n_rows(examples: Examples, context: int) -> int:
    """Rows that hold all of the examples; the last one may have room left."""
    return -(-len(examples) // (context // examples.kind.length))


def _empty(rows: int, context: int) -> dict[str, Any]:
    shape = (rows, context)
    batch: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in (
        "tokens_BT", "targets_BT", "document_ids_BT", "positions_BT")}
    return {**batch, "loss_weight_BT": np.zeros(shape, np.float32)}


def _fill(batch: dict[str, Any], at: np.ndarray, examples: Examples, rows: np.ndarray) -> None:
    """Puts rows of one kind into rows `at` of a batch."""
    length = examples.kind.length
    per_row = batch["tokens_BT"].shape[1] // length
    for place in range(per_row):
        index = rows * per_row + place
        there, index = at[index < len(examples)], index[index < len(examples)]
        columns = slice(place * length, (place + 1) * length)
        answers = examples.answers_NL[index]
        batch["tokens_BT"][there, columns] = examples.tokens_NL[index]
        batch["targets_BT"][there, columns] = answers
        batch["loss_weight_BT"][there, columns] = answers > 0
        batch["document_ids_BT"][there, columns] = place + 1
        batch["positions_BT"][there, columns] = np.arange(length)
