"""Texts of any lengths as rows: every prediction that is asked for is there once."""

import numpy as np

from hippocampus.probing.adapters.text_rows import row_length, text_batches

IDS = [np.arange(10, 10 + n) for n in (5, 2, 9)]


def test_each_text_predicts_its_own_next_tokens():
    first, second = text_batches(IDS, rows=2, length=32)
    assert first.tokens_BT.shape == second.tokens_BT.shape == (2, 32)
    for batch, row, ids in ((first, 0, IDS[0]), (first, 1, IDS[1]), (second, 0, IDS[2])):
        n = len(ids) - 1
        np.testing.assert_array_equal(batch.tokens_BT[row, :n], ids[:-1])
        np.testing.assert_array_equal(batch.targets_BT[row, :n], ids[1:])
        np.testing.assert_array_equal(batch.loss_weight_BT[row], np.arange(32) < n)
        np.testing.assert_array_equal(batch.document_ids_BT[row], np.arange(32) < n)
    assert not second.loss_weight_BT[1].any() and not second.document_ids_BT[1].any()


def test_only_what_is_asked_for_counts():
    batch, = text_batches(IDS, rows=4, length=32, asked=[3, 1, 8])
    counted = [np.flatnonzero(row).tolist() for row in batch.loss_weight_BT]
    # The token at place n is predicted where the one before it is read.
    assert counted == [[2, 3], [0], [7], []]


def test_rows_are_long_enough_and_of_few_lengths():
    assert row_length(IDS) == 32
    assert row_length([np.arange(33)]) == 32 and row_length([np.arange(34)]) == 64
    assert row_length([np.arange(200)], most=50) == 50
    batch, = text_batches([np.arange(200)], rows=1, length=50)
    np.testing.assert_array_equal(batch.targets_BT[0], np.arange(1, 51))
