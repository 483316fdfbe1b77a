"""What a run needs to know of what it reads, be it a text or a synthetic task: `RunData`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.evaluation.evaluate import Evaluation
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.files import write_atomically
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training.resume import check_record


class RunData(ABC):
    """Training batches, what is held out, and how the folder of a run knows them again.

    Attributes:
      tokenizer: what the ids belong to.
    """

    tokenizer: Tokenizer

    @abstractmethod
    def batches(self, config: Config) -> Any:
        """Training batches, a pure function of (seed, step), with `windows_per_epoch`."""

    @abstractmethod
    def windows(self, config: Config, max_windows: int) -> Any:
        """Validation batches; at most so many windows, 0 = all."""

    @abstractmethod
    def score(self, model: Any, params: Any, windows: Any,
              place: Callable[[Batch], Batch]) -> Evaluation:
        """Evaluates a model on `windows`, see `hippocampus.evaluation.evaluate`."""

    @abstractmethod
    def held_out(self, packed: bool) -> HeldOutText:
        """The validation split as it is evaluated, its documents kept apart if `packed`."""

    @abstractmethod
    def lines(self) -> dict[str, float]:
        """Nats per token of models that count."""

    @abstractmethod
    def line_notes(self) -> tuple[str, ...]:
        """What was counted for the lines, and smoothed how."""

    @abstractmethod
    def describe(self, config: Config) -> tuple[str, ...]:
        """What there is to read, in lines for a person."""

    @abstractmethod
    def record(self) -> str:
        """What the run folder keeps to recognise what was read by: JSON."""

    def check_same_as(self, folder: RunFolder, allowed: Collection[str] = ()) -> list[str]:
        """Refuses to go on with a run on another text or tokenizer.

        Args:
          folder: of the run.
          allowed: what may differ all the same, see `hippocampus.training.resume`.

        Returns:
          A line for each difference that was allowed.

        Raises:
          ConfigError: what differs.
          DataError: data.json is missing or damaged.
        """
        return check_record(folder, self.record(), allowed)

    def save(self, folder: RunFolder) -> None:
        """Writes what a run folder keeps of its text: the tokenizer, and what it is known by."""
        self.tokenizer.save(folder.tokenizer)
        write_atomically(folder.data, self.record())
