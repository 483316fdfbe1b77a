"""Texts of any lengths as batches of one shape, so that one program reads them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from hippocampus.data.batches import Batch

ROUND = 32
"""Lengths of rows are multiples of it, so that few programs serve all."""


def row_length(ids: Sequence[Int[np.ndarray, " n"]], most: int = 0) -> int:
    """Tokens of a row in which the longest of some texts is read but for its last token.

    Args:
      ids: of the texts.
      most: never more than so many; 0 = as many as it takes.
    """
    longest = max(max((len(one) for one in ids), default=1) - 1, 1)
    rounded = -(-longest // ROUND) * ROUND
    return min(rounded, most) if most else rounded


def text_batches(ids: Sequence[Int[np.ndarray, " n"]], *, rows: int, length: int,
                 asked: Sequence[int] | None = None) -> Iterator[Batch]:
    """Batches in which every text has a row of its own and predicts its own next tokens.

    Args:
      ids: of the texts; one that is longer than a row is cut at its end.
      rows: texts in a batch; the last rows may be padding, which no prediction counts of.
      length: tokens of a row.
      asked: of each text, the place of the first token whose prediction counts; None = all count.

    Yields:
      Batches of NumPy arrays [rows, length]; `document_ids_BT` is 0 for padding.
    """
    for first in range(0, len(ids), rows):
        tokens, targets, valid = (np.zeros((rows, length), np.int32) for _ in range(3))
        weight = np.zeros((rows, length), np.float32)
        for row, one in enumerate(ids[first : first + rows]):
            own = one[: length + 1]
            n = len(own) - 1
            tokens[row, :n], targets[row, :n], valid[row, :n] = own[:-1], own[1:], 1
            begin = 0 if asked is None else max(asked[first + row] - 1, 0)
            weight[row, begin:n] = 1
        positions: Any = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        arrays: dict[str, Any] = {
            "tokens_BT": tokens, "targets_BT": targets, "loss_weight_BT": weight,
            "document_ids_BT": valid, "positions_BT": positions}
        yield Batch(**arrays)
