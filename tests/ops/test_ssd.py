"""ssd: the matrix products against the recurrence and its adjoint in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.ops import ssd as module
from hippocampus.testing import assert_close, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

NAMES = ("y", "h", "dx", "ddt", "dA", "dB", "dC", "dD", "dh0")
BACKENDS = ("sequential", "chunked")
B, H, P, G, N = 2, 4, 3, 2, 5
CHUNK = 8

ssd = jax.jit(functools.partial(module.ssd, chunk=CHUNK), static_argnames="backend")


def reference(x, dt, A, Bm, C, D, h0, reset, g, g_h):
    """y, the last state and the gradients of all inputs, step by step in float64."""
    x, dt, A, Bm, C, D, h0, g, g_h = (
        np.asarray(v, np.float64) for v in (x, dt, A, Bm, C, D, h0, g, g_h))
    T, heads = x.shape[1], H // G
    Bh, Ch = (np.repeat(v, heads, 2) for v in (Bm, C))
    decay = np.where(np.asarray(reset)[..., None], 0.0, np.exp(dt * A))[..., None, None]
    h, states = h0, [h0]
    for t in range(T):
        h = decay[:, t] * h + (dt[:, t, :, None] * x[:, t])[..., None] * Bh[:, t, :, None]
        states.append(h)
    before, after = np.stack(states[:-1], 1), np.stack(states[1:], 1)
    y = (after * Ch[:, :, :, None]).sum(-1) + D[:, None] * x
    adjoint, later = np.zeros_like(after), g_h
    for t in reversed(range(T)):
        adjoint[:, t] = later + g[:, t, ..., None] * Ch[:, t, :, None]
        later = decay[:, t] * adjoint[:, t]
    dz = (adjoint * Bh[:, :, :, None]).sum(-1)
    dlog = (adjoint * decay * before).sum((-1, -2))
    dBh = (adjoint * (dt[..., None] * x)[..., None]).sum(3)
    dCh = (g[..., None] * after).sum(3)
    dB, dC = (v.reshape(B, T, G, heads, N).sum(3) for v in (dBh, dCh))
    return (y, h, dz * dt[..., None] + D[:, None] * g, (dz * x).sum(-1) + dlog * A,
            (dlog * dt).sum((0, 1)), dB, dC, (g * x).sum((0, 1, 3)), later)


def inputs(T, resets=0.2, seed=0):
    rng = np.random.default_rng(seed)
    x, g = rng.normal(size=(2, B, T, H, P))
    Bm, C = rng.normal(size=(2, B, T, G, N))
    h0, g_h = rng.normal(size=(2, B, H, P, N))
    arrays = (x, np.logaddexp(0, rng.normal(size=(B, T, H)) - 1), -np.exp(rng.normal(size=H)),
              Bm, C, rng.normal(size=H), h0)
    return (*(jnp.asarray(v, jnp.float32) for v in arrays), rng.uniform(size=(B, T)) < resets,
            jnp.asarray(g, jnp.float32), jnp.asarray(g_h, jnp.float32))


@functools.cache
def with_gradients(backend, resets=True):
    @jax.jit
    def run(x, dt, A, Bm, C, D, h0, reset, g, g_h):
        def scan(x, dt, A, Bm, C, D, h0):
            return module.ssd(x, dt, A, Bm, C, D, h0_BHPN=h0, reset_BT=reset if resets else None,
                              chunk=CHUNK, backend=backend)

        out, vjp = jax.vjp(scan, x, dt, A, Bm, C, D, h0)
        return *out, *vjp((g, g_h))

    return run


@pytest.mark.parametrize("T", [1, 5, 24, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_states_and_gradients_are_those_of_the_recurrence(backend, T):
    arrays = inputs(T, seed=T)
    found = with_gradients(backend)(*arrays)
    for name, actual, desired in zip(NAMES, found, reference(*arrays), strict=True):
        assert_close(actual, desired, n_operations=4 * (T + N), what=name)


def test_without_resets_it_is_one_document():
    arrays = inputs(33, resets=0.0)
    found = with_gradients("chunked", resets=False)(*arrays)
    for name, actual, desired in zip(NAMES, found, reference(*arrays), strict=True):
        assert_close(actual, desired, n_operations=4 * 33, what=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("steps", "rates"), [(1, 16), (10, 1), (100, 1)])
def test_strong_decays_neither_overflow_nor_drown_gradients_in_rounding(steps, rates, dtype):
    x, dt, A, Bm, C, D, h0, reset, g, g_h = inputs(24)
    x, Bm, C, g = (v.astype(dtype) for v in (x, Bm, C, g))
    arrays = (x, dt * steps, A * rates, Bm, C, D, h0, reset, g, g_h)
    found = with_gradients("chunked")(*arrays)
    for name, actual, desired in zip(NAMES, found, reference(*arrays), strict=True):
        # In float32 a sum s of large steps has few digits behind the point.
        n_operations = 400 * steps if dtype == jnp.float32 else 4
        assert_close(actual, desired, n_operations=n_operations, dtype=dtype, what=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_any_length_give_what_the_whole_gives(backend):
    x, dt, A, Bm, C, D, h0, reset, *_ = inputs(33, resets=0.05)
    whole, last = ssd(x, dt, A, Bm, C, D, h0_BHPN=h0, reset_BT=reset, backend=backend)
    parts, h = [], h0
    for part in (slice(0, 1), slice(1, 20), slice(20, 33)):
        y, h = ssd(x[:, part], dt[:, part], A, Bm[:, part], C[:, part], D, h0_BHPN=h,
                   reset_BT=reset[:, part], backend=backend)
        parts.append(y)
    assert_close(jnp.concatenate(parts, 1), whole, n_operations=33)
    assert_close(h, last, n_operations=33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_reset(backend):
    x, dt, A, Bm, C, D, h0, *_ = inputs(24)
    reset = np.zeros((B, 24), bool)
    reset[:, 10] = True
    before, h = ssd(x, dt, A, Bm, C, D, h0_BHPN=h0, reset_BT=reset, backend=backend)
    after, h_after = ssd(x.at[:, :10].add(7), dt, A, Bm, C, D, h0_BHPN=h0 + 5, reset_BT=reset,
                         backend=backend)
    np.testing.assert_array_equal(before[:, 10:], after[:, 10:])
    np.testing.assert_array_equal(h, h_after)
    assert not np.array_equal(before[:, :10], after[:, :10])


def test_chunks_are_causal():
    x, dt, A, Bm, C, D, *_ = inputs(20)
    check_causality(lambda x: ssd(x, dt, A, Bm, C, D)[0], x)
    check_causality(lambda dt: ssd(x, dt, A, Bm, C, D)[0], dt)


def test_bfloat16_products_are_near_the_recurrence_of_the_same_inputs():
    x, dt, A, Bm, C, D, h0, reset, g, g_h = inputs(33, resets=0.05)
    low = [v.astype(jnp.bfloat16) for v in (x, Bm, C)]
    arrays = (low[0], dt, A, low[1], low[2], D, h0, reset, g.astype(jnp.bfloat16), g_h)
    found = with_gradients("chunked")(*arrays)
    assert (found[0].dtype, found[1].dtype) == (jnp.bfloat16, jnp.float32)
    for name, actual, desired in zip(NAMES, found, reference(*arrays), strict=True):
        assert_close(actual, desired, n_operations=16, dtype=jnp.bfloat16, what=name)


def test_one_chunk_whose_state_nobody_reads_has_the_gradients_of_several():
    # XLA for CPUs once read memory that it had not written here: large enough for its library.
    rng = np.random.default_rng(0)
    x, Bm, C = (jnp.asarray(rng.normal(size=(1, 256, n, 64)), jnp.float32) for n in (4, 1, 1))
    dt = jnp.full((1, 256, 4), 0.05)

    def gradients(chunk):
        def loss(x, dt, Bm, C):
            return (module.ssd(x, dt, -jnp.ones(4), Bm, C, chunk=chunk)[0] ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(x, dt, Bm, C)

    for one, several in zip(gradients(256), gradients(64), strict=True):
        assert_close(one, several, n_operations=256)


def test_what_does_not_fit_is_refused():
    arrays = inputs(2)[:5]
    with pytest.raises(ConfigError, match="known: chunked, sequential"):
        ssd(*arrays, backend="pallas")
    with pytest.raises(ConfigError, match="multiple of G"):
        ssd(arrays[0][:, :, :3], arrays[1][:, :, :3], arrays[2][:3], *arrays[3:])
