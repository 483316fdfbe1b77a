"""Gradients of fixed points: right, of constant memory, and finite whatever happens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_cell import IDS, METHODS, B, D, T, cell, weights
from float64 import in_float64

from hippocampus.ops.fixed_point import fixed_point

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = {
    "implicit": {"tol": 1e-6, "max_iterations": 60, "backward_tol": 1e-6,
                 "backward_iterations": 60},
    "unroll": {"tol": 0.0, "max_iterations": 40},
    "phantom": {"tol": 1e-6, "max_iterations": 60, "phantom_steps": 3}}


def solve(w, method, gradient, ids=IDS, **settings):
    return fixed_point(lambda z, w: cell(z, w, ids), 0.1 * jax.lax.stop_gradient(w["u"]), w,
                       method=method, gradient=gradient, document_ids=ids, memory=3,
                       **{**SETTINGS[gradient], **settings})


@functools.cache
def _solver(method, gradient):
    def run(w, cotangent, limit):
        def value(w):
            solution = solve(w, method, gradient, limit=limit)
            return solution.value, solution

        _, pull, solution = jax.vjp(value, w, has_aux=True)
        return solution, pull(cotangent)[0]

    return jax.jit(run)


# Differs everywhere and leaves the first tokens out.
COTANGENT = np.cos(np.arange(B * T * D, dtype=np.float32)).reshape(B, T, D)
COTANGENT[:, 0] = 0


def gradients(method, gradient, w, cotangent=COTANGENT, limit=60):
    """A solution and its gradient; compiled once for each method and gradient."""
    return jax.tree.map(np.asarray, _solver(method, gradient)(w, cotangent, limit))


def assert_near(found, wanted, share):
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, err_msg=name,
                                   atol=share * np.abs(wanted[name]).max())


@pytest.mark.parametrize("gradient", ["implicit", "unroll"])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_a_long_unrolling(method, gradient):
    solution, grads = gradients(method, gradient, weights())
    assert gradient == "unroll" or solution.converged.all()
    assert_near(grads, gradients("picard", "unroll", weights())[1], 1e-5)


def test_the_implicit_gradient_is_the_closed_form_of_a_linear_map():
    """z = u + z W: with G the loss's gradient, that of u is G (1 - W^T)^-1, that of W is z^T it."""
    w = weights()
    G = np.cos(np.arange(B * T * D)).reshape(B, T, D)

    def run(W, u, G):
        return jax.jit(jax.grad(lambda W, u: (G * fixed_point(
            lambda z, w: w[1] + z @ w[0], jnp.zeros_like(u), (W, u), tol=1e-13,
            backward_tol=1e-13, max_iterations=50, backward_iterations=50).value).sum(), (0, 1)
        ))(W, u)

    of_W, of_u = in_float64(run, w["W"], w["u"], G)
    W, u = (np.asarray(w[name], np.float64) for name in ("W", "u"))
    inverse = np.linalg.inv(np.eye(D) - W)
    np.testing.assert_allclose(of_u, G @ inverse.T, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(of_W, np.einsum("btd,bte->de", u @ inverse, G @ inverse.T),
                               rtol=1e-9, atol=1e-10)


def test_unrolled_picard_is_a_plain_loop_whether_steps_are_recomputed_or_not():
    def loop(w, z):
        for _ in range(3):  # the result has been evaluated: 4 evaluations are 3 steps
            z = z + 0.5 * (cell(z, w) - z)
        return (COTANGENT * z).sum()

    def unrolled(w, z, remat):
        return (COTANGENT * fixed_point(
            cell, z, w, method="picard", damping=0.5, gradient="unroll", max_iterations=4,
            tol=0.0, remat=remat, document_ids=IDS).value).sum()

    w, z0 = weights(), weights()["u"] * 0.1
    wanted = jax.jit(jax.grad(loop, (0, 1)))(w, z0)
    for remat in (False, True):
        found = jax.jit(jax.grad(functools.partial(unrolled, remat=remat), (0, 1)))(w, z0)
        assert_near({**found[0], "z0": found[1]}, {**wanted[0], "z0": wanted[1]}, 1e-6)


def test_phantom_gradients_are_those_of_a_few_steps_from_the_result():
    w = weights()
    solution, grads = gradients("anderson", "phantom", w)
    first = gradients("anderson", "implicit", w)[0]

    @jax.jit
    def steps(w, z):
        for _ in range(3):
            z = cell(z, w)
        return (COTANGENT * z).sum()

    assert_near(grads, jax.grad(steps)(w, first.value), 1e-5)
    np.testing.assert_allclose(solution.value, first.value, atol=1e-5)
    assert int(solution.evaluations) == int(first.evaluations) + 3


@pytest.mark.parametrize("method, limit", [("anderson", 60), ("anderson", 3), ("broyden", 3)])
def test_the_gradient_of_a_token_reaches_all_its_past_and_nothing_else(method, limit):
    ids = np.asarray(IDS)
    for b, t in ((0, 4), (0, 6), (1, 3)):
        one = np.zeros((B, T, D), np.float32)
        one[b, t] = 1
        found = (gradients(method, "implicit", weights(), one, limit)[1]["u"] != 0).any(-1)
        past = (ids == ids[b, t]) & (np.arange(T) <= t) & (np.arange(B) == b)[:, None]
        np.testing.assert_array_equal(found, past)


def test_memory_does_not_grow_with_the_iterations_of_an_implicit_gradient():
    def temporary_bytes(gradient, **settings):
        return jax.jit(jax.grad(lambda w: (COTANGENT * solve(
            w, "picard", gradient, **settings).value).sum())).lower(
                weights()).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary_bytes("implicit", max_iterations=n, backward_iterations=n)
                 for n in (8, 64))
    residuals, states = 56 * B * T * 4, 56 * B * T * D * 4
    assert many - few <= 2 * residuals < states  # the trace has one number for each token
    assert temporary_bytes("unroll", max_iterations=64) > many + states


def test_a_solution_may_stand_in_a_loop_and_a_branch_and_close_over_what_those_know():
    def looped(w):
        def body(total, step):
            number, ids = step

            def solved(total):
                def f(z, u):
                    return cell(z, {**w, "u": u}, jnp.where(number > 0, 0, ids))

                return total + (COTANGENT * fixed_point(
                    f, jnp.zeros((B, T, D)), w["u"], document_ids=ids,
                    done=lambda z, fz: (z + w["u"])[..., 0] * number <= 0,
                    **SETTINGS["implicit"]).value).sum()

            return jax.lax.cond(number == 0, solved, lambda t: t + (w["u"] ** 2).sum(), total), None

        return jax.lax.scan(body, 0.0, (jnp.arange(2), jnp.stack([IDS, IDS])))[0]

    w = weights()
    wanted = gradients("anderson", "implicit", w)[1]
    assert_near(jax.jit(jax.grad(looped))(w), {**wanted, "u": wanted["u"] + 2 * w["u"]}, 1e-5)


@pytest.mark.parametrize("method, gradient", [
    *((method, gradient) for method in METHODS for gradient in ("implicit", "unroll")),
    ("anderson", "phantom")])
def test_where_nothing_converges_values_and_gradients_are_finite_all_the_same(method, gradient):
    for size, leak in ((4.0, 0.0), (50.0, 1.0)):  # the second one overflows
        solution, grads = gradients(method, gradient, weights(size, leak))
        assert not solution.converged.all()
        assert all(np.isfinite(a).all() for a in (*grads.values(), solution.value))
        assert np.isfinite(solution.residual).all() and all(np.any(g) for g in grads.values())


@pytest.mark.parametrize("method, gradient", [
    *((method, gradient) for method in METHODS for gradient in ("implicit", "unroll")),
    ("anderson", "phantom")])
def test_a_token_without_a_finite_value_disturbs_only_those_that_read_it(method, gradient):
    w = weights()
    broken = {**w, "u": w["u"].at[0, 3].set(jnp.nan)}
    clean, grads_clean = gradients(method, gradient, w)
    solution, grads = gradients(method, gradient, broken)
    assert all(np.isfinite(a).all() for a in (*grads.values(), solution.value))
    assert np.isinf(solution.residual[0, 3]) and not solution.converged[0, 3:5].any()
    reads = np.zeros((B, T), bool)
    reads[0, 3:5] = True  # the rest of its document
    for name in ("value", "residual", "converged", "iterations"):
        found, wanted = getattr(solution, name), getattr(clean, name)
        assert (found == wanted)[~reads].all(), name
    np.testing.assert_array_equal(grads["u"][1], grads_clean["u"][1])


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_a_value_that_is_not_finite_once_costs_an_iteration_and_no_more(method):
    w = weights()
    z0 = w["u"].at[1, 2, 0].set(jnp.inf)

    @jax.jit
    def run(w):
        return fixed_point(lambda z, w, k: jnp.where(k == 3, jnp.nan, cell(z, w)), z0, w,
                           method=method, tol=1e-5, max_iterations=40, indexed=True, memory=3,
                           gradient="none", document_ids=IDS, record=True)

    solution = jax.tree.map(np.asarray, run(w))
    assert np.isinf(solution.residual_trace[3]).all() and solution.converged.all()
    best = solution.residual_trace[:3].argmin(0)[None, ..., None]
    assert (solution.iterates[4] == np.take_along_axis(solution.iterates, best, 0)[0]).all()
    np.testing.assert_allclose(solution.value, gradients(method, "implicit", w)[0].value,
                               atol=1e-4)
