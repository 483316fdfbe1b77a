"""Where a shuffled path is read from: sources for `Interventions`, as flat indices b * T + t.

Within the past, a token reads what the path said at an earlier token of its own document: which
of its memories counts is wrong, but nothing of the future is seen. Across the batch, it reads what
the path said of another text at the same place. The plain shuffle permutes the whole row; it shows
tokens their own future and is here for reference alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int32

from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError

Source = Int32[np.ndarray, "B T"]


def past(rng: np.random.Generator, batch: Batch) -> Source:
    """An earlier token of the same document, any of them alike; the first one reads itself.

    Args:
      rng: what is drawn from.
      batch: NumPy arrays.
    """
    tokens_BT: Any = np.asarray(batch.tokens_BT)
    B, T = tokens_BT.shape
    place_BT = np.broadcast_to(np.arange(T), (B, T))
    first_BT = np.zeros((B, T), np.int64)
    if batch.document_ids_BT is not None:
        ids_BT = np.asarray(batch.document_ids_BT)
        begins = np.concatenate(
            [np.ones((B, 1), bool), ids_BT[:, 1:] != ids_BT[:, :-1]], axis=1)
        first_BT = np.maximum.accumulate(np.where(begins, place_BT, 0), axis=1)
    earlier_BT = first_BT + np.floor(rng.random((B, T)) * (place_BT - first_BT)).astype(np.int64)
    return _flat(np.arange(B)[:, None], earlier_BT)


def across(rng: np.random.Generator, batch: Batch) -> Source:
    """The same place of another row; every row reads one other and is read by one.

    Raises:
      ConfigError: a batch of one row.
    """
    B, T = np.shape(batch.tokens_BT)
    if B < 2:
        raise ConfigError("a shuffle across the batch needs two windows in it",
                          "raise --batch_size or --max_windows")
    order = rng.permutation(B)
    other_B = np.empty(B, np.int64)
    other_B[order] = np.roll(order, -1)  # one cycle through all rows: no row reads itself
    return _flat(other_B[:, None], np.broadcast_to(np.arange(T), (B, T)))


def plain(rng: np.random.Generator, batch: Batch) -> Source:
    """Any token of the row, each once: the past, the future, and other documents."""
    B, T = np.shape(batch.tokens_BT)
    return _flat(np.arange(B)[:, None], rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1))


KINDS: dict[str, Callable[[np.random.Generator, Batch], Source]] = {
    "past": past, "batch": across, "plain": plain}


def _flat(row: np.ndarray, place: np.ndarray) -> Source:
    return (row * place.shape[1] + place).astype(np.int32)
