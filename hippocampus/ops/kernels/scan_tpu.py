"""The linear recurrence on TPUs: Pallas kernels that read and write every array once.

Time is the leading axis of a block, so that a step works on whole vector registers: 8 rows of the
batch fill the sublanes, 128 channels the lanes. The two transposes that this needs are mostly
folded into the neighbours by XLA. The state is float32 and stays on the chip. With the gates inside
(`gated_scan`) the decays and the scaled inputs never exist in the main memory: the vector unit has
time to spare while the memory is waited for.

These are functions of one device's arrays and know no gradient; `linear_scan` and
`hippocampus.ops.gated_scan` give them one.

Source: De et al. 2024 (arXiv:2402.19427), section 4.2 and the reference code for kernels that walk
along time with a carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SHARPNESS = 8.0
_SMALLEST = 1e-6
_LANES, _SUBLANES = 128, 8
_UNROLL = 8
"""Steps written out in a loop's body: the TPU compiler does not honour `fori_loop(unroll=)`."""
_BLOCK_BYTES = 8 * 2**20
"""Of 16 MiB of on-chip memory, for the blocks of all arrays, twice each (one is in transfer)."""


def supports(shape: tuple[int, int, int], dtype: Any) -> bool:
    """Whether the kernels take arrays of one device of this shape.

    Args:
      shape: B, T, E of the device's shards. Rows fill whole registers (B a multiple of 8) or a
        power-of-two part of one (1, 2, 4); T must be a multiple of 8 and E of 128.
      dtype: float32 or bfloat16.
    """
    B, T, E = shape
    return (jnp.dtype(dtype) in (jnp.float32, jnp.bfloat16) and min(shape) > 0
            and T % _UNROLL == 0 and E % _LANES == 0 and (B % _SUBLANES == 0 or B in (1, 2, 4)))


def scan(a_BTE: Float[Array, "B T E"], x_BTE: Float[Array, "B T E"], *,
         reverse: bool = False) -> Float[Array, "B T E"]:
    """Every state of h_t = a_t h_{t-1} + x_t, from zero.

    Args:
      a_BTE, x_BTE: decays and inputs, of a shape that `supports` takes.
      reverse: from the last token to the first: h_t = a_t h_{t+1} + x_t.

    Returns:
      h_BTE in the dtype of `x_BTE`.
    """
    def kernel(a: Any, x: Any, h: Any, state: Any) -> None:
        def step(lanes: Any, t: Array, _: Array, s: Array) -> tuple[Array]:
            s = _f32(a[t, :, lanes]) * s + _f32(x[t, :, lanes])
            h[t, :, lanes] = s.astype(h.dtype)
            return (s,)

        _walk(step, (state,), h, most_lanes=512, reverse=reverse)

    grid = _Grid(x_BTE.shape, n_arrays=3, reverse=reverse)
    h_TBE, = grid.run(kernel, [(a_BTE, grid.steps()), (x_BTE, grid.steps())],
                      [(grid.like(x_BTE), grid.steps())])
    return jnp.swapaxes(h_TBE, 0, 1)


def scan_backward(
    a_BTE: Float[Array, "B T E"], h_BTE: Float[Array, "B T E"], g_BTE: Float[Array, "B T E"],
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
    """Gradients of `scan` in one pass: l_t = g_t + a_{t+1} l_{t+1}, dx_t = l_t, da_t = l_t h_{t-1}.

    Args:
      a_BTE: decays.
      h_BTE: what `scan` returned.
      g_BTE: gradient of it.

    Returns:
      da_BTE and dx_BTE, in the dtypes of `a_BTE` and `g_BTE`.
    """
    def kernel(a: Any, h: Any, before: Any, g: Any, da: Any, dx: Any, state: Any) -> None:
        def step(lanes: Any, t: Array, h_before: Array, later: Array) -> tuple[Array]:
            adjoint = _f32(g[t, :, lanes]) + later
            dx[t, :, lanes] = adjoint.astype(dx.dtype)
            da[t, :, lanes] = (adjoint * h_before).astype(da.dtype)
            return (_f32(a[t, :, lanes]) * adjoint,)

        _walk(step, (state,), h, most_lanes=512, reverse=True, before=before)

    grid = _Grid(h_BTE.shape, n_arrays=5, reverse=True)
    da_TBE, dx_TBE = grid.run(
        kernel, [(a_BTE, grid.steps()), (h_BTE, grid.steps()), (h_BTE, grid.step_before()),
                 (g_BTE, grid.steps())],
        [(grid.like(a_BTE), grid.steps()), (grid.like(g_BTE), grid.steps())])
    return jnp.swapaxes(da_TBE, 0, 1), jnp.swapaxes(dx_TBE, 0, 1)


def gated_scan(
    gates_2BTE: Float[Array, "2 B T E"], c_BTE: Float[Array, "B T E"],
    log_decay_E: Float[Array, " E"], scale_E: Float[Array, " E"] | None,
    first_BT: Bool[Array, "B T"], *, dtype: Any = None,
) -> Float[Array, "B T E"]:
    """The recurrence of `hippocampus.layers.modern_ssm` from the logits of its gates.

        log a = -8 softplus(log_decay) sigmoid(forget)
        h_t   = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(in) scale c_t

    with a = 0, and 1 for the square root, at a document's first token.

    Args:
      gates_2BTE: logits of the forget gate and of the input gate.
      c_BTE: inputs, of a shape that `supports` takes.
      log_decay_E: parameter of the channels.
      scale_E: of the inputs; None = 1.
      first_BT: whether a token is its document's first.
      dtype: of the result; None = that of `c_BTE`. The state is float32 in any case.
    """
    def kernel(gates: Any, c: Any, first: Any, rate: Any, scale: Any, h: Any, state: Any) -> None:
        def step(lanes: Any, t: Array, _: Array, s: Array) -> tuple[Array]:
            gate = _gate(gates, first, rate, lanes, t)
            s = gate.a * s + gate.factor * gate.g_in * scale[:, lanes] * _f32(c[t, :, lanes])
            h[t, :, lanes] = s.astype(h.dtype)
            return (s,)

        _walk(step, (state,), h)

    grid = _Grid(c_BTE.shape, n_arrays=4)
    h_TBE, = grid.run(
        kernel, _gated_inputs(grid, gates_2BTE, c_BTE, log_decay_E, scale_E, first_BT),
        [(grid.like(c_BTE, dtype), grid.steps())])
    return jnp.swapaxes(h_TBE, 0, 1)


def gated_scan_backward(
    gates_2BTE: Float[Array, "2 B T E"], c_BTE: Float[Array, "B T E"],
    log_decay_E: Float[Array, " E"], scale_E: Float[Array, " E"] | None,
    first_BT: Bool[Array, "B T"], h_BTE: Float[Array, "B T E"], g_BTE: Float[Array, "B T E"],
) -> tuple[Array, ...]:
    """Gradients of `gated_scan` in one pass, which works the gates out again.

    Args:
      gates_2BTE, c_BTE, log_decay_E, scale_E, first_BT: as there.
      h_BTE: what it returned.
      g_BTE: gradient of it.

    Returns:
      Gradients of gates_2BTE and c_BTE, in their dtypes, then float32 B,E of log_decay_E and, if
      there is one, of scale_E: a part for each row, which the caller adds up over all devices.
    """
    def kernel(gates: Any, c: Any, first: Any, rate: Any, scale: Any, h: Any, before: Any, g: Any,
               d_gates: Any, d_c: Any, d_rate: Any, d_scale: Any, state: Any) -> None:
        def step(lanes: Any, t: Array, h_before: Array, later: Array, sum_rate: Array,
                 sum_scale: Array) -> tuple[Array, ...]:
            gate, s = _gate(gates, first, rate, lanes, t), scale[:, lanes]
            adjoint, c_t = _f32(g[t, :, lanes]) + later, _f32(c[t, :, lanes])
            d_scaled = adjoint * gate.factor * gate.g_in  # of scale c
            d_size = adjoint * gate.g_in * s * c_t
            d_log_a = gate.a * adjoint * h_before + d_size * gate.d_factor
            d_forget = d_log_a * rate[:, lanes] * gate.g_forget * (1 - gate.g_forget)
            d_gates[0, t, :, lanes] = d_forget.astype(d_gates.dtype)
            d_in = d_scaled * s * c_t * (1 - gate.g_in)
            d_gates[1, t, :, lanes] = d_in.astype(d_gates.dtype)
            d_c[t, :, lanes] = (d_scaled * s).astype(d_c.dtype)
            return (gate.a * adjoint, sum_rate + d_log_a * gate.g_forget,
                    sum_scale + d_scaled * c_t)

        _walk(step, (state, d_rate, d_scale), h, reverse=True, before=before)

    grid = _Grid(c_BTE.shape, n_arrays=8, reverse=True)
    sums = jax.ShapeDtypeStruct((c_BTE.shape[0], c_BTE.shape[2]), jnp.float32)
    d_gates, d_c, d_rate, d_scale = grid.run(
        kernel, [*_gated_inputs(grid, gates_2BTE, c_BTE, log_decay_E, scale_E, first_BT),
                 (h_BTE, grid.steps()), (h_BTE, grid.step_before()), (g_BTE, grid.steps())],
        [(grid.like(gates_2BTE), grid.steps(2)), (grid.like(c_BTE), grid.steps()),
         (sums, grid.sums()), (sums, grid.sums())])
    d_log_decay = -_SHARPNESS * jax.nn.sigmoid(_f32(log_decay_E)) * d_rate
    return (jnp.swapaxes(d_gates, 1, 2), jnp.swapaxes(d_c, 0, 1), d_log_decay,
            *([] if scale_E is None else [d_scale]))


class _Gate(NamedTuple):
    """What the gates make of a step, float32."""

    a: Array
    """The decay, 0 at a first token."""
    factor: Array
    """sqrt(1 - a^2), or 1."""
    d_factor: Array
    """Its derivative by log a."""
    g_forget: Array
    g_in: Array


def _gate(gates: Any, first: Any, rate: Any, lanes: Any, t: Array) -> _Gate:
    g_forget, g_in = (jax.nn.sigmoid(_f32(gates[i, t, :, lanes])) for i in (0, 1))
    log_a = rate[:, lanes] * g_forget
    a, is_first = jnp.exp(log_a), _f32(first[t])
    square = _one_minus_exp(2 * log_a, a * a)
    size = jnp.sqrt(jnp.maximum(square, _SMALLEST))
    a = a * (1 - is_first)
    d_factor = jnp.where(square > _SMALLEST, -a * a / size, 0.0)
    return _Gate(a, size * (1 - is_first) + is_first, d_factor, g_forget, g_in)


def _one_minus_exp(y: Array, exp_y: Array) -> Array:
    """1 - e^y for y <= 0, near 0 by its series; there is no `expm1` for these kernels."""
    series = 1.0 + y / 6
    for n in (5, 4, 3, 2):
        series = 1.0 + y / n * series
    return jnp.where(y > -0.25, -y * series, 1.0 - exp_y)


def _gated_inputs(grid: _Grid, gates: Array, c: Array, log_decay: Array, scale: Array | None,
                  first: Array) -> list[tuple[Array, Any]]:
    rate = -_SHARPNESS * jax.nn.softplus(_f32(log_decay))
    scale = jnp.ones_like(rate) if scale is None else _f32(scale)
    return [(gates, grid.steps(2)), (c, grid.steps()),
            (first[..., None].astype(c.dtype), grid.mask()),
            (rate[None], grid.channels()), (scale[None], grid.channels())]


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _walk(step: Callable[..., tuple[Array, ...]], carried: tuple[Any, ...], h: Any, *,
          most_lanes: int = 256, reverse: bool = False, before: Any = None) -> None:
    """Makes the steps of a block, one group of lanes after the other.

    Args:
      step: of (lanes, t, h_before, *values): the next values. It reads and writes its blocks.
      carried: a reference (rows, lanes) for each value, which starts as zeros.
      h: block of the states.
      most_lanes: of a group, so that what is live at once fits the registers.
      reverse: from the last step to the first.
      before: block with the state before the first one of `h`; None = `h_before` is not needed.
    """
    from jax.experimental import pallas as pl

    block, n_blocks = pl.program_id(2), pl.num_programs(2)
    steps, width = h.shape[0], h.shape[-1]

    @pl.when(block == 0)
    def _() -> None:
        for ref in carried:
            ref[...] = jnp.zeros(ref.shape, ref.dtype)

    size = _largest_part(width, _LANES, most_lanes)
    for start in range(0, width, size):
        lanes = slice(start, start + size)

        def some(i: Array, values: tuple[Array, ...], lanes: slice = lanes) -> tuple[Array, ...]:
            begin = (steps // _UNROLL - 1 - i if reverse else i) * _UNROLL
            for u in reversed(range(_UNROLL)) if reverse else range(_UNROLL):
                t, h_before = begin + u, None
                if before is not None:
                    h_before = _f32(h[jnp.maximum(t - 1, 0), :, lanes])
                    if u == 0:
                        outside = _f32(before[0, :, lanes]) * _f32(block < n_blocks - 1)
                        h_before = jnp.where(begin == 0, outside, h_before)
                values = step(lanes, t, h_before, *values)
            return values

        values = jax.lax.fori_loop(0, steps // _UNROLL, some,
                                   tuple(ref[:, lanes] for ref in carried))
        for ref, value in zip(carried, values, strict=True):
            ref[:, lanes] = value


class _Grid:
    """How arrays are cut into blocks: over rows, channels, and (one after the other) time."""

    def __init__(self, shape: tuple[int, ...], *, n_arrays: int, reverse: bool = False) -> None:
        self.shape = B, T, E = shape
        self.rows = _SUBLANES if B % _SUBLANES == 0 else B
        self.lanes = _largest_part(E, _LANES, 1024)
        step_bytes = 2 * n_arrays * 4 * self.rows * self.lanes
        self.block = _largest_part(T, _UNROLL, max(_UNROLL, _BLOCK_BYTES // step_bytes))
        self.n_blocks, self.reverse = T // self.block, reverse

    def steps(self, leading: int = 0) -> Any:
        """Blocks of arrays T,B,E, or of so many of them."""
        if leading:
            return _spec((leading, self.block, self.rows, self.lanes),
                         lambda i, j, t: (0, self._time(t), i, j))
        return _spec((self.block, self.rows, self.lanes), lambda i, j, t: (self._time(t), i, j))

    def step_before(self) -> Any:
        """The one step before each block (for the first block, its own first step)."""
        return _spec((1, self.rows, self.lanes), lambda i, j, t: (
            jnp.maximum(self._time(t) * self.block - 1, 0), i, j))

    def mask(self) -> Any:
        """Blocks of an array T,B,1."""
        return _spec((self.block, self.rows, 1), lambda i, j, t: (self._time(t), i, 0))

    def channels(self) -> Any:
        """Blocks of an array 1,E."""
        return _spec((1, self.lanes), lambda i, j, t: (0, j))

    def sums(self) -> Any:
        """Blocks of an array B,E, which stay on the chip along time."""
        return _spec((self.rows, self.lanes), lambda i, j, t: (i, j))

    def like(self, array_BTE: Array, dtype: Any = None) -> jax.ShapeDtypeStruct:
        """An array such as this one, with time before the batch."""
        *leading, B, T, E = array_BTE.shape
        return jax.ShapeDtypeStruct((*leading, T, B, E), dtype or array_BTE.dtype)

    def run(self, kernel: Callable[..., None], inputs: Sequence[tuple[Array, Any]],
            outputs: Sequence[tuple[Any, Any]]) -> list[Array]:
        """Calls the kernel on pairs of array and block; it also gets a state of one step."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        B, _, E = self.shape
        arrays = [x if x.ndim < 3 else jnp.swapaxes(x, -3, -2) for x, _ in inputs]
        return pl.pallas_call(
            kernel, grid=(B // self.rows, E // self.lanes, self.n_blocks),
            in_specs=[spec for _, spec in inputs], out_specs=[spec for _, spec in outputs],
            out_shape=[shape for shape, _ in outputs],
            scratch_shapes=[pltpu.VMEM((self.rows, self.lanes), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")))(*arrays)

    def _time(self, t: Any) -> Any:
        return self.n_blocks - 1 - t if self.reverse else t


def _spec(shape: tuple[int, ...], index: Callable[..., tuple]) -> Any:
    from jax.experimental import pallas as pl

    return pl.BlockSpec(shape, index)


def _largest_part(size: int, unit: int, most: int) -> int:
    """The largest multiple of `unit` that divides `size` and is no larger than `most`."""
    return max(n for n in range(unit, max(unit, min(size, most)) + 1, unit) if size % n == 0)
