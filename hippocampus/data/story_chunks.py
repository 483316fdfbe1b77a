"""Rows of several chunks, for gradients that run through them; and every story once, to score.

    stream of a user:   chunk chunk chunk questions | chunk chunk questions | chunk …
    rows of 2 chunks:  [chunk chunk] [chunk questions] [chunk chunk] [questions chunk] …

A memory carried from row to row has the same chunks behind it whatever the number of them in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hippocampus.data.story_rows import ChunkedBatch, StoryBatch, StoryStreams

_NAMES = ("tokens_BT", "targets_BT", "loss_weight_BT", "document_ids_BT", "positions_BT")


@dataclass(frozen=True, eq=False)
class ChunkedStreams:
    """The rows of `StoryStreams`, several in a row.

    Attributes:
        streams: whose rows become chunks.
        chunks: n, how many make a row.
    """

    streams: StoryStreams
    chunks: int

    @property
    def windows_per_epoch(self) -> int:
        """Rows until every story was read once, on average over users."""
        return -(-self.streams.windows_per_epoch // self.chunks)

    def batch(self, step: int, rows: slice | None = None) -> ChunkedBatch:
        """Return the batch of one step; the same one whenever it is asked for.

        Args:
            step: number of the step, from 0.
            rows: which rows of it, for a host that feeds only some; None: all.
        """
        return joined([self.streams.batch(step * self.chunks + i, rows)
                       for i in range(self.chunks)])


def joined(parts: Sequence[StoryBatch]) -> ChunkedBatch:
    """Batches of the same users, one behind the other in every row."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts], 1) for name in _NAMES}
    for name in ("reset", "question", "story"):
        arrays[f"{name}_Bn"] = np.stack([getattr(part, f"{name}_B") for part in parts], 1)
    return ChunkedBatch(**arrays)


@dataclass(frozen=True, eq=False)
class StoryPass(StoryStreams):
    """Every story once, then all questions about it with their first answers: what is scored.

    Users are dealt the stories as `StoryStreams` deals them, and may have none; what follows a
    user's last row is padding.
    """

    def _check_users(self) -> None:
        """Any number of them."""

    @cached_property
    def steps(self) -> int:
        """Batches until every user is through."""
        return int(self._loads.max())

    def batch(self, step: int, rows: slice | None = None) -> StoryBatch:
        """Return one batch; `step` is below `steps`."""
        users = np.arange(self.batch_size)[rows or slice(None)]
        found = super().batch(step, rows)
        over_B = step >= self._loads[users]
        for name in _NAMES:
            getattr(found, name)[over_B] = 0
        return found

    def _asked(self, story: int, place: int, key: np.ndarray) -> Sequence[int]:
        return self._layouts[story][place]

    def _choice(self, n: int, key: np.ndarray) -> int:
        return 0

    def _place(self, user: int, step: int) -> tuple[int, int]:
        if step >= self._loads[user]:
            return 0, 0
        return super()._place(user, step)


@dataclass(frozen=True, eq=False)
class StoryWindows:
    """The batches of a `StoryPass`, several chunks a row, in order.

    Attributes:
        stories: what is read.
        chunks: n, how many make a row.
        max_batches: at most so many; 0 = all.
    """

    stories: StoryPass
    chunks: int
    max_batches: int = 0

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return self.chunks * self.stories.context

    @property
    def stride(self) -> int:
        """Rows do not overlap."""
        return 0

    def __len__(self) -> int:
        """Return the number of batches."""
        n = -(-self.stories.steps // self.chunks)
        return min(n, self.max_batches or n)

    def __iter__(self) -> Iterator[ChunkedBatch]:
        """Yield the batches; the memory of one belongs in front of the next."""
        for step in range(len(self)):
            yield joined([self.stories.batch(step * self.chunks + i) for i in range(self.chunks)])
