"""HController: what a pass read decides how the next pass mixes its paths.

    b_t = W_c silu(W_h rms(h_t))     a bias on every gate of every layer, per token

It reads token by token: pooling over the sequence would carry the future into the next pass and
look like reasoning. W_c is zero at first, so the second pass starts as a copy of the first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hippocampus.layers.norms import RMSNorm


class HController(nn.Module):
    """Maps a pass's hidden states to gate biases of the next pass."""

    n_layers: int
    n_paths: int
    width: int
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h_BTD: Float[Array, "B T D"]) -> Float[Array, "L B T P"]:
        """Returns the bias of every layer's gates, layers first (float32)."""
        B, T, _ = h_BTD.shape
        hidden = nn.Dense(self.width, dtype=self.dtype, name="hidden")(
            RMSNorm(self.epsilon, self.dtype, name="norm")(h_BTD))
        bias = nn.Dense(self.n_layers * self.n_paths, use_bias=False, dtype=jnp.float32,
                        kernel_init=nn.initializers.zeros, name="out")(jax.nn.silu(hidden))
        return jnp.moveaxis(bias.reshape(B, T, self.n_layers, self.n_paths), 2, 0)
