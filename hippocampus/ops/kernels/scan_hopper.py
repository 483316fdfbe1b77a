"""The diagonal scan h_t = a_t h_{t-1} + x_t on NVIDIA GPUs from Hopper on; see `mosaic_gpu`.

The forward pass reads two arrays and writes one, the backward pass reads three and writes two:
nothing else goes through the main memory but one row of states per block. The sizes follow from
the 227 KB of shared memory of a Hopper multiprocessor; `benchmarks/scan.py --only=sweep` tries
others.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hippocampus.ops.kernels.mosaic_gpu import CHANNELS, Blocks, Rows, Values, over_time, runs_here

LEAST_STEPS = 16
"""Time steps that the sequence's length divides by."""
_FORWARD = {2: Blocks(64, 4, 2, 16), 4: Blocks(32, 4, 2, 16)}
_BACKWARD = {2: Blocks(32, 4, 2, 16), 4: Blocks(16, 4, 2, 16)}
"""By the bytes of a number."""


def supports(shape: tuple[int, int, int], dtype: jnp.dtype) -> bool:
    """Whether the kernels take local arrays of this shape B,T,E."""
    _, T, E = shape
    return (T % LEAST_STEPS == 0 and E % CHANNELS == 0
            and dtype in (jnp.float32, jnp.bfloat16) and runs_here())


def scan(a_BTE: Float[Array, "B T E"], x_BTE: Float[Array, "B T E"], *, reverse: bool = False,
         blocks: Blocks | None = None, interpret: bool = False) -> Float[Array, "B T E"]:
    """Every state, from a state of zero and in float32; the result has the dtype of `x_BTE`.

    Args:
      a_BTE: decays.
      x_BTE: inputs.
      reverse: h_t = a_t h_{t+1} + x_t instead.
      blocks: other sizes than those for the dtype.
      interpret: run without a GPU.
    """
    like = jax.ShapeDtypeStruct(x_BTE.shape, x_BTE.dtype)
    blocks = blocks or _blocks(x_BTE.shape[1], _FORWARD[x_BTE.dtype.itemsize])
    return over_time(_steps, [a_BTE, x_BTE], [Rows(0), Rows(1)], [like], [Rows(0)], blocks,
                     reverse=reverse, interpret=interpret, name="scan")[0]


def scan_backward(
    a_BTE: Float[Array, "B T E"], h_BTE: Float[Array, "B T E"], g_BTE: Float[Array, "B T E"], *,
    blocks: Blocks | None = None, interpret: bool = False,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """The adjoint of `scan`: l_t = g_t + a_{t+1} l_{t+1}; da_t = l_t h_{t-1}, dx_t = l_t.

    Args:
      a_BTE: decays.
      h_BTE: what `scan` found.
      g_BTE: gradient of every state.
      blocks: other sizes than those for the dtype.
      interpret: run without a GPU.

    Returns:
      da_BTE in the dtype of `a_BTE`, dx_BTE in that of `g_BTE`.
    """
    like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (a_BTE, g_BTE)]
    blocks = blocks or _blocks(g_BTE.shape[1], _BACKWARD[g_BTE.dtype.itemsize])
    da_BTE, dx_BTE = over_time(
        _steps_back, [a_BTE, h_BTE, g_BTE], [Rows(0), Rows(1, before=True), Rows(2)], like,
        [Rows(0), Rows(1)], blocks, reverse=True, interpret=interpret, name="scan_backward")
    return da_BTE, dx_BTE


def _steps(rows: Sequence[Values], constants: Values, carry: Values,
           ) -> tuple[Values, Sequence[Values]]:
    (h,), states = carry, []
    for a, x in rows:
        h = a * h + x
        states.append((h,))
    return (h,), states


def _steps_back(rows: Sequence[Values], constants: Values, carry: Values,
                ) -> tuple[Values, Sequence[Values]]:
    (later,), gradients = carry, []
    for a, h_before, g in rows:
        adjoint = g + later
        gradients.append((adjoint * h_before, adjoint))
        later = a * adjoint
    return (later,), gradients


def _blocks(T: int, blocks: Blocks) -> Blocks:
    """With as many steps in a block as divide the sequence, and as many steps on their way."""
    steps = blocks.steps
    while T % steps:
        steps //= 2
    return Blocks(steps, blocks.stages * blocks.steps // steps, blocks.out_stages, blocks.group)
