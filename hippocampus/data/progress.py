"""What a person sees while a corpus is read: `Progress`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 30
_STRIDE = 2**20


class Progress:
    """A live line on a terminal, else a line every half minute; on stderr."""

    def __init__(self, task: str, live: bool = True):
        """Names what goes on; `live=False` leaves the terminal to another bar."""
        self._live = live
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._task, self._characters, self._shown = task, 0, 0
        self._begin = self._said = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal and self._live:
            self._bar = Bar(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
                            console=self._console, transient=True)
            self._bar.start()
            self._id = self._bar.add_task(escape(self._task), total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, characters: int, more: str = "") -> None:
        """Counts what was read, and says so when it is time."""
        self._characters += characters
        if self._characters - self._shown < _STRIDE:
            return
        self._shown = self._characters
        now = time.monotonic()
        rate = self._characters / 1e6 / max(now - self._begin, 1e-3)
        line = f"{self._task}: {self._characters / 1e6:,.0f}M characters{more}, {rate:.1f}M/s"
        if self._bar is not None:
            self._bar.update(self._id, description=escape(line))
        elif not self._console.is_terminal and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            self._console.print(line, markup=False)

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """Passes texts on and counts them."""
        for text in texts:
            self.add(len(text))
            yield text
