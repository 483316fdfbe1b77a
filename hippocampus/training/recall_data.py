"""The examples of a synthetic task, as a run reads them: `RecallData`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hippocampus.config import Config, DataConfig
from hippocampus.config_recall import task_of, train_kinds
from hippocampus.data.batches import Batch
from hippocampus.data.recall_rows import RecallRows, RecallWindows
from hippocampus.data.synthetic import Examples, make_examples
from hippocampus.data.tokenizers import Tokenizer, id_tokenizer
from hippocampus.evaluation.evaluate import Evaluation, evaluate
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.evaluation.recall_text import (
    RECALL_NOTE,
    RecallText,
    recall_lines,
    recall_text,
)
from hippocampus.evaluation.report import Windows
from hippocampus.training.run_data import RunData


@dataclass(frozen=True)
class RecallData(RunData):
    """All examples of a task, made.

    Attributes:
      settings: what they are made from.
      tokenizer: its words are the ids.
      train: the training examples of every kind.
      validation: the held-out ones.
    """

    settings: DataConfig
    tokenizer: Tokenizer
    train: tuple[Examples, ...]
    validation: RecallText

    def batches(self, config: Config) -> RecallRows:
        """Training batches, a pure function of (seed, step)."""
        return RecallRows(self.train, config.data.context, config.train.batch_size,
                          config.train.seed)

    def windows(self, config: Config, max_windows: int) -> RecallWindows:
        """Held-out examples of the kinds that fit into a window."""
        cut = Windows.of(config)
        return self.validation.windows(cut.context, cut.stride, cut.batch_size, max_windows)

    def score(self, model: Any, params: Any, windows: RecallWindows,
              place: Callable[[Batch], Batch]) -> Evaluation:
        """Evaluates a model on `windows`, with the share of right answers of every kind."""
        return evaluate(model, params, windows, None, place, parts=windows.parts)

    def held_out(self, packed: bool) -> HeldOutText:
        """The held-out examples; they are always kept apart."""
        return self.validation

    def lines(self) -> dict[str, float]:
        """Nats per answer of a guess, and of the frequencies of answers."""
        return recall_lines(self.settings, self.validation)

    def line_notes(self) -> tuple[str, ...]:
        """What was counted for the lines."""
        return (RECALL_NOTE,)

    def describe(self, config: Config) -> tuple[str, ...]:
        """What there is to read, in lines for a person."""
        kinds = ", ".join(f"{len(e):,} of {e.kind.length} tokens with {e.kind.pairs} pairs"
                          for e in self.train)
        return (f"{self.settings.corpus}: {kinds}; {self.tokenizer.vocab_size} ids, sha256 "
                f"{self.validation.digest[:16]}",)

    def record(self) -> str:
        """What the run folder keeps to recognise the examples by."""
        text = self.validation
        return json.dumps({
            "corpus": text.name, "sha256": text.digest, "tokenizer": self.tokenizer.digest,
            "train_tokens": sum(e.tokens_NL.size for e in self.train), "train_bytes": 0,
            "validation_tokens": len(text.ids), "validation_bytes": 0, "validation_words": 0,
            "validation_unknown": 0}, indent=2) + "\n"


def make_recall_data(config: Config) -> RecallData:
    """Makes the examples of a task; 24 million tokens take some seconds.

    Raises:
      ConfigError: no held-out examples fit into a window.
    """
    data = config.data
    tokenizer = id_tokenizer(data.recall.vocab_size)
    train = tuple(make_examples(task_of(data), data.recall, "train", kind, np.arange(n))
                  for kind, n in zip(train_kinds(data.recall), data.recall.examples, strict=True))
    held_out = recall_text(data, "validation", tokenizer, Windows.of(config).context)
    return RecallData(data, tokenizer, train, held_out)
