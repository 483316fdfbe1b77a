"""Which predictions the context holds: n-grams that came before, and how frequent they are."""

import numpy as np
import pytest

from hippocampus.data.batches import Batch
from hippocampus.probing.repeats import count_grams, gram_keys, repeated


def batch_of(rows, documents=None):
    ids = np.array(rows, np.int32)
    arrays = ids[:, :-1], ids[:, 1:], np.ones(ids[:, 1:].shape, np.float32)
    if documents is None:
        return Batch(*arrays)
    documents = np.array(documents, np.int32)
    begins = np.diff(documents, axis=1, prepend=0) != 0
    at = np.arange(documents.shape[1])
    positions = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    return Batch(*arrays, documents, positions.astype(np.int32))


def test_a_pair_that_came_before_is_repeated_and_its_first_time_is_not():
    batch = batch_of([[1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 5, 6, 1, 2, 7, 5]])
    assert repeated(batch, 2, 8).tolist() == [
        [False, False, False, True, False, False, True],
        [False, True, False, False, False, False, False]]


def test_longer_grams_need_all_of_their_ids():
    batch = batch_of([[1, 2, 3, 9, 2, 3, 1, 2, 3]])
    assert repeated(batch, 2, 10).tolist() == [[False, False, False, False, True, False, True,
                                                True]]
    assert repeated(batch, 3, 10).tolist() == [[False] * 7 + [True]]


def test_documents_do_not_look_into_each_other():
    ids = [[1, 2, 1, 2, 1, 2, 1]]
    assert repeated(batch_of(ids), 2, 4).tolist() == [[False, False, True, True, True, True]]
    assert repeated(batch_of(ids, [[1, 1, 1, 2, 2, 2]]), 2, 4).tolist() == [
        [False, False, True, False, False, True]]
    # A gram that begins in the document before is none of this one.
    assert gram_keys(batch_of(ids, [[1, 1, 1, 2, 2, 2]]), 3, 4)[1].tolist() == [
        [False, True, True, False, True, True]]


@pytest.mark.parametrize("n", [2, 3])
def test_counts_are_those_of_a_plain_search(n):
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 5, 3000).astype(np.uint16)
    batch = batch_of(draw.integers(0, 5, (3, 20)))
    keys, whole = gram_keys(batch, n, 5)
    found = count_grams(keys[whole], ids, n, 5)
    text = ids.tolist()
    for (row, at), count in zip(np.argwhere(whole), found, strict=True):
        tokens = [*batch.tokens_BT[row], batch.targets_BT[row, -1]]
        gram = [int(token) for token in tokens[at + 2 - n:at + 2]]
        assert count == sum(text[i:i + n] == gram for i in range(len(text)))


def test_counting_in_pieces_counts_what_stands_across_them(monkeypatch):
    ids = np.random.default_rng(1).integers(0, 3, 100)
    keys = np.arange(9, dtype=np.uint64)
    whole = count_grams(keys, ids, 2, 3)
    monkeypatch.setattr("hippocampus.probing.repeats._CHUNK", 7)
    assert count_grams(keys, ids, 2, 3).tolist() == whole.tolist()
    assert whole.sum() == 99
    assert count_grams(keys[:0], ids, 2, 3).tolist() == []
