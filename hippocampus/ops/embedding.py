"""Tables of one row per id: their size, and looking rows up on one device or many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hippocampus.ops import placement

VOCAB_MULTIPLE = 128


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of an embedding table: tables divide well over devices and tiles."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def embed(table_VD: Float[Array, "V D"], ids_BT: Int[Array, "B T"], *,
          exchange_below: float = 0.0) -> Float[Array, "B T D"]:
    """table[ids].

    Under a mesh the rows of the table stay spread over the tensor axis, and what the fsdp axis
    has of it is gathered, as a matrix is before its product. Left to itself XLA spreads the
    looked-up vectors like the table and then copies all of them to every device to get them back
    into rows of the batch.

    Args:
      table_VD: a row per id.
      ids_BT: ids in [0, V).
      exchange_below: a share of the rows, at most 1. Where the devices of an fsdp axis ask for
        fewer together, they send each other those, and the table is not gathered: 1 for one that
        nothing else gathers.
    """
    V = table_VD.shape[0]
    if _rows_asked_for(V, *ids_BT.shape) < exchange_below * V:
        return placement.map_shards(
            _exchange_rows, (table_VD, ids_BT), (("rows", None), ("batch", placement.SEQUENCE)),
            ("batch", placement.SEQUENCE, None))
    table_VD = placement.constrain(table_VD, "tensor", None)
    return placement.constrain(table_VD[ids_BT], "batch", placement.SEQUENCE, None)


def _rows_asked_for(V: int, B: int, T: int) -> int:
    """By the devices of an fsdp axis together; V where it does not cut both rows and batch."""
    fsdp = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    of_batch = placement.shards("batch", B)
    if fsdp == 1 or of_batch == 1 or placement.shards("rows", V) == 1:
        return V
    return fsdp * (B // of_batch) * (T // placement.shards(placement.SEQUENCE, T))


def _exchange_rows(table_rD: Array, ids_bt: Array) -> Array:
    """On each device: sends of its rows of the table what others ask for, gets what it asks for."""
    ids_Bt = jax.lax.all_gather(ids_bt, "fsdp", axis=0, tiled=True)
    place_Bt = ids_Bt - jax.lax.axis_index(placement.AXES["rows"]) * table_rD.shape[0]
    here_Bt = (place_Bt >= 0) & (place_Bt < table_rD.shape[0])
    rows_BtD = jnp.where(here_Bt[..., None], table_rD[jnp.where(here_Bt, place_Bt, 0)], 0)
    # One device has the row and the others zeros: the sums are exact.
    rows_btD = jax.lax.psum_scatter(rows_BtD, "fsdp", scatter_dimension=0, tiled=True)
    return jax.lax.psum(rows_btD, "tensor")
