"""Held-out examples of a synthetic task, as what is evaluated: `RecallText`, `recall_text`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hippocampus.config import DataConfig
from hippocampus.config_recall import Kind, held_out_kinds, task_of, train_kinds
from hippocampus.data.recall_rows import RecallWindows
from hippocampus.data.synthetic import Examples, digest_of, make_examples
from hippocampus.data.tokenizers import Tokenizer, id_tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.held_out import HeldOutText

SPLITS = ("validation", "test")
RECALL_NOTE = "the unigram line counts answers of training examples, with 1 added to each id"
_COUNTED = 4096
"""Training examples of each kind that the unigram line is counted on."""


@dataclass(frozen=True, eq=False)
class RecallText(HeldOutText):
    """Held-out examples: only answers are predicted, and it is not text.

    Attributes:
      examples: of every held-out kind.
      ids: of all of them, one after another.
    """

    examples: tuple[Examples, ...] = ()

    @property
    def predictions(self) -> int:
        """Answers."""
        return sum(int((e.answers_NL > 0).sum()) for e in self.examples)

    @property
    def bytes_per_token(self) -> None:
        """Ids have no bytes."""

    @property
    def words_per_token(self) -> None:
        """Ids are no words."""

    def windows(self, context: int, stride: int, batch_size: int,  # type: ignore[override]
                max_windows: int = 0) -> RecallWindows:
        """Rows of the kinds that fit into the context.

        Raises:
          ConfigError: none does, or a stride, which examples have no use for.
        """
        if stride not in (0, context):
            raise ConfigError(f"a stride of {stride} for examples that are read whole",
                              "leave it at 0")
        fitting = tuple(e for e in self.examples if e.kind.length <= context)
        if not fitting:
            raise ConfigError(f"no example fits into a context of {context}", "raise it")
        return RecallWindows(fitting, context, batch_size, max_windows)

    def whole_windows(self, context: int, batch_size: int, max_windows: int) -> RecallWindows:
        """Rows that are full, of every kind that fits, in batches that are all full.

        Args:
          context: T, tokens in a row.
          batch_size: rows in a batch at most.
          max_windows: at most so many rows, an equal share of every kind; 0 = all.
        """
        cut = self.windows(context, 0, batch_size)
        per_row = [context // e.kind.length for e in cut.examples]
        most = max(1, max_windows // len(per_row)) if max_windows else 2**62
        rows = [min(most, len(e) // n) for e, n in zip(cut.examples, per_row, strict=True)]
        batch_size = min(batch_size, *(n for n in rows if n))
        return RecallWindows(
            tuple(Examples(e.kind, e.tokens_NL[:kept], e.answers_NL[:kept])
                  for e, n, k in zip(cut.examples, rows, per_row, strict=True)
                  if (kept := n // batch_size * batch_size * k)), context, batch_size)

    def of_kinds(self, kinds: Sequence[Kind]) -> RecallText:
        """The same with some kinds only."""
        return _text(self.name, self.digest, self.split, self.tokenizer,
                     tuple(e for e in self.examples if e.kind in kinds))


def recall_text(data: DataConfig, split: str, tokenizer: Tokenizer | None = None,
                longest: int = 0) -> RecallText:
    """The held-out examples of a task.

    Args:
      data: the settings.
      split: "validation" or "test".
      tokenizer: of the ids; None = made.
      longest: only kinds of at most so many tokens; 0 = all.

    Raises:
      DataError: another split.
      ConfigError: no kind is short enough.
    """
    if split not in SPLITS:
        raise DataError(f"{data.corpus} has no {split} split", f"it has {', '.join(SPLITS)}")
    index_N = np.arange(data.recall.test_examples)
    examples = tuple(make_examples(task_of(data), data.recall, split, kind, index_N)
                     for kind in held_out_kinds(data.recall)
                     if kind.length <= (longest or kind.length))
    if not examples:
        raise ConfigError(f"no kind of data.recall.test_lengths fits a context of {longest}",
                          "raise it")
    return _text(data.corpus, digest_of(data), split,
                 tokenizer or id_tokenizer(data.recall.vocab_size), examples)


def recall_lines(data: DataConfig, text: RecallText) -> dict[str, float]:
    """Nats per answer of a guess among all ids, and of one by how often an id is an answer."""
    size, kinds = data.recall.vocab_size, zip(train_kinds(data.recall), data.recall.examples,
                                              strict=True)
    counts = np.ones(size)
    for kind, n in kinds:
        of_kind = make_examples(task_of(data), data.recall, "train", kind,
                                np.arange(min(n, _COUNTED)))
        counts += np.bincount(_answers(of_kind), minlength=size)
    cost = np.log(counts.sum()) - np.log(counts)
    return {"uniform": math.log(size),
            "unigram": float(np.concatenate([cost[_answers(e)] for e in text.examples]).mean())}


def _text(name: str, digest: str, split: str, tokenizer: Tokenizer,
          examples: tuple[Examples, ...]) -> RecallText:
    lengths = [np.full(len(e), e.kind.length) for e in examples]
    starts = np.cumsum(np.concatenate([[0], *lengths]))[:-1].astype(np.int64)
    ids = np.concatenate([e.tokens_NL.ravel() for e in examples])
    return RecallText(name, digest, split, tokenizer, ids, starts, 0, 0, 0, examples)


def _answers(examples: Examples) -> np.ndarray:
    return examples.answers_NL[examples.answers_NL > 0]
