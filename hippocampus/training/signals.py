"""A signal asks for an end; the loop ends between two steps, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from hippocampus import distributed


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for an end; a second one ends the process at once.

    Of several processes each may get its signal at another time, or only one gets one at all. JAX
    then finds a step that all of them can stop after: a handler of our own for SIGTERM would
    switch that off, so only SIGINT is handled here, and passed on as SIGTERM.
    """

    def __init__(self) -> None:
        """Nothing is installed before `__enter__`."""
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._several = distributed.is_several()

    def __enter__(self) -> StopSignal:
        numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def after(self, step: int) -> signal.Signals | None:
        """The signal to stop for after this step; the same step on every process."""
        if not self._several:
            return self._received
        from jax.experimental import multihost_utils

        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            os._exit(128 + number)
        self._received = signal.Signals(number)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
