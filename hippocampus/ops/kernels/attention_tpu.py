"""Fused causal attention on TPUs: JAX's splash attention, for one device's arrays.

It never writes the scores to the main memory and leaves blocks out that a mask hides wholly: those
above the diagonal and those before a window.

Source: Dao et al. 2022 (arXiv:2205.14135); jax.experimental.pallas.ops.tpu.splash_attention.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES = 128
_BLOCKS = (512, 384, 256, 128)


def supports(shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether the kernels take queries B,T,H,d: T in whole tiles, d in whole or half ones."""
    _, T, _, d = shape
    return (T % _LANES == 0 and d % (_LANES // 2) == 0
            and jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16))


def attention(
    q_BTHd: Float[Array, "B T H d"], k_BTGd: Float[Array, "B T G d"],
    v_BTGd: Float[Array, "B T G d"], document_ids: Int[Array, "B T"] | None, *, window: int = 0,
    scale: float | None = None, interpret: bool = False,
) -> Float[Array, "B T H d"]:
    """As `hippocampus.ops.attention.attention`, for a shape that `supports` takes.

    Args:
      q_BTHd, k_BTGd, v_BTGd: of one device; G divides H.
      document_ids: document of each token; None = one document a row.
      window: how many tokens a token sees; 0 = all.
      scale: of the scores; None = 1/sqrt(d). It is applied to the queries, in their dtype.
      interpret: works it out without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (T, H, d), dtype = q_BTHd.shape[1:], q_BTHd.dtype
    q = q_BTHd * jnp.asarray(1 / math.sqrt(d) if scale is None else scale, dtype)
    mask = (splash.LocalMask((T, T), (window - 1, 0), offset=0) if window
            else splash.CausalMask((T, T)))
    size = next(size for size in _BLOCKS if T % size == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H), block_sizes=splash.BlockSizes(
            block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size,
            block_kv_dq=size), interpret=interpret)
    ids = None if document_ids is None else splash.SegmentIds(document_ids, document_ids)
    o_BHTd = jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q, k_BTGd, v_BTGd)), ids)
    return jnp.swapaxes(o_BHTd, 1, 2).astype(dtype)
