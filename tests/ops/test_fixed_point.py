"""Fixed points: the right ones, at the right cost, causal at any number of evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.ops.fixed_point import fixed_point
from hippocampus.testing import check_batch_invariance, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D = 2, 8, 6
IDS = jnp.asarray([[1] * 5 + [2] * 3, [1] * 1 + [2] * 4 + [0] * 3])
METHODS = ("picard", "anderson", "broyden")


def weights(size=0.7):
    W = jax.random.normal(jax.random.key(0), (D, D))
    return {"W": size * W / jnp.linalg.norm(W, 2),
            "u": jax.random.normal(jax.random.key(1), (B, T, D))}


def cell(z_BTD, w):
    """Causal: a token reads a decaying sum of the states up to itself."""
    def token(h, z):
        h = 0.5 * h + 0.5 * z
        return h, h

    h = jax.lax.scan(token, jnp.zeros_like(z_BTD[:, 0]), jnp.swapaxes(z_BTD, 0, 1))[1]
    return jnp.tanh((0.5 * z_BTD + 0.5 * jnp.swapaxes(h, 0, 1)) @ w["W"] + w["u"])


@functools.cache
def solver(**settings):
    return jax.jit(lambda w: fixed_point(cell, jnp.zeros((B, T, D)), w, **settings))


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_fixed_point_and_its_residual_is_that_of_the_formula(method):
    w = weights()
    solution = solver(method=method, tol=1e-5)(w)
    assert solution.converged.all() and solution.residual.max() <= 1e-5
    moved = np.asarray(cell(solution.value, w), np.float64)
    off = np.linalg.norm(moved - solution.value, axis=-1)
    np.testing.assert_allclose(solution.residual, off / (np.linalg.norm(moved, axis=-1) + 1e-8),
                               atol=3e-7)


@pytest.mark.parametrize("iterations", [2, 4, 30])
@pytest.mark.parametrize("method", METHODS)
def test_no_token_sees_a_later_one_at_any_number_of_iterations(method, iterations):
    run = jax.jit(lambda u: as_batch(fixed_point(
        cell, 0.1 * u, {**weights(), "u": u}, method=method, max_iterations=iterations,
        document_ids=IDS)))
    u = weights()["u"]
    check_causality(run, u, jit=False)
    check_batch_invariance(run, u, jit=False)


def as_batch(solution):
    """All of a solution that belongs to tokens, with B,T first."""
    solution = solution._asdict()
    del solution["evaluations"]
    if solution["iterates"] is None:
        del solution["iterates"]
    for name in ("residual_trace", "iterates"):
        if name in solution:
            solution[name] = jnp.moveaxis(solution[name], 0, 2)
    return solution


@pytest.mark.parametrize("method", METHODS)
def test_the_implicit_gradient_is_that_of_long_unrolling(method):
    def loss(gradient, tol):
        return jax.jit(jax.grad(lambda w: (fixed_point(
            cell, jnp.zeros((B, T, D)), w, method=method, gradient=gradient, tol=tol,
            max_iterations=60, backward_tol=1e-7, backward_iterations=60).value ** 2).sum()))

    implicit, unrolled = loss("implicit", 1e-6)(weights()), loss("unroll", 1e-7)(weights())
    for name in implicit:
        np.testing.assert_allclose(implicit[name], unrolled[name], rtol=0,
                                   atol=1e-5 * np.abs(unrolled[name]).max())


@pytest.mark.parametrize("settings", [
    {"method": "newton"}, {"granularity": "sequence"}, {"gradient": "exact"}, {"memory": 0},
    {"max_iterations": 0}, {"damping": 0.0}, {"granularity": "row", "causal": False}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        solver.__wrapped__(**settings)(weights())
