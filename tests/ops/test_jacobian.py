"""Size and contraction of a Jacobian, beside matrices whose size is known."""

import jax
import jax.numpy as jnp
import numpy as np

from hippocampus.ops.jacobian import contraction, jacobian_norm

ROWS, T, D = 2, 3, 8


def matrix(largest):
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    return jnp.asarray((Q * np.linspace(0.1, largest, D)) @ Q.T, jnp.float32)


def affine(z, W):
    return z @ W


def test_the_contraction_tends_to_the_largest_eigenvalue_and_knows_its_gradient():
    z, key = jnp.zeros((ROWS, T, D)), jax.random.key(1)
    value, slope = jax.jit(jax.value_and_grad(lambda size: contraction(
        affine, z, size * matrix(0.9), key, iterations=200).mean()))(1.0)
    np.testing.assert_allclose(value, 0.9, rtol=1e-3)
    np.testing.assert_allclose(slope, 0.9, rtol=1e-2)  # with the matrix, its eigenvalues grow


def test_a_row_has_its_own_contraction():
    sizes = jnp.asarray([0.5, 2.0])
    found = jax.jit(lambda: contraction(
        lambda z, W: sizes[:, None, None] * (z @ W), jnp.zeros((ROWS, T, D)), matrix(0.9),
        jax.random.key(2), iterations=200))()
    np.testing.assert_allclose(found, 0.9 * sizes, rtol=1e-3)


def test_the_norm_of_the_jacobian_is_right_on_average():
    W, z = matrix(0.9), jnp.zeros((ROWS, T, D))
    keys = jax.random.split(jax.random.key(3), 400)
    estimates = jax.jit(jax.vmap(lambda key: jacobian_norm(affine, z, W, key)))(keys)
    assert estimates.shape == (400, ROWS, T)
    exact = float((W * W).sum()) / D
    np.testing.assert_allclose(estimates.mean(), exact, rtol=0.05)
    assert np.asarray(estimates).std() > 0.05 * exact
