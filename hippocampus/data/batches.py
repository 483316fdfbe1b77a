"""Training batches of windows over ids: `Batch`, `ShuffledWindows`, `Streams`.

A training batch is a pure function of (seed, step), so that resuming, rolling back and changing
the number of hosts need nothing but the step. Shuffling therefore keeps no list of what is left:
`permute` computes where one index goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Int64, Integer

from hippocampus.data.permutation import mix, permute
from hippocampus.errors import DataError

SEQUENCES_AT_ONCE = 4096


class Batch(flax.struct.PyTreeNode):
    """What a model is trained or evaluated on in one step: NumPy on the host, JAX on a device.

    Attributes:
        tokens_BT: ids read.
        targets_BT: the id after each of them, to be predicted.
        loss_weight_BT: how much each prediction counts; 0 for padding.
        document_ids_BT: which document a token belongs to, 0 for padding; None: every row is one
            document.
        positions_BT: place of a token in its document; None: 0 .. T-1 in every row.
        reset_B: whether a row starts afresh rather than continues the row of the batch before;
            None: every row does.
    """

    tokens_BT: Int32[Array, "B T"]
    targets_BT: Int32[Array, "B T"]
    loss_weight_BT: Float32[Array, "B T"]
    document_ids_BT: Int32[Array, "B T"] | None = None
    positions_BT: Int32[Array, "B T"] | None = None
    reset_B: Bool[Array, " B"] | None = None


@dataclass(frozen=True, eq=False)
class _Order:
    """What an order of training windows is made from.

    Attributes:
        ids: the token ids, one dimension, any integer type; may be a memory map.
        context: T, tokens in a window.
        batch_size: B, rows in a batch.
        seed: which order.
        document_starts: where documents begin in `ids`, sorted, for batches with document ids
            and positions; None: a window is read as one document.
        marked: whether every document begins with a token that says so. Where documents are
            kept apart, the prediction of the next document's first token has weight 0 otherwise.
    """

    ids: Integer[np.ndarray, " n"]
    context: int
    batch_size: int
    seed: int
    document_starts: Int64[np.ndarray, " d"] | None = None
    marked: bool = False

    def _windows(self, start: np.ndarray) -> Batch:
        return _windows(self._views, start, self.document_starts, self.marked)

    def _key(self, epoch: np.ndarray) -> np.ndarray:
        """64 bits of the seed for each epoch."""
        return mix(mix(np.uint64(self.seed % 2**64)) ^ epoch.astype(np.uint64))

    @cached_property
    def _views(self) -> np.ndarray:
        """All windows of the text as rows of a view, so that numpy copies whole rows."""
        # The base class does without the overhead of a memory map.
        return np.lib.stride_tricks.sliding_window_view(np.asarray(self.ids), self.context)


@dataclass(frozen=True, eq=False)
class ShuffledWindows(_Order):
    """An endless shuffled stream of windows, cut into batches by step number.

    Sequence n of the stream is row n % batch_size of step n // batch_size. Every epoch cuts the
    ids into disjoint windows from an offset of its own and visits each window once, in an order
    of its own; a batch may straddle two epochs.
    """

    def __post_init__(self):
        if self.windows_per_epoch < 1:
            raise DataError(
                f"the training text has {len(self.ids)} tokens, and windows of {self.context} "
                f"need at least {2 * self.context}",
                "use a longer text or a smaller --config.data.context",
            )

    @property
    def windows_per_epoch(self) -> int:
        """Windows in every epoch: as many as fit after the largest offset, context - 1.

        The last token of a window has its target too, so k windows take k * context + 1 ids.
        """
        return (len(self.ids) - self.context) // self.context

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Return the batch of one step; the same one whenever it is asked for.

        Args:
            step: number of the step, from 0.
            rows: which rows of it, for a host that feeds only some; None: all.

        Returns:
            A batch of numpy arrays, [rows, context]; with `document_starts` it has document ids
            (1, 2, … in every window) and positions.
        """
        sequence = step * self.batch_size + np.arange(self.batch_size)[rows or slice(None)]
        block, place = np.divmod(sequence, SEQUENCES_AT_ONCE)
        start = np.empty(len(sequence), np.int64)
        for one in np.unique(block):
            of_block = block == one
            start[of_block] = self._starts(int(one))[place[of_block]]
        return self._windows(start)

    @cached_property
    def _starts(self) -> Callable[[int], np.ndarray]:
        """Where a block of sequences begins; many at once cost little more than one."""
        def starts(block: int) -> np.ndarray:
            sequence = block * SEQUENCES_AT_ONCE + np.arange(SEQUENCES_AT_ONCE)
            epoch, index = np.divmod(sequence, self.windows_per_epoch)
            key = self._key(epoch)
            offset = (mix(key) % np.uint64(self.context)).astype(np.int64)
            return offset + permute(index, self.windows_per_epoch, key) * self.context

        return lru_cache(maxsize=4)(starts)


@dataclass(frozen=True, eq=False)
class Streams(_Order):
    """Batches in which row b of a step goes on where row b of the step before ended.

    Every epoch cuts the ids, from an offset of its own, into `batch_size` strips of equal length,
    deals them to the rows in an order of its own, and reads all of them from front to back.
    """

    def __post_init__(self):
        if self.steps_per_epoch < 1:
            raise DataError(
                f"the training text has {len(self.ids)} tokens, and {self.batch_size} streams in "
                f"windows of {self.context} need at least {(self.batch_size + 1) * self.context}",
                "use a longer text, or a smaller --config.data.context or train.batch_size",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that every epoch takes, whatever its offset, which is below context."""
        return (len(self.ids) - self.context) // (self.batch_size * self.context)

    @property
    def windows_per_epoch(self) -> int:
        """Windows in every epoch."""
        return self.steps_per_epoch * self.batch_size

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Return the batch of one step; the same one whenever it is asked for.

        Args:
            step: number of the step, from 0.
            rows: which rows of it, for a host that feeds only some; None: all.

        Returns:
            A batch of numpy arrays, [rows, context]. `reset_B` is set in the first step of an
            epoch, and with `document_starts` where a window begins with a document.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        start = self._strips(epoch)[rows or slice(None)] + index * self.context
        batch = self._windows(start)
        reset: Any = np.full(len(start), index == 0)
        if self.document_starts is not None:
            starts = np.asarray(self.document_starts)
            place = np.minimum(np.searchsorted(starts, start), len(starts) - 1)
            reset |= starts[place] == start
        return batch.replace(reset_B=reset)

    @cached_property
    def _strips(self) -> Callable[[int], np.ndarray]:
        """Where the strip of each row begins in an epoch."""
        def strips(epoch: int) -> np.ndarray:
            key = self._key(np.array(epoch))
            offset = int(mix(key) % np.uint64(self.context))
            order = permute(np.arange(self.batch_size), self.batch_size, int(key))
            return offset + order * self.steps_per_epoch * self.context

        return lru_cache(maxsize=4)(strips)


def _windows(
    views: np.ndarray, start: np.ndarray, document_starts: np.ndarray | None, marked: bool
) -> Batch:
    """The windows that begin at each start, one a row."""
    tokens, targets = views[start].astype(np.int32), views[start + 1].astype(np.int32)
    weight = np.ones(tokens.shape, np.float32)
    documents = () if document_starts is None else _documents(
        np.asarray(document_starts), start, views.shape[1], weight, marked)
    host: Any = (tokens, targets, weight, *documents)  # NumPy stands in until it is placed
    return Batch(*host)


def _documents(
    starts: np.ndarray, start: np.ndarray, context: int, weight_BT: np.ndarray, marked: bool
) -> tuple[Any, Any]:
    """Document ids and positions of windows; clears the weight where a document ends unmarked.

    Work grows with the documents that begin in the windows, not with all there are.
    """
    begun = np.searchsorted(starts, start, "right")  # documents that begin up to the first token
    counts = np.searchsorted(starts, start + context, "left") - begun
    rows = len(start)
    # A run is the part of a document in a window; the first one of a row begins with it.
    row = np.repeat(np.arange(rows), counts + 1)
    first_run = np.cumsum(counts + 1) - (counts + 1)
    number = np.arange(len(row)) - first_run[row]
    place = starts[np.maximum(begun[row] + number - 1, 0)] - start[row]
    place[first_run] = 0
    lengths = np.diff(row * context + place, append=rows * context)
    document_ids_BT = np.repeat((number + 1).astype(np.int32), lengths).reshape(rows, context)
    begin_BT = np.repeat(place.astype(np.int32), lengths).reshape(rows, context)
    positions_BT = np.arange(context, dtype=np.int32) - begin_BT
    if not marked:
        later = number > 0
        weight_BT[row[later], place[later] - 1] = 0
        after = np.minimum(begun + counts, len(starts) - 1)
        weight_BT[starts[after] == start + context, -1] = 0
    return document_ids_BT, positions_BT
