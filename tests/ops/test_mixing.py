"""mix_normalized against float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops.mixing import mix_normalized
from tests.ops.float64 import distance, in_float64

B, T, D, P = 2, 3, 10, 3


def inputs(dtype: type) -> tuple:
    keys = jax.random.split(jax.random.key(0), 2 * P + 2)
    gates = jax.nn.softmax(jax.random.normal(keys[0], (B, T, P)))
    scales = [1 + 0.3 * jax.random.normal(k, (D,)) for k in keys[1:P + 1]]
    paths = [(4.0**p * jax.random.normal(k, (B, T, D))).astype(dtype)
             for p, k in enumerate(keys[P + 1:2 * P + 1])]
    return (gates, scales, paths), jax.random.normal(keys[-1], (B, T, D)).astype(dtype)


def plain(gates: jax.Array, scales: list, paths: list) -> jax.Array:
    return sum(gates[..., p, None] * s * y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)
               for p, (s, y) in enumerate(zip(scales, paths, strict=True)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_the_mix_and_all_its_gradients(dtype: type, tolerance: float) -> None:
    arguments, g = inputs(dtype)
    value, pull = jax.vjp(mix_normalized, *arguments)
    assert value.dtype == dtype

    def reference(arguments: tuple, g: jax.Array) -> tuple:
        value, pull = jax.vjp(plain, *arguments)
        return value, pull(g)

    expected = in_float64(reference, arguments, g)
    for found, wanted in zip(jax.tree.leaves((value, pull(g))), jax.tree.leaves(expected),
                             strict=True):
        assert distance(found, wanted) < tolerance


def test_a_path_of_zeros_is_no_problem() -> None:
    (gates, scales, paths), g = inputs(jnp.float32)
    paths[1] = jnp.zeros_like(paths[1])
    value, pull = jax.vjp(mix_normalized, gates, scales, paths)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((value, pull(g))))
