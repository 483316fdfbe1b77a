"""The permutation that shuffles: one to one, evenly, at any size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippocampus.data.permutation import permute

KEYS = st.integers(0, 2**64 - 1)

# Where the permutation is not one to one, its walk may never end.
pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("size", [4**half for half in range(2, 8)])
def test_permutation_of_a_whole_domain_is_one_to_one(size):
    assert np.array_equal(np.sort(permute(np.arange(size), size, 7)), np.arange(size))


@given(size=st.integers(1, 3000), key=KEYS)
def test_permutation_is_one_to_one(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(2**31, 2**62), key=KEYS)
def test_permutation_of_a_huge_size_stays_inside_and_distinct(size, key):
    image = permute(np.arange(size - 500, size), size, key)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == 500


@pytest.mark.parametrize("size", [2, 3, 7, 16, 17])
def test_permutation_sends_every_point_everywhere_equally_often(size):
    keys = np.arange(4000, dtype=np.uint64)
    for index in range(size):
        counts = np.bincount(permute(np.full(4000, index), size, keys), minlength=size)
        expected = 4000 / size
        assert np.abs(counts - expected).max() < 6 * expected**0.5


def test_permutation_takes_a_key_for_each_index():
    keys = np.array([3, 4, 5], np.uint64)
    mixed = permute(np.array([[0, 1, 2], [6, 7, 8]]), 100, keys)
    for column, key in enumerate(keys):
        assert mixed[:, column].tolist() == [
            permute(np.array(index), 100, key) for index in (column, column + 6)
        ]


@pytest.mark.parametrize("index", [-1, 10])
def test_permutation_refuses_what_is_outside(index):
    with pytest.raises(ValueError, match="below 10"):
        permute(np.array([index]), 10, 0)
