"""The windows that a held-out text is scored in: `EvaluationWindows`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class EvaluationWindows:
    """Windows over a text in order, predicting every id but the first exactly once.

    A window reads `context` ids and the next one begins `stride` ids later. The first window's
    predictions all count; of every other only the last `stride` do, which the windows before have
    not made: each of them sees at least context - stride ids before it. stride = context gives
    disjoint windows, stride = 1 the full context to every prediction at `context` times the cost.

    What sticks out at the end is filled up with predictions of weight 0, so that every batch has
    the same shape.

    Attributes:
        ids: the token ids, one dimension, any integer type; may be a memory map.
        context: T, tokens in a window.
        batch_size: B, rows in a batch.
        max_windows: at most so many windows, evenly spaced over the text; 0: all of them.
        stride: ids from one window to the next, at most `context`; 0: `context`.
        document_starts: where documents begin, ascending, the first at 0; what a window holds of
            one document then sees nothing of another (its first id is still predicted, from the
            end of the document before). None: the text is one document.
    """

    ids: Integer[np.ndarray, " n"]
    context: int
    batch_size: int
    max_windows: int = 0
    stride: int = 0
    document_starts: Integer[np.ndarray, " d"] | None = None

    def __post_init__(self):
        if self.context < 1 or self.batch_size < 1:
            raise ConfigError(f"windows of {self.context} tokens in batches of {self.batch_size}",
                              "both must be at least 1")
        if not 0 <= self.stride <= self.context:
            raise ConfigError(f"a stride of {self.stride} does not go with windows of "
                              f"{self.context} tokens", "it must be between 0 (disjoint windows) "
                              "and the context, or tokens would be left out")
        if len(self.ids) < 2:
            raise DataError(
                f"the text to evaluate has {len(self.ids)} tokens, and a prediction needs 2",
                "use a longer text",
            )

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self._chosen) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, numpy arrays [batch_size, context]."""
        for first in range(0, len(self._chosen), self.batch_size):
            yield self._batch(self._chosen[first : first + self.batch_size])

    @property
    def n_windows(self) -> int:
        """Windows over the whole text, chosen or not."""
        after_first = max(0, len(self.ids) - 1 - self.context)
        return 1 + -(-after_first // self._step)

    @property
    def n_targets(self) -> int:
        """Predictions with weight 1 in all batches together."""
        first = self._chosen * self._step + self._uncounted(self._chosen)
        end = np.minimum(self._chosen * self._step + self.context, len(self.ids) - 1)
        return int((end - first).sum())

    @property
    def starts(self) -> Int64[np.ndarray, " w"]:
        """Where the windows that are evaluated begin; each predicts from the id after on."""
        return self._chosen * self._step

    @property
    def _step(self) -> int:
        return self.stride or self.context

    @cached_property
    def _chosen(self) -> np.ndarray:
        """Numbers of the windows that are evaluated."""
        kept = min(self.max_windows or self.n_windows, self.n_windows)
        return np.arange(kept) * self.n_windows // kept

    def _uncounted(self, windows: np.ndarray) -> np.ndarray:
        """How many predictions at the start of each window belong to the windows before."""
        return np.where(windows == 0, 0, self.context - self._step)

    def _batch(self, windows: np.ndarray) -> Batch:
        place_T = np.arange(self.context)
        at_BT = (windows * self._step)[:, None] + place_T
        real_BT = at_BT < len(self.ids) - 1
        at_BT = np.minimum(at_BT, len(self.ids) - 2)
        counted_BT = real_BT & (place_T >= self._uncounted(windows)[:, None])
        ids = np.asarray(self.ids)  # the base class does without a memory map's overhead
        arrays = [np.where(real_BT, ids[at_BT], 0).astype(np.int32),
                  np.where(real_BT, ids[at_BT + 1], 0).astype(np.int32),
                  counted_BT.astype(np.float32)]
        if self.document_starts is not None:
            document_BT = np.searchsorted(self.document_starts, at_BT, side="right")
            begin_BT = np.asarray(self.document_starts)[document_BT - 1]
            positions_BT = at_BT - np.maximum(begin_BT, at_BT[:, :1])
            arrays += [np.where(real_BT, document_BT - document_BT[:, :1] + 1, 0).astype(np.int32),
                       np.where(real_BT, positions_BT, 0).astype(np.int32)]
        missing = self.batch_size - len(windows)
        host: Any = [np.pad(array, ((0, missing), (0, 0))) for array in arrays]
        return Batch(*host)
