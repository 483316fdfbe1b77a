"""`gated_scan` on NVIDIA GPUs from Hopper on: gates and scan in one kernel per pass.

The forward pass reads the two gates and c and writes the states; the backward pass reads those and
the states' gradient, computes decays and inputs again and writes three gradients. What the
parameters get is summed over time in registers, and over the rows of the batch outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hippocampus.ops.gated_scan import LEAST_SQUARE, SHARPNESS
from hippocampus.ops.kernels.mosaic_gpu import CHANNELS, Blocks, Rows, Values, over_time, runs_here

STEPS = 32
"""Time steps of a block; the sequence's length divides by it."""
_FORWARD = {2: Blocks(STEPS, 3, 2, 8), 4: Blocks(STEPS, 3, 2, 8)}
_BACKWARD = {2: Blocks(STEPS, 2, 2, 8), 4: Blocks(STEPS, 2, 1, 8)}
"""By the bytes of a number."""


def supports(shape: tuple[int, int, int], dtype: jnp.dtype) -> bool:
    """Whether the kernels take local arrays of this shape B,T,E."""
    _, T, E = shape
    return (T % STEPS == 0 and E % CHANNELS == 0
            and dtype in (jnp.float32, jnp.bfloat16) and runs_here())


def gated_scan(
    gates_2BTE: Float[Array, "2 B T E"], c_BTE: Float[Array, "B T E"],
    log_decay_E: Float[Array, " E"], scale_E: Float[Array, " E"] | None,
    first_BT: Bool[Array, "B T"], *, blocks: Blocks | None = None, interpret: bool = False,
) -> Float[Array, "B T E"]:
    """The states; arguments as for `gated_scan`, and `interpret`: run without a GPU."""
    return over_time(
        _steps, [gates_2BTE, c_BTE], [Rows(0, 0), Rows(0, 1), Rows(1)],
        [jax.ShapeDtypeStruct(c_BTE.shape, c_BTE.dtype)], [Rows(0)],
        blocks or _FORWARD[c_BTE.dtype.itemsize], constants=_constants(log_decay_E, scale_E),
        flags_BT=_kept(first_BT), interpret=interpret, name="gated_scan")[0]


def gated_scan_backward(
    gates_2BTE: Float[Array, "2 B T E"], c_BTE: Float[Array, "B T E"],
    log_decay_E: Float[Array, " E"], scale_E: Float[Array, " E"] | None,
    first_BT: Bool[Array, "B T"], h_BTE: Float[Array, "B T E"], g_BTE: Float[Array, "B T E"], *,
    blocks: Blocks | None = None, interpret: bool = False,
) -> tuple[Array, ...]:
    """The gradients of gates and c, and of log_decay (and scale) for every row of the batch."""
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (gates_2BTE, c_BTE)]
    dgates_2BTE, dc_BTE, drate_BE, dscale_BE = over_time(
        _steps_back, [gates_2BTE, c_BTE, h_BTE, g_BTE],
        [Rows(0, 0), Rows(0, 1), Rows(1), Rows(2, before=True), Rows(3)], results,
        [Rows(0, 0), Rows(0, 1), Rows(1)], blocks or _BACKWARD[c_BTE.dtype.itemsize],
        reverse=True, carry=3, sums=(1, 2), constants=_constants(log_decay_E, scale_E),
        flags_BT=_kept(first_BT), interpret=interpret, name="gated_scan_backward")
    dlog_decay_BE = -SHARPNESS * jax.nn.sigmoid(log_decay_E) * drate_BE
    return (dgates_2BTE, dc_BTE, dlog_decay_BE, *([] if scale_E is None else [dscale_BE]))


def _constants(log_decay_E: Array, scale_E: Array | None) -> tuple[Array, Array]:
    scale_E = jnp.ones_like(log_decay_E) if scale_E is None else scale_E.astype(jnp.float32)
    return -SHARPNESS * jax.nn.softplus(log_decay_E), scale_E


def _kept(first_BT: Array) -> Array:
    return jnp.where(first_BT, 0.0, 1.0)


def _gates(gate: Array, gate_in: Array, rate: Array, kept: Array) -> tuple[Array, ...]:
    """g_forget, g_in, the decay (0 at a first token), 1 - a^2 and 1 / sqrt(1 - a^2)."""
    g_forget, g_in = _sigmoid(gate), _sigmoid(gate_in)
    log_a = rate * g_forget
    a = jnp.exp(log_a)
    square = jnp.maximum(_one_minus_square(log_a, a), LEAST_SQUARE)
    return g_forget, g_in, a * kept, square, jax.lax.rsqrt(square)


def _steps(rows: Sequence[Values], constants: Values, carry: Values,
           ) -> tuple[Values, Sequence[Values]]:
    (rate, scale), (h,), steps, states = constants, carry, [], []
    for gate, gate_in, c, kept in rows:  # first all that no state is needed for
        _, g_in, a, square, root = _gates(gate, gate_in, rate, kept)
        size = kept * (square * root) + (1.0 - kept)
        steps.append((a, size * g_in * scale * c))
    for a, x in steps:
        h = a * h + x
        states.append((h,))
    return (h,), states


def _steps_back(rows: Sequence[Values], constants: Values, carry: Values,
                ) -> tuple[Values, Sequence[Values]]:
    (rate, scale), (later, drate, dscale), gradients = constants, carry, []
    gated = [_gates(gate, gate_in, rate, kept) for gate, gate_in, *_, kept in rows]
    for (_, _, c, h_before, g, kept), (g_forget, g_in, a, square, root) in zip(
            rows, gated, strict=True):
        adjoint = g + later
        later = a * adjoint
        size = kept * (square * root) + (1.0 - kept)
        dscaled = adjoint * size  # of g_in scale c
        dc = dscaled * g_in * scale
        dg_in = dscaled * scale * c
        dscale = dscale + dscaled * g_in * c
        # d sqrt(1 - a^2) / d log a = -a^2 / sqrt(1 - a^2), and 0 below the bound.
        dsize = jnp.where(square > LEAST_SQUARE, adjoint * g_in * scale * c, 0.0)
        dlog_a = later * h_before - a * a * root * dsize
        drate = drate + dlog_a * g_forget
        gradients.append((dlog_a * rate * g_forget * (1.0 - g_forget),
                          dg_in * g_in * (1.0 - g_in), dc))
    return (later, drate, dscale), gradients


def _sigmoid(x: Array) -> Array:
    root = jax.lax.rsqrt(1.0 + jnp.exp(-x))  # one instruction, where a division is ten
    return root * root


def _one_minus_square(log_a: Array, a: Array) -> Any:
    """1 - a^2 without loss where the decay is almost 1."""
    y = 2.0 * log_a
    series = -y * (1.0 + y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y / 720)))))
    return jnp.where(y > -0.3, series, 1.0 - a * a)
