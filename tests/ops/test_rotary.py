"""Rotary positions: a rotation, whose products depend on distances only."""

import jax.numpy as jnp
import numpy as np

from hippocampus.ops.rotary import rotate
from hippocampus.testing import assert_close

T, D_HEAD, THETA = 7, 6, 100.0
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, T, 3, D_HEAD)), jnp.float32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (2, T))


def test_it_is_the_rotation_of_the_formula():
    x, positions = np.asarray(X, np.float64), np.asarray(POSITIONS)
    expected = np.zeros_like(x)
    for i in range(D_HEAD // 2):
        angle = (positions * THETA ** (-2 * i / D_HEAD))[..., None]
        a, b = x[..., i], x[..., i + D_HEAD // 2]
        expected[..., i] = a * np.cos(angle) - b * np.sin(angle)
        expected[..., i + D_HEAD // 2] = a * np.sin(angle) + b * np.cos(angle)
    assert_close(rotate(X, POSITIONS, THETA), expected, n_operations=T)


def test_position_zero_is_the_identity():
    np.testing.assert_array_equal(rotate(X, jnp.zeros_like(POSITIONS), THETA), X)


def test_norms_are_preserved():
    assert_close(jnp.linalg.norm(rotate(X, POSITIONS * 1000, THETA), axis=-1),
                 jnp.linalg.norm(X, axis=-1), n_operations=D_HEAD)


def test_products_depend_on_the_distance_only():
    def products(shift):
        q = rotate(X, POSITIONS + shift, THETA)
        k = rotate(jnp.flip(X, 1), POSITIONS + shift, THETA)
        return jnp.einsum("bthd,bshd->bhts", q, k)

    assert_close(products(50), products(0), n_operations=50)
    unrotated = jnp.einsum("bthd,bshd->bhts", X, jnp.flip(X, 1))
    assert float(jnp.abs(products(0) - unrotated).max()) > 0.1


def test_half_precision_keeps_its_dtype():
    assert rotate(X.astype(jnp.bfloat16), POSITIONS, THETA).dtype == jnp.bfloat16
