"""Which parameters a decoder may hold in compute dtype without changing a bit of its results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_CAST = frozenset({"kernel", "bias", "embedding", "position_embedding", "head", "head_down",
                   "conv_kernel", "conv_bias", "time_kernel", "recurrent_kernel"})
"""Names of what is cast to the compute dtype in every use."""
_FLOAT32 = frozenset({("mixer", "gate"), ("controller", "out"), ("flow", "out")})
"""Layers that compute in float32 whatever the compute dtype is."""


def cast_parameters(params: Any, dtype: jnp.dtype) -> Any:
    """The same tree, matrices, tables and their biases in `dtype`, the rest as it is.

    Decays, scales of norms, slots, inverse temperatures and the layers that compute in float32
    keep their precision.
    """
    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(entry.key for entry in path)
        kept = names[-1] not in _CAST or names[-3:-1] in _FLOAT32
        return leaf if kept or leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
