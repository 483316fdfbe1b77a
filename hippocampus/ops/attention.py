"""Causal softmax attention within documents."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.errors import ConfigError
from hippocampus.ops import attention_tpu, placement
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
      o_BTHd in the dtype of `q_BTHd`; scores and softmax are float32. Under a mesh that cuts the
      time axis every device gathers all keys and values and answers its own queries.

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
    mask = None if document_ids is None else same_document(document_ids)[:, None]
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTGd, v_BTGd, mask=mask, scale=scale, is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation=_implementation(backend, q_BTHd))


def _implementation(backend: str, q: Array) -> Literal["xla", "cudnn"]:
    """cuDNN has no gradient for odd lengths and none for float32: those calls go to XLA."""
    T, d = q.shape[1], q.shape[-1]
    fused = (backend == "cudnn" and T % 2 == 0 and d % 8 == 0 and d <= 128
             and q.dtype in (jnp.float16, jnp.bfloat16))
    return "cudnn" if fused else "xla"


def _own_queries(q: Array, k: Array, v: Array, ids: Array | None, *, window: int,
                 scale: float | None, backend: str) -> Array:
    """Attention of one device's queries to the keys and values of all devices."""
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


def same_document(document_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether tokens t and s of a row belong to one document."""
    return document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
