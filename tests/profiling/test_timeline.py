"""Time that is shared out adds up to what there was."""

import pytest

from hippocampus.profiling.timeline import share_out
from hippocampus.profiling.trace import Event


def shared(*events, steps=1):
    made = [Event(line, start, end, name) for line, start, end, name in events]
    return share_out(made, lambda event: event.instruction != "", steps)


def test_every_instant_belongs_to_somebody_or_is_idle():
    found = shared((0, 0, 10, "a"), (1, 5, 20, "b"), (0, 30, 40, "c"), (2, 0, 100, ""))
    assert found.by_instruction == {"a": 7.5, "b": 12.5, "c": 10}
    assert (found.outside, found.idle, found.total) == (10, 0, 40)


def test_an_event_inside_another_hides_it():
    found = shared((0, 0, 10, "outer"), (0, 2, 5, "inner"), (0, 5, 6, "inner"))
    assert found.by_instruction == {"outer": 6, "inner": 4}


def test_an_event_that_begins_with_another_is_inside_it():
    assert shared((0, 0, 3, "inner"), (0, 0, 10, "outer")).by_instruction == {
        "outer": 7, "inner": 3}


def test_idle_time_between_steps_is_told_from_that_within():
    step = [(0, 0, 4, "a"), (0, 6, 8, "b"), (0, 8, 9, "b")]
    events = [(line, start + t, end + t, name) for t in (0, 20) for line, start, end, name in step]
    found = shared(*events, steps=2)
    assert found.idle == pytest.approx(2 + 11 + 2)
    assert found.idle_between == pytest.approx(11)
    assert shared(*events, steps=3).idle_between is None
