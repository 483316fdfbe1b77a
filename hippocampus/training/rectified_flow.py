"""Rectified-flow regularisers of hidden states: straight paths can be walked in one step.

Segment flow: a velocity network learns the way from the first pass's state x_0 to the last
pass's x_1 (both normalised, both without gradient),

    L = |v(x_tau, tau) - (x_1 - x_0)|^2 / |x_1 - x_0|^2,   x_tau = (1 - tau) x_0 + tau x_1,

so that at evaluation x_0 + v(x_0, 0) can stand in for the last pass. Depth straightness keeps the
states h_0 … h_L of the layers near the line between the ends (ends without gradient: else the
easiest way is h_L = h_0),

    L = sum_l |h_l - ((1 - l/L) h_0 + (l/L) h_L)|^2 / |h_L - h_0|^2.

Source: Liu, Gong & Liu 2022 (arXiv:2209.03003), equation 1; both losses are this project's
application of it to hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hippocampus.layers.norms import rms_normalize

# Where nothing moves, as at initialisation, both losses are 0/0; this share of a normalised
# state's squared length keeps them finite.
_LEAST_MOVE = 1e-4


def segment_flow(
    velocity: Callable[[Array, Array], Array], first_BTD: Float[Array, "B T D"],
    last_BTD: Float[Array, "B T D"], tau_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """The segment-flow loss of every token.

    Args:
      velocity: (x_BTD, tau_BT) -> velocity_BTD.
      first_BTD, last_BTD: residual states after the first and the last pass.
      tau_BT: times in [0, 1].
    """
    x0 = jax.lax.stop_gradient(rms_normalize(first_BTD))
    x1 = jax.lax.stop_gradient(rms_normalize(last_BTD))
    tau = tau_BT[..., None]
    move = x1 - x0
    miss = velocity((1 - tau) * x0 + tau * x1, tau_BT).astype(jnp.float32) - move
    least = _LEAST_MOVE * x0.shape[-1]
    return (miss**2).sum(-1) / ((move**2).sum(-1) + least)


def depth_straightness(states: list[Float[Array, "B T D"]]) -> Float[Array, "B T"]:
    """The straightness loss of every token.

    Args:
      states: h_0 (embeddings) to h_L (after the last layer), residual streams.
    """
    h = jnp.stack([state.astype(jnp.float32) for state in states])
    first, last = jax.lax.stop_gradient(h[0]), jax.lax.stop_gradient(h[-1])
    share = (jnp.arange(len(states)) / (len(states) - 1))[:, None, None, None]
    off = ((h - ((1 - share) * first + share * last))[1:-1] ** 2).sum((0, -1))
    length = ((last - first) ** 2).sum(-1)
    return off / (length + _LEAST_MOVE * (first**2).sum(-1) + 1e-6)
