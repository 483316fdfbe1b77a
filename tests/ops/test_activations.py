"""swiglu and gelu against float64, values and gradients."""

import jax
import jax.numpy as jnp
import pytest

from hippocampus.ops.activations import gelu, halves, swiglu
from tests.ops.float64 import distance, in_float64

B, T, F = 2, 3, 10


def plain_swiglu(h: jax.Array) -> jax.Array:
    return h[..., :F] / (1 + jnp.exp(-h[..., :F])) * h[..., F:]


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize(("function", "plain", "width"), [
    (swiglu, plain_swiglu, 2 * F), (gelu, jax.nn.gelu, F)])
def test_values_and_gradients(function, plain, width: int, dtype: type, tolerance: float) -> None:
    h = (3 * jax.random.normal(jax.random.key(1), (B, T, width))).astype(dtype)
    g = jax.random.normal(jax.random.key(2), (B, T, F)).astype(dtype)

    def reference(h: jax.Array, g: jax.Array) -> tuple:
        value, pull = jax.vjp(plain, h)
        return value, *pull(g)

    def run(h: jax.Array, g: jax.Array) -> tuple:
        value, pull = jax.vjp(function, h)
        return value, *pull(g)

    # Without optimisations, what is fused is rounded more often.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 3})
    for found, wanted in zip(run(h, g), in_float64(reference, h, g), strict=True):
        assert distance(found, wanted) < tolerance
        assert found.dtype == dtype


def test_halves_and_their_joined_gradient() -> None:
    h = jax.random.normal(jax.random.key(1), (B, T, 2 * F)).astype(jnp.bfloat16)
    parts, pull = jax.vjp(halves, h)
    assert (jnp.concatenate(parts, -1) == h).all()
    assert (pull(parts)[0] == h).all() and pull(parts)[0].dtype == h.dtype
