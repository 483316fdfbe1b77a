"""Which rows of a table go between devices; that values stay is in test_sequence_shards.py."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from hippocampus.config import MESH_AXES, MeshConfig
from hippocampus.ops.embedding import embed
from hippocampus.ops.placement import AXES


def primitives(V: int, B: int, axes: tuple[int, int, int, int], exchange: float = 1.0) -> str:
    """What a lookup of B x 16 ids consists of."""
    mesh = AbstractMesh(axes, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(lambda table, ids: embed(table, ids, exchange_below=exchange))(
            jax.ShapeDtypeStruct((V, 8), jnp.float32), jax.ShapeDtypeStruct((B, 16), jnp.int32)))


@pytest.mark.parametrize("axes", [(1, 4, 1, 1), (1, 2, 2, 2), (2, 2, 1, 1)])
def test_devices_send_each_other_the_rows_that_they_ask_for(axes):
    assert "reduce_scatter" in primitives(256, 8, axes)


@pytest.mark.parametrize(("V", "B", "axes", "exchange", "why"), [
    (256, 8, (1, 4, 1, 1), 0.0, "nobody asked for an exchange"),
    (256, 8, (1, 4, 1, 1), 0.5, "more is asked for than that share"),
    (128, 8, (1, 4, 1, 1), 1.0, "it is no larger than what is asked for"),
    (258, 8, (1, 4, 1, 1), 1.0, "its rows do not divide"),
    (256, 6, (1, 4, 1, 1), 1.0, "the batch does not divide"),
    (256, 8, (4, 1, 2, 1), 1.0, "fsdp cuts nothing"),
    (256, 8, (1, 1, 1, 1), 1.0, "one device")])
def test_a_table_is_gathered_where(V, B, axes, exchange, why):
    assert "reduce_scatter" not in primitives(V, B, axes, exchange)


def test_rows_lie_as_the_default_rules_lay_a_table():
    axes = next(axes for pattern, axes in MeshConfig().rules if "embedding$" in pattern)
    assert axes.split(",")[0] == "+".join(AXES["rows"])  # else every lookup would move the table
