"""Batches made ahead of time, while the device computes: `prefetch`."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from hippocampus.data.batches import Batch

THREADS = 2
BUFFERED_BATCHES = 4


class BatchSource(Protocol):
    """What makes the batch of any step."""

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Return the batch of a step, or some rows of it."""
        ...


def prefetch(
    batches: BatchSource,
    first_step: int,
    last_step: int,
    rows: slice | None = None,
    threads: int = THREADS,
    buffered: int = BUFFERED_BATCHES,
) -> Generator[Batch, None, None]:
    """Yield the batches of the steps first_step .. last_step - 1, made ahead in threads.

    What comes is the same as from `batches.batch` in a loop. Close the generator
    (`contextlib.closing`) to end its threads early; at its end and on an error they end by
    themselves.

    Args:
        batches: a pure function of the step.
        first_step: where to begin.
        last_step: where to end.
        rows: which rows of every batch, for a process that feeds only some; None: all.
        threads: that make batches.
        buffered: batches kept ready.

    Yields:
        The batches, on the host.
    """
    import grain

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)
    source = _Steps(batches, first_step, last_step, rows)
    ahead = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from ahead
    finally:
        ahead.close()


class _Steps:
    """Batches by their place in the run, as grain reads them."""

    def __init__(self, batches: BatchSource, first: int, last: int, rows: slice | None):
        self._batches, self._first, self._last, self._rows = batches, first, last, rows

    def __len__(self) -> int:
        return max(0, self._last - self._first)

    def __getitem__(self, index: int) -> Batch:
        return self._batches.batch(self._first + index, self._rows)
