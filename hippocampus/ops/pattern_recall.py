"""One look of every token at all patterns, context and slots, in blocks of tokens.

`hopfield` has the whole table of scores in memory: tokens times patterns, in float32. With
thousands of learned patterns that is the largest array of a model, so here a block of tokens is
read at a time, and its scores are computed again for the gradient. The log-sum of the scores comes
with the retrieved pattern: it is all that the energy needs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops import placement

BLOCK_SCORES = 2**24
"""Most scores (B n H S) that a block has on a device: 64 MiB."""
_HIDDEN = -1e30
"""Score of what a token may not see: finite, so that no row of scores gives NaN."""


class Recalled(NamedTuple):
    """What the patterns k_1..k_n that a token sees say to its query xi (float32).

    Attributes:
      value_BTHd: sum_i softmax_i(beta k_i.xi) k_i.
      log_sum_BTH: log sum_i exp(beta k_i.xi).
      n_BT: how many patterns the token sees.
    """

    value_BTHd: Float[Array, "B T H d"]
    log_sum_BTH: Float[Array, "B T H"]
    n_BT: Float[Array, "B T"]


def recall(
    xi_BTHd: Float[Array, "B T H d"], keys_BHCd: Float[Array, "B H C d"] | None,
    slots_SHd: Float[Array, "S H d"] | None, beta_H: Float[Array, " H"], *,
    visible_BTC: Bool[Array, "B T C"] | None = None,
    document_ids_BT: Int[Array, "B T"] | None = None, dtype: jnp.dtype = jnp.float32,
    block_scores: int = BLOCK_SCORES,
) -> Recalled:
    """Compares every query with every pattern that it sees.

    Args:
      xi_BTHd: queries.
      keys_BHCd: patterns from the context; None = none.
      slots_SHd: patterns that every token sees; None = none.
      beta_H: inverse temperature per head, > 0.
      visible_BTC: which keys each token sees; None = token t those of the tokens s <= t of its
        document (then C = T).
      document_ids_BT: document of each token, without `visible_BTC`; None = one a row.
      dtype: of the matrix products' inputs; sums and softmax are float32.
      block_scores: most scores on a device at once; the blocks are as long as they allow.

    Returns:
      See `Recalled`. The gradient keeps nothing of a block but its queries where there are
      several.
    """
    B, T, H, _ = xi_BTHd.shape
    q_BTHd = (xi_BTHd * beta_H[:, None]).astype(dtype)
    keys_BHCd = None if keys_BHCd is None else keys_BHCd.astype(dtype)
    slots_SHd = None if slots_SHd is None else slots_SHd.astype(dtype)
    context = 0 if keys_BHCd is None else keys_BHCd.shape[2]
    patterns = context + (0 if slots_SHd is None else len(slots_SHd))
    token = {"q": q_BTHd, "index": jnp.broadcast_to(jnp.arange(T), (B, T)),
             "ids": document_ids_BT, "visible": visible_BTC}
    if keys_BHCd is None or visible_BTC is not None:
        token["index"] = token["ids"] = None

    def block(token: dict) -> Recalled:
        seen = None if keys_BHCd is None else token["visible"]
        if keys_BHCd is not None and seen is None:
            seen = jnp.arange(context) <= token["index"][..., None]
            if document_ids_BT is not None:
                seen = seen & (token["ids"][..., None] == document_ids_BT[:, None])
        return _look(token["q"], keys_BHCd, slots_SHd, seen)

    rows = -(-B // placement.shards("batch", B))
    size = max(1, block_scores // (rows * H * patterns))
    if size >= T or placement.shards(placement.SEQUENCE, T) > 1:
        return block(token)
    n = -(-T // size)
    size = -(-T // n)  # blocks of one length, with as little padding as can be
    blocks = jax.tree.map(lambda array: _cut(array, n, size), token)
    found = jax.lax.map(jax.checkpoint(block), blocks)
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(
        B, n * size, *array.shape[3:])[:, :T], found)


def _cut(array: Array, n: int, size: int) -> Array:
    """B,T,… -> n,B,size,…; padded with tokens that see nothing, or what the first one sees."""
    behind = [(0, 0)] * array.ndim
    behind[1] = (0, n * size - array.shape[1])
    padded = jnp.pad(array, behind)
    return jnp.moveaxis(padded.reshape(array.shape[0], n, size, *array.shape[2:]), 1, 0)


def _look(q_BnHd: Array, keys_BHCd: Array | None, slots_SHd: Array | None,
          seen_BnC: Array | None) -> Recalled:
    scores, n_Bn = [], jnp.zeros(q_BnHd.shape[:2])
    if keys_BHCd is not None:
        assert seen_BnC is not None
        own = jnp.einsum("bnhd,bhcd->bhnc", q_BnHd, keys_BHCd,
                         preferred_element_type=jnp.float32)
        scores.append(jnp.where(seen_BnC[:, None], own, _HIDDEN))
        n_Bn = n_Bn + seen_BnC.sum(-1)
    if slots_SHd is not None:
        scores.append(jnp.einsum("bnhd,shd->bhns", q_BnHd, slots_SHd,
                                 preferred_element_type=jnp.float32))
        n_Bn = n_Bn + len(slots_SHd)
    scores_BHnS = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    log_sum_BHn = jax.nn.logsumexp(scores_BHnS, axis=-1)
    p_BHnS = jnp.exp(scores_BHnS - log_sum_BHn[..., None]).astype(q_BnHd.dtype)
    value = jnp.zeros(q_BnHd.shape, jnp.float32)
    context = 0
    if keys_BHCd is not None:
        context = keys_BHCd.shape[2]
        value = value + jnp.einsum("bhnc,bhcd->bnhd", p_BHnS[..., :context], keys_BHCd,
                                   preferred_element_type=jnp.float32)
    if slots_SHd is not None:
        value = value + jnp.einsum("bhns,shd->bnhd", p_BHnS[..., context:], slots_SHd,
                                   preferred_element_type=jnp.float32)
    return Recalled(value, jnp.moveaxis(log_sum_BHn, 1, 2), jnp.maximum(n_Bn, 1.0))


def energy(xi_BTHd: Float[Array, "B T H d"], recalled: Recalled, beta_H: Float[Array, " H"],
           square_norm: float) -> Float[Array, "B T H"]:
    """E(xi) of `hippocampus.ops.hopfield`, of patterns that are of one length (float32, >= 0).

    Args:
      xi_BTHd: the queries that `recalled` is for.
      recalled: from `recall`.
      beta_H: inverse temperature per head.
      square_norm: |k|^2 of the patterns, or a bound of it.
    """
    xi_BTHd = xi_BTHd.astype(jnp.float32)
    return ((jnp.log(recalled.n_BT)[..., None] - recalled.log_sum_BTH) / beta_H
            + 0.5 * (xi_BTHd * xi_BTHd).sum(-1) + 0.5 * square_norm)
