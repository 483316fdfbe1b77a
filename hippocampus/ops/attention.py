"""Causal softmax attention within documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.errors import ConfigError

BACKENDS = ("xla", "cudnn")


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
      backend: "xla", or "cudnn" (fused; NVIDIA Ampere and later, float16 or bfloat16).

    Returns:
      o_BTHd in the dtype of `q_BTHd`; scores and softmax are float32.

    Raises:
      ConfigError: an unknown backend.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; Ainslie et al. 2023 for groups.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"attention backend is {backend!r}", f"known: {', '.join(BACKENDS)}")
    T, d = q_BTHd.shape[1], q_BTHd.shape[-1]
    # cuDNN has no gradient for odd lengths and none for float32: those calls go to XLA.
    fused = (backend == "cudnn" and T % 2 == 0 and d % 8 == 0 and d <= 128
             and q_BTHd.dtype in (jnp.float16, jnp.bfloat16))
    mask = None if document_ids is None else same_document(document_ids)[:, None]
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTGd, v_BTGd, mask=mask, scale=scale, is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn" if fused else "xla")


def same_document(document_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether tokens t and s of a row belong to one document."""
    return document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
