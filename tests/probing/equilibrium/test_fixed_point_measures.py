"""Measurements of fixed points, on maps whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops.fixed_point import fixed_point
from hippocampus.probing.equilibrium import convergence, gradients, landscape
from hippocampus.probing.equilibrium.descent import astray, descent, energies_along

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, S = 2, 6, 4
STATES = np.random.default_rng(0).standard_normal((B, T, S)).astype(np.float32)


def contractive(z):
    return 0.5 * z + 1


def bistable(z):
    """Fixed points at -1 and 1, number by number; 0 repels."""
    return z - 0.3 * (z**3 - z)


def plain(f):
    """200 evaluations of a map, as a solver."""
    run = jax.jit(lambda z: jax.lax.fori_loop(0, 200, lambda _, z: f(z), z))
    return lambda z: (run(jnp.asarray(z)), np.ones((B, T), bool))


# ---------------------------------------------------------------- solvers and starts

def test_solvers_that_end_elsewhere_disagree_where_both_converged():
    near = STATES * (1 + 1e-4)
    far = np.where(np.arange(T)[None, :, None] == 2, -STATES, STATES)
    every, but_2 = np.ones((B, T), bool), np.arange(T)[None] != np.full((B, 1), 2)
    whole, pairs = convergence.agreement([STATES, near, far], [every, every, every])
    assert whole.tokens == 3 * B * T and whole.largest == pytest.approx(2, rel=1e-3)
    assert pairs[0, 1] == pytest.approx(1e-4, rel=1e-2) and pairs[0, 2] == pytest.approx(2)
    left_out, pairs = convergence.agreement([STATES, near, far], [every, every, but_2])
    assert left_out.largest == pytest.approx(1e-4, rel=1e-2)
    assert pairs[0, 2] == 0
    nothing, pairs = convergence.agreement([STATES, far], [every, ~every])
    assert nothing.tokens == 0 and np.isnan(nothing.largest) and np.isnan(pairs[0, 1])


@pytest.mark.parametrize(("f", "apart"), [(contractive, False), (bistable, True)])
def test_a_map_with_two_fixed_points_fails_uniqueness(f, apart):
    value, converged = plain(f)(np.abs(STATES))
    starts = convergence.random_starts(np.asarray(value), 3, seed=0)
    ends = convergence.from_starts(plain(f), starts, np.asarray(value), converged, allowed=1e-2)
    assert all(share == 1 for share, _ in ends)
    assert all((off.apart > 0.5) == apart and (off.largest > 0.5) == apart for _, off in ends)


def test_starts_are_noise_of_the_size_of_the_state():
    one, other = convergence.random_starts(3 * STATES, 2, seed=0)
    rms = np.sqrt((np.concatenate([one, other], -1) ** 2).mean())
    assert rms == pytest.approx(3, rel=0.3) and not np.allclose(one, other)


# ---------------------------------------------------------------- rate

@pytest.mark.parametrize("rho", [0.3, 0.9, 1.1])
def test_the_rate_of_a_linear_map_is_its_largest_eigenvalue(rho):
    matrix = jnp.diag(jnp.asarray([rho, 0.2, 0.1, 0.0]))
    residuals, end = convergence.picard(lambda z: z @ matrix + 1, jnp.asarray(STATES), 60)
    found = convergence.observed_rate(np.asarray(residuals))
    if rho < 1:
        np.testing.assert_allclose(found, rho, rtol=0.02)
        np.testing.assert_allclose(end[..., 0], 1 / (1 - rho), rtol=1e-2)
    else:  # the relative residual of what grows for ever tends to a constant
        assert (found > 0.95).all()


def test_a_residual_that_grows_has_a_rate_above_1_and_a_short_one_has_none():
    grows = 1e-3 * 1.2 ** np.arange(20)[:, None]
    assert convergence.observed_rate(grows) == pytest.approx(1.2)
    quick = np.asarray([0.5, 1e-3, 1e-9, 1e-9, 1e-9])[:, None]
    assert np.isnan(convergence.observed_rate(quick)).all()
    broken = np.asarray([1.0, np.inf, np.nan, 1.0, 1.0, 1.0])[:, None]
    assert np.isnan(convergence.observed_rate(broken)).all()


# ---------------------------------------------------------------- causality

def causal(z, inputs):
    return 0.5 * jnp.tanh(jnp.cumsum(z, 1)) + inputs


def leaky(z, inputs):
    return causal(z, inputs) + 1e-3 * z.mean(1, keepdims=True)


@pytest.mark.parametrize(("f", "options", "leak"), [
    (causal, {"method": "picard"}, False), (leaky, {"method": "picard"}, True),
    (causal, {"granularity": "sequence", "causal": False}, True)])
def test_a_leaky_map_and_a_leaky_solver_fail_causality(f, options, leak):
    solve = jax.jit(lambda inputs, limit: fixed_point(
        f, jnp.zeros_like(inputs), inputs, limit=limit, tol=0.0, gradient="none",
        **options).value)
    inputs, token = jnp.asarray(STATES), 3
    changed = inputs.at[:, token].add(1.0)
    found = convergence.leaks(solve, inputs, changed, token, (2, 4, 30))
    assert [one.limit for one in found] == [2, 4, 30]
    assert (found[-1].before > 0) == leak and found[-1].after == 1
    assert any(one.before for one in found) == leak


def test_a_single_bit_is_a_difference():
    other = np.nextafter(STATES, np.float32(9))
    assert convergence.differing(STATES, other).all()
    assert not convergence.differing(STATES, STATES.copy()).any()
    assert convergence.differing(np.float32(0), np.float32(-0.0)).all()


# ---------------------------------------------------------------- energy

def square(z):
    return 0.5 * (z**2).sum(-1)


@pytest.mark.parametrize(("size", "rose"), [(0.5, 0.0), (2.5, 1.0)])
def test_steps_that_overshoot_are_reported_as_rises(size, rose):
    def step(z):
        return z - size * z

    before, after, wrong = energies_along(step, astray(step, jax.random.key(0)), square,
                                          jnp.asarray(STATES), 3)
    found = descent(before, after, 1e-6)
    assert found.moves == 3 * B * T and found.rose == rose
    assert (found.largest_rise > 0.1) == bool(rose)
    if size == 0.5:
        assert found.fell == 1
        assert descent(before, wrong, 1e-6).rose > 0.2
        np.testing.assert_allclose(before[1:], after[:-1], rtol=1e-6)  # it goes on from its steps


def test_rounding_is_no_rise_and_a_number_that_is_none_is():
    before = np.asarray([100.0, 100.0, 100.0])
    found = descent(before, np.asarray([100.00001, 99.0, 100.0]), 1e-6)
    assert (found.rose, found.fell) == (0, pytest.approx(1 / 3)) and found.largest_rise > 0
    assert descent(before, np.asarray([np.nan, 99.0, 99.0]), 1e-6).rose == pytest.approx(1 / 3)


# ---------------------------------------------------------------- gradients

def test_gradients_are_compared_part_by_part_and_together():
    reference = {"a": {"x": np.asarray([3.0, 4.0])}, "b": np.asarray([0.0, 12.0])}
    found = gradients.compare({"a": {"x": np.asarray([4.0, 3.0])}, "b": reference["b"]}, reference)
    assert found["a"] == (5, pytest.approx(2**0.5 / 5), pytest.approx(24 / 25))
    assert found["b"][1:] == (0, 1)
    assert found["all"].size == 13 and found["all"].relative == pytest.approx(2**0.5 / 13)
    nothing = gradients.compare({"a": np.zeros(2)}, {"a": np.zeros(2)})["a"]
    assert nothing.relative == 0 and np.isnan(nothing.cosine)
    assert gradients.compare({"a": np.ones(2)}, {"a": np.zeros(2)})["a"].relative == np.inf


# ---------------------------------------------------------------- landscape

def test_the_plane_of_trajectories_has_the_directions_in_which_they_move():
    draw = np.random.default_rng(0)
    origin = draw.standard_normal(S)
    axes = np.linalg.qr(draw.standard_normal((S, 2)))[0].T
    flat = origin + draw.standard_normal((3, 5, 2)) @ axes
    plane = landscape.principal_plane(flat, origin)
    assert plane.share == pytest.approx(1)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane.origin + plane.project(flat) @ plane.axes, flat, atol=1e-12)
    off = landscape.principal_plane(draw.standard_normal((3, 50, S)) + origin, origin)
    assert off.share < 0.9


def test_a_grid_of_a_plane_lies_in_it_with_the_fixed_point_in_the_middle():
    used = np.asarray([True, True, False, True])
    plane = landscape.random_plane(np.arange(S, dtype=np.float64), seed=0, used=used)
    points = plane.points(2.0, 5)
    np.testing.assert_allclose(points[2, 2], np.arange(S))
    at = plane.project(points)
    np.testing.assert_allclose(at[0, :, 0], np.linspace(-2, 2, 5), atol=1e-12)
    np.testing.assert_allclose(at[:, 0, 1], np.linspace(-2, 2, 5), atol=1e-12)
    assert (points[..., 2] == 2).all()  # a coordinate that may not change


def test_starts_beyond_the_ridge_do_not_come_back():
    counted = np.ones((B, T), bool)
    value = np.ones((B, T, S), np.float32)
    near, far = landscape.basin(lambda z: plain(bistable)(z)[0], value, counted, (0.1, 1.5), 1e-2,
                                seed=0)
    assert near == 1 and far < 0.9
    whole = landscape.basin(lambda z: plain(contractive)(z)[0], 2 * value, counted, (0.1, 30.0),
                            1e-2, seed=0)
    assert whole == [1, 1]
    assert np.isnan(landscape.basin(lambda z: z, value, ~counted, (0.1,), 1e-2, seed=0)).all()
