"""The velocity network of the segment flow: from the first pass's state to the last pass's.

    v(x, tau) = W_2 silu(W_1 x + w_tau tau + b)     W_2 zero at first: no movement

Source: Liu, Gong & Liu 2022 (arXiv:2209.03003), section 2.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class VelocityField(nn.Module):
    """Predicts the direction x_1 - x_0 at a point x on the way, token by token."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"],
                 tau_BT: Float[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the velocity at `x_BTD` and time `tau_BT` in [0, 1] (float32)."""
        time = self.param("time_kernel", nn.initializers.normal(1.0), (self.width,))
        h = nn.Dense(self.width, dtype=self.dtype, name="hidden")(x_BTD)
        h = jax.nn.silu(h + tau_BT[..., None].astype(h.dtype) * time.astype(h.dtype))
        return nn.Dense(x_BTD.shape[-1], dtype=jnp.float32, kernel_init=nn.initializers.zeros,
                        name="out")(h)
