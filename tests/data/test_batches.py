"""Training batches: every order of windows is a pure function of (seed, step)."""

import dataclasses
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hippocampus.data.batches import Batch, ShuffledWindows, Streams
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.errors import DataError

# Where an order is not one to one, its walk may never end.
pytestmark = pytest.mark.timeout(30)


def numbered(n):
    """A text in which every id says where it stands."""
    return np.arange(n, dtype=np.int32)


def starts(windows, first, count):
    """Where the sequences first .. first + count - 1 of the stream begin."""
    steps = range(first // windows.batch_size, -(-(first + count) // windows.batch_size))
    found = np.concatenate([windows.batch(step).tokens_BT[:, 0] for step in steps])
    skipped = first - steps[0] * windows.batch_size
    return found[skipped : skipped + count]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@settings(max_examples=50)
@given(
    n=st.integers(2, 400),
    context=st.integers(1, 40),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 20),
)
def test_every_epoch_visits_disjoint_windows_that_cover_the_text_once(
    n, context, batch_size, seed, epoch
):
    n = max(n, 2 * context)
    windows = ShuffledWindows(numbered(n), context, batch_size, seed)
    count = windows.windows_per_epoch
    found = np.sort(starts(windows, epoch * count, count))
    offset = found[0]
    assert 0 <= offset < context
    assert found.tolist() == [offset + i * context for i in range(count)]
    # What lies before the offset or after the last window is less than two windows.
    assert n - 1 - count * context < 2 * context


def test_epochs_have_their_own_offset_and_order():
    windows = ShuffledWindows(numbered(1000), context=8, batch_size=4, seed=0)
    count = windows.windows_per_epoch
    epochs = [starts(windows, e * count, count) for e in range(30)]
    assert {int(e.min()) for e in epochs} == set(range(8))
    orders = {tuple(e // 8) for e in epochs}
    assert len(orders) == 30


def test_seeds_have_their_own_stream():
    streams = [starts(ShuffledWindows(numbered(1000), 8, 4, s), 0, 40) for s in range(5)]
    assert len({tuple(s) for s in streams}) == 5


def test_batch_is_a_pure_function_of_seed_and_step():
    forwards = ShuffledWindows(numbered(500), 8, 6, seed=3)
    there = [forwards.batch(step) for step in range(40)]
    backwards = ShuffledWindows(numbered(500), 8, 6, seed=3)
    for step in reversed(range(40)):
        assert_same(backwards.batch(step), there[step])


def test_stream_does_not_depend_on_the_batch_size():
    streams = [
        starts(ShuffledWindows(numbered(300), 8, b, seed=1), 0, 120) for b in (1, 7, 50, 120)
    ]
    for a, b in pairwise(streams):
        assert np.array_equal(a, b)


def test_stream_of_a_seed_is_the_same_in_every_version():
    # A run resumed after an upgrade relies on these numbers: never update them lightly.
    windows = ShuffledWindows(numbered(10_000), context=16, batch_size=8, seed=1234)
    assert starts(windows, 0, 8).tolist() == [3746, 9650, 5394, 5730, 7074, 2562, 9970, 7618]
    assert starts(windows, 5 * 624, 8).tolist() == [9030, 5654, 6806, 7318, 9110, 8502, 4022, 7990]


def test_targets_are_the_next_ids_with_full_weight():
    batch = ShuffledWindows(numbered(500), 8, 6, seed=0).batch(11)
    assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.loss_weight_BT.shape == (6, 8)
    assert np.array_equal(batch.targets_BT, batch.tokens_BT + 1)
    assert np.array_equal(np.diff(batch.tokens_BT), np.ones((6, 7)))
    assert (batch.loss_weight_BT == 1).all()
    assert (batch.tokens_BT.dtype, batch.loss_weight_BT.dtype) == (np.int32, np.float32)
    assert batch.document_ids_BT is batch.positions_BT is batch.reset_B is None


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 8), slice(8, 9), slice(1, None, 2)])
def test_rows_of_a_batch_are_the_slice_of_the_whole(rows):
    windows = ShuffledWindows(numbered(100), 8, 9, seed=0)  # 9 rows straddle epochs of 11
    for step in range(5):
        whole = windows.batch(step)
        assert_same(windows.batch(step, rows), jax.tree.map(lambda a: a[rows], whole))


def test_shortest_text_has_one_window_in_every_epoch():
    windows = ShuffledWindows(numbered(16), context=8, batch_size=3, seed=0)
    assert windows.windows_per_epoch == 1
    assert set(starts(windows, 0, 200)) == set(range(8))


def test_text_shorter_than_a_window_is_an_error_with_the_numbers():
    with pytest.raises(DataError, match=r"15 tokens, and windows of 8 need at least 16") as caught:
        ShuffledWindows(numbered(15), context=8, batch_size=3, seed=0)
    assert "data.context" in caught.value.hint


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_memory_map_gives_the_batches_of_the_array(tmp_path, dtype):
    ids = numbered(1000) * 65
    ids.astype(dtype).tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", dtype, mode="r")
    batch = ShuffledWindows(mapped, 8, 4, seed=0).batch(5)
    assert_same(batch, ShuffledWindows(ids, 8, 4, seed=0).batch(5))
    assert batch.tokens_BT.dtype == np.int32
    for a, b in zip(EvaluationWindows(mapped, 64, 4), EvaluationWindows(ids, 64, 4), strict=True):
        assert_same(a, b)


def test_batch_goes_through_jit_with_absent_fields_absent():
    batch = ShuffledWindows(numbered(500), 8, 6, seed=0).batch(0)
    out = jax.jit(lambda b: b.replace(tokens_BT=b.tokens_BT + 1))(batch)
    assert isinstance(out, Batch)
    assert np.array_equal(out.tokens_BT, batch.targets_BT)
    assert out.document_ids_BT is None
    assert len(jax.tree.leaves(batch)) == 3


STARTS = st.lists(st.integers(1, 399), max_size=60).map(lambda places: sorted({0, *places}))
SOURCES = pytest.mark.parametrize("source", [ShuffledWindows, Streams])


def expected_documents(batch, document_starts, marked):
    """Ids, positions and weights, token by token; every id of the text is its place."""
    begins = set(document_starts)
    ids, positions = np.zeros_like(batch.tokens_BT), np.zeros_like(batch.tokens_BT)
    weight = np.ones(ids.shape, np.float32)
    for row, places in enumerate(batch.tokens_BT):
        document, position = 1, 0
        for column, place in enumerate(places):
            if column and place in begins:
                document, position = document + 1, 0
            ids[row, column], positions[row, column] = document, position
            position += 1
            if place + 1 in begins and not marked:
                weight[row, column] = 0
    return ids, positions, weight


@SOURCES
@settings(max_examples=50, deadline=None)
@given(starts=STARTS, context=st.integers(1, 40), batch_size=st.integers(1, 8),
       step=st.integers(0, 30), marked=st.booleans())
def test_packed_windows_number_their_documents_and_positions(
    source, starts, context, batch_size, step, marked
):
    n = max(400, (batch_size + 1) * context)
    places = np.array(starts)
    batch = source(numbered(n), context, batch_size, 3, places, marked).batch(step)
    ids, positions, weight = expected_documents(batch, starts, marked)
    np.testing.assert_array_equal(batch.document_ids_BT, ids)
    np.testing.assert_array_equal(batch.positions_BT, positions)
    np.testing.assert_array_equal(batch.loss_weight_BT, weight)
    assert batch.document_ids_BT.dtype == batch.positions_BT.dtype == np.int32
    plain = source(numbered(n), context, batch_size, 3).batch(step)
    np.testing.assert_array_equal(batch.tokens_BT, plain.tokens_BT)


@SOURCES
@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 8), slice(8, 9), slice(1, None, 2)])
def test_rows_of_a_packed_batch_are_the_slice_of_the_whole(source, rows):
    windows = source(numbered(500), 8, 9, 0, np.arange(0, 500, 7))
    for step in range(9):
        whole = windows.batch(step)
        assert_same(windows.batch(step, rows), jax.tree.map(lambda a: a[rows], whole))


def test_far_steps_and_blocks_cost_no_memory_and_keep_their_place():
    windows = ShuffledWindows(numbered(300), 8, 7, seed=1)
    step = 10**12
    assert_same(windows.batch(step), ShuffledWindows(numbered(300), 8, 7, seed=1).batch(step))
    wide = ShuffledWindows(numbered(300), 8, 7 * 2000, seed=1).batch(1)  # over several blocks
    assert np.array_equal(wide.tokens_BT[:7], windows.batch(2000).tokens_BT)
    assert np.array_equal(wide.tokens_BT[-7:], windows.batch(3999).tokens_BT)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 400), context=st.integers(1, 20), batch_size=st.integers(1, 9),
       seed=st.integers(0, 2**32), epoch=st.integers(0, 20))
def test_rows_of_streams_go_on_and_an_epoch_reads_everything_once(
    n, context, batch_size, seed, epoch
):
    streams = Streams(numbered(max(n, (batch_size + 1) * context)), context, batch_size, seed)
    steps = streams.steps_per_epoch
    batches = [streams.batch(epoch * steps + i) for i in range(steps)]
    for before, after in pairwise(batches):
        assert np.array_equal(after.tokens_BT[:, 0], before.targets_BT[:, -1])
        assert not after.reset_B.any()
    assert batches[0].reset_B.all()
    read = np.sort(np.concatenate([batch.tokens_BT.ravel() for batch in batches]))
    assert np.array_equal(read, read[0] + np.arange(steps * batch_size * context))
    assert read[0] < context
    assert streams.windows_per_epoch == steps * batch_size


def test_streams_have_an_order_and_offset_of_their_own_in_every_epoch():
    streams = Streams(numbered(1000), 8, 6, seed=0)
    firsts = [streams.batch(e * streams.steps_per_epoch).tokens_BT[:, 0] for e in range(20)]
    assert len({int(f.min()) for f in firsts}) > 4
    assert len({tuple(np.argsort(f)) for f in firsts}) > 15


def test_streams_start_afresh_where_a_window_begins_with_a_document():
    starts = np.arange(0, 1000, 7)
    streams = Streams(numbered(1000), 8, 4, 0, starts)
    seen = set()
    for step in range(1, streams.steps_per_epoch):
        batch = streams.batch(step)
        assert batch.reset_B.tolist() == [t in starts for t in batch.tokens_BT[:, 0]]
        seen |= set(batch.reset_B.tolist())
    assert seen == {True, False}


def test_streams_of_a_seed_are_the_same_in_every_version():
    # A run resumed after an upgrade relies on these numbers: never update them lightly.
    streams = Streams(numbered(10_000), context=16, batch_size=8, seed=1234)
    assert streams.batch(0).tokens_BT[:, 0].tolist() == [
        4994, 2498, 1250, 2, 3746, 6242, 7490, 8738]
    assert streams.batch(3 * 78 + 5).tokens_BT[:, 0].tolist() == [
        5074, 3826, 7570, 82, 1330, 8818, 2578, 6322]


def test_text_too_short_for_streams_is_an_error_with_the_numbers():
    with pytest.raises(DataError, match=r"31 tokens, and 3 streams .* need at least 32"):
        Streams(numbered(31), 8, 3, seed=0)
    assert Streams(numbered(32), 8, 3, seed=0).steps_per_epoch == 1


def test_windows_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShuffledWindows(numbered(100), 8, 3, seed=0).seed = 1
