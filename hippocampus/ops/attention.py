"""Causal softmax attention within documents."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.errors import ConfigError
from hippocampus.ops import placement
from hippocampus.ops.kernels import attention_tpu
from hippocampus.ops.placement import SEQUENCE

BACKENDS = ("xla", "cudnn", "flash")


def attention(
    q_BTHd: Float[Array, "B T H d"], k_BTGd: Float[Array, "B T G d"],
    v_BTGd: Float[Array, "B T G d"], *, document_ids: Int[Array, "B T"] | None = None,
    window: int = 0, scale: float | None = None, backend: str = "xla",
) -> Float[Array, "B T H d"]:
    """softmax(scale q k^T) v over the tokens s <= t of t's document.

    Args:
      q_BTHd: queries.
      k_BTGd, v_BTGd: keys and values of G heads; G divides H (grouped-query attention).
      document_ids: document of each token; None = one document a row.
      window: how many tokens a token sees, itself included; 0 = all of them.
      scale: of the scores; None = 1/sqrt(d).
      backend: "xla", "cudnn" (fused; NVIDIA Ampere and later, float16 or bfloat16), or "flash"
        (fused; TPU v4 and later, head widths of whole tiles of 64). What a fused backend does
        not take runs on XLA.

    Returns:
      o_BTHd in the dtype of `q_BTHd`; scores and softmax are float32. Cost and memory grow with
      T window where there is a window, else with T^2 (cuDNN: its cost only). Under a mesh that
      cuts the time axis every device answers its own queries: with a window no longer than its
      own tokens from the last ones of the device before, else from gathered keys and values.

    Raises:
      ConfigError: an unknown backend.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; Ainslie et al. 2023 for groups.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend is {backend!r}", f"known: {', '.join(BACKENDS)}")
    if placement.shards(SEQUENCE, q_BTHd.shape[1]) > 1:
        heads = ("batch", SEQUENCE, "tensor", None)
        return placement.map_shards(
            functools.partial(_own_queries, window=window, scale=scale, backend=backend),
            (q_BTHd, k_BTGd, v_BTGd, document_ids), (heads, heads, heads, ("batch", SEQUENCE)),
            heads)
    if backend == "flash" and attention_tpu.supports(q_BTHd.shape, q_BTHd.dtype):
        whole = ("batch", None, "tensor", None)
        arrays: tuple[Any, ...] = (q_BTHd, k_BTGd, v_BTGd, document_ids)
        return placement.map_local(
            functools.partial(attention_tpu.attention, window=window, scale=scale),
            arrays, (whole, whole, whole, ("batch", None)), whole)
    return _attend(q_BTHd, k_BTGd, v_BTGd, document_ids, window=window, scale=scale,
                   backend=backend)


def _attend(q: Array, k: Array, v: Array, ids: Array | None, *, window: int,
            scale: float | None, backend: str) -> Array:
    """Attention to keys that are all at hand."""
    implementation = _implementation(backend, q)
    # Without a mask cuDNN skips by itself what lies before the window; a mask is T x T there.
    if 0 < 2 * window < q.shape[1] and (implementation == "xla" or ids is not None):
        return _attend_in_blocks(q, k, v, ids, window=window, scale=scale, backend=backend)
    mask = None if ids is None else same_document(ids)[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True,
        local_window_size=(window - 1, 0) if window else None, implementation=implementation)


def _attend_in_blocks(q: Array, k: Array, v: Array, ids: Array | None, *, window: int,
                      scale: float | None, backend: str) -> Array:
    """Blocks of `window` queries see their own and the previous block: T x 2 window scores."""
    B, T = q.shape[:2]
    n = -(-T // window)

    def blocks(array: Array) -> Array:  # B,T,… -> B,n,window,…; nothing sees what is added behind
        behind = [(0, 0)] * array.ndim
        behind[1] = (0, n * window - T)
        return jnp.pad(array, behind).reshape(B, n, window, *array.shape[2:])

    def with_previous(array: Array) -> Array:  # B,n,window,… -> B,n,2 window,…
        before = jnp.concatenate([jnp.zeros_like(array[:, :1]), array[:, :-1]], axis=1)
        return jnp.concatenate([before, array], axis=2)

    q, k, v = blocks(q), with_previous(blocks(k)), with_previous(blocks(v))
    t = window + jnp.arange(window)[:, None]
    s = jnp.arange(2 * window)
    first = jnp.arange(n)[:, None, None] == 0
    mask = ((s <= t) & (s > t - window) & ~(first & (s < window)))[None]
    if ids is not None:
        own = blocks(ids)
        mask = mask & (own[..., None] == with_previous(own)[:, :, None])
    mask = jnp.broadcast_to(mask, (B, n, window, 2 * window))
    q, k, v, mask = (x.reshape(B * n, *x.shape[2:]) for x in (q, k, v, mask))
    o = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale,
                                     implementation=_implementation(backend, q))
    return o.reshape(B, n * window, *o.shape[2:])[:, :T]


def _implementation(backend: str, q: Array) -> Literal["xla", "cudnn"]:
    """cuDNN has no gradient for odd lengths and none for float32: those calls go to XLA."""
    T, d = q.shape[1], q.shape[-1]
    fused = (backend == "cudnn" and T % 2 == 0 and d % 8 == 0 and d <= 128
             and q.dtype in (jnp.float16, jnp.bfloat16))
    return "cudnn" if fused else "xla"


def _own_queries(q: Array, k: Array, v: Array, ids: Array | None, *, window: int,
                 scale: float | None, backend: str) -> Array:
    """Attention of one device's queries to all keys and values that they may see."""
    if 0 < window <= q.shape[1]:
        return _with_neighbour(q, k, v, ids, window=window, scale=scale, backend=backend)
    gather = functools.partial(jax.lax.all_gather, axis_name=SEQUENCE, axis=1, tiled=True)
    k, v = gather(k), gather(v)
    t = jax.lax.axis_index(SEQUENCE) * q.shape[1] + jnp.arange(q.shape[1])[:, None]
    s = jnp.arange(k.shape[1])
    mask = s <= t
    if window:
        mask &= s > t - window
    mask = mask[None]
    if ids is not None:
        mask = mask & (ids[:, :, None] == gather(ids)[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale,
                                        implementation=_implementation(backend, q))


def _with_neighbour(q: Array, k: Array, v: Array, ids: Array | None, *, window: int,
                    scale: float | None, backend: str) -> Array:
    """A window reaches back to the device before this one at most: its last tokens are enough.

    The first device has nothing before it. There the neighbour's place is behind the own tokens,
    where a causal query does not look, so that no mask is needed.
    """
    first = jax.lax.axis_index(SEQUENCE) == 0
    follows = [(i, i + 1) for i in range(jax.lax.axis_size(SEQUENCE) - 1)]

    def place(own: Array, past: Array) -> Array:
        return jnp.where(first, jnp.concatenate([own, past], axis=1),
                         jnp.concatenate([past, own], axis=1))

    def with_past(own: Array) -> Array:
        return place(own, jax.lax.ppermute(own[:, -window:], SEQUENCE, follows))

    # The neighbour answers its own queries: zeros keep the lengths of queries and keys equal.
    o = _attend(place(q, jnp.zeros_like(q[:, -window:])), with_past(k), with_past(v),
                None if ids is None else with_past(ids), window=window, scale=scale,
                backend=backend)
    return jax.lax.dynamic_slice_in_dim(o, jnp.where(first, 0, window), q.shape[1], axis=1)


def same_document(document_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether tokens t and s of a row belong to one document."""
    return document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
