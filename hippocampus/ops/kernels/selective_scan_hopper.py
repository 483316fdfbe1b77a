"""The selective scan (S6) on NVIDIA Hopper: Pallas kernels of Mosaic GPU.

A thread owns a channel and keeps its N states in registers; a warpgroup owns 128 channels of one
row of the batch and walks over one of K pieces of time, tile by tile, through shared memory. What
all channels share (B_t, C_t, resets) lies in shared memory too and is broadcast. Where K > 1, a
first kernel finds what every piece adds to the state at its end, XLA carries that over the pieces
(the decay of a whole piece is exp(A sum(delta))), and the pieces then run side by side. The
forward pass keeps the state before each tile; the backward pass runs a tile again from there, a
few steps at a time, and then back over them. Sums over channels (of dB, dC) are made within a
warp by exchanging halves, 31 shuffles for 32 sums, and leave as one row for each warp.

Decays are exp2(delta A'), A' = A / ln 2, which is one instruction of the special function unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

LANES = 128
"""Channels of a block: the threads of a warpgroup."""
_BLOCKS = 264
"""That run side by side: two on each multiprocessor, for their registers."""
_FORGET = -1e30
"""Exponent of a decay of zero."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the work is cut.

    Attributes:
      pieces: parts of time that run side by side.
      tile: steps between two saved states, a copy to shared memory each.
      group: steps whose states the backward pass has in registers; it divides the tile.
      buffers: tiles under way.
      keep_decays: whether the backward pass keeps the decays of a group in registers too.
    """

    pieces: int = 1
    tile: int = 16
    group: int = 4
    buffers: int = 2
    keep_decays: bool = False


def supports(N: int) -> bool:
    """Whether the kernels take so many states, on the GPU that is here if one is."""
    if not 0 < N <= 16:
        return False
    device = jax.devices()[0]
    return device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) >= 9.0


def schedule(shape: tuple[int, ...]) -> Schedule:
    """So many pieces of time that an H100 is full, of four tiles at least."""
    (B, T, E), cut = shape, Schedule(pieces=1)
    while cut.pieces * B * -(-E // LANES) < _BLOCKS and 8 * cut.pieces * cut.tile <= T:
        cut = dataclasses.replace(cut, pieces=2 * cut.pieces)
    return cut


def shared_rows(B_BTN: Float[Array, "B T N"], C_BTN: Float[Array, "B T N"],
                reset_BT: Bool[Array, "B T"]) -> Float[Array, "B T M"]:
    """B, C and the exponent of a reset side by side, in rows of a multiple of 16 bytes."""
    forget = jnp.where(reset_BT, _FORGET, 0.0)[..., None]
    rows = jnp.concatenate([B_BTN.astype(jnp.float32), C_BTN.astype(jnp.float32), forget], -1)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[-1] % 4)))


def forward(u: Array, delta: Array, A2: Float[Array, "N E"], rows: Float[Array, "B T M"],
            D: Float[Array, " E"], h0: Float[Array, "B K N E"], schedule: Schedule, *,
            save: bool, interpret: bool = False) -> tuple[Array, ...]:
    """y (B,T,E), the states at the end of the pieces (B,K,N,E), and with `save` those before tiles.

    `A2` is A / ln 2, `h0` the states in front of the pieces.
    """
    (B, T, E), N, tile, K = u.shape, A2.shape[0], schedule.tile, schedule.pieces

    def kernel(u_ref: Any, delta_ref: Any, A_ref: Any, rows_ref: Any, D_ref: Any, h0_ref: Any,
               y_ref: Any, end_ref: Any, *saved_refs: Any) -> None:
        here = _Block(T, schedule)
        b, k, channels = here.b, here.k, here.channels
        A = [_load(A_ref, (n, channels)) for n in range(N)]
        D = _load(D_ref, (channels,))

        def walk(tiles: Any, u: Any, delta: Any, rows: Any, h: list[Array]) -> list[Array]:
            for saved_ref in saved_refs:
                for n in range(N):
                    saved_ref[b, k * here.tiles + tiles[0], n, channels] = h[n]

            def group(i: Any, h: list[Array]) -> list[Array]:
                for t in (i * schedule.group + j for j in range(schedule.group)):
                    u_t, delta_t = _load(u, (t,)), _load(delta, (t,))
                    B, C, forget = _shared_row(rows, t, N, interpret)
                    h, _ = _advance(h, A, B, delta_t * u_t, delta_t, forget)
                    y = D * u_t
                    for n in range(N):
                        y = y + h[n] * C[n]
                    y_ref[b, here.first + tiles[0] * tile + t, channels] = y.astype(y_ref.dtype)
                return h

            return lax.fori_loop(0, tile // schedule.group, group, h)

        h = here.pipeline(walk, [_load(h0_ref, (b, k, n, channels)) for n in range(N)],
                          u_ref, delta_ref, rows_ref)
        for n in range(N):
            end_ref[b, k, n, channels] = h[n]

    out = [jax.ShapeDtypeStruct(u.shape, u.dtype), _float32(B, K, N, E)]
    if save:
        out.append(_float32(B, T // tile, N, E))
    return _call(kernel, out, E=E, B=B, pieces=K, name="selective_scan", interpret=interpret)(
        u, delta, A2, rows, D, h0)


def ends(x: Array, delta: Array, A2: Float[Array, "N E"], rows: Float[Array, "B T M"],
         schedule: Schedule, *, backward: bool, interpret: bool = False) -> tuple[Array, Array]:
    """What each piece adds to the state behind it (B,K,N,E), and its sum of delta (B,K,E).

    Forward, x is u; backward, x is the gradient of y, and the adjoint of the state in front of a
    piece is found.
    """
    (B, T, E), N, K, G = x.shape, A2.shape[0], schedule.pieces, schedule.group

    def kernel(x_ref: Any, delta_ref: Any, A_ref: Any, rows_ref: Any, end_ref: Any,
               total_ref: Any) -> None:
        here = _Block(T, schedule, backward)
        A = [_load(A_ref, (n, here.channels)) for n in range(N)]

        def walk(_: Any, x: Any, delta: Any, rows: Any, carry: Any) -> Any:
            def group(i: Any, carry: Any) -> Any:
                h, total = carry
                for t in (i * G + j for j in range(G)):
                    t = schedule.tile - 1 - t if backward else t
                    x_t, delta_t = _load(x, (t,)), _load(delta, (t,))
                    B, C, forget = _shared_row(rows, t, N, interpret)
                    total = total + delta_t
                    if backward:
                        h = [_decay(delta_t, A[n], forget) * (h[n] + x_t * C[n]) for n in range(N)]
                    else:
                        h, _ = _advance(h, A, B, delta_t * x_t, delta_t, forget)
                return h, total

            return lax.fori_loop(0, schedule.tile // G, group, carry)

        *h, total = _zeros(N + 1, interpret)
        h, total = here.pipeline(walk, (h, total), x_ref, delta_ref, rows_ref)
        for n in range(N):
            end_ref[here.b, here.k, n, here.channels] = h[n]
        total_ref[here.b, here.k, here.channels] = total

    return _call(kernel, [_float32(B, K, N, E), _float32(B, K, E)], E=E, B=B, pieces=K,
                 name="selective_scan_ends", interpret=interpret)(x, delta, A2, rows)


def backward(u: Array, delta: Array, A2: Float[Array, "N E"], rows: Float[Array, "B T M"],
             D: Float[Array, " E"], saved: Array, g: Array, behind: Float[Array, "B K N E"],
             schedule: Schedule, *, interpret: bool = False) -> tuple[Array, ...]:
    """du, ddelta (B,T,E), sums over warps (B,T,E), dA (B,K,N,E), dD (B,K,E) and adjoint states.

    The sums are 32 for each warp: dB, then dC (from 2 N on zeros). `behind` is the adjoint of the
    states at the end of the pieces; what comes last is that in front of them (B,K,N,E).
    """
    _, plgpu = _pallas()
    (B, T, E), N, K, G = u.shape, A2.shape[0], schedule.pieces, schedule.group
    groups = schedule.tile // G

    def kernel(u_ref: Any, delta_ref: Any, A_ref: Any, rows_ref: Any, D_ref: Any, saved_ref: Any,
               g_ref: Any, behind_ref: Any, du_ref: Any, ddelta_ref: Any, warps_ref: Any,
               dA_ref: Any, dD_ref: Any, front_ref: Any, starts: Any) -> None:
        here = _Block(T, schedule, backward=True)
        b, k, channels = here.b, here.k, here.channels
        A = [_load(A_ref, (n, channels)) for n in range(N)]
        D = _load(D_ref, (channels,))

        def walk(tiles: Any, u: Any, delta: Any, rows: Any, g: Any, saved: Any,
                 carry: Any) -> Any:
            first = here.first + (here.tiles - 1 - tiles[0]) * schedule.tile

            def tokens(i: Any) -> list[tuple[Any, ...]]:
                steps = [i * G + j for j in range(G)]
                return [(t, _load(u, (t,)), _load(delta, (t,)),
                         *_shared_row(rows, t, N, interpret)) for t in steps]

            def again(i: Any, h: list[Array]) -> list[Array]:
                for n in range(N):
                    starts[i, n] = h[n]
                for _, u_t, delta_t, B, _, forget in tokens(i):
                    h, _ = _advance(h, A, B, delta_t * u_t, delta_t, forget)
                return h

            def group(i: Any, carry: Any) -> Any:
                state, i = carry, groups - 1 - i
                h = [[_load(starts, (i, n)) if groups > 1 else _load(saved, (0, n))
                      for n in range(N)]]
                kept, here_tokens = [], tokens(i)
                for _, u_t, delta_t, B, _, forget in here_tokens:
                    after, decays = _advance(h[-1], A, B, delta_t * u_t, delta_t, forget)
                    h.append(after)
                    kept.append(decays)
                for j in reversed(range(G)):
                    t, u_t, delta_t, B, C, forget = here_tokens[j]
                    decays = kept[j] if schedule.keep_decays else [
                        _decay(delta_t, A[n], forget) for n in range(N)]
                    state, du, ddelta, sums = _go_back(
                        state, _load(g, (t,)), u_t, delta_t, decays, A, B, C, D, h[j], h[j + 1])
                    at = (b, first + t, channels)
                    du_ref[at] = du.astype(du_ref.dtype)
                    ddelta_ref[at] = ddelta.astype(ddelta_ref.dtype)
                    warps_ref[at] = _sum_over_warps(sums, interpret)
                return state

            if groups > 1:
                lax.fori_loop(0, groups, again, [_load(saved, (0, n)) for n in range(N)])
            return lax.fori_loop(0, groups, group, carry)

        *dA, dD = _zeros(N + 1, interpret)
        dh = [_load(behind_ref, (b, k, n, channels)) for n in range(N)]
        dh, dA, dD = here.pipeline(walk, (dh, dA, dD), u_ref, delta_ref, rows_ref, g_ref,
                                   states=saved_ref)
        for n in range(N):
            dA_ref[b, k, n, channels] = dA[n]
            front_ref[b, k, n, channels] = dh[n]
        dD_ref[b, k, channels] = dD

    S = jax.ShapeDtypeStruct
    out = [S(u.shape, u.dtype), S(u.shape, delta.dtype), _float32(B, T, E),
           _float32(B, K, N, E), _float32(B, K, E), _float32(B, K, N, E)]
    scratch = (plgpu.SMEM((groups if groups > 1 else 1, N, LANES), jnp.float32),)
    return _call(kernel, out, E=E, B=B, pieces=K, name="selective_scan_backward",
                 scratch=scratch, interpret=interpret)(u, delta, A2, rows, D, saved, g, behind)


def _decay(delta: Array, A2: Array, forget: Array) -> Array:
    return jnp.exp2(delta * A2 + forget)


def _advance(h: Sequence[Array], A2: Sequence[Array], B: Sequence[Array], x: Array, delta: Array,
             forget: Array) -> tuple[list[Array], list[Array]]:
    """The states after a token, and its decays."""
    decays = [_decay(delta, a, forget) for a in A2]
    return [decay * before + x * b for decay, before, b in zip(decays, h, B, strict=True)], decays


def _go_back(state: tuple[Sequence[Array], Sequence[Array], Array], g: Array, u: Array,
             delta: Array, decays: Sequence[Array], A2: Sequence[Array], B: Sequence[Array],
             C: Sequence[Array], D: Array, before: Sequence[Array], after: Sequence[Array],
             ) -> tuple[tuple[list[Array], list[Array], Array], Array, Array, list[Array]]:
    """One step of the adjoint: (dh, dA, dD) in front of it, du, ddelta, parts of dB and dC."""
    (dh, dA, dD), x = state, delta * u
    dh, dA = list(dh), list(dA)
    of_B, of_C, to_x, to_delta = [], [], D * 0.0, D * 0.0
    for n in range(len(dh)):
        dh[n] = dh[n] + g * C[n]
        of_B.append(dh[n] * x)
        of_C.append(after[n] * g)
        to_x = to_x + dh[n] * B[n]
        dh[n] = dh[n] * decays[n]
        dlog = dh[n] * before[n]
        to_delta = to_delta + dlog * A2[n]
        dA[n] = dA[n] + dlog * delta
    du = to_x * delta + D * g
    return (dh, dA, dD + u * g), du, to_x * u + to_delta * math.log(2), of_B + of_C


class _Block:
    """Where this block works: its row, its piece of time, its channels."""

    def __init__(self, T: int, schedule: Schedule, backward: bool = False) -> None:
        pl, _ = _pallas()
        self.b, self.k = lax.axis_index("b"), lax.axis_index("k")
        self.steps, self._schedule, self._backward = T // schedule.pieces, schedule, backward
        self.tiles = self.steps // schedule.tile
        self.first = self.k * self.steps
        self.channels = pl.ds(lax.axis_index("e") * LANES, LANES)

    def pipeline(self, walk: Callable, carry: Any, *refs: Any, states: Any = None) -> Any:
        """Runs `walk` over the tiles of arrays (B,T,…) and of saved states, with a carry."""
        pl, plgpu = _pallas()
        tile = self._schedule.tile

        def at(t: Any) -> Any:
            return self.tiles - 1 - t if self._backward else t

        specs, arrays = [], []
        for ref in refs:
            shared = ref.shape[-1] % LANES
            width = ref.shape[-1] if shared else LANES
            specs.append(plgpu.BlockSpec((tile, width), lambda t: (at(t), 0)))
            time = pl.ds(self.first, self.steps)
            arrays.append(ref.at[self.b, time] if shared else ref.at[self.b, time, self.channels])
        if states is not None:
            specs.append(plgpu.BlockSpec((1, states.shape[2], LANES), lambda t: (at(t), 0, 0)))
            arrays.append(states.at[self.b, pl.ds(self.k * self.tiles, self.tiles), :,
                                    self.channels])

        def walk_and_wait(*arguments: Any) -> Any:
            carry = walk(*arguments)
            plgpu.commit_smem()  # all threads have read the tile before the next one comes there
            return carry

        return plgpu.emit_pipeline(walk_and_wait, grid=(self.tiles,), in_specs=specs,
                                   max_concurrent_steps=self._schedule.buffers,
                                   init_carry=carry)(*arrays)


def _pallas() -> tuple[Any, Any]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl, plgpu


def _call(kernel: Callable, out_type: Any, *, E: int, B: int, pieces: int, name: str,
          interpret: bool, scratch: Any = ()) -> Callable:
    _, plgpu = _pallas()
    more: dict[str, Any] = {}
    if interpret:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        more["interpret"] = InterpretGPUParams()
    # No automatic barriers: a thread reads and writes its own channel only, but for the tiles.
    return plgpu.kernel(
        kernel, out_type=out_type, grid=(E // LANES, pieces, B), grid_names=("e", "k", "b"),
        scratch_types=scratch, kernel_name=name, compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane), **more)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _load(ref: Any, index: Any) -> Array:
    """128 channels, one a thread, in float32."""
    return ref[index].astype(jnp.float32)


def _lanes() -> Any:
    return _pallas()[1].Layout.WG_STRIDED((LANES,), vec_size=1)


def _zeros(n: int, interpret: bool) -> list[Array]:
    zeros = jnp.zeros((LANES,), jnp.float32)
    return [zeros if interpret else _pallas()[1].layout_cast(zeros, _lanes()) for _ in range(n)]


def _shared_row(rows: Any, t: Any, N: int, interpret: bool) -> tuple[Any, Any, Any]:
    """B_t, C_t and the exponent of a reset: the same for all threads, read four at a time."""
    width = rows.shape[-1]
    if interpret:
        values = tuple(rows[t, i] for i in range(width))
    else:
        from hippocampus.ops.kernels.selective_scan_mlir import read_row

        _, plgpu = _pallas()
        splat = plgpu.ShapeDtypeStruct((LANES,), jnp.float32,
                                       layout=plgpu.Layout.WG_SPLAT((LANES,)))
        values = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(splat,) * width)(
            read_row)(rows.at[t])
    return values[:N], values[N:2 * N], values[2 * N]


def _sum_over_warps(values: Sequence[Array], interpret: bool) -> Array:
    """Thread l of each warp gets the sum of the l-th value over the 32 channels of its warp."""
    if interpret:  # the same sums, without shuffles
        stacked = jnp.stack([*values, *[jnp.zeros_like(values[0])] * (32 - len(values))])
        return stacked.reshape(32, LANES // 32, 32).sum(-1).T.reshape(LANES)
    from hippocampus.ops.kernels.selective_scan_mlir import exchange_halves

    _, plgpu = _pallas()
    one = plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=_lanes())
    return plgpu.inline_mgpu(arg_types=(_lanes(),) * len(values), return_type=one)(
        exchange_halves)(*values)
