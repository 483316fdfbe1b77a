"""Selective state spaces: S6 (Mamba), N states a channel, and SSD (Mamba-2), one decay a head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from hippocampus.errors import ConfigError
from hippocampus.ops import placement
from hippocampus.ops.kernels import selective_scan_hopper
from hippocampus.ops.kernels.selective_scan_hopper import Schedule
from hippocampus.ops.linear_scan import linear_scan
from hippocampus.ops.ssd import ssd as ssd

_CHUNK = 64
"""Steps whose states the "chunked" backend has at once."""


def selective_scan(
    u_BTE: Float[Array, "B T E"], delta_BTE: Float[Array, "B T E"], A_EN: Float[Array, "E N"],
    B_BTN: Float[Array, "B T N"], C_BTN: Float[Array, "B T N"],
    D_E: Float[Array, " E"] | None = None, *, h0_BEN: Float[Array, "B E N"] | None = None,
    reset_BT: Bool[Array, "B T"] | None = None, backend: str = "chunked",
) -> tuple[Float[Array, "B T E"], Float[Array, "B E N"]]:
    """S6: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, then y_t = C_t h_t + D u_t.

    Args:
      u_BTE: inputs.
      delta_BTE: step sizes, positive (after softplus).
      A_EN: rates, negative; each channel has its own N.
      B_BTN: how the states take a token in, for all channels.
      C_BTN: how they are read.
      D_E: of what passes by the states; None = nothing does.
      h0_BEN: states before the first token; None = zeros.
      reset_BT: True where a document begins: the states before that token do not count.
      backend: "sequential" (one step after the other), "associative" (log-depth; has all B T E N
        states in memory at once, more often than not several times), "chunked" (steps in chunks
        whose states are computed again for the gradient) or "pallas" (one kernel each way that
        keeps states in registers, on NVIDIA Hopper with N <= 16; "chunked" elsewhere).

    Returns:
      y_BTE in the dtype of `u_BTE`, and the states after the last token (B,E,N), float32 as all
      that happens in between. Handed on as `h0_BEN` they continue the scan.

    Raises:
      ConfigError: an unknown backend.

    Source: Gu & Dao 2023 (arXiv:2312.00752), section 3.2, algorithm 2; the zero-order hold for A
    and the Euler step for B as in the authors' code.
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"selective_scan backend is {backend!r}",
                          f"known: {', '.join(_BACKENDS)}")
    (B, T, E), N = u_BTE.shape, A_EN.shape[1]
    f32 = jnp.float32
    D_E = jnp.zeros((E,), f32) if D_E is None else D_E.astype(f32)
    h0_BEN = jnp.zeros((B, E, N), f32) if h0_BEN is None else h0_BEN.astype(f32)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else jnp.asarray(reset_BT)
    scan = _chunked if T == 1 else _BACKENDS[backend]
    return scan(u_BTE, delta_BTE, A_EN.astype(f32), B_BTN, C_BTN, D_E, h0_BEN, reset_BT)


def _steps(A: Array, h: Array, tokens: tuple[Array, ...]) -> tuple[Array, Array]:
    """The scan over tokens whose time is the first axis: the last state, y without D u."""
    def step(h: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        u, delta, B, C = (part.astype(jnp.float32) for part in token[:-1])
        decay = jnp.where(token[-1][:, None, None], 0.0, jnp.exp(delta[..., None] * A))
        h = decay * h + (delta * u)[..., None] * B[:, None]
        return h, (h * C[:, None]).sum(-1)

    return lax.scan(step, h, tokens)


def _sequential(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, h0: Array,
                reset: Array) -> tuple[Array, Array]:
    h, y = _steps(A, h0, tuple(jnp.swapaxes(v, 0, 1) for v in (u, delta, B, C, reset)))
    return (jnp.swapaxes(y, 0, 1) + D * u).astype(u.dtype), h


def _chunked(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, h0: Array,
             reset: Array) -> tuple[Array, Array]:
    T = u.shape[1]
    size = min(_CHUNK, T)
    padded = _pad_time(size, u, delta, B, C, reset)
    chunks = tuple(jnp.swapaxes(v, 0, 1).reshape(-1, size, v.shape[0], *v.shape[2:])
                   for v in padded)
    h, y = lax.scan(jax.checkpoint(functools.partial(_steps, A)), h0, chunks)
    y = jnp.swapaxes(y.reshape(-1, *y.shape[2:]), 0, 1)[:, :T]
    return (y + D * u).astype(u.dtype), h


def _associative(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, h0: Array,
                 reset: Array) -> tuple[Array, Array]:
    (rows, T, E), N = u.shape, A.shape[1]
    u32, delta, B, C = (v.astype(jnp.float32) for v in (u, delta, B, C))
    decay = jnp.exp(delta[..., None] * A)
    x = (delta * u32)[..., None] * B[:, :, None]
    h = linear_scan(decay.reshape(rows, T, E * N), x.reshape(rows, T, E * N),
                    h0.reshape(rows, E * N), reset, backend="associative")
    h = h.reshape(rows, T, E, N)
    return ((h * C[:, :, None]).sum(-1) + D * u32).astype(u.dtype), h[:, -1]


def _pad_time(multiple: int, *arrays: Array) -> tuple[Array, ...]:
    """Tokens of step size 0 at the end; they leave the states as they are."""
    return tuple(jnp.pad(v, ((0, 0), (0, -v.shape[1] % multiple)) + ((0, 0),) * (v.ndim - 2))
                 for v in arrays)


def _pallas(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, h0: Array,
            reset: Array) -> tuple[Array, Array]:
    (B_, _, E), arrays = u.shape, (u, delta, A, B, C, D, h0, reset)
    if placement.shards("batch", B_) == placement.shards("tensor", E) == 1:
        return _pallas_on_device(*arrays)
    row, channel, state = ("batch", None, "tensor"), ("batch", None, None), ("batch", "tensor")
    return placement.map_shards(
        _pallas_on_device, arrays,
        (row, row, ("tensor", None), channel, channel, ("tensor",), (*state, None), channel[:2]),
        row, (*state, None))


def _pallas_on_device(u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array, h0: Array,
                      reset: Array) -> tuple[Array, Array]:
    if not selective_scan_hopper.supports(A.shape[1]):
        return _chunked(u, delta, A, B, C, D, h0, reset)
    schedule = selective_scan_hopper.schedule(u.shape)
    return _fused(schedule, False, u, delta, A, B, C, D, h0, reset)


def _fused(schedule: Schedule, interpret: bool, u: Array, delta: Array, A: Array, B: Array,
           C: Array, D: Array, h0: Array, reset: Array) -> tuple[Array, Array]:
    _, T, E = u.shape
    u, delta, B, C, reset = _pad_time(schedule.pieces * schedule.tile, u, delta, B, C, reset)
    u, delta, A, D, h0 = (_pad_channels(v, axis) for v, axis in (
        (u, 2), (delta, 2), (A, 0), (D, 0), (h0, 1)))
    y, h, _ = _kernels(schedule, interpret, False, u, delta, A, B, C, D, h0, reset)
    return y[:, :T, :E], h[:, :E]


def _pad_channels(v: Array, axis: int) -> Array:
    """Zeros up to whole blocks of channels."""
    widths = [(0, 0)] * v.ndim
    widths[axis] = (0, -v.shape[axis] % selective_scan_hopper.LANES)
    return jnp.pad(v, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _kernels(schedule: Schedule, interpret: bool, save: bool, *arrays: Any,
             ) -> tuple[Array, Array, list[Array]]:
    """y, the last states, and with `save` what the backward pass wants to have kept."""
    def on_gpu(*arrays: Any) -> tuple[Array, ...]:
        return _forward_on_gpu(schedule, interpret, save, *arrays)

    def elsewhere(*arrays: Any) -> tuple[Array, ...]:
        shapes = jax.eval_shape(on_gpu, *arrays)[2:]
        return *_chunked(*arrays), *(jnp.zeros(s.shape, s.dtype) for s in shapes)

    if interpret:
        y, h, *kept = on_gpu(*arrays)
    else:
        y, h, *kept = lax.platform_dependent(*arrays, cuda=on_gpu, default=elsewhere)
    return y, h, kept


def _kernels_forward(schedule: Schedule, interpret: bool, save: bool, *arrays: Any,
                     ) -> tuple[tuple[Array, Array, list[Array]], tuple]:
    y, h, kept = _kernels(schedule, interpret, True, *arrays)
    return (y, h, kept if save else []), (arrays, kept)


def _forward_on_gpu(schedule: Schedule, interpret: bool, save: bool, u: Array, delta: Array,
                    A: Array, B: Array, C: Array, D: Array, h0: Array, reset: Array,
                    ) -> tuple[Array, ...]:
    gpu = selective_scan_hopper
    A2, rows = A.T / math.log(2), gpu.shared_rows(B, C, reset)
    starts = jnp.swapaxes(h0, 1, 2)[:, None]
    kept = []
    if schedule.pieces > 1:
        ends, total = gpu.ends(u, delta, A2, rows, schedule, backward=False, interpret=interpret)
        starts = _carry(starts[:, 0], _decays(A2, total, reset), ends)
        kept.append(total)
    y, end, *saved = gpu.forward(u, delta, A2, rows, D, starts, schedule, save=save,
                                 interpret=interpret)
    return y, jnp.swapaxes(end[:, -1], 1, 2), *(saved + kept if save else [])


def _decays(A2: Array, total: Array, reset: Array) -> Array:
    """Of whole pieces (B,K,N,E)."""
    B, K, _ = total.shape
    resets = reset.reshape(B, K, -1).any(-1)[..., None, None]
    return jnp.where(resets, 0.0, jnp.exp2(A2 * total[:, :, None]))


def _carry(first: Array, decays: Array, ends: Array) -> Array:
    """The state in front of every piece (B,K,N,E)."""
    def step(h: Array, piece: tuple[Array, Array]) -> tuple[Array, Array]:
        return piece[0] * h + piece[1], h

    pieces = (jnp.swapaxes(decays, 0, 1), jnp.swapaxes(ends, 0, 1))
    # As a loop every step would be a launch.
    return jnp.swapaxes(lax.scan(step, first, pieces, unroll=16)[1], 0, 1)


def _kernels_backward(schedule: Schedule, interpret: bool, save: bool, saved: tuple,
                      cotangents: tuple) -> tuple[Array | None, ...]:
    arrays, kept = saved
    return *_gradients(schedule, interpret, arrays, kept, cotangents[:2]), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradients(schedule: Schedule, interpret: bool, arrays: tuple, kept: list[Array],
               cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
    """With respect to all of `arrays` but the last, the resets."""
    def on_gpu(arrays: tuple, kept: list[Array], cotangents: tuple) -> tuple:
        return _backward_on_gpu(schedule, interpret, kept, cotangents, *arrays)

    def elsewhere(arrays: tuple, kept: list[Array], cotangents: tuple) -> tuple:
        return _chunked_gradients(arrays[:-1], cotangents, reset=arrays[-1])

    if interpret:
        return on_gpu(arrays, kept, cotangents)
    gradients: tuple[Array, ...] = lax.platform_dependent(
        arrays, kept, cotangents, cuda=on_gpu, default=elsewhere)
    return gradients


def _chunked_gradients(arrays: tuple, cotangents: tuple, *, reset: Array) -> tuple[Array, ...]:
    return jax.vjp(lambda *arrays: _chunked(*(*arrays, reset)), *arrays)[1](cotangents)


def _gradients_forward(schedule: Schedule, interpret: bool, arrays: tuple, kept: list[Array],
                       cotangents: tuple[Array, Array]) -> tuple[tuple[Array, ...], tuple]:
    found = _gradients(schedule, interpret, arrays, kept, cotangents)
    return found, (arrays, kept, cotangents)


def _gradients_backward(schedule: Schedule, interpret: bool, saved: tuple,
                        g: tuple[Array, ...]) -> tuple[Any, ...]:
    """A gradient of the gradient is rare: the chunked form's. What was kept is no input of it."""
    arrays, kept, cotangents = saved
    _, pull = jax.vjp(functools.partial(_chunked_gradients, reset=arrays[-1]), arrays[:-1],
                      cotangents)
    darrays, dcotangents = pull(g)
    return (*darrays, None), jax.tree.map(jnp.zeros_like, kept), dcotangents


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _backward_on_gpu(schedule: Schedule, interpret: bool, kept: list[Array],
                     cotangents: tuple[Array, Array], u: Array, delta: Array, A: Array, B: Array,
                     C: Array, D: Array, h0: Array, reset: Array) -> tuple[Array, ...]:
    gpu, (g, g_state), N = selective_scan_hopper, cotangents, A.shape[1]
    A2, rows = A.T / math.log(2), gpu.shared_rows(B, C, reset)
    behind = jnp.swapaxes(g_state, 1, 2)[:, None]
    if schedule.pieces > 1:
        fronts, _ = gpu.ends(g, delta, A2, rows, schedule, backward=True, interpret=interpret)
        decays = _decays(A2, kept[1], reset)
        behind = _carry(behind[:, 0], decays[:, ::-1], fronts[:, ::-1])[:, ::-1]
    du, ddelta, warps, dA, dD, front = gpu.backward(
        u, delta, A2, rows, D, kept[0], g, behind, schedule, interpret=interpret)
    sums = warps.reshape(*warps.shape[:2], -1, 32).sum(2)
    return (du, ddelta, dA.sum((0, 1)).T, sums[..., :N].astype(B.dtype),
            sums[..., N:2 * N].astype(C.dtype), dD.sum((0, 1)), jnp.swapaxes(front[:, 0], 1, 2))


_kernels.defvjp(_kernels_forward, _kernels_backward)

_BACKENDS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "sequential": _sequential, "associative": _associative, "chunked": _chunked, "pallas": _pallas}
