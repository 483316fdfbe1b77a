"""The sizes of synthetic examples: what `data.recall` may be for each task, see `check_recall`.

The examples themselves are made by `hippocampus.data.synthetic`.
"""

from __future__ import annotations

from typing import NamedTuple

from hippocampus.config import RECALL_TASKS, DataConfig, RecallConfig
from hippocampus.errors import ConfigError

RECALL = "recall:"
"""What `data.corpus` begins with for a synthetic task."""


class Kind(NamedTuple):
    """Examples of one size.

    Attributes:
        length: tokens L of an example.
        pairs: how much there is to remember: bindings, or ids to copy.
    """

    length: int
    pairs: int

    @property
    def name(self) -> str:
        """As tables and series write it."""
        return f"{self.length}x{self.pairs}"


def task_of(data: DataConfig) -> str:
    """The task that a corpus names; "" for a text."""
    return data.corpus.removeprefix(RECALL) if data.corpus.startswith(RECALL) else ""


def train_kinds(recall: RecallConfig) -> tuple[Kind, ...]:
    """The kinds of training examples, in order."""
    return tuple(map(Kind, recall.lengths, recall.pairs))


def held_out_kinds(recall: RecallConfig) -> tuple[Kind, ...]:
    """The kinds of held-out examples, in order."""
    return tuple(map(Kind, recall.test_lengths, recall.test_pairs))


def extra_events(task: str, recall: RecallConfig, pairs: int) -> tuple[int, int]:
    """Bindings of keys that have one, and pairs of filler among them; the noisy task's alone."""
    if task != "noisy":
        return 0, 0
    return round(recall.updates * pairs), round(recall.noise * pairs)


def least_length(task: str, recall: RecallConfig, pairs: int) -> int:
    """Tokens that an example needs at least."""
    if task in ("mqar", "noisy"):  # a binding has two tokens, a query one and one of filler
        return 4 * pairs + 2 * sum(extra_events(task, recall, pairs))
    return {"induction": 3, "selective_copy": 2, "delayed_copy": 2}[task] * pairs


def fits(task: str, recall: RecallConfig, kind: Kind) -> bool:
    """Whether there are examples of this kind."""
    return (kind.length >= least_length(task, recall, kind.pairs)
            and recall.vocab_size >= _least_ids(task, recall, kind.pairs))


def check_recall(data: DataConfig) -> None:
    """Refuses settings of a task that have no examples.

    Raises:
        ConfigError: naming the field and what fits.
    """
    task, recall = task_of(data), data.recall
    if task not in RECALL_TASKS:
        raise ConfigError(f"data.corpus names the task {task[:60]!r}; there is none of that name",
                          f"known: {', '.join(RECALL + name for name in RECALL_TASKS)}")
    for field, wanted in (("tokenizer", "ids"), ("documents", "packed"), ("order", "shuffled")):
        if getattr(data, field) != wanted:
            raise ConfigError(f"data.{field} is {getattr(data, field)[:60]!r} for data.corpus = "
                              f"{data.corpus}", f"the examples of a task need {wanted}")
    for one, other in (("lengths", "pairs"), ("lengths", "examples"),
                       ("test_lengths", "test_pairs")):
        sizes = len(getattr(recall, one)), len(getattr(recall, other))
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ConfigError(f"data.recall.{one} has {sizes[0]} numbers and data.recall.{other} "
                              f"{sizes[1]}", "give one of each for every kind of example")
    for kind in (*train_kinds(recall), *held_out_kinds(recall)):
        _check_kind(task, recall, kind)
    if max(recall.lengths) > data.context:
        raise ConfigError(f"data.recall.lengths has {max(recall.lengths)}, data.context is "
                          f"{data.context}", "a row holds whole examples")
    if min(recall.test_lengths) > data.context:
        raise ConfigError(f"no kind of data.recall.test_lengths fits data.context = {data.context}",
                          "the evaluation while training needs one")


def _check_kind(task: str, recall: RecallConfig, kind: Kind) -> None:
    length, ids = least_length(task, recall, kind.pairs), _least_ids(task, recall, kind.pairs)
    if kind.length < length:
        raise ConfigError(f"{task} with {kind.pairs} pairs does not fit into {kind.length} tokens",
                          f"data.recall: it needs {length}")
    if recall.vocab_size < ids:
        raise ConfigError(f"data.recall.vocab_size = {recall.vocab_size} is too small for {task} "
                          f"with {kind.pairs} pairs", f"it needs {ids}")


def _least_ids(task: str, recall: RecallConfig, pairs: int) -> int:
    if task in ("mqar", "noisy"):  # keys are one half, values the other; some are left as filler
        return 2 * (pairs + extra_events(task, recall, pairs)[0]) + 4
    return pairs + 2 if task == "induction" else 3
