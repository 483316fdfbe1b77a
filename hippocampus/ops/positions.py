"""Where a token stands in its document."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def token_positions(
    tokens_BT: Int[Array, "B T"], document_ids_BT: Int[Array, "B T"] | None,
    positions_BT: Int[Array, "B T"] | None,
) -> Int[Array, "B T"]:
    """The positions that a batch gives, or those that follow from its documents.

    Args:
      tokens_BT: the batch's tokens, of which only the shape counts.
      document_ids_BT: document of each token; None = one a row.
      positions_BT: what the batch says; None = count from 0 in every document.
    """
    if positions_BT is not None:
        return positions_BT
    index = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if document_ids_BT is None:
        return index
    ids = document_ids_BT
    begins = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], 1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
