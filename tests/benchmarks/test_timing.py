"""The clock and the table of the benchmarks."""

import io
import time

import jax
import pytest

from benchmarks.timing import Table, copy_bandwidth, duration, median_seconds


def test_the_time_is_that_of_one_call_and_not_of_the_first_ones():
    calls = []

    def run():
        calls.append(1)
        time.sleep(0.05 if len(calls) <= 2 else 0.002)

    seconds = median_seconds(run, lambda _: None, batches=3, batch_seconds=0.01)
    assert 0.002 <= seconds < 0.01


def test_every_batch_waits_once_for_its_last_result():
    waited = []
    counter = iter(range(10**6))
    median_seconds(lambda: next(counter), waited.append, batches=2, batch_seconds=0.0, warm_up=1)
    assert waited == [0, 1, 2, 3]  # warm-up, the estimate, two batches of one call


def test_a_copy_moves_what_a_machine_can_move():
    assert 1e8 < copy_bandwidth(2**24) < 1e13


def test_the_ratio_stands_first_and_then_time_and_roofline():
    file = io.StringIO()
    table = Table("scan", "associative_scan", file=file)
    table.add("ours", 2e-3, peer=5e-3, floor=1e-3)
    table.add("alone", 3.0)
    table.fail("broken", ValueError("no such\nkernel"))
    head, title, _, ours, alone, broken = file.getvalue().splitlines()
    assert jax.devices()[0].device_kind in head and f"jax {jax.__version__}" in head
    assert "python" in head and "associative_scan" in title
    assert ours.split()[:4] == ["2.50", "2.000", "ms", "50.0%"]
    assert alone.split()[:4] == ["-", "3.000", "s", "-"]
    assert broken.endswith("broken  failed: ValueError: no such")
    assert "| ours | 2.50 | 2.000 ms | 50.0% |  |" in table.markdown()


@pytest.mark.parametrize(("seconds", "text"), [
    (2.0, "2.000 s"), (0.0015, "1.500 ms"), (2.5e-6, "2.500 µs"), (3e-9, "3.0 ns")])
def test_a_time_has_a_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
