"""Root-mean-square normalisation, always in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def rms_normalize(x: Float[Array, "... D"], epsilon: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + epsilon) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def unit_normalize(x: Float[Array, "... D"], epsilon: float = 1e-6) -> Float[Array, "... D"]:
    """x / sqrt(sum(x^2) + epsilon) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon)


class RMSNorm(nn.Module):
    """(offset + scale) * x / rms(x).

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), equation 4.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    scale_init: float = 1.0
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises over the last axis; statistics are float32, the result is `dtype`."""
        scale = self.param("scale", nn.initializers.constant(self.scale_init), x.shape[-1:])
        if self.offset:
            scale = self.offset + scale.astype(jnp.float32)
        return (rms_normalize(x, self.epsilon) * scale).astype(self.dtype)
