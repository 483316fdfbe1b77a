"""The gated recurrence of the RG-LRU with its gates inside: what is read is what the layer has.

    g_forget, g_in = sigmoid(gates)
    log a_t = -8 softplus(log_decay) g_forget                    a_t = 0 at a document's first token
    h_t     = a_t h_{t-1} + sqrt(1 - a_t^2) g_in scale c_t       the root is 1 at a first token

For the backward pass only the inputs and the states are kept; decays and inputs of the scan are
computed again. With the backend "pallas" one kernel per pass does everything where it fits
(`hippocampus.ops.kernels`).

Source: De et al. 2024 (arXiv:2402.19427), section 2.4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hippocampus.ops import placement
from hippocampus.ops.kernels import scan_tpu
from hippocampus.ops.kernels.dispatch import by_platform
from hippocampus.ops.linear_scan import linear_scan, scan_gradients
from hippocampus.ops.placement import SEQUENCE

SHARPNESS = 8.0
LEAST_SQUARE = 1e-6
"""Of 1 - a^2: it keeps the root's derivative below 500 where the decay is almost 1."""


def gated_scan(
    gates_2BTE: Float[Array, "2 B T E"], c_BTE: Float[Array, "B T E"],
    log_decay_E: Float[Array, " E"], scale_E: Float[Array, " E"] | None,
    first_BT: Bool[Array, "B T"], *, backend: str,
) -> Float[Array, "B T E"]:
    """Every state of the gated recurrence, from a state of zero.

    Args:
      gates_2BTE: pre-activations of the forget gate and of the input gate.
      c_BTE: what is gated and read.
      log_decay_E: parameter of the channels, float32.
      scale_E: factor on the input; None = 1.
      first_BT: whether a token is its document's first.
      backend: as for `linear_scan`.

    Returns:
      h_BTE in the dtype of `c_BTE`; the recurrence itself runs in float32.

    Raises:
      ConfigError: an unknown backend.
    """
    return _gated_scan(backend, gates_2BTE, c_BTE, log_decay_E, scale_E, first_BT)


def decay_and_input(
    log_decay_E: Float[Array, " E"], g_forget: Float[Array, "... E"], first: Bool[Array, ...],
) -> tuple[Float[Array, "... E"], Float[Array, "... E"]]:
    """The decay a and the input's factor sqrt(1 - a^2), which is 1 at a document's first token.

    Args:
      log_decay_E: parameter of the channels.
      g_forget: the gate, in (0, 1).
      first: whether a token is its document's first.
    """
    log_a = -SHARPNESS * jax.nn.softplus(log_decay_E) * g_forget
    return jnp.exp(log_a), jnp.where(first[..., None], 1.0, input_size(log_a))


def input_size(log_a: Float[Array, ...]) -> Float[Array, ...]:
    """sqrt(1 - a^2), bounded from below."""
    return jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), LEAST_SQUARE))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_scan(backend: str, gates: Array, c: Array, log_decay: Array, scale: Array | None,
                first: Array) -> Array:
    if not _one_kernel(backend, c):
        return _open_states(backend, gates, c, log_decay, scale, first)
    return placement.map_local(
        functools.partial(_by_platform, "gated_scan", _open_states),
        (gates, c, log_decay, scale, first), _LIES, _BTE)


def _forward(backend: str, *inputs: Any) -> tuple[Array, tuple]:
    h = _gated_scan(backend, *inputs)
    return h, (*inputs, h)


def _backward(backend: str, saved: tuple, g: Array) -> tuple[Array | None, ...]:
    *inputs, h = saved
    dgates, dc, dlog_decay, dscale = _gradients(backend, *inputs, h, g)
    return dgates, dc, dlog_decay, dscale, None


_gated_scan.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(backend: str, gates: Array, c: Array, log_decay: Array, scale: Array | None,
               first: Array, h: Array, g: Array) -> tuple[Array | None, ...]:
    if not _one_kernel(backend, c):
        return _open_gradients(backend, gates, c, log_decay, scale, first, h, g)
    dgates, dc, *sums = placement.map_local(
        functools.partial(_by_platform, "gated_scan_backward", _open_sums),
        (gates, c, log_decay, scale, first, h, g), (*_LIES, _BTE, _BTE),
        _2BTE, _BTE, *[("batch", "tensor")] * (1 if scale is None else 2))
    dlog_decay, *dscale = (part.sum(0) for part in sums)
    return dgates, dc, dlog_decay, dscale[0] if dscale else None


# A gradient of the gradient is rare: XLA's own, of the open form.
_gradients.defvjp(
    lambda backend, *inputs: (_gradients(backend, *inputs), inputs),
    lambda backend, saved, g: _differentiable(
        functools.partial(_open_gradients, backend), saved, g))


def _differentiable(function: Callable, inputs: tuple, g: Any) -> tuple[Array | None, ...]:
    """Gradients with respect to all inputs except the fifth, which is the mask."""
    first = inputs[4]
    *own, (h, dg) = *inputs[:4], inputs[5:]
    _, pull = jax.vjp(lambda *x: function(*x[:4], first, *x[4:]), *own, h, dg)
    found = pull(g)
    return *found[:4], None, *found[4:]


def _one_kernel(backend: str, c: Array) -> bool:
    """A time axis that is cut over devices has a carry between kernels."""
    return backend == "pallas" and placement.shards(SEQUENCE, c.shape[1]) == 1


def _scan_inputs(gates: Array, c: Array, log_decay: Array, scale: Array | None, first: Array,
                 ) -> tuple[Array, Array]:
    g_forget, g_in = jax.nn.sigmoid(gates.astype(jnp.float32))
    a, size = decay_and_input(log_decay, g_forget, first)
    x = size * g_in * c if scale is None else size * g_in * scale * c
    return jnp.where(first[..., None], 0.0, a), x


def _open_states(backend: str, gates: Array, c: Array, *rest: Any) -> Array:
    return linear_scan(*_scan_inputs(gates, c, *rest), backend=backend).astype(c.dtype)


def _open_gradients(backend: str, gates: Array, c: Array, log_decay: Array, scale: Array | None,
                    first: Array, h: Array, g: Array) -> tuple[Array | None, ...]:
    (a, _), pull = jax.vjp(functools.partial(_scan_inputs, first=first),
                           gates, c, log_decay, scale)
    found: tuple[Array | None, ...] = pull(scan_gradients(
        a, h.astype(jnp.float32), g.astype(jnp.float32), backend=backend))
    return found


def _open_sums(backend: str, *arrays: Any) -> tuple[Array | None, ...]:
    """As a kernel gives them: the gradients of the parameters still have an axis of rows."""
    B = arrays[1].shape[0]
    dgates, dc, *sums = _open_gradients(backend, *arrays)
    first_row = jnp.arange(B)[:, None] == 0
    return dgates, dc, *(jnp.where(first_row, part, 0.0) for part in sums if part is not None)


def _by_platform(name: str, instead: Callable, *arrays: Any) -> Any:
    from hippocampus.ops.kernels import gated_scan_hopper  # which reads this module's constants

    def open_form(_: str, *arrays: Any) -> Any:  # the plain scan's kernels take more shapes
        return instead("pallas", *arrays)

    return by_platform(
        arrays, arrays[1], open_form,
        cuda=(gated_scan_hopper.supports, getattr(gated_scan_hopper, name)),
        tpu=(scan_tpu.supports, getattr(scan_tpu, name)))


_BTE = ("batch", SEQUENCE, "tensor")
_2BTE = (None, *_BTE)
_LIES = (_2BTE, _BTE, ("tensor",), ("tensor",), ("batch", SEQUENCE))
