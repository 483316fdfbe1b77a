"""What tells a model from every other: one digest of every bit of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import xxhash


def parameter_digest(params: Any) -> str:
    """A digest of names, types, shapes and bits, whatever devices they lie on.

    Args:
      params: a tree of arrays.

    Returns:
      32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    leaves = [(jax.tree_util.keystr(path), leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    for name, leaf in sorted(leaves, key=lambda pair: pair[0]):
        array = np.ascontiguousarray(jax.device_get(leaf))  # one after the other: there is room
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
