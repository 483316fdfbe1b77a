"""Where numbers go: metrics.jsonl always, TensorBoard always, Weights & Biases when asked."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hippocampus.errors import ConfigError
from hippocampus.runs.run_folder import RunFolder

_FLUSH_SECONDS = 30.0
_MAX_BINS = 64


class Tracker(Protocol):
    """Something that keeps series."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps one number per series."""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Keeps the distribution of some values."""

    def text(self, step: int, name: str, text: str) -> None:
        """Keeps a text."""

    def flush(self) -> None:
        """Keeps what is pending safe from the end of this process."""

    def close(self) -> None:
        """Writes what is pending."""


class JsonLines:
    """metrics.jsonl: one object a row with "step" and slash-named series."""

    def __init__(self, path: Path):
        """Opens the file to append."""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - held open
        self._waiting = b""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row; it is in the file when this returns. What is not finite becomes null.

        Raises:
          OSError: the disk takes none; the row waits for the next call.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._waiting += json.dumps({"step": step, **finite}).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(self._waiting) != len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)  # a part of a row would spoil the next one
            raise
        self._waiting = b""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Not kept here."""

    def text(self, step: int, name: str, text: str) -> None:
        """Not kept here; samples have files of their own."""

    def flush(self) -> None:
        """Nothing is pending."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files beside metrics.jsonl.

    Written here and now: the thread of tensorboardX's own writer ends with the first error of the
    disk, and whoever adds an event then waits for it for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        """Begins a new event file; events from `first_step` on of an earlier start are dropped.

        tensorboardX is imported here, before the first step: at its first row the device would
        wait. Where PyTorch is installed, tensorboardX imports it with itself, for nothing that is
        used here: 4 s, and libraries of CUDA beside JAX's own.
        """
        with _absent("torch"):
            import tensorboardX  # noqa: F401
        self._folder, self._first_step = folder, first_step
        self._file: Any = None
        self._flushed = time.monotonic()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each series."""
        from tensorboardX.summary import scalar

        self._add(step, [scalar(name, value) for name, value in values.items()])

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Adds a histogram of the finite values."""
        from tensorboardX.summary import histogram

        finite = np.asarray(values, np.float32)
        finite = finite[np.isfinite(finite)]
        if finite.size:
            self._add(step, [histogram(name, finite, "auto", max_bins=_MAX_BINS)])

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text, shown as it is."""
        from tensorboardX import summary

        self._add(step, [summary.text(name, "    " + text.replace("\n", "\n    "))])

    def flush(self) -> None:
        """Writes what is pending to the disk, so that a killed process does not lose it."""
        if self._file is not None:
            self._flushed = time.monotonic()
            self._file.flush()

    def close(self) -> None:
        """Writes what is pending."""
        if self._file is not None:
            self._file.close()

    def _add(self, step: int, parts: list[Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        content = Summary(value=[value for part in parts for value in part.value])
        try:
            if self._file is None:
                self._file = self._begin()
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=content))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self.flush()
        except OSError:
            self._file = None  # behind a half-written event nothing can be read: a new file next
            raise

    def _begin(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        # The name has the second in it; two starts may fall into one.
        file = EventsWriter(str(self._folder / "events"), f".{time.time_ns()}")
        file.write_event(Event(wall_time=time.time(), step=self._first_step,
                               session_log=SessionLog(status=SessionLog.START)))
        return file


@contextlib.contextmanager
def _absent(package: str) -> Iterator[None]:
    """A context in which a package that is not imported yet is as if it were not installed."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


class WeightsAndBiases:
    """A W&B run that goes on under the same id when the run folder resumes."""

    def __init__(self, project: str, folder: RunFolder, config: dict[str, Any]):
        """Starts or resumes.

        Raises:
          ConfigError: the package is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise ConfigError("log.wandb_project is set but wandb is not installed",
                              "pip install 'hippocampus[wandb]'") from None
        self._wandb = wandb
        id_file = folder.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(project=project, id=id_file.read_text(), resume="allow",
                               name=folder.path.name, dir=str(folder.path), config=config)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs a row."""
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Logs a histogram."""
        self._run.log({name: self._wandb.Histogram(values)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """Logs a text as HTML-safe preformatted text."""
        import html

        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        """Ends the run's upload."""
        self._run.finish()


class Trackers:
    """Several trackers as one. A disk that takes nothing costs numbers, never the run."""

    def __init__(self, trackers: list[Tracker], say: Callable[[str], None] = lambda line: None):
        """Keeps them in order.

        Args:
          trackers: to pass everything on to.
          say: is told once, in a line, of a tracker that cannot write, until it can again.
        """
        self._all, self._say = trackers, say
        self._failing: set[int] = set()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Passes on."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Passes on."""
        self._each(lambda tracker: tracker.histogram(step, name, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Passes on."""
        self._each(lambda tracker: tracker.text(step, name, text))

    def flush(self) -> None:
        """Passes on."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """Passes on."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for i, tracker in enumerate(self._all):
            try:
                act(tracker)
                self._failing.discard(i)
            except OSError as error:
                if i not in self._failing:
                    self._say(f"warning: numbers could not be written to {type(tracker).__name__}: "
                              f"{error.strerror or error}; training goes on")
                self._failing.add(i)
