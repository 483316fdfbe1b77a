"""Keys and values of the tokens read so far, and attention to them.

A cache holds the last C tokens of a row in a ring: the token at position p lies in slot p mod C.
What a slot holds follows from how many tokens the row has read, so nothing else is kept. Rows are
at their own positions. Until a row has read more than C, a larger ring holds the same in the same
slots: padding its end makes a cache larger.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_HIDDEN = -1e30
"""Score of what a token may not see: finite, so that a row that sees nothing has no NaN."""


def recall(
    caches: tuple[Float[Array, "B G C d"], ...], new: tuple[Float[Array, "B n G d"], ...],
    positions_Bn: Int[Array, "B n"], valid_Bn: Bool[Array, "B n"], window: int = 0,
) -> tuple[tuple[Float[Array, "B G S d"], ...], Bool[Array, "B n S"],
           tuple[Float[Array, "B G C d"], ...]]:
    """What new tokens can look at, and the caches that hold them too.

    Args:
      caches: of one capacity C, such as keys and values.
      new: what goes into each.
      positions_Bn: of the new tokens; a row's valid ones follow on what it has read.
      valid_Bn: a row's valid tokens come first; the others are not written.
      window: how many tokens a token sees, itself included; never more than C. 0 = C.

    Returns:
      The arrays to attend to, which of their S entries each new token sees, and the new caches.
    """
    n, C = positions_Bn.shape[1], caches[0].shape[2]
    window = min(window or C, C)
    start_B, end_B = positions_Bn[:, 0], positions_Bn[:, 0] + valid_Bn.sum(1)
    written = tuple(_write(cache, part, positions_Bn, valid_Bn & (
        positions_Bn >= end_B[:, None] - C)) for cache, part in zip(caches, new, strict=True))
    if n == 1:  # the token that this one pushes out of the ring is beyond its window
        arrays, held_BS = written, _positions_held(end_B, C)
    else:
        arrays = tuple(jnp.concatenate([cache, jnp.moveaxis(part, 1, 2).astype(cache.dtype)], 2)
                       for cache, part in zip(caches, new, strict=True))
        held_BS = jnp.concatenate(
            [_positions_held(start_B, C), jnp.where(valid_Bn, positions_Bn, -1)], axis=1)
    held_B1S, at_Bn1 = held_BS[:, None], positions_Bn[..., None]
    visible_BnS = (held_B1S >= 0) & (held_B1S <= at_Bn1) & (held_B1S > at_Bn1 - window)
    return arrays, visible_BnS, written


def attend(
    q_BnHd: Float[Array, "B n H d"], k_BGSd: Float[Array, "B G S d"],
    v_BGSd: Float[Array, "B G S d"], visible_BnS: Bool[Array, "B n S"],
    scale: float | Float[Array, " H"],
) -> Float[Array, "B n H d"]:
    """softmax(scale q k^T) v over the entries that each token sees.

    Args:
      q_BnHd: queries of H heads, a multiple of G.
      k_BGSd, v_BGSd: entries.
      visible_BnS: what each token sees.
      scale: of the scores; a number, or one per query head.

    Returns:
      o_BnHd in the dtype of `q_BnHd`; scores and softmax are float32.
    """
    B, n, H, d = q_BnHd.shape
    G = k_BGSd.shape[1]
    q = (q_BnHd * jnp.asarray(scale, q_BnHd.dtype).reshape(-1, 1)).reshape(B, n, G, H // G, d)
    scores = jnp.einsum("bngrd,bgsd->bgrns", q, k_BGSd, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BnS[:, None, None], scores, _HIDDEN)
    p = jax.nn.softmax(scores, axis=-1).astype(v_BGSd.dtype)
    o = jnp.einsum("bgrns,bgsd->bngrd", p, v_BGSd)
    return o.reshape(B, n, H, d).astype(q_BnHd.dtype)


def _positions_held(length_B: Array, C: int) -> Int[Array, "B C"]:
    """Position of the token in each slot after so many tokens; below 0 = empty."""
    last_B1 = length_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(C)) % C


def _write(cache_BGCd: Array, new_BnGd: Array, positions_Bn: Array, kept_Bn: Array) -> Array:
    B, C = cache_BGCd.shape[0], cache_BGCd.shape[2]
    outside_n = C + jnp.arange(positions_Bn.shape[1])  # such slots are dropped
    slots_Bn = jnp.where(kept_Bn, positions_Bn % C, outside_n)
    rows_B1 = jnp.arange(B)[:, None]
    return cache_BGCd.at[rows_B1, :, slots_Bn].set(
        new_BnGd.astype(cache_BGCd.dtype), mode="drop", unique_indices=True)
