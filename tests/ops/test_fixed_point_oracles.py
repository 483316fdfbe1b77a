"""Fixed points beside what is known of them: other solvers, closed forms, costs, bad maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

from hippocampus.ops.fixed_point import fixed_point

METHODS = ("picard", "anderson", "broyden")
N, D = 6, 12


def linear_map(largest):
    """A symmetric matrix of known eigenvalues, and a shift for every token."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))
    W = (Q * np.linspace(0.1, largest, D)) @ Q.T
    return W, np.random.default_rng(1).normal(size=(N, D))


def affine(z, w):
    return z @ w["W"] + w["b"]


def solve(f, w, **settings):
    return jax.jit(lambda w: fixed_point(f, jnp.zeros((N, D)), w, causal=False, **settings))(w)


@functools.cache
def arrays(largest):
    W, b = linear_map(largest)
    return {"W": jnp.asarray(W, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_map_has_the_fixed_point_and_the_gradient_of_its_closed_form(method):
    W, b = linear_map(0.8)

    @jax.jit
    def run(w):
        def loss(w):
            solution = fixed_point(affine, jnp.zeros((N, D)), w, method=method, causal=False,
                                   max_iterations=100, tol=1e-7, backward_iterations=100,
                                   backward_tol=1e-7)
            return solution.value.sum(), solution

        return jax.grad(loss, has_aux=True)(w)

    grads, solution = run(arrays(0.8))
    inverse = np.linalg.inv(np.eye(D) - W)
    expected = b @ inverse
    np.testing.assert_allclose(solution.value, expected, atol=3e-6 * np.abs(expected).max())
    u = np.ones((N, D)) @ inverse.T
    np.testing.assert_allclose(grads["b"], u, atol=1e-5 * np.abs(u).max())
    np.testing.assert_allclose(grads["W"], expected.T @ u, atol=1e-5 * np.abs(expected.T @ u).max())


def test_the_fixed_point_is_that_of_another_library():
    def f(z, w):
        return jnp.tanh(affine(z, w))

    w = arrays(0.8)
    other = optimistix.fixed_point(f, optimistix.FixedPointIteration(rtol=1e-7, atol=1e-7),
                                   jnp.zeros((N, D)), w, max_steps=500).value
    for method in METHODS:
        found = solve(f, w, method=method, tol=1e-7, max_iterations=200)
        np.testing.assert_allclose(found.value, other, atol=2e-6)


def test_a_slow_map_takes_anderson_at_most_three_fifths_of_picards_evaluations():
    picard, anderson = (solve(affine, arrays(0.9), method=method, tol=1e-4, max_iterations=200)
                        for method in ("picard", "anderson"))
    assert picard.converged.all() and anderson.converged.all()
    assert int(picard.evaluations) >= 30
    assert int(anderson.evaluations) <= 0.6 * int(picard.evaluations)


def test_the_memory_of_the_implicit_gradient_does_not_grow_with_the_iterations():
    def temporaries(gradient, iterations):
        step = jax.jit(jax.grad(lambda w: fixed_point(
            affine, jnp.zeros((N, D)), w, causal=False, gradient=gradient, tol=0.0,
            max_iterations=iterations, backward_iterations=iterations).value.sum()))
        return step.lower(arrays(0.8)).compile().memory_analysis().temp_size_in_bytes

    trace = 4 * N * (64 - 8)  # the residuals of all evaluations are part of the result
    assert temporaries("implicit", 64) <= temporaries("implicit", 8) + 2 * trace
    assert temporaries("unroll", 64) > temporaries("unroll", 8) + 4 * N * D * (64 - 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_token_without_a_fixed_point_is_finite_and_leaves_its_neighbours_alone(method):
    w = {**arrays(0.8), "growth": jnp.ones((N, 1)).at[2].set(1e30)}

    def f(z, w):
        return w["growth"] * affine(z, w)

    @jax.jit
    def run(w):
        def loss(w):
            solution = fixed_point(f, jnp.zeros((N, D)), w, method=method, causal=False,
                                   max_iterations=40)
            return solution.value.sum(), solution

        return jax.grad(loss, has_aux=True)(w)

    grads, bad = run(w)
    _, good = run({**w, "growth": jnp.ones((N, 1))})
    assert not bad.converged[2] and np.isfinite(bad.value).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    others = np.arange(N) != 2
    assert bad.converged[others].all()
    np.testing.assert_array_equal(bad.value[others], good.value[others])
