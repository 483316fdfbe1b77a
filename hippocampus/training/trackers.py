"""Where numbers go: metrics.jsonl always, TensorBoard always, Weights & Biases when asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hippocampus.errors import ConfigError
from hippocampus.runs.run_folder import RunFolder


class Tracker(Protocol):
    """Something that keeps series."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps one number per series."""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Keeps the distribution of some values."""

    def text(self, step: int, name: str, text: str) -> None:
        """Keeps a text."""

    def close(self) -> None:
        """Writes what is pending."""


class JsonLines:
    """metrics.jsonl: one object a row with "step" and slash-named series."""

    def __init__(self, path: Path):
        """Opens the file to append."""
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held open

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row; it is in the file when this returns. What is not finite becomes null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Not kept here."""

    def text(self, step: int, name: str, text: str) -> None:
        """Not kept here; samples have files of their own."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Event files beside metrics.jsonl."""

    def __init__(self, folder: Path, first_step: int):
        """Opens a new event file; events from `first_step` on of an earlier start are dropped."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each series."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Adds a histogram."""
        self._writer.add_histogram(name, np.asarray(values, np.float32), step)

    def text(self, step: int, name: str, text: str) -> None:
        """Adds a text, shown as it is."""
        self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        """Writes what is pending."""
        self._writer.close()


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

    def close(self) -> None:
        """Ends the run's upload."""
        self._run.finish()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: list[Tracker]):
        """Keeps them in order."""
        self._all = trackers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Passes on."""
        for tracker in self._all:
            tracker.scalars(step, values)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Passes on."""
        for tracker in self._all:
            tracker.histogram(step, name, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Passes on."""
        for tracker in self._all:
            tracker.text(step, name, text)

    def close(self) -> None:
        """Passes on."""
        for tracker in self._all:
            tracker.close()
