"""The recurrences' kernels for NVIDIA GPUs against float64, in Pallas' interpreter or on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops import gated_scan, linear_scan
from hippocampus.ops.kernels import gated_scan_hopper, scan_hopper
from hippocampus.testing import assert_close
from tests.ops.recurrences import gated, gated_back, scanned, scanned_back, sigmoid

# More blocks of steps than are in flight at once, and more than one thread block.
B, T, E = 1, 160, 256


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def close(found, expected, dtype, n_operations=T):
    if dtype == jnp.float32:
        assert_close(found, expected, n_operations=n_operations)
    else:
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2e-2, atol=3e-2)


def scan_inputs(dtype):
    a = sigmoid(normal(0, B, T, E) + 2)
    arrays = (jnp.asarray(v, dtype) for v in (a, normal(1, B, T, E), normal(2, B, T, E)))
    return [(array, np.asarray(array, np.float64)) for array in arrays]


def gated_inputs(dtype, decays="spread"):
    rng = np.random.default_rng(3)
    log_decay = rng.uniform(-6, 1, E) if decays == "spread" else np.full(E, -20.0)
    arrays = (normal(4, 2, B, T, E), normal(5, B, T, E), normal(6, B, T, E))
    gates, c, g = (jnp.asarray(v, dtype) for v in arrays)
    return (gates, c, jnp.asarray(log_decay, jnp.float32), jnp.asarray(normal(7, E), jnp.float32),
            jnp.asarray(rng.random((B, T)) < 0.05)), g


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_scan_and_its_adjoint_are_those_of_the_recurrence(dtype):
    (a, a64), (x, x64), (g, g64) = scan_inputs(dtype)
    h = scan_hopper.scan(a, x, interpret=True)
    assert h.dtype == dtype
    close(h, scanned(a64, x64), dtype)
    found = scan_hopper.scan_backward(a, h, g, interpret=True)
    for array, expected in zip(found, scanned_back(a64, np.asarray(h, np.float64), g64),
                               strict=True):
        assert array.dtype == dtype
        scale = np.abs(expected).max()
        close(array / scale, expected / scale, dtype)


def test_a_scan_from_the_end_is_the_scan_of_what_is_turned_round():
    (a, a64), (x, x64), _ = ([np.concatenate([v[:, :48], v[:, -48:]]) for v in pair]
                             for pair in scan_inputs(jnp.float32))  # two rows of the batch
    found = scan_hopper.scan(a, x, reverse=True, interpret=True)
    assert_close(found, np.flip(scanned(np.flip(a64, 1), np.flip(x64, 1)), 1), n_operations=T)


@pytest.mark.parametrize("decays", ["spread", "almost 1"])
def test_the_gated_scan_and_all_its_gradients_are_those_of_the_recurrence(decays):
    inputs, g = gated_inputs(jnp.float32, decays)
    h = gated_scan_hopper.gated_scan(*inputs, interpret=True)
    expected, parts = gated(*inputs)
    assert_close(h, expected, n_operations=T)
    found = gated_scan_hopper.gated_scan_backward(*inputs, h, g, interpret=True)
    for array, wanted in zip(found, gated_back(expected, parts, g), strict=True):
        array = array if array.shape == wanted.shape else array.sum(0)
        scale = np.abs(wanted).max() or 1.0
        assert_close(array / scale, wanted / scale, n_operations=B * T)


@pytest.mark.full
def test_the_gated_scan_of_bfloat16_keeps_its_state_in_float32():
    inputs, g = gated_inputs(jnp.bfloat16)
    h = gated_scan_hopper.gated_scan(*inputs, interpret=True)
    expected, parts = gated(*inputs)
    assert h.dtype == jnp.bfloat16
    # What is written is rounded once, to 8 bits.
    assert np.linalg.norm(np.asarray(h, np.float64) - expected) < 2e-3 * np.linalg.norm(expected)
    found = gated_scan_hopper.gated_scan_backward(*inputs, h, g, interpret=True)
    for array, wanted in zip(found, gated_back(expected, parts, g), strict=True):
        array = np.asarray(array if array.shape == wanted.shape else array.sum(0), np.float64)
        assert np.linalg.norm(array - wanted) < 6e-3 * np.linalg.norm(wanted)


def test_without_a_scale_there_is_no_gradient_of_one():
    (gates, c, log_decay, _, first), g = gated_inputs(jnp.float32)
    gates, c, first, g = gates[:, :, :32], c[:, :32], first[:, :32], g[:, :32]
    bare, ones = (gates, c, log_decay, None, first), (gates, c, log_decay, jnp.ones(E), first)
    h = gated_scan_hopper.gated_scan(*bare, interpret=True)
    np.testing.assert_array_equal(h, gated_scan_hopper.gated_scan(*ones, interpret=True))
    assert len(gated_scan_hopper.gated_scan_backward(*bare, h, g, interpret=True)) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("length", "has_gated", "has_scan"), [
    (160, True, True), (144, False, True), (100, False, False)])
def test_a_gpu_gets_one_kernel_per_pass_where_the_shape_fits(dtype, length, has_gated, has_scan):
    x = jax.ShapeDtypeStruct((2, length, 256), dtype)
    gates, row = jax.ShapeDtypeStruct((2, *x.shape), dtype), jax.ShapeDtypeStruct((256,), "float32")

    def both(a, x, gates, log_decay):
        first = jnp.zeros(x.shape[:2], bool)
        h, pull = jax.vjp(lambda a, x: linear_scan.linear_scan(a, x, backend="pallas"), a, x)
        y, pull_gated = jax.vjp(lambda *v: gated_scan.gated_scan(
            *v, None, first, backend="pallas"), gates, x, log_decay)
        return pull(h), pull_gated(y)

    text = jax.jit(both).trace(x, x, gates, row).lower(lowering_platforms=("cuda",)).as_text()
    # The open form of the gated scan is a scan of its decays and inputs.
    assert text.count("custom_call @mosaic_gpu") == 4 * has_scan
    assert ("gated_scan_backward" in text) == has_gated
    on_cpu = jax.jit(both).trace(x, x, gates, row).lower(lowering_platforms=("cpu",)).as_text()
    assert "mosaic_gpu" not in on_cpu


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_gpu_the_kernels_compute_the_same(dtype):
    (a, a64), (x, x64), (g, g64) = scan_inputs(dtype)
    h = jax.jit(scan_hopper.scan)(a, x)
    close(h, scanned(a64, x64), dtype)
    for array, expected in zip(jax.jit(scan_hopper.scan_backward)(a, h, g),
                               scanned_back(a64, np.asarray(h, np.float64), g64), strict=True):
        scale = np.abs(expected).max()
        close(array / scale, expected / scale, dtype)
    inputs, g = gated_inputs(dtype)
    h = jax.jit(gated_scan_hopper.gated_scan)(*inputs)
    expected, parts = gated(*inputs)
    found = jax.jit(gated_scan_hopper.gated_scan_backward)(*inputs, h, g)
    pairs = [(h, expected), *zip(found, gated_back(expected, parts, g), strict=True)]
    for array, wanted in pairs:
        array = np.asarray(array if array.shape == wanted.shape else array.sum(0), np.float64)
        tolerance = 1e-5 if dtype == jnp.float32 else 6e-3
        assert np.linalg.norm(array - wanted) < tolerance * np.linalg.norm(wanted)
