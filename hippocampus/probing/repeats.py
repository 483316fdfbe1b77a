"""Which predictions a memory of the context could make: `repeated`, `count_grams`.

An n-gram that the window has had before can be looked up there; one that the training text is full
of needs no looking up. What is repeated and not frequent is a hit of associative recall.

Source: Arora et al. 2023 (arXiv:2312.04927), section 3, with n = 2.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int, Int64, Integer, UInt64

from hippocampus.data.batches import Batch

FREQUENT = 1250
"""Occurrences in the training text above which an n-gram counts as known by heart."""

_CHUNK = 1 << 22  # training ids taken into memory at once


def gram_keys(batch: Batch, n: int, vocab_size: int) -> tuple[UInt64[np.ndarray, "B T"],
                                                              Bool[np.ndarray, "B T"]]:
    """The n-gram that ends with the target of each token, as a number in base V.

    Args:
        batch: on the host or a device.
        n: ids of a gram, the predicted one included, at least 2.
        vocab_size: V; V ** n must fit in 64 bits.

    Returns:
        The keys, and whether all of a gram lies in the token's document.
    """
    tokens_BT = np.asarray(batch.tokens_BT).astype(np.uint64)
    B, T = tokens_BT.shape
    key_BT = np.zeros((B, T), np.uint64)
    for back in range(n - 2, -1, -1):
        shifted = np.zeros((B, T), np.uint64)
        shifted[:, back:] = tokens_BT[:, :T - back]
        key_BT = key_BT * np.uint64(vocab_size) + shifted
    key_BT = key_BT * np.uint64(vocab_size) + np.asarray(batch.targets_BT).astype(np.uint64)
    return key_BT, _positions(batch) >= n - 2


def repeated(batch: Batch, n: int, vocab_size: int) -> Bool[np.ndarray, "B T"]:
    """Whether the gram that ends with a token's target has ended before, in the same document.

    Args:
        batch, n, vocab_size: as for `gram_keys`. Tokens of weight 0 are part of the context too.
    """
    key_BT, whole_BT = gram_keys(batch, n, vocab_size)
    document_BT = _documents(batch)
    found_BT = np.zeros(key_BT.shape, bool)
    for row in range(len(key_BT)):
        at = np.flatnonzero(whole_BT[row] & (document_BT[row] > 0))
        _, number = np.unique(key_BT[row, at], return_inverse=True)
        in_document = number * (int(document_BT[row].max()) + 1) + document_BT[row, at]
        _, first, same = np.unique(in_document, return_index=True, return_inverse=True)
        found_BT[row, at] = first[same] < np.arange(len(at))
    return found_BT


def count_grams(keys: UInt64[np.ndarray, " k"], ids: Integer[np.ndarray, " m"], n: int,
                vocab_size: int) -> Int64[np.ndarray, " k"]:
    """How often grams occur in a text.

    Args:
        keys: of the grams, as `gram_keys` makes them.
        ids: the text; may be a memory map.
        n, vocab_size: as for `gram_keys`.
    """
    wanted, place = np.unique(keys, return_inverse=True)
    counts = np.zeros(len(wanted), np.int64)
    for first in range(0, max(0, len(ids) - n + 1) if len(wanted) else 0, _CHUNK):
        part = np.asarray(ids[first:first + _CHUNK + n - 1]).astype(np.uint64)
        key = np.zeros(len(part) - n + 1, np.uint64)
        for i in range(n):
            key = key * np.uint64(vocab_size) + part[i:len(key) + i]
        at = np.minimum(np.searchsorted(wanted, key), len(wanted) - 1)
        counts += np.bincount(at[wanted[at] == key], minlength=len(wanted))
    return counts[place]


def _documents(batch: Batch) -> Int[np.ndarray, "B T"]:
    if batch.document_ids_BT is None:
        return np.ones(batch.tokens_BT.shape, np.int64)
    return np.asarray(batch.document_ids_BT).astype(np.int64)


def _positions(batch: Batch) -> Int[np.ndarray, "B T"]:
    if batch.positions_BT is None:
        return np.broadcast_to(np.arange(batch.tokens_BT.shape[1]), batch.tokens_BT.shape)
    return np.asarray(batch.positions_BT)
