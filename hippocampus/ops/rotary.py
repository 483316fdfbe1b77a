"""Rotary position embedding."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x_BTHd: Float[Array, "B T H d"], positions_BT: Int[Array, "B T"],
           theta: float) -> Float[Array, "B T H d"]:
    """Rotates the pairs (i, i + d/2) of every head by position * theta^(-2i/d).

    Args:
      x_BTHd: queries or keys; d is even.
      positions_BT: position of each token in its document.
      theta: base of the frequencies.

    Source: Su et al. 2021 (arXiv:2104.09864), equation 34, in the half-split layout.
    """
    half = x_BTHd.shape[-1] // 2
    return rotate_at(x_BTHd, positions_BT, theta ** (-jnp.arange(half, dtype=jnp.float32) / half))


def rotate_at(x_BTHd: Float[Array, "B T H d"], positions_BT: Int[Array, "B T"],
              frequency: Float[Array, " half"]) -> Float[Array, "B T H d"]:
    """Rotates the pairs (i, i + d/2) of every head by position * frequency_i.

    Args:
      x_BTHd: queries or keys; d is even.
      positions_BT: position of each token in its document.
      frequency: d/2 of them, in radians per position.
    """
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)
