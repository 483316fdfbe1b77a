"""Estimates of a Jacobian against the Jacobian itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_cell import B, D, T, cell, weights

from hippocampus.errors import ConfigError
from hippocampus.ops.jacobian import contraction, jacobian_norm
from hippocampus.ops.linear_scan import linear_scan

pytestmark = pytest.mark.usefixtures("quick_compiles")


def symmetric(rho):
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    return jnp.asarray(Q * np.linspace(-0.2, rho, D) @ Q.T, jnp.float32)


def scaled(z_BTD, w):
    return w["scale"][:, None, None] * (z_BTD @ w["W"])


def test_the_contraction_of_each_row_is_its_largest_eigenvalue():
    w = {"W": symmetric(0.9), "scale": jnp.asarray([1.0, 2.0])}
    z = weights()["u"]
    found = jax.jit(lambda z, w: contraction(scaled, z, w, jax.random.key(0), iterations=40))(z, w)
    np.testing.assert_allclose(found, [0.9, 1.8], rtol=1e-3)


def test_gradients_of_the_contraction_go_through_the_last_product_only():
    w = {"W": symmetric(0.9), "scale": jnp.asarray([1.0, 2.0])}
    z, key = weights()["u"], jax.random.key(0)
    value, grads = jax.jit(jax.value_and_grad(
        lambda w: contraction(scaled, z, w, key, iterations=3)[1]))(w)
    np.testing.assert_allclose(grads["scale"], [0, value / 2], rtol=1e-5)
    v = jax.random.normal(key, z.shape)
    for _ in range(2):
        v = v @ w["W"].T

    def last(W):
        product = 2 * v[1] @ W.T
        return jnp.sqrt((product * product).sum() / (v[1] * v[1]).sum())

    np.testing.assert_allclose(grads["W"], jax.grad(last)(w["W"]), rtol=1e-4, atol=1e-6)
    zero = jax.grad(lambda w: contraction(scaled, z, w, key).sum())({**w, "W": 0 * w["W"]})
    assert all(np.isfinite(g).all() for g in zero.values())


def test_scans_with_a_backward_pass_of_their_own_have_a_contraction():
    decay = jnp.full((B, T, D), 0.5)
    found = jax.jit(lambda z: contraction(
        lambda z, a: 0.4 * linear_scan(decay * a, z), z, 1.0, jax.random.key(0), iterations=1))(
            weights()["u"])
    assert found.shape == (B,) and (found > 0.4).all() and (found < 0.8).all()


def test_the_norm_is_on_average_that_of_each_token_s_derivatives():
    w, z = weights(), weights()["u"]
    J = np.asarray(jax.jacrev(cell)(z, w))  # to B,T,D from B,T,D
    wanted = (J**2).sum((0, 1, 2)).sum(-1) / D
    keys = jax.random.split(jax.random.key(0), 3000)
    draws = jax.jit(jax.vmap(lambda key: jacobian_norm(cell, z, w, key)))(keys)
    error = np.asarray(draws).std(0) / len(keys) ** 0.5
    assert draws.shape == (len(keys), B, T) and (np.abs(draws.mean(0) - wanted) < 4 * error).all()
    assert (error < 0.05 * wanted).all()


def test_the_norm_has_a_gradient():
    w, z, key = {"W": symmetric(0.9), "scale": jnp.ones(B)}, weights()["u"], jax.random.key(0)
    found = jax.jit(jax.grad(lambda w: jacobian_norm(scaled, z, w, key).sum()))(w)["W"]
    v = jax.random.normal(key, z.shape)
    wanted = jax.grad(lambda W: ((v @ W.T) ** 2).mean(-1).sum())(w["W"])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_contraction_needs_a_product():
    with pytest.raises(ConfigError):
        contraction(scaled, weights()["u"], {}, jax.random.key(0), iterations=0)
