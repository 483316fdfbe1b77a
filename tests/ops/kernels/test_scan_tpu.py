"""The TPU kernels of the recurrence in JAX's interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.layers.modern_ssm import decay_and_input
from hippocampus.ops.kernels import scan_tpu
from hippocampus.testing import assert_close

# Rows of 16 make two blocks of rows; `small_blocks` makes blocks of 8 steps.
SHAPES = [(8, 16, 256), (2, 8, 128), pytest.param((16, 24, 384), marks=pytest.mark.full)]


@pytest.fixture(autouse=True)
def interpreted():
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        yield


def doubles(function):
    """The results of a function in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function())


def sequential(a, x, reverse=False):
    def step(h, ax):
        h = ax[0] * h + ax[1]
        return h, h

    time_major = (jnp.swapaxes(a, 0, 1), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(
        jax.lax.scan(step, jnp.zeros_like(x[:, 0]), time_major, reverse=reverse)[1], 0, 1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def decays(*shape):
    return np.random.default_rng(9).uniform(0.1, 1, shape).astype(np.float32)


def small_blocks(monkeypatch):
    """Blocks of 8 steps, so that short sequences have several."""
    monkeypatch.setattr(scan_tpu, "_BLOCK_BYTES", 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_states_and_gradients_are_those_of_the_formula(shape, monkeypatch):
    small_blocks(monkeypatch)
    a, x, g = decays(*shape), normal(*shape), normal(*shape, seed=1)

    def expected():
        h, vjp = jax.vjp(sequential, a.astype(np.float64), x.astype(np.float64))
        return h, vjp(g.astype(np.float64)), sequential(
            a.astype(np.float64), x.astype(np.float64), reverse=True)

    h, gradients, backwards = doubles(expected)
    T = shape[1]
    assert_close(scan_tpu.scan(a, x), h, n_operations=T)
    assert_close(scan_tpu.scan(a, x, reverse=True), backwards, n_operations=T)
    assert_close(scan_tpu.scan_backward(a, h.astype(np.float32), g), gradients, n_operations=T)


def test_bfloat16_is_read_and_written_and_the_state_stays_float32():
    shape = (4, 8, 128)
    a, x = (jnp.asarray(array, jnp.bfloat16) for array in (decays(*shape), normal(*shape)))
    expected = doubles(lambda: sequential(*(
        jnp.asarray(np.asarray(array, np.float64)) for array in (a, x))))
    h = scan_tpu.scan(a, x)
    assert h.dtype == jnp.bfloat16
    assert_close(h, expected)
    da, dx = scan_tpu.scan_backward(a, h, jnp.ones_like(h))
    assert da.dtype == dx.dtype == jnp.bfloat16


def gated(gates, c, log_decay, scale, first):
    """What the layer computes with its open form."""
    g_forget, g_in = jax.nn.sigmoid(gates)
    a, size = decay_and_input(log_decay, g_forget, first)
    return sequential(jnp.where(first[..., None], 0.0, a), size * g_in * scale * c)


@pytest.mark.parametrize(("shape", "dtype"), [
    ((8, 16, 256), jnp.float32), ((2, 8, 128), jnp.bfloat16),
    pytest.param((16, 24, 384), jnp.float32, marks=pytest.mark.full)])
def test_gates_states_and_gradients_are_those_of_the_layer(shape, dtype, monkeypatch):
    small_blocks(monkeypatch)
    B, T, E = shape
    gates, c = jnp.asarray(3 * normal(2, *shape), dtype), jnp.asarray(normal(*shape, seed=1), dtype)
    log_decay, scale, g = 2 * normal(E, seed=2) - 3, normal(E, seed=3), normal(*shape, seed=4)
    log_decay[:8] = -20  # decays so near 1 that the bound on the square root holds
    first = np.random.default_rng(5).random((B, T)) < 0.15
    inputs = (gates, c, log_decay, scale)

    def expected():
        h, vjp = jax.vjp(lambda *moved: gated(*moved, first), *(
            jnp.asarray(np.asarray(array, np.float64)) for array in inputs))
        return h, vjp(jnp.asarray(g, jnp.float64))

    h64, gradients = doubles(expected)
    h = scan_tpu.gated_scan(*inputs, first, dtype=jnp.float32)
    assert_close(h, h64, n_operations=T)
    d_gates, d_c, *of_rows = scan_tpu.gated_scan_backward(*inputs, first, h, g)
    assert d_gates.dtype == d_c.dtype == dtype
    assert_close((d_gates, d_c), gradients[:2], n_operations=T)
    assert of_rows[0].shape == of_rows[1].shape == (B, E)
    assert_close([rows.sum(0) for rows in of_rows], list(gradients[2:]), n_operations=B * T)


def test_no_scale_is_a_scale_of_one():
    shape = (1, 8, 128)
    inputs = (normal(2, *shape), normal(*shape, seed=1), normal(128, seed=2))
    first = np.zeros((1, 8), bool)
    h = scan_tpu.gated_scan(*inputs, None, first)
    np.testing.assert_array_equal(h, scan_tpu.gated_scan(*inputs, jnp.ones(128), first))
    assert h.dtype == jnp.float32  # that of the inputs
    assert len(scan_tpu.gated_scan_backward(*inputs, None, first, h, h)) == 3


@pytest.mark.parametrize(("shape", "dtype", "taken"), [
    ((8, 1024, 768), "float32", True), ((64, 8, 128), "bfloat16", True),
    ((4, 1024, 768), "bfloat16", True), ((1, 64, 128), "float32", True),
    ((12, 1024, 768), "float32", False), ((3, 64, 128), "float32", False),
    ((8, 1023, 768), "float32", False), ((8, 4, 768), "float32", False),
    ((8, 1024, 96), "float32", False), ((8, 1024, 768), "float16", False),
    ((0, 8, 128), "float32", False)])
def test_shapes_that_do_not_fill_registers_are_refused(shape, dtype, taken):
    assert scan_tpu.supports(shape, dtype) is taken
