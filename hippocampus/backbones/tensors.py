"""Where tensors are read from, one at a time and by name: `TensorSource`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped

from hippocampus.exports.storage import TensorSpec


@dataclass(frozen=True)
class TensorSource:
    """Named tensors that lie in files.

    Attributes:
      place: what to call it in messages.
      specs: type and shape of every tensor.
      read: a tensor by its name; the host holds no other one for it.
    """

    place: str
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], Shaped[np.ndarray, "*sizes"]]


def half_split_rows(weight: Shaped[np.ndarray, "rows D"], heads: int,
                    ) -> Shaped[np.ndarray, "rows D"]:
    """Rows of a query or key matrix whose rotary pairs are neighbours, as pairs half a head apart.

    Args:
      weight: (out, in), of rows (2i, 2i + 1) that are rotated together.
      heads: that the rows are of.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)
