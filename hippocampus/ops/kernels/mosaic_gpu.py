"""The loop over time of the recurrences' kernels for NVIDIA GPUs from Hopper on (Pallas, Mosaic).

A thread block has one row of the batch and `CHANNELS` channels, a thread one of them with its
states in registers. The copy engine (TMA) brings blocks of time steps into shared memory a few
blocks ahead and takes results away, so the threads never wait for the main memory. Two things keep
them busy: all steps of a group are read before the first is computed (a store could else overwrite
what the next read wants, as far as the compiler knows), and nothing waits for the other threads
but once a block (Pallas by itself waits before and after every store).

With `interpret` the same kernels run without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CHANNELS = 128
"""Of a thread block: one per thread of a warpgroup."""

Values = tuple[Array, ...]
Group = Callable[[Sequence[Values], Values, Values], tuple[Values, Sequence[Values]]]
"""(inputs of each step, constants, carry) -> (carry, outputs of each step), all in float32."""


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts the time axis.

    Attributes:
      steps: time steps of a block.
      stages: blocks of inputs in shared memory: one in use, the others on their way.
      out_stages: blocks of outputs there.
      group: steps that are read before the first is computed; divides `steps`.
    """

    steps: int
    stages: int
    out_stages: int
    group: int


@dataclass(frozen=True)
class Rows:
    """What a group finds of an array of shape [planes,] B,T,E at every step.

    Attributes:
      array: number of the array.
      plane: which plane of a four-dimensional array.
      before: the row of the step before in time instead; zeros before the first.
    """

    array: int
    plane: int | None = None
    before: bool = False


def runs_here() -> bool:
    """Whether the GPUs that JAX sees, if any, have a copy engine (compute capability 9)."""
    device = jax.devices()[0]
    return device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) >= 9


def over_time(
    group: Group, arrays: Sequence[Array], inputs: Sequence[Rows],
    results: Sequence[jax.ShapeDtypeStruct], outputs: Sequence[Rows], blocks: Blocks, *,
    reverse: bool = False, carry: int = 1, sums: Sequence[int] = (),
    constants: Sequence[Float[Array, " E"]] = (), flags_BT: Float[Array, "B T"] | None = None,
    interpret: bool = False, name: str = "over_time",
) -> list[Array]:
    """Runs a group of steps after the other, for all rows and channels side by side.

    Args:
      group: the computation; steps come in the order of the loop.
      arrays: what is read, of shape B,T,E or P,B,T,E; T divides by `blocks.steps`, E by
        `CHANNELS`.
      inputs: what a step finds of them.
      results: shapes and dtypes of what is written.
      outputs: where the outputs of a step go.
      blocks: sizes.
      reverse: from the last time step to the first.
      carry: number of values per row and channel that go from group to group, zeros at first.
      sums: which of them are results in the end.
      constants: values per channel.
      flags_BT: a number per step, the last of its inputs; needs 32 steps in a block.
      interpret: run without a GPU.
      name: of the kernel in a profile.

    Returns:
      The results, then the sums of shape B,E in float32.
    """
    from jax.experimental.pallas import mosaic_gpu as pg

    B, T, E = arrays[0].shape[-3:]
    n = T // blocks.steps
    blocks = Blocks(blocks.steps, min(blocks.stages, n), min(blocks.out_stages, n), blocks.group)
    kernel = functools.partial(
        _kernel, group=group, inputs=inputs, outputs=outputs, blocks=blocks, n=n, reverse=reverse,
        counts=(len(arrays), len(constants), int(flags_BT is not None), len(results), len(sums)),
        carry=carry, sums=sums, interpret=interpret)

    def stages(rows: Rows, dtype: Any, count: int) -> Any:
        return pg.SMEM((count, 1 if rows.before else blocks.steps, CHANNELS), dtype)

    before = [rows for rows in inputs if rows.before]
    scratch: dict[str, Any] = {
        "ins": [stages(Rows(r.array), arrays[r.array].dtype, blocks.stages) for r in inputs],
        "befores": [stages(r, arrays[r.array].dtype, blocks.stages) for r in before],
        "flags": [] if flags_BT is None else [
            pg.SMEM((blocks.stages, blocks.steps), flags_BT.dtype)],
        "outs": [stages(r, results[r.array].dtype, blocks.out_stages) for r in outputs],
        "arrived": pg.Barrier(num_barriers=blocks.stages, num_arrivals=(
            len(inputs) + len(before) + int(flags_BT is not None)))}
    call = pg.kernel(
        kernel, out_type=[*results, *[jax.ShapeDtypeStruct((B, E), jnp.float32)] * len(sums)],
        grid=(E // CHANNELS, B), grid_names=("channels", "row"), scratch_types=scratch,
        compiler_params=pg.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name, **({"interpret": _interpreter()} if interpret else {}))
    found: list[Array] = call(
        *arrays, *constants, *([] if flags_BT is None else [flags_BT]))
    return found


def _kernel(*refs: Any, ins: list, befores: list, flags: list, outs: list, arrived: Any,
            group: Group, inputs: Sequence[Rows], outputs: Sequence[Rows], blocks: Blocks, n: int,
            reverse: bool, counts: tuple[int, ...], carry: int, sums: Sequence[int],
            interpret: bool) -> None:
    """One thread block: fetch ahead, wait, compute, send, block after block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as pg

    queue = list(refs)
    arrays, constants, flag_array, results, totals = (
        [queue.pop(0) for _ in range(count)] for count in counts)
    row, j = jax.lax.axis_index("row"), jax.lax.axis_index("channels")
    channels, steps = pl.ds(j * CHANNELS, CHANNELS), blocks.steps

    def begin(i: Any) -> Any:
        return (n - 1 - i if reverse else i) * steps

    def place(ref: Any, rows: Rows, times: Any) -> Any:
        lead = (row,) if rows.plane is None else (rows.plane, row)
        return ref.at[(*lead, times, channels)]

    def fetch(i: Any, slot: Any) -> None:
        first, bar = begin(i), arrived.at[slot]
        for rows, shared in zip(inputs, ins, strict=True):
            pg.copy_gmem_to_smem(place(arrays[rows.array], rows, pl.ds(first, steps)),
                                 shared.at[slot], bar)
        for rows, shared in zip([r for r in inputs if r.before], befores, strict=True):
            pg.copy_gmem_to_smem(
                place(arrays[rows.array], rows, pl.ds(jnp.maximum(first - 1, 0), 1)),
                shared.at[slot], bar)
        for ref, shared in zip(flag_array, flags, strict=True):
            pg.copy_gmem_to_smem(ref.at[row, pl.ds(first, steps)], shared.at[slot], bar)

    for i in range(blocks.stages):
        fetch(jnp.int32(i), i)
    per_channel = tuple(ref[channels] for ref in constants)

    def block(i: Any, state: Values) -> Values:
        slot, out_slot = _modulo(i, blocks.stages), _modulo(i, blocks.out_stages)
        pg.barrier_wait(arrived.at[slot])
        pg.wait_smem_to_gmem(blocks.out_stages - 1, wait_read_only=True)
        state = _block(
            group, inputs, [ref.at[slot] for ref in ins], [ref.at[slot] for ref in befores],
            [ref.at[slot] for ref in flags], [ref.at[out_slot] for ref in outs], per_channel, state,
            blocks, reverse, begin(i) == 0)
        pg.commit_smem()  # from here on no thread reads this block of inputs
        for rows, shared in zip(outputs, outs, strict=True):
            pg.copy_smem_to_gmem(
                shared.at[out_slot], place(results[rows.array], rows, pl.ds(begin(i), steps)),
                commit_group=False)
        pg.commit_smem_to_gmem_group()

        @pl.when(i + blocks.stages < n)
        def _() -> None:
            fetch(i + blocks.stages, slot)

        return state

    state = jax.lax.fori_loop(
        jnp.int32(0), jnp.int32(n), block, tuple(_zeros(interpret) for _ in range(carry)))
    for ref, k in zip(totals, sums, strict=True):
        ref[row, channels] = state[k]
    pg.wait_smem_to_gmem(0)


def _block(group: Group, inputs: Sequence[Rows], ins: list, befores: list, flags: list, outs: list,
           constants: Values, state: Values, blocks: Blocks, reverse: bool,
           is_first: Any) -> Values:
    """The steps of a block in shared memory, group after group."""
    steps, size = blocks.steps, blocks.group

    def some(k: Any, state: Values) -> Values:
        at = [steps - 1 - k * size - u if reverse else k * size + u for u in range(size)]
        lowest, edges, columns = size - 1 if reverse else 0, iter(befores), []
        for rows, ref in zip(inputs, ins, strict=True):
            column = [ref[r - rows.before] if u != lowest or not rows.before
                      else _before(ref, next(edges), r, is_first) for u, r in enumerate(at)]
            columns.append([value.astype(jnp.float32) for value in column])
        columns += [[jnp.broadcast_to(ref[r], (CHANNELS,)) for r in at] for ref in flags]
        state, values = group(list(zip(*columns, strict=True)), constants, state)
        for r, step in zip(at, values, strict=True):
            for ref, value in zip(outs, step, strict=True):
                ref[r] = value.astype(ref.dtype)
        return state

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(steps // size), some, state)


def _before(ref: Any, edge: Any, r: Any, is_first: Any) -> Array:
    """The row before one that may be a block's first: of the block, of that before, or zeros."""
    inside = ref[jnp.maximum(r - 1, 0)].astype(jnp.float32)
    outside = edge[0].astype(jnp.float32)
    outside = jnp.where(_everywhere(is_first), jnp.zeros_like(outside), outside)
    return jnp.where(_everywhere(r > 0), inside, outside)


def _everywhere(condition: Any) -> Array:
    return jnp.broadcast_to(condition, (CHANNELS,))  # a kernel's `where` broadcasts nothing


def _modulo(i: Any, count: int) -> Any:
    return jax.lax.rem(i, jnp.int32(count))


def _zeros(interpret: bool) -> Array:
    """Zeros that lie in registers as what is read does; the loop's carry must not change that."""
    from jax.experimental.pallas import mosaic_gpu as pg

    zeros = jnp.zeros((CHANNELS,), jnp.float32)
    if interpret:
        return zeros
    return pg.layout_cast(zeros, pg.Layout.WG_STRIDED((CHANNELS,), vec_size=1))


def _interpreter() -> Any:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
