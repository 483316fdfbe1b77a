"""linear_scan: every backend against the recurrence and its hand-derived adjoint in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.ops import linear_scan as module
from hippocampus.testing import assert_close, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

BACKENDS = ("sequential", "associative", "chunked", "pallas")
LENGTHS = (1, 2, 7, 24, 33)
B, E = 2, 3

linear_scan = jax.jit(module.linear_scan, static_argnames="backend")


def reference(a, x, h0, reset, g):
    """h and (da, dx, dh0) for the upstream gradient g, step by step in float64."""
    a, x, h0, g = (np.asarray(v, np.float64) for v in (a, x, h0, g))
    T, kept = x.shape[1], np.where(np.asarray(reset)[..., None], 0.0, 1.0)
    h, previous = np.zeros_like(x), h0
    for t in range(T):
        previous = h[:, t] = kept[:, t] * a[:, t] * previous + x[:, t]
    da, dx, later = np.zeros_like(x), np.zeros_like(x), np.zeros_like(h0)
    for t in reversed(range(T)):
        dx[:, t] = later = g[:, t] + later
        da[:, t] = kept[:, t] * later * (h[:, t - 1] if t else h0)
        later = kept[:, t] * a[:, t] * later
    return h, (da, dx, later)


@functools.cache
def value_and_gradients(backend):
    @jax.jit
    def run(a, x, h0, reset, g):
        h, vjp = jax.vjp(
            lambda a, x, h0: linear_scan(a, x, h0, reset, backend=backend), a, x, h0)
        return h, vjp(g)

    return run


def inputs(T, decays="random", resets=True, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 1, (B, T, E))
    if decays == "extreme":
        a = rng.choice([0.0, 1.0, 0.99999], (B, T, E))
    reset = rng.uniform(size=(B, T)) < 0.2 if resets else np.zeros((B, T), bool)
    x, g = rng.normal(size=(2, B, T, E))
    a, x, h0, g = (jnp.asarray(v, jnp.float32) for v in (a, x, rng.normal(size=(B, E)), g))
    return a, x, h0, reset, g


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_and_gradients_are_those_of_the_recurrence(backend, T):
    for decays in ("random", "extreme"):
        for resets in (False, True):
            arrays = inputs(T, decays, resets, seed=T)
            h, gradients = value_and_gradients(backend)(*arrays)
            expected_h, expected = reference(*arrays)
            assert_close(h, expected_h, n_operations=T, what="h")
            names = ("da", "dx", "dh0")
            assert_close(dict(zip(names, gradients, strict=True)),
                         dict(zip(names, expected, strict=True)), n_operations=T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_one_sums_and_of_zero_forgets(backend):
    ones = jnp.ones((1, 9, 1))
    total = linear_scan(ones, ones, backend=backend)[0, :, 0]
    assert total.tolist() == list(range(1, 10))
    assert linear_scan(ones * 0, ones, backend=backend)[0, :, 0].tolist() == [1.0] * 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_reset(backend):
    a, x, h0, _, _ = inputs(24, resets=False)
    reset = np.zeros((B, 24), bool)
    reset[:, 10] = True
    whole = linear_scan(a, x, h0, reset, backend=backend)
    after = linear_scan(a, x.at[:, :10].add(7), h0 + 5, reset, backend=backend)
    np.testing.assert_array_equal(whole[:, 10:], after[:, 10:])
    assert not np.array_equal(whole[:, :10], after[:, :10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_at_the_first_token_ignores_the_initial_state(backend):
    a, x, h0, _, _ = inputs(7, resets=False)
    reset = np.zeros((B, 7), bool)
    reset[0, 0] = True
    with_state = linear_scan(a, x, h0, reset, backend=backend)
    without = linear_scan(a, x, None, backend=backend)
    np.testing.assert_array_equal(with_state[0], without[0])
    assert not np.allclose(with_state[1], without[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_carrying_the_last_state_continues_the_scan(backend):
    a, x, h0, reset, _ = inputs(33)
    whole = linear_scan(a, x, h0, reset, backend=backend)
    first = linear_scan(a[:, :20], x[:, :20], h0, reset[:, :20], backend=backend)
    second = linear_scan(a[:, 20:], x[:, 20:], first[:, -1], reset[:, 20:], backend=backend)
    assert_close(jnp.concatenate([first, second], axis=1), whole, n_operations=33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scan_is_causal(backend):
    a, x, *_ = inputs(24, resets=False)
    check_causality(lambda x: linear_scan(a, x, backend=backend), x)
    check_causality(lambda a: linear_scan(a, x, backend=backend), a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_gradients(backend):
    a, x, h0, reset, g = inputs(7)

    @jax.jit
    def curvature(a):
        def loss(a):
            return (linear_scan(a, x, h0, reset, backend=backend) * g).sum()

        return jax.grad(lambda a: (jax.grad(loss)(a) ** 2).sum())(a)

    # By hand: differences of the float64 gradient.
    direction = np.random.default_rng(1).normal(size=a.shape)

    def squared(step):
        moved = np.asarray(a, np.float64) + step * direction
        return (reference(moved, x, h0, reset, g)[1][0] ** 2).sum()

    expected = (squared(1e-5) - squared(-1e-5)) / 2e-5
    np.testing.assert_allclose((curvature(a) * direction).sum(), expected, rtol=1e-4)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    x = jnp.ones((1, 2, 1))
    with pytest.raises(ConfigError, match="sequential, associative, chunked, pallas"):
        linear_scan(x, x, backend="parallel")
