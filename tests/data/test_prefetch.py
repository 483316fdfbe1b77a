"""Read-ahead: the same batches in the same order, and no thread outlives it."""

import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from hippocampus.data.batches import ShuffledWindows
from hippocampus.data.prefetch import prefetch


def windows():
    return ShuffledWindows(np.arange(5000, dtype=np.uint16), 8, 6, 0, np.arange(0, 5000, 11))


def threads():
    return {t for t in threading.enumerate() if t.name.startswith("grain")}


def gone(before):
    """Whether the threads end within seconds."""
    for _ in range(100):
        if not threads() - before:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("rows", [None, slice(2, 5)])
def test_batches_are_those_of_the_steps_in_order(rows):
    before, source = threads(), windows()
    found = list(prefetch(source, 90, 130, rows))
    assert len(found) == 40
    for step, batch in enumerate(found, 90):
        jax.tree.map(np.testing.assert_array_equal, batch, source.batch(step, rows))
    assert gone(before)


def test_no_steps_are_no_batches():
    assert list(prefetch(windows(), 7, 7)) == []


def test_batches_are_made_ahead_but_not_without_end():
    made, source = [], windows()

    class Counted:
        def batch(self, step, rows=None):
            made.append(step)
            return source.batch(step, rows)

    with closing(prefetch(Counted(), 0, 1000, buffered=4)) as ahead:
        next(ahead)
        time.sleep(0.3)
        assert 4 <= len(made) <= 6


def test_closing_early_ends_the_threads():
    before = threads()
    with closing(prefetch(windows(), 0, 10**9)) as ahead:
        next(ahead)
        assert threads() - before
    assert gone(before)


def test_error_in_a_batch_comes_through_and_ends_the_threads():
    class Broken:
        def batch(self, step, rows=None):
            if step == 3:
                raise OSError("the disk is gone")
            return windows().batch(step, rows)

    before, seen = threads(), 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in prefetch(Broken(), 0, 10):
            seen += 1
    assert seen == 3
    assert gone(before)


def test_process_that_leaves_in_the_middle_ends_at_once_and_quietly():
    script = ("import numpy as np\n"
              "from hippocampus.data.batches import ShuffledWindows\n"
              "from hippocampus.data.prefetch import prefetch\n"
              "ahead = prefetch(ShuffledWindows(np.arange(5000), 8, 6, 0), 0, 10**9)\n"
              "print(next(ahead).tokens_BT.shape)\n"
              "raise SystemExit(7)\n")
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                         env={**os.environ, "PYTHONPATH": str(root)})
    assert (run.returncode, run.stdout, run.stderr) == (7, "(6, 8)\n", "")
