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
