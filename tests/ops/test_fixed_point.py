"""Fixed points: the right ones, at the right cost, causal at any number of evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import scipy.optimize
from causal_cell import IDS, METHODS, B, D, T, cell, weights

from hippocampus.errors import ConfigError
from hippocampus.ops.fixed_point import Solution, fixed_point
from hippocampus.ops.fixed_point_methods import solve
from hippocampus.testing import (
    check_batch_invariance,
    check_causality,
    check_document_isolation,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

K, LONG = 30, 48


@functools.cache
def _solver(method, done):
    return jax.jit(lambda w, ids, limit, z0, tol: fixed_point(
        lambda z, w: cell(z, w, ids), z0, w, method=method, max_iterations=K, limit=limit,
        tol=tol, document_ids=ids, done=done, record=True, gradient="none", memory=3))


def find(method, w, tol=1e-3, limit=K, z0=None, ids=IDS, done=None):
    """A solution; compiled once for each method."""
    found = _solver(method, done)(w, ids, limit, 0.1 * w["u"] if z0 is None else z0, tol)
    return jax.tree.map(np.asarray, found)


def by_token(solution):
    """All of a solution that belongs to tokens, with B,T first."""
    found = {name: a for name, a in solution._asdict().items()
             if name != "evaluations" and a is not None}
    for name in {"residual_trace", "iterates"} & set(found):
        found[name] = np.moveaxis(found[name], 0, 2)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_fixed_point_and_its_residual_is_that_of_the_formula(method):
    w = weights()
    solution = find(method, w, 1e-5)
    assert solution.converged.all() and solution.residual.max() <= 1e-5
    moved = np.asarray(cell(solution.value, w), np.float64)
    off = np.linalg.norm(moved - solution.value, axis=-1)
    np.testing.assert_allclose(solution.residual, off / (np.linalg.norm(moved, axis=-1) + 1e-8),
                               atol=3e-7)


def test_the_result_is_that_of_other_libraries():
    w = weights()
    found = [find(method, w, 1e-5).value for method in METHODS]
    by_optimistix = optimistix.fixed_point(
        cell, optimistix.FixedPointIteration(rtol=1e-6, atol=1e-6), jnp.zeros((B, T, D)), w).value
    by_scipy = scipy.optimize.fixed_point(
        lambda z: np.asarray(cell(z, w)), np.zeros((B, T, D)), xtol=1e-6, method="iteration")
    for value in (*found, by_optimistix):
        np.testing.assert_allclose(value, by_scipy, atol=5e-5)


@pytest.mark.parametrize("size", [0.7, 4.0], ids=["contracts", "expands"])
@pytest.mark.parametrize("method", METHODS)
def test_no_token_sees_a_later_one_or_another_row_at_any_number_of_iterations(method, size):
    def run(limit):
        return lambda u: by_token(find(method, {**weights(size), "u": u}, limit=limit))

    for limit in (2, 4, K):
        check_causality(run(limit), weights()["u"], jit=False)
        check_batch_invariance(run(limit), weights()["u"], jit=False)


@pytest.mark.parametrize("method", METHODS)
def test_documents_of_a_row_are_solved_as_if_each_stood_alone(method):
    def run(u, ids, positions):
        found = by_token(find(method, {**weights(), "u": u}, ids=ids))
        return {name: found[name] for name in ("value", "iterations", "converged", "iterates")}

    check_document_isolation(run, weights()["u"], [3, 4], n_operations=20 * T, jit=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_token_freezes_for_good_and_only_when_all_before_it_in_its_document_have(method):
    solution = find(method, weights())
    iterations, ids = solution.iterations, np.asarray(IDS)
    assert solution.converged.all() and len(np.unique(iterations)) > 2
    same = ids[:, 1:] == ids[:, :-1]
    assert (np.diff(iterations)[same] >= 0).all()
    assert (np.diff(iterations)[~same] < 0).any(), "documents wait for each other"
    assert int(solution.evaluations) == iterations.max()
    for b, t in np.ndindex(B, T):
        at = iterations[b, t] - 1
        assert (solution.iterates[at:, b, t] == solution.value[b, t]).all()
        assert (solution.residual_trace[at:, b, t] == solution.residual[b, t]).all()
        states = solution.iterates[:at + 1, b, t]
        assert (states[1:] != states[:-1]).any(-1).all(), "froze too early"


def test_the_residual_of_every_evaluation_is_recorded_and_the_least_one_is_the_result_s():
    w = weights(4.0)
    solution = find("anderson", w)
    assert not solution.converged.all() and int(solution.evaluations) == K
    moved = np.stack([cell(z, w) for z in solution.iterates])
    residuals = (np.linalg.norm(moved - solution.iterates, axis=-1)
                 / np.linalg.norm(moved, axis=-1))
    np.testing.assert_allclose(solution.residual_trace, residuals, rtol=1e-4)
    open_ = ~solution.converged
    assert (solution.residual == solution.residual_trace.min(0))[open_].all()
    best = np.take_along_axis(solution.iterates,
                              solution.residual_trace.argmin(0)[None, ..., None], 0)[0]
    assert (best == solution.value)[open_].all()


def slow_map(z, w):
    """Eigenvalues evenly from -0.3 to 0.9; a share of each token's input is of earlier tokens."""
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    W = jnp.asarray(Q * np.linspace(-0.3, 0.9, 16) @ Q.T, jnp.float32)
    age = jnp.arange(LONG)[:, None] - jnp.arange(LONG)
    past = jnp.einsum("ts,bsd->btd", jnp.where(age >= 0, 0.5 ** (age + 1), 0), z)
    return ((1 - w["share"]) * z + w["share"] * past) @ W + w["u"]


@functools.cache
def slowly(method, share):
    w = {"u": jax.random.normal(jax.random.key(1), (B, LONG, 16)), "share": share}
    solution = jax.tree.map(np.asarray, _slow_solver(method)(w))
    assert solution.converged.all()
    return solution


@functools.cache
def _slow_solver(method):
    return jax.jit(lambda w: fixed_point(slow_map, w["u"], w, method=method, tol=1e-4,
                                         max_iterations=100, gradient="none"))


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_sixty_percent_of_picard_s_evaluations_are_enough_on_a_slow_map(method):
    picard, other = (int(slowly(m, 0.0).evaluations) for m in ("picard", method))
    assert picard >= 30 and other <= 0.6 * picard


@pytest.mark.parametrize("method", ["anderson", "broyden"])
def test_tokens_that_move_together_take_fewer_evaluations_than_with_picard(method):
    """What a token's own changes do not explain must not throw it off its way."""
    picard, other = (float(slowly(m, 0.5).iterations.mean()) for m in ("picard", method))
    assert other <= 0.9 * picard


def test_a_further_condition_holds_tokens_back():
    def late(z, fz):  # the change of an energy, say
        return jnp.abs((fz * fz).sum(-1) - (z * z).sum(-1)) <= 1e-5

    plain, both = (find("picard", weights(), 1e-1, done=done) for done in (None, late))
    z, fz = both.value, cell(both.value, weights())
    assert both.converged.all() and late(z, fz).all() and not late(plain.value, cell(
        plain.value, weights())).all()
    assert (both.iterations >= plain.iterations).all()


def test_a_decoder_finds_what_the_full_pass_found_token_by_token():
    """With the states of all evaluations of the past, and when it froze."""
    w, ids = weights(), jnp.ones((B, T), int)
    full = find("anderson", w, ids=ids)
    past_KBTD, first = full.iterates[:, :, :-1], 0.1 * w["u"][:, -1:]

    def last(z_B1D, past_KBTD, k):
        return cell(jnp.concatenate([past_KBTD[k], z_B1D], 1), w, ids)[:, -1:]

    @jax.jit
    def run(tol, earliest):
        return fixed_point(last, first, past_KBTD, tol=tol, max_iterations=K, gradient="none",
                           indexed=True, record=True, earliest=earliest, memory=3)

    found = run(1e-3, full.iterations[:, -2:-1])
    assert (found.iterations == full.iterations[:, -1:]).all()
    np.testing.assert_allclose(found.iterates, full.iterates[:, :, -1:], atol=1e-6)
    assert (run(2e-2, full.iterations[:, -2:-1]).iterations == full.iterations[:, -2:-1]).all()
    assert not run(1e-3, np.full((B, 1), K + 1, np.int32)).converged.any()


def test_no_evaluations_leave_the_first_state_and_one_judges_it():
    w = weights()
    none, one = (find("anderson", w, limit=limit) for limit in (0, 1))
    for solution in (none, one):
        assert (solution.value == 0.1 * w["u"]).all() and not solution.converged.any()
        assert (solution.iterates == 0.1 * w["u"]).all()
    assert int(none.evaluations) == 0 and np.isinf(none.residual).all()
    assert int(one.evaluations) == 1 and np.isfinite(one.residual_trace).all()
    there = find("anderson", w, 1e-5).value
    at_once = find("anderson", w, z0=there)
    assert (at_once.value == there).all() and (at_once.iterations == 1).all()


def test_one_set_of_weights_for_a_sequence_solves_it_too():
    solution = jax.jit(lambda w: fixed_point(
        cell, w["u"], w, granularity="sequence", causal=False, tol=1e-5, memory=2,
        gradient="none"))(weights())
    assert solution.converged.all() and (solution.iterations == solution.iterations[:, :1]).all()
    np.testing.assert_allclose(solution.value, find("picard", weights(), 1e-5).value, atol=1e-4)


def test_states_keep_their_dtype_and_need_no_time_axis():
    dtype = jnp.bfloat16
    w = {"W": weights()["W"].astype(dtype), "u": weights()["u"][0, 0].astype(dtype)}

    def f(z, w):
        return jnp.tanh(z @ w["W"] + w["u"])

    @jax.jit
    def run(w):
        value, pull = jax.vjp(lambda w: fixed_point(
            f, jnp.zeros_like(w["u"]), w, tol=0.02, memory=1).value, w)
        return value, pull(jnp.ones_like(value))[0]

    value, grads = run(w)
    assert value.dtype == dtype and {g.dtype for g in jax.tree.leaves(grads)} == {np.dtype(dtype)}
    off = (f(value, w) - value).astype(jnp.float32)
    assert float(jnp.linalg.norm(off) / jnp.linalg.norm(value.astype(jnp.float32))) <= 0.03


@pytest.mark.parametrize("m", [1, 5, 12])
def test_small_systems_are_solved_and_dependent_columns_left_out(m):
    rows = np.random.default_rng(m).normal(size=(m, m + 3, 7))
    system = np.einsum("ikn,jkn->ijn", rows, rows).astype(np.float32)
    right = np.random.default_rng(1).normal(size=(m, 7)).astype(np.float32)
    wanted = np.stack([np.linalg.solve(system[..., n].astype(np.float64), right[:, n])
                       for n in range(7)], -1)
    np.testing.assert_allclose(solve(system, right), wanted, rtol=2e-3, atol=1e-4)
    if m > 1:
        twice = np.ones((m, m, 1), np.float32)
        solution = np.asarray(solve(twice, np.ones((m, 1), np.float32)))
        np.testing.assert_allclose(solution.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("settings", [
    {"method": "newton"}, {"granularity": "sequence"}, {"granularity": "row", "causal": False},
    {"gradient": "exact"}, {"memory": 0}, {"max_iterations": 0}, {"damping": 0.0},
    {"indexed": True}, {"z0": jnp.zeros((B, T, D), int)}, {"f": lambda z, w: z[..., :1]},
    {"f": lambda z, w: z.astype(jnp.bfloat16)}], ids=lambda settings: next(iter(settings)))
def test_impossible_settings_are_refused_with_a_hint(settings):
    settings = {"f": cell, "z0": jnp.zeros((B, T, D)), "args": weights(), **settings}
    with pytest.raises(ConfigError) as error:
        fixed_point(**settings)
    assert error.value.hint


def test_a_solution_is_a_tree_of_arrays():
    assert len(jax.tree.leaves(find("picard", weights()))) == len(Solution._fields)
