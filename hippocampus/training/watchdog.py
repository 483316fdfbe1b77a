"""Says where a run hangs: the stacks of all threads, once a step takes far too long.

A run that hangs, on a dead file system, a collective that one process never joins or a reader that
waits for ever, shows nothing by itself. What is usual is learned from the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from hippocampus.files import write_atomically

_WINDOW = 64
_KNOWN = 8
_SECONDS_TO_END = 2.0


class Watchdog:
    """While entered, watches from a thread of its own how long the step in progress takes.

    A step is too slow after `factor` times what is usual, and `least_seconds`. Usual is the median
    of the last 64 steps, or their mean where that is more: a host that runs ahead of its device
    does many steps in no time and waits for all of them in one, which must not count as slow. For
    the same reason, time that earlier steps took less than the mean is granted to later ones. So
    what happens every few steps is told the first time only.

    Each slow step is told once. A thread that keeps Python's lock for ever cannot be seen; JAX
    gives the lock away whenever it waits.
    """

    def __init__(self, folder: Path, factor: float, least_seconds: float,
                 say: Callable[[str], object], process: int = 0):
        """Nothing is watched before `__enter__` and eight known steps.

        Args:
          folder: the run folder; stacks go to stacks/step_<n>.txt there.
          factor: times the usual seconds of a step.
          least_seconds: what no step is reported before.
          say: gets one line for each slow step, from another thread.
          process: index of this process; all but the first name it in their file.
        """
        self._folder, self._say = folder / "stacks", say
        self._suffix = f"_process_{process}" if process else ""
        self._factor, self._least = factor, least_seconds
        self._taken: deque[float] = deque(maxlen=_WINDOW)
        self._sum = self._saved = 0.0
        self._now: tuple[int, float] | None = None  # the step in progress and its start
        self._compiled = False
        self._pauses = 0
        self._reported: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(_SECONDS_TO_END)  # it may itself hang, on the run folder

    def beat(self, step: int) -> None:
        """The step in progress has ended; another one begins.

        Args:
          step: the number of steps that are done, as in the names of checkpoints.
        """
        now = time.perf_counter()
        if self._now is not None:
            if self._compiled:
                self._learn(now - self._now[1])
            self._compiled = True  # the first step compiles, which is not usual
        self._now = (step + 1, now)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time belongs to no step: evaluation, saving, sampling."""
        start = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            if self._now is not None:
                self._now = (self._now[0], self._now[1] + time.perf_counter() - start)
            self._pauses -= 1

    def _learn(self, seconds: float) -> None:
        if len(self._taken) == _WINDOW:
            self._sum -= self._taken[0]
        self._taken.append(seconds)
        self._sum += seconds
        mean = self._sum / len(self._taken)
        self._saved = min(max(0.0, self._saved + mean - seconds), _WINDOW * mean)

    def _usual(self) -> float:
        taken = list(self._taken)
        return max(statistics.median(taken), statistics.fmean(taken))

    def _limit(self) -> float:
        return max(self._least, self._factor * self._usual() + self._saved)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, max(0.02, self._least / 4))):
            with contextlib.suppress(Exception):  # never the reason that a run ends
                self._look()

    def _look(self) -> None:
        now = self._now
        if now is None or self._pauses or len(self._taken) < _KNOWN or now[0] == self._reported:
            return
        step, seconds = now[0], time.perf_counter() - now[1]
        if seconds <= self._limit() or self._now is not now or self._pauses:
            return
        self._reported = step
        text = f"step {step} has taken {_short(seconds)} (usual: {_short(self._usual())})"
        try:
            path = self._free_name(step)
            write_atomically(path, f"{text}\n\n{_stacks()}")
        except OSError as error:
            self._say(f"warning: {text}; its stacks could not be written: {error}")
        else:
            self._say(f"warning: {text}; what every thread does is in {path}")

    def _free_name(self, step: int) -> Path:
        """A run that was started again may hang in the same step: what is there stays."""
        names = (f"step_{step}{self._suffix}{again}.txt"
                 for again in ("", *(f"-{i}" for i in range(2, 1000))))
        return next(p for p in map(self._folder.joinpath, names) if not p.exists())


def _stacks() -> str:
    names = "".join(f"0x{thread.ident:016x} is {thread.name}\n" for thread in threading.enumerate())
    with tempfile.TemporaryFile() as file:  # faulthandler writes to a descriptor only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return f"{names}\n{file.read().decode(errors='replace')}"


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
