"""Depthwise causal convolution over time that stays inside a document."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hippocampus.ops import placement
from hippocampus.ops.placement import SEQUENCE


def causal_conv(
    x_BTE: Float[Array, "B T E"], kernel_WE: Float[Array, "W E"], bias_E: Float[Array, " E"],
    *, document_ids_BT: Int[Array, "B T"] | None = None,
    before_BwE: Float[Array, "B w E"] | None = None,
) -> Float[Array, "B T E"]:
    """y_t = bias + sum_j kernel_j x_{t-j}, over the tokens t-j of the same document.

    Args:
      x_BTE: inputs.
      kernel_WE: taps per channel; tap 0 weighs the token itself.
      bias_E: bias per channel.
      document_ids_BT: document of each token; None = one document a row.
      before_BwE: the W - 1 inputs before the first one, of the same document; None = there are
        none. Not together with `document_ids_BT`.
    """
    if before_BwE is not None:
        x_BTE = jnp.concatenate([before_BwE.astype(x_BTE.dtype), x_BTE], axis=1)
        return _convolve(x_BTE, kernel_WE, bias_E, None)[:, before_BwE.shape[1]:]
    halo, T = len(kernel_WE) - 1, x_BTE.shape[1]
    n = placement.shards(SEQUENCE, T)
    if n > 1 and 0 < halo <= T // n:
        lies = ("batch", SEQUENCE, "tensor")
        return placement.map_shards(
            _own_tokens, (x_BTE, kernel_WE, bias_E, document_ids_BT),
            (lies, (None, "tensor"), ("tensor",), ("batch", SEQUENCE)), lies)
    return _convolve(x_BTE, kernel_WE, bias_E, document_ids_BT)


def last_inputs(
    before_BwE: Float[Array, "B w E"], x_BTE: Float[Array, "B T E"], valid_BT: Bool[Array, "B T"],
) -> Float[Array, "B w E"]:
    """The last w inputs that count: what the next call of `causal_conv` takes as `before_BwE`.

    Args:
      before_BwE: the inputs before.
      x_BTE: new ones; a row's valid ones come first.
      valid_BT: which count.
    """
    w = before_BwE.shape[1]
    all_BtE = jnp.concatenate([before_BwE, x_BTE.astype(before_BwE.dtype)], axis=1)
    if x_BTE.shape[1] == 1:
        return jnp.where(valid_BT[..., None], all_BtE[:, 1:], before_BwE)
    return jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, w))(
        all_BtE, valid_BT.sum(1))


def _own_tokens(x: Array, kernel: Array, bias: Array, ids: Array | None) -> Array:
    """The outputs of one device's tokens, which reach back to the device before it."""
    halo = len(kernel) - 1
    follows = [(i, i + 1) for i in range(jax.lax.axis_size(SEQUENCE) - 1)]

    def with_past(array: Array) -> Array:  # zeros before the first token
        past = jax.lax.ppermute(array[:, -halo:], SEQUENCE, follows)
        return jnp.concatenate([past, array], axis=1)

    # Shifted by one, because 0 is a document and nothing is none.
    ids = None if ids is None else with_past(ids + 1)
    return _convolve(with_past(x), kernel, bias, ids)[:, halo:]


def _convolve(x_BTE: Array, kernel_WE: Array, bias_E: Array,
              document_ids_BT: Array | None) -> Array:
    T = x_BTE.shape[1]
    y_BTE = bias_E + kernel_WE[0] * x_BTE
    for j in range(1, min(len(kernel_WE), T)):
        past_BTE = jnp.pad(x_BTE, ((0, 0), (j, 0), (0, 0)))[:, :T]
        if document_ids_BT is not None:
            past_ids_BT = jnp.pad(document_ids_BT, ((0, 0), (j, 0)), constant_values=-1)[:, :T]
            past_BTE = jnp.where((past_ids_BT == document_ids_BT)[..., None], past_BTE, 0)
        y_BTE = y_BTE + kernel_WE[j] * past_BTE
    return y_BTE
