"""The feed-forward part of a block: swiglu, (silu(u W_g) * u W_u) W_d, or gelu(u W_u) W_d.

Source: Shazeer 2020 (arXiv:2002.05202), equation 6.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hippocampus.config import MLPConfig
from hippocampus.ops.activations import gelu, swiglu


def mlp_width(config: MLPConfig, d_model: int) -> int:
    """The hidden width F: the one asked for, or the usual one for the kind and width."""
    wanted = config.width or (d_model * 8 / 3 if config.kind == "swiglu" else d_model * 4)
    return config.width or -(-round(wanted) // 16) * 16


class MLP(nn.Module):
    """Two or three matrices and a non-linearity, token by token."""

    config: MLPConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, u_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns y_BTD."""
        D = u_BTD.shape[-1]
        F = mlp_width(self.config, D)
        n = 2 if self.config.kind == "swiglu" else 1
        h = nn.Dense(n * F, use_bias=False, dtype=self.dtype, name="up")(u_BTD)
        h = swiglu(h) if self.config.kind == "swiglu" else gelu(h)
        return nn.Dense(D, use_bias=False, dtype=self.dtype, name="down")(h)
