"""A signal asks for an end; the loop ends between two steps, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType


class StopSignal:
    """While entered, SIGTERM and SIGINT set `received`; a second one ends the process at once."""

    def __init__(self) -> None:
        """Nothing is installed before `__enter__`."""
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)
