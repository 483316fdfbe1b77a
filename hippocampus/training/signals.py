"""A signal asks for an end; the run ends at the next place where nothing is lost by it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from hippocampus import distributed
from hippocampus.errors import EXIT_TRY_AGAIN, Stopped

AGAIN = "start the same command again to go on"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_POLL_SECONDS = 0.3
_SECONDS_TO_END = 10.0


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for an end; a second one ends the process at once.

    A run calls `here` at every place where it could stop, `unsaved` when it has done something
    that must be saved, and `all_saved` when it has saved it. A signal while nothing is unsaved ends
    the run at once, with exit code 75: compiling outlasts most grace periods, and a handler written
    in Python has to wait for it. So a thread takes the signals of a process that belongs to the
    run; in somebody else's process (a notebook) the handler raises `Stopped` as soon as it can.

    Several processes may get their signals at different times, or only one gets one at all. The one
    that does tells the others. They agree on a place to stop that none of them has passed, counted
    in calls of `here`, of which all make the same. Their threads do that, because their main
    threads may be waiting for each other in a collective.

    What acts on a signal may wait, for another process or a terminal that takes no text. The thread
    that reads the signals never does, so that the second one is always heard.
    """

    def __init__(self, owns_process: bool = False):
        """Nothing is installed before `__enter__`.

        Args:
          owns_process: the process may be ended; else `Stopped` is raised in it.
        """
        self._owns_process = owns_process
        self._lock = threading.RLock()  # a handler may come while its own thread holds it
        self._own: signal.Signals | None = None  # what this process itself was sent
        self._received: signal.Signals | None = None  # what the run stops for
        self._wanted: signal.Signals | None = None
        self._late: signal.Signals | None = None
        self._unsaved = False
        self._calls = 0
        self._stop_at: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._exits = False
        self._news, self._ended = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._pipe: tuple[int, int, int] | None = None

    def __enter__(self) -> StopSignal:
        self._agreement = distributed.Agreement()
        try:
            if self._owns_process or distributed.is_several():
                self._start(self._act)
            if threading.current_thread() is threading.main_thread():
                handler = _leave_it_to_the_thread if self._owns_process else self._raise_or_note
                if self._owns_process:
                    self._read_in_thread()  # before the handlers: they lose what nobody reads
                self._before = {number: signal.getsignal(number) for number in _SIGNALS}
                for number in _SIGNALS:
                    signal.signal(number, handler)
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._lock:
            self._unsaved = False
        # Of several processes, one that was told by another may still wait for all to leave when
        # its own first signal comes. It ends soon, and keeps its handlers until then.
        if not (self._owns_process and distributed.is_several()):
            self._undo()

    @property
    def wanted(self) -> signal.Signals | None:
        """What the last call of `here` returned."""
        return self._wanted

    def here(self) -> signal.Signals | None:
        """The signal to stop for at this place, or None; the same on every process."""
        with self._lock:
            self._calls += 1
            agreed = self._stop_at is not None and self._stop_at <= self._calls
            if agreed or not distributed.is_several():
                self._wanted = self._received
            return self._wanted

    def unsaved(self) -> None:
        """From now on an end would lose something: it has to wait for `here`."""
        with self._lock:
            self._unsaved = True

    def all_saved(self) -> None:
        """From now on there is nothing to lose."""
        with self._lock:
            self._unsaved = False
            received = self._received
        if received is not None and not distributed.is_several():
            raise Stopped(_saved(received), AGAIN)

    def _raise_or_note(self, number: int, frame: FrameType | None) -> None:
        """The handler in a process of somebody else."""
        if self._exits:  # an exception would keep the other handlers from being restored
            self._late = signal.Signals(number)
            return
        if self._own is not None:
            raise KeyboardInterrupt
        self._own = signal.Signals(number)
        if distributed.is_several():  # the others would wait for this one: the thread asks them
            return
        self._received = self._own
        if not self._unsaved:
            raise Stopped(_saved(self._received), AGAIN)

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True, name="signals")
        self._threads.append(thread)
        thread.start()

    def _read_in_thread(self) -> None:
        numbers, wake = os.pipe()
        for end in (numbers, wake):
            os.set_blocking(end, False)
        self._pipe = (numbers, wake, signal.set_wakeup_fd(wake, warn_on_full_buffer=False))
        self._start(self._read)

    def _undo(self) -> None:
        """Ends the threads, and leaves signals to whom they were left before."""
        self._exits = True
        for number, handler in self._before.items():
            # One that was not set in Python cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        self._agreement.answer(self._answer())  # who is still asked must not wait for this process
        self._ended.set()
        self._news.set()
        if self._pipe is not None:
            numbers, wake, before = self._pipe
            signal.set_wakeup_fd(before)
            os.write(wake, b"\0")  # no signal has this number
        for thread in self._threads:
            thread.join()
        if self._pipe is not None:
            os.close(wake)
            os.close(numbers)
            self._pipe = None
        if self._late is not None:
            signal.raise_signal(self._late)

    def _read(self) -> None:
        """A thread that takes every signal of this process, and waits for nothing else."""
        assert self._pipe is not None
        numbers = self._pipe[0]
        while True:
            select.select([numbers], [], [])
            for number in os.read(numbers, 64):
                if number == 0:
                    return
                if number in _SIGNALS:
                    if self._own is not None:
                        os._exit(128 + number)  # the second one
                    self._own = signal.Signals(number)
                    self._news.set()

    def _act(self) -> None:
        """A thread that does what a signal asks for."""
        done = False
        while not self._ended.is_set():
            self._news.wait(_POLL_SECONDS)
            self._news.clear()
            if not done:
                done = self._agree() if distributed.is_several() else self._stop_alone()

    def _stop_alone(self) -> bool:
        if self._own is None:
            return False
        with self._lock:
            self._received = self._own
            if not self._unsaved:
                _end_at_once(self._own)
        return True

    def _answer(self) -> dict[str, int | bool]:
        # A process of somebody else cannot be ended: it has to come to a place, whatever is saved.
        return {"calls": self._calls, "unsaved": self._unsaved or not self._owns_process}

    def _agree(self) -> bool:
        """Finds the place where all processes stop; while they do, none of them passes one."""
        if self._own is not None:
            self._agreement.ask(self._own)
        asked = self._agreement.asked()
        if asked is None:
            return False
        number = signal.Signals(asked)  # the same word on every process
        with self._lock:
            self._agreement.answer(self._answer())
            answers = self._agreement.answers()
            if answers is None:
                return False
            self._received = number
            if not any(answer["unsaved"] for answer in answers):
                if not distributed.is_first():
                    threading.Event().wait(_SECONDS_TO_END)  # the first process ends this one
                _end_at_once(number)
            self._stop_at = 1 + max(answer["calls"] for answer in answers)
        return True


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler has to be there for the wake-up descriptor to be written to."""


def _saved(number: signal.Signals) -> str:
    return f"{number.name}: nothing was left to save"


def _end_at_once(number: signal.Signals) -> None:
    """Ends this process, and all of several, from a thread that may wait for ever."""
    def give_up() -> None:
        threading.Event().wait(_SECONDS_TO_END)  # nobody may be reading what is printed
        os._exit(EXIT_TRY_AGAIN)

    threading.Thread(target=give_up, daemon=True).start()
    if distributed.report_failure(EXIT_TRY_AGAIN):
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"stopped: {_saved(number)}\nhint: {AGAIN}\n")
            sys.stderr.flush()
    with contextlib.suppress(OSError, ValueError):
        distributed.leave_failed(EXIT_TRY_AGAIN)  # returns where there is only one process
    os._exit(EXIT_TRY_AGAIN)
