"""Depthwise causal convolution over time that stays inside a document."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
    x_BTE: Float[Array, "B T E"], kernel_WE: Float[Array, "W E"], bias_E: Float[Array, " E"],
    *, document_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T E"]:
    """y_t = bias + sum_j kernel_j x_{t-j}, over the tokens t-j of the same document.

    Args:
      x_BTE: inputs.
      kernel_WE: taps per channel; tap 0 weighs the token itself.
      bias_E: bias per channel.
      document_ids_BT: document of each token; None = one document a row.
    """
    T = x_BTE.shape[1]
    y_BTE = bias_E + kernel_WE[0] * x_BTE
    for j in range(1, min(len(kernel_WE), T)):
        past_BTE = jnp.pad(x_BTE, ((0, 0), (j, 0), (0, 0)))[:, :T]
        if document_ids_BT is not None:
            past_ids_BT = jnp.pad(document_ids_BT, ((0, 0), (j, 0)), constant_values=-1)[:, :T]
            past_BTE = jnp.where((past_ids_BT == document_ids_BT)[..., None], past_BTE, 0)
        y_BTE = y_BTE + kernel_WE[j] * past_BTE
    return y_BTE
