"""Modern Hopfield retrieval in key space: the step, its energy, and the regime it ends in.

A query xi retrieves from the patterns k_1..k_n by descending

    E(xi) = -lse(beta, K xi) + xi.xi / 2 + log(n) / beta + M^2 / 2,     M = max |k_i|,
    lse(beta, x) = log(sum_i exp(beta x_i)) / beta,

and  xi <- xi - alpha grad E(xi) = (1 - alpha) xi + alpha sum_i softmax_i(beta k_i.xi) k_i.
For 0 < alpha <= 1 the energy never rises (the step is a concave-convex procedure). That holds
because the sum reads keys: iterating over separate values has no energy function. One step with
alpha = 1 is softmax attention with the keys as values.

Source: Ramsauer et al. 2020 (arXiv:2008.02217), equations 2-3 and lemma A.4.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops import key_cache, placement
from hippocampus.ops.attention import attention, same_document


def retrieve(
    xi_BTHd: Float[Array, "B T H d"], keys_BTHd: Float[Array, "B T H d"] | None,
    slots_SHd: Float[Array, "S H d"] | None, beta_H: Float[Array, " H"], *,
    alpha: float = 1.0, document_ids: Int[Array, "B T"] | None = None, backend: str = "xla",
    scaled_BTHd: Float[Array, "B T H d"] | None = None,
) -> Float[Array, "B T H d"]:
    """One retrieval step of every token.

    Args:
      xi_BTHd: the states.
      keys_BTHd: patterns from the context: token t retrieves from the keys s <= t of its
        document. None = no context.
      slots_SHd: patterns that every token retrieves from. None = no slots.
      beta_H: inverse temperature per head, > 0.
      alpha: step size, in (0, 1].
      document_ids: document of each token; None = one document a row.
      backend: of `attention`; retrieval from slots always runs on XLA.
      scaled_BTHd: from `scaled`, for further steps with the same keys; None = computed here.

    Returns:
      The new states, in the dtype of `xi_BTHd`.
    """
    if slots_SHd is None:
        assert keys_BTHd is not None
        if scaled_BTHd is None:
            scaled_BTHd = scaled(keys_BTHd, beta_H)
        new = attention(xi_BTHd, scaled_BTHd, keys_BTHd, document_ids=document_ids, scale=1.0,
                        backend=backend)
    else:
        keys_BTHd = _everywhere(keys_BTHd)
        p_context, p_slots = probabilities(xi_BTHd, keys_BTHd, slots_SHd, beta_H, document_ids)
        new = jnp.einsum("bhts,shd->bthd", p_slots, slots_SHd.astype(jnp.float32))
        if keys_BTHd is not None:
            new = new + jnp.einsum("bhts,bshd->bthd", p_context, keys_BTHd.astype(jnp.float32))
        new = new.astype(xi_BTHd.dtype)
    return new if alpha == 1.0 else (1 - alpha) * xi_BTHd + alpha * new


def scaled(keys_BTHd: Float[Array, "B T H d"], beta_H: Float[Array, " H"],
           ) -> Float[Array, "B T H d"]:
    """beta k: scaled once, keys serve all steps, and so does the one gradient of beta."""
    return keys_BTHd * beta_H[:, None].astype(keys_BTHd.dtype)


def patterns_at_hand(
    keys_BHSd: Float[Array, "B H S d"] | None, visible_BnS: Bool[Array, "B n S"] | None,
    slots_SHd: Float[Array, "S H d"] | None, like_BnHd: Float[Array, "B n H d"],
) -> tuple[Float[Array, "B H S d"], Bool[Array, "B n S"]]:
    """Keys of a cache and learned slots as one list of patterns, and which each token sees.

    Args:
      keys_BHSd, visible_BnS: from `key_cache.recall`; None = no context.
      slots_SHd: learned patterns, which every token sees; None = none.
      like_BnHd: the queries, for their shape and dtype.
    """
    if slots_SHd is None:
        assert keys_BHSd is not None and visible_BnS is not None
        return keys_BHSd, visible_BnS
    (B, n), S = like_BnHd.shape[:2], slots_SHd.shape[0]
    slots_BHSd = jnp.moveaxis(slots_SHd, 0, 1)[None].astype(like_BnHd.dtype)
    if keys_BHSd is None:  # one row of patterns for all rows of the batch
        return slots_BHSd, jnp.ones((1, 1, S), bool)
    assert visible_BnS is not None
    slots_BHSd = jnp.broadcast_to(slots_BHSd, (B, *slots_BHSd.shape[1:]))
    return (jnp.concatenate([keys_BHSd.astype(like_BnHd.dtype), slots_BHSd], axis=2),
            jnp.concatenate([visible_BnS, jnp.ones((B, n, S), bool)], axis=2))


def retrieve_from(
    xi_BnHd: Float[Array, "B n H d"], patterns_BHSd: Float[Array, "B H S d"],
    visible_BnS: Bool[Array, "B n S"], beta_H: Float[Array, " H"], *, alpha: float = 1.0,
) -> Float[Array, "B n H d"]:
    """One step of `retrieve` from `patterns_at_hand`; a decoder's form of it."""
    if patterns_BHSd.shape[0] == 1 < xi_BnHd.shape[0]:  # the same patterns: one longer row
        flat = xi_BnHd.reshape(1, -1, *xi_BnHd.shape[2:])
        new = key_cache.attend(flat, patterns_BHSd, patterns_BHSd, visible_BnS, beta_H)
        new = new.reshape(xi_BnHd.shape)
    else:
        new = key_cache.attend(xi_BnHd, patterns_BHSd, patterns_BHSd, visible_BnS, beta_H)
    return new if alpha == 1.0 else (1 - alpha) * xi_BnHd + alpha * new


def probabilities(
    xi_BTHd: Float[Array, "B T H d"], keys_BTHd: Float[Array, "B T H d"] | None,
    slots_SHd: Float[Array, "S H d"] | None, beta_H: Float[Array, " H"],
    document_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B H T T"] | None, Float[Array, "B H T S"] | None]:
    """The retrieval weights over context and slots (float32); together they sum to 1."""
    scores, T = _scores(xi_BTHd, keys_BTHd, slots_SHd, beta_H, document_ids), xi_BTHd.shape[1]
    p = jax.nn.softmax(scores, axis=-1)
    if keys_BTHd is None:
        return None, p
    return p[..., :T], None if slots_SHd is None else p[..., T:]


def energy(
    xi_BTHd: Float[Array, "B T H d"], keys_BTHd: Float[Array, "B T H d"] | None,
    slots_SHd: Float[Array, "S H d"] | None, beta_H: Float[Array, " H"],
    document_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H"]:
    """E(xi) of every state (float32, >= 0); M is the running maximum, so it is causal."""
    scores = _scores(xi_BTHd, keys_BTHd, slots_SHd, beta_H, document_ids)  # beta k.xi or -inf
    seen = scores > -jnp.inf
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    norms = jnp.where(seen, _square_norms(keys_BTHd, slots_SHd), 0.0)
    xi = jnp.moveaxis(xi_BTHd.astype(jnp.float32), 1, 2)
    beta = beta_H[:, None]
    value = ((jnp.log(seen.sum(-1)) - log_sum) / beta
             + 0.5 * (xi * xi).sum(-1) + 0.5 * norms.max(-1))
    return jnp.moveaxis(value, 1, 2)


def effective_patterns(
    xi_BTHd: Float[Array, "B T H d"], keys_BTHd: Float[Array, "B T H d"] | None,
    slots_SHd: Float[Array, "S H d"] | None, beta_H: Float[Array, " H"],
    document_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """1 / sum p^2, the number of patterns a retrieval mixes, and the number n it could."""
    scores = _scores(xi_BTHd, keys_BTHd, slots_SHd, beta_H, document_ids)
    p = jax.nn.softmax(scores, axis=-1)
    n = (scores > -jnp.inf).sum(-1).astype(jnp.float32)
    return jnp.moveaxis(1 / (p * p).sum(-1), 1, 2), jnp.moveaxis(n, 1, 2)


def entropy(
    xi_BTHd: Float[Array, "B T H d"], keys_BTHd: Float[Array, "B T H d"] | None,
    slots_SHd: Float[Array, "S H d"] | None, beta_H: Float[Array, " H"],
    document_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H"]:
    """-sum p log p of the retrieval weights, in nats: 0 = one pattern, log n = all n alike."""
    scores = _scores(xi_BTHd, keys_BTHd, slots_SHd, beta_H, document_ids)
    p = jax.nn.softmax(scores, axis=-1)
    log_p = jnp.log(jnp.maximum(p, jnp.finfo(jnp.float32).tiny))
    return jnp.moveaxis(-(p * log_p).sum(-1), 1, 2)


def regime(effective: Float[Array, ...], n_patterns: Float[Array, ...]) -> Int[Array, ...]:
    """What a retrieval found: 0 = single (one pattern), 1 = metastable (some), 2 = global (most).

    Args:
      effective, n_patterns: from `effective_patterns`; below 1.5 is single, above n/2 global.
    """
    return jnp.where(effective < 1.5, 0, jnp.where(effective > n_patterns / 2, 2, 1))


def _scores(xi: Array, keys: Array | None, slots: Array | None, beta_H: Array,
            document_ids: Array | None) -> Array:
    """beta k.xi as B,H,T,(T+S) float32, with -inf where a token may not look."""
    xi = xi.astype(jnp.float32) * beta_H[:, None]
    parts, keys = [], _everywhere(keys)
    if keys is not None:
        scores = jnp.einsum("bthd,bshd->bhts", xi, keys.astype(jnp.float32))
        parts.append(jnp.where(_visible(keys.shape[1], document_ids), scores, -jnp.inf))
    if slots is not None:
        parts.append(jnp.einsum("bthd,shd->bhts", xi, slots.astype(jnp.float32)))
    return jnp.concatenate(parts, axis=-1)


def _everywhere(keys: Array | None) -> Array | None:
    """The keys of all tokens on every device, also where the time axis is cut."""
    if keys is None or placement.shards(placement.SEQUENCE, keys.shape[1]) == 1:
        return keys
    # In two steps, because XLA copies whole arrays to change two dimensions at once.
    keys = placement.constrain(keys, "batch", placement.SEQUENCE, "tensor", None)
    return placement.constrain(keys, "batch", None, "tensor", None)


def _visible(T: int, document_ids: Array | None) -> Bool[Array, "... T T"]:
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal if document_ids is None else causal & same_document(document_ids)[:, None]


def _square_norms(keys: Array | None, slots: Array | None) -> Array:
    """|k|^2 of every pattern, broadcastable to the shape of `_scores`."""
    parts = []
    if keys is not None:
        squares = (keys.astype(jnp.float32) ** 2).sum(-1)  # B,S,H
        parts.append(jnp.moveaxis(squares, 1, 2)[:, :, None])
    if slots is not None:
        squares = (slots.astype(jnp.float32) ** 2).sum(-1).T[None, :, None]
        batch = keys.shape[0] if keys is not None else 1
        parts.append(jnp.broadcast_to(squares, (batch, *squares.shape[1:])))
    return jnp.concatenate(parts, axis=-1)
