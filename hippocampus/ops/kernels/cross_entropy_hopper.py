"""Ratios of a vocabulary's probabilities to the target's, in one kernel for NVIDIA Hopper.

    r_NV = exp(x_N . w_V - t_N), 0 at the target and at rows that are no ids;    s_N = sum_v r_NV

The logits x w^T stay in registers: the kernel writes the ratios, rounded to the dtype of x as any
gradient of logits is, and one float32 sum for each row of a tile. Two groups of warps multiply
tiles by turns, so that one of them takes exponentials while the other keeps the tensor cores busy;
a third one fetches what they multiply. Every block works through every 132nd tile (`_BLOCKS`).

Written against Pallas' Mosaic GPU; names of jax 0.10 to 0.12.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TILE_N = 128
"""Tokens come in whole tiles of so many."""
_TILE_V = 128
_TILE_D = 64
_SLOTS = 4  # fetched ahead, 32 KiB each
_STRIPE = 64  # columns of 128 bytes, which a swizzled copy moves at once
_BLOCKS = 132  # multiprocessors of an H100; with fewer of them blocks queue, with more some rest
_GROUP = 8  # tiles of tokens that share a tile of the table while it is in the cache


def supports(n_rows: int, width: int, dtype: Any) -> bool:
    """Whether `ratios` takes a table of this size and dtype."""
    return jnp.dtype(dtype) == jnp.bfloat16 and n_rows % _TILE_V == 0 and width % _TILE_D == 0


def ratios(
    x_ND: Float[Array, "N D"], weight_VD: Float[Array, "V D"], target_logit_N: Float[Array, " N"],
    targets_N: Int[Array, " N"], n_ids: int, *, blocks: int = _BLOCKS,
) -> tuple[Float[Array, "N V"], Float[Array, " N"]]:
    """The ratios in the dtype of `x_ND`, and their float32 sums over the vocabulary.

    Args:
      x_ND: states, a multiple of `TILE_N`.
      weight_VD: the table, in the same dtype; see `supports`.
      target_logit_N: float32.
      targets_N: ids.
      n_ids: rows of the table that are ids.
      blocks: that run side by side.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (N, _), V = x_ND.shape, len(weight_VD)
    ratio_NV, sums_nN = plgpu.kernel(
        functools.partial(_kernel, n_ids=n_ids, blocks=blocks),
        out_type=(jax.ShapeDtypeStruct((N, V), x_ND.dtype),
                  jax.ShapeDtypeStruct((V // _TILE_V, N), jnp.float32)),
        grid=(blocks,), grid_names=("block",), num_threads=3, thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(x_ND, weight_VD, target_logit_N * math.log2(math.e), targets_N.astype(jnp.int32))
    return ratio_NV, sums_nN.sum(0)


def _kernel(x: Any, w: Any, logit: Any, target: Any, ratio: Any, sums: Any, *, n_ids: int,
            blocks: int) -> None:
    """One block; the arguments are references to the arrays of `ratios` in the main memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    shared = functools.partial(plgpu.SMEM, transforms=(
        plgpu.TilingTransform((8, _STRIPE)), plgpu.SwizzleTransform(128)))
    rows = (2, TILE_N)

    @functools.partial(
        pl.run_scoped,
        x_tile=shared((_SLOTS, TILE_N, _TILE_D), x.dtype),
        w_tile=shared((_SLOTS, _TILE_V, _TILE_D), x.dtype),
        staged=shared((2, _TILE_V // _STRIPE, TILE_N, _STRIPE), x.dtype),
        of_rows=(plgpu.SMEM(rows, jnp.float32), plgpu.SMEM(rows, jnp.int32),
                 plgpu.SMEM(rows, jnp.float32)),
        # A group waits for its own tiles only, so `full` is kept apart for the two of them.
        full=plgpu.Barrier(num_arrivals=2, num_barriers=2 * _SLOTS),
        empty=plgpu.Barrier(num_barriers=_SLOTS),
        rows_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        collective_axes="group")
    def run(x_tile: Any, w_tile: Any, staged: Any, of_rows: Any, full: Any, empty: Any,
            rows_full: Any) -> None:
        group = jax.lax.axis_index("group")
        steps, plan = x.shape[1] // _TILE_D, _plan(x.shape[0], w.shape[0], blocks)

        @pl.when(group == 2)
        def fetch() -> None:
            plgpu.set_max_registers(40, action="decrease")
            _fetch(x, w, x_tile, w_tile, full, empty, steps, plan)

        @pl.when(group < 2)
        def multiply() -> None:
            plgpu.set_max_registers(232, action="increase")
            logit_row, target_row, sum_row = (row.at[group] for row in of_rows)

            def tile(j: Array, _: None) -> None:
                i = 2 * j + group
                n, v = plan.tile(i)
                tokens = pl.ds(n * TILE_N, TILE_N)
                plgpu.copy_gmem_to_smem(logit.at[tokens], logit_row, rows_full.at[group])
                plgpu.copy_gmem_to_smem(target.at[tokens], target_row, rows_full.at[group])
                logits = _product(x_tile, w_tile, full, empty, i * steps, steps, group)
                plgpu.barrier_wait(rows_full.at[group])
                r = _exponentials(logits, logit_row, target_row, v * _TILE_V, n_ids, w.shape[0])
                _store(r, staged.at[group], sum_row,
                       ratio.at[tokens, pl.ds(v * _TILE_V, _TILE_V)], sums.at[v, tokens])

            jax.lax.fori_loop(0, jax.lax.div(plan.count - group + 1, jnp.int32(2)), tile, None)
            plgpu.wait_smem_to_gmem(0)


class _plan:
    """The tiles of a block, in order: the i-th is its group's i % 2."""

    def __init__(self, N: int, V: int, blocks: int):
        self._sizes, self._blocks = (N // TILE_N, V // _TILE_V), blocks
        self._first = jax.lax.axis_index("block")
        total = self._sizes[0] * self._sizes[1]
        self.count = jax.lax.div(total - self._first + blocks - 1, jnp.int32(blocks))

    def tile(self, i: Array) -> tuple[Array, Array]:
        """The tile's place along tokens and vocabulary."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        return plgpu.planar_snake(self._first + i * self._blocks, self._sizes, 0, _GROUP)


def _fetch(x: Any, w: Any, x_tile: Any, w_tile: Any, full: Any, empty: Any, steps: int,
           plan: _plan) -> None:
    """Fills the slots, one after the other, for both groups' tiles."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def tile(i: Array, _: None) -> None:
        n, v = plan.tile(i)
        group = jax.lax.rem(i, jnp.int32(2))

        def step(k: Array, _: None) -> None:
            at = i * steps + k
            slot = jax.lax.rem(at, jnp.int32(_SLOTS))
            pl.when(at >= _SLOTS)(lambda: plgpu.barrier_wait(empty.at[slot]))
            columns, ready = pl.ds(k * _TILE_D, _TILE_D), full.at[group * _SLOTS + slot]
            plgpu.copy_gmem_to_smem(x.at[pl.ds(n * TILE_N, TILE_N), columns], x_tile.at[slot],
                                    ready)
            plgpu.copy_gmem_to_smem(w.at[pl.ds(v * _TILE_V, _TILE_V), columns], w_tile.at[slot],
                                    ready)

        jax.lax.fori_loop(0, steps, step, None)

    jax.lax.fori_loop(0, plan.count, tile, None)


def _product(x_tile: Any, w_tile: Any, full: Any, empty: Any, first: Array, steps: int,
             group: Array) -> Array:
    """A tile's logits in registers; `first` counts the slots that were filled before its own."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def multiply(sums: Any) -> Array:
        def step(k: Array, _: None) -> None:
            slot = jax.lax.rem(first + k, jnp.int32(_SLOTS))
            plgpu.barrier_wait(full.at[group * _SLOTS + slot])
            plgpu.wgmma(sums, x_tile.at[slot], _transposed(w_tile.at[slot]))
            plgpu.wgmma_wait(1)  # the product before this one has read its slot
            before = jax.lax.rem(first + k + _SLOTS - 1, jnp.int32(_SLOTS))
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[before]))

        jax.lax.fori_loop(0, steps, step, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(empty.at[jax.lax.rem(first + steps - 1, jnp.int32(_SLOTS))])
        return sums[...]

    registers = plgpu.ACC((TILE_N, _TILE_V), jnp.float32)  # type: ignore[attr-defined]
    return pl.run_scoped(multiply, registers)


def _exponentials(logits: Array, logit_row: Any, target_row: Any, first_id: Array, n_ids: int,
                  n_rows: int) -> Array:
    """The ratios of a tile, in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def along_ids(row: Array) -> Array:
        return jax.lax.broadcast_in_dim(row, logits.shape, [0])

    layout = plgpu.Layout.WGMMA
    ids = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=layout)
    at_target = along_ids(_load(logit_row, layout.reduce(1)))
    target = along_ids(_load(target_row, layout.reduce(1)) - first_id)
    r = jnp.where(ids == target, 0.0, jnp.exp2(logits * math.log2(math.e) - at_target))
    return r if n_ids == n_rows else jnp.where(ids < n_ids - first_id, r, 0.0)


def _store(r: Array, staged: Any, sum_row: Any, ratio: Any, sums: Any) -> None:
    """Queues the way of a tile's ratios and sums to the main memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    total, low = r.sum(axis=1), r.astype(staged.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of this group's tile before
    sum_row[...] = total
    stripes = [slice(at, at + _STRIPE) for at in range(0, _TILE_V, _STRIPE)]
    for i, columns in enumerate(stripes):
        staged[i] = low[:, columns]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(sum_row, sums)
    for i, columns in enumerate(stripes):
        plgpu.copy_smem_to_gmem(staged.at[i], ratio.at[:, pl.ds(columns.start, _STRIPE)])


def _load(ref: Any, layout: Any) -> Array:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Callable[..., Array] = plgpu.load
    whole = ((),) if "idx" in inspect.signature(load).parameters else ()  # until jax 0.11
    return load(ref, *whole, layout=layout)


def _transposed(ref: Any) -> Any:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))  # until jax 0.10
