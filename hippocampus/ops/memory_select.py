"""What of a chunk is offered to a memory: at most m entries a row, and none of padding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops.memory_state import NO_SOURCE


class Chosen(NamedTuple):
    """The entries of each row, in the order of time; those that count come first.

    Attributes:
      hidden_BmD: of a token, or the mean of a part of the chunk.
      active_Bm: which of the entries there are.
      rank_Bm: the token (the last one of a part) by its number among the row's tokens, padding
        apart.
      source_Bmn: ids of the n tokens up to it, -1 in front where the chunk has fewer.
    """

    hidden_BmD: Float[Array, "B m D"]
    active_Bm: Bool[Array, "B m"]
    rank_Bm: Int[Array, "B m"]
    source_Bmn: Int[Array, "B m n"]


def choose(
    hidden_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"], *, how: str, n_writes: int,
    source_tokens: int, surprise_BT: Float[Array, "B T"] | None = None,
    tokens_BT: Int[Array, "B T"] | None = None,
) -> Chosen:
    """Chooses min(n_writes, T) entries, or as many as a row has tokens.

    Args:
      hidden_BTD: hidden states.
      mask_BT: False for padding, wherever it is.
      how: "stride" (the last token of each of m equal parts), "mean" (the mean of each part) or
        "surprise" (the m tokens of largest surprise).
      n_writes: m.
      source_tokens: n.
      surprise_BT: -log p of each token; needed for "surprise", which puts what is not finite last.
      tokens_BT: ids; None = unknown.

    Raises:
      ValueError: "surprise" without any.
    """
    T = hidden_BTD.shape[1]
    m = min(n_writes, T)
    n_B1 = mask_BT.sum(-1, keepdims=True)
    count_B1 = jnp.minimum(n_B1, m)
    i_m = jnp.arange(m)
    active_Bm = i_m < count_B1
    order_BT = jnp.argsort(~mask_BT, axis=-1, stable=True)  # of the row's tokens, padding last
    if how == "surprise":
        if surprise_BT is None:
            raise ValueError("select=surprise needs surprise_BT")
        rank_Bm = _most_surprising(surprise_BT, mask_BT, m)
    else:
        rank_Bm = -(-((i_m + 1) * n_B1) // jnp.maximum(count_B1, 1)) - 1
    rank_Bm = jnp.clip(rank_Bm, 0, T - 1)
    if how == "mean":
        part_BT = (jnp.cumsum(mask_BT, -1) - 1) * count_B1 // jnp.maximum(n_B1, 1)
        member_BmT = (part_BT[:, None] == i_m[:, None]) & mask_BT[:, None]
        hidden = jnp.where(mask_BT[..., None], hidden_BTD, 0).astype(jnp.float32)
        total = jnp.einsum("bmt,btd->bmd", member_BmT.astype(jnp.float32), hidden,
                           precision=jax.lax.Precision.HIGHEST)
        mean = total / jnp.maximum(member_BmT.sum(-1, keepdims=True), 1)
        hidden_BmD = mean.astype(hidden_BTD.dtype)
    else:
        place_Bm = jnp.take_along_axis(order_BT, rank_Bm, axis=1)
        hidden_BmD = jnp.take_along_axis(hidden_BTD, place_Bm[..., None], axis=1)
    # What padding holds must reach neither a value nor a gradient, even if it is not finite.
    hidden_BmD = jnp.where(active_Bm[..., None], hidden_BmD, 0)
    source = _sources(tokens_BT, order_BT, rank_Bm, source_tokens)
    return Chosen(hidden_BmD, active_Bm, rank_Bm,
                  jnp.where(active_Bm[..., None], source, NO_SOURCE))


def _most_surprising(surprise_BT: Array, mask_BT: Array, m: int) -> Array:
    least = jnp.finfo(jnp.float32).min
    surprise = jnp.where(jnp.isfinite(surprise_BT), surprise_BT.astype(jnp.float32), least)
    surprise = jax.lax.stop_gradient(jnp.where(mask_BT, surprise, -jnp.inf))
    _, place_Bm = jax.lax.top_k(surprise, m)
    chosen = jnp.take_along_axis(mask_BT, place_Bm, axis=1)
    rank_Bm = jnp.take_along_axis(jnp.cumsum(mask_BT, -1) - 1, place_Bm, axis=1)
    return jnp.sort(jnp.where(chosen, rank_Bm, mask_BT.shape[1]), axis=-1)


def _sources(tokens_BT: Array | None, order_BT: Array, rank_Bm: Array, n: int) -> Array:
    if tokens_BT is None:
        return jnp.full((*rank_Bm.shape, n), NO_SOURCE, jnp.int32)
    in_order_BT = jnp.take_along_axis(tokens_BT, order_BT, axis=1).astype(jnp.int32)
    rank_Bmn = rank_Bm[..., None] + jnp.arange(1 - n, 1)
    ids = jnp.take_along_axis(in_order_BT[:, None], jnp.maximum(rank_Bmn, 0), axis=2)
    return jnp.where(rank_Bmn >= 0, ids, NO_SOURCE)
