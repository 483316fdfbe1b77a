"""Tables of one row per id: their size, and looking rows up on one device or many."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from hippocampus.ops import placement

VOCAB_MULTIPLE = 128


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of an embedding table: tables divide well over devices and tiles."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def embed(table_VD: Float[Array, "V D"], ids_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """table[ids].

    Under a mesh the rows of the table stay spread over the tensor axis, and what the fsdp axis
    has of it is gathered, as a matrix is before its product. Left to itself XLA spreads the
    looked-up vectors like the table and then copies all of them to every device to get them back
    into rows of the batch.
    """
    table_VD = placement.constrain(table_VD, "tensor", None)
    return placement.constrain(table_VD[ids_BT], "batch", placement.SEQUENCE, None)
