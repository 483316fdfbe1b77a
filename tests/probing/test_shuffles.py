"""Where a shuffled path is read from: the past of the document, another row, or anywhere."""

import numpy as np
import pytest

from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.probing import shuffles
from hippocampus.testing import pack

B, T = 5, 40
IDS = np.asarray(pack((9, 1, 21), B, T)[0])
ROWS = np.arange(B)[:, None]
PLACES = np.broadcast_to(np.arange(T), (B, T))


def batch(ids=None):
    tokens = np.zeros((B, T), np.int32)
    return Batch(tokens, tokens, np.ones((B, T), np.float32), ids)


def drawn(kind, ids=None, seed=0):
    """Row and place of every source."""
    source = shuffles.KINDS[kind](np.random.default_rng(seed), batch(ids))
    assert source.dtype == np.int32 and source.shape == (B, T)
    return np.divmod(source, T)


@pytest.mark.parametrize("ids", [None, IDS], ids=["one document", "packed"])
@pytest.mark.parametrize("seed", range(20))
def test_the_past_is_an_earlier_token_of_the_own_document(ids, seed):
    row, place = drawn("past", ids, seed)
    documents = np.ones((B, T), int) if ids is None else ids
    np.testing.assert_array_equal(row, np.broadcast_to(ROWS, (B, T)))
    np.testing.assert_array_equal(documents[row, place], documents)
    first = np.concatenate([np.ones((B, 1), bool), documents[:, 1:] != documents[:, :-1]], 1)
    np.testing.assert_array_equal(place[first], PLACES[first])
    assert (place[~first] < PLACES[~first]).all()


def test_every_earlier_token_is_drawn_alike():
    places = np.concatenate([drawn("past", seed=seed)[1][:, 4] for seed in range(800)])
    counts = np.bincount(places, minlength=4)
    assert len(counts) == 4 and abs(counts / counts.sum() - 1 / 4).max() < 0.03


def test_across_the_batch_is_the_same_place_of_one_other_row():
    for seed in range(20):
        row, place = drawn("batch", seed=seed)
        np.testing.assert_array_equal(place, PLACES)
        assert (row == row[:, :1]).all()
        assert sorted(row[:, 0]) == list(range(B)) and (row[:, 0] != np.arange(B)).all()


def test_one_row_has_no_other():
    one = Batch(*[np.zeros((1, T))] * 3)
    with pytest.raises(ConfigError, match="two windows"):
        shuffles.across(np.random.default_rng(0), one)


def test_the_plain_shuffle_permutes_every_row_in_its_own_way():
    row, place = drawn("plain", IDS)
    np.testing.assert_array_equal(row, np.broadcast_to(ROWS, (B, T)))
    np.testing.assert_array_equal(np.sort(place, axis=1), PLACES)
    assert (place[0] != place[1]).any() and (place > PLACES).any()


@pytest.mark.parametrize("kind", shuffles.KINDS)
def test_a_seed_draws_the_same_again_and_another_one_something_else(kind):
    first, again, other = (np.concatenate(drawn(kind, seed=seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
