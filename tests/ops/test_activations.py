"""swiglu and gelu against float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops.activations import gelu, swiglu
from tests.ops.test_mixing import in_float64

B, T, D = 2, 3, 10


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_swiglu_and_its_gradient(dtype: type, tolerance: float) -> None:
    h = (3 * jax.random.normal(jax.random.key(1), (B, T, 2 * D))).astype(dtype)
    g = jax.random.normal(jax.random.key(2), (B, T, D)).astype(dtype)

    def reference(h: jax.Array, g: jax.Array) -> tuple:
        value, pull = jax.vjp(
            lambda h: h[..., :D] / (1 + jnp.exp(-h[..., :D])) * h[..., D:], h)
        return value, *pull(g)

    value, pull = jax.vjp(swiglu, h)
    for found, wanted in zip((value, *pull(g)), in_float64(reference, h, g), strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < tolerance
        assert found.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_gelu_and_its_gradient(dtype: type, tolerance: float) -> None:
    h = (3 * jax.random.normal(jax.random.key(3), (B, T, D))).astype(dtype)
    g = jax.random.normal(jax.random.key(4), (B, T, D)).astype(dtype)

    def reference(h: jax.Array, g: jax.Array) -> tuple:
        value, pull = jax.vjp(jax.nn.gelu, h)
        return value, *pull(g)

    value, pull = jax.vjp(gelu, h)
    for found, wanted in zip((value, *pull(g)), in_float64(reference, h, g), strict=True):
        error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < tolerance
        assert found.dtype == dtype
