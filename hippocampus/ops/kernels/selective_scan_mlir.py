"""What the selective scan's kernels say to Mosaic GPU directly, as Pallas has no words for it.

Imported while a kernel is built for a GPU, and only then. `_` is Mosaic's launch context.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

WARP = 32


def read_row(_: Any, ref: Any) -> tuple[Any, ...]:
    """Every number of a row in shared memory, for all threads; 16 bytes are one instruction."""
    f32, pointer = ir.F32Type.get(), utils.memref_ptr(ref)
    (width,) = ir.MemRefType(ref.type).shape
    fours = [llvm.load(ir.VectorType.get((4,), f32), utils.getelementptr(pointer, [i], f32),
                       alignment=16) for i in range(0, width, 4)]
    return tuple(mosaic.FragmentedArray.splat(_element(four, j), (4 * WARP,))
                 for four in fours for j in range(4))


def exchange_halves(_: Any, *arrays: Any) -> Any:
    """Thread l of each warp gets the sum of the l-th array over its warp; 32 arrays at most.

    In each of five rounds a thread hands half of its values to a partner and adds the other half
    that it gets: 16, 8, 4, 2, 1 shuffles.
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    register = arrays[0].registers.flat[0]
    values = [_element(array.registers.flat[0], 0) for array in arrays]
    values += [utils.c(0.0, f32)] * (WARP - len(values))
    distance = WARP // 2
    while distance:
        bit = arith.andi(utils.thread_idx(), utils.c(distance, i32))
        upper = arith.cmpi(arith.CmpIPredicate.ne, bit, utils.c(0, i32))
        values = [arith.addf(arith.select(upper, high, low),
                             utils.shfl_bfly(arith.select(upper, low, high), distance))
                  for low, high in zip(values[:distance], values[distance:], strict=True)]
        distance //= 2
    total = vector.broadcast(register.type, values[0])
    return mosaic.FragmentedArray(_registers=np.array([total], dtype=object),
                                  _layout=arrays[0].layout, _is_signed=None)


def _element(value: Any, i: int) -> Any:
    return vector.extract(value, dynamic_position=[],
                          static_position=ir.DenseI64ArrayAttr.get([i]))
