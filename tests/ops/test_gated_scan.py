"""gated_scan: every backend against the recurrence and its hand-derived gradient in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.ops.gated_scan import gated_scan
from hippocampus.testing import assert_close
from tests.ops.recurrences import gated, gated_back

pytestmark = pytest.mark.usefixtures("quick_compiles")

BACKENDS = ("sequential", "associative", "chunked", "pallas")
B, T, E = 2, 9, 3


def inputs(T=T):
    rng = np.random.default_rng(0)
    gates, c, g = (jnp.asarray(rng.normal(size=shape), jnp.float32)
                   for shape in ((2, B, T, E), (B, T, E), (B, T, E)))
    log_decay, scale = (jnp.asarray(rng.normal(size=E) - mean, jnp.float32) for mean in (3, 0))
    return (gates, c, log_decay, scale), jnp.asarray(rng.random((B, T)) < 0.3), g


def states_and_gradients(backend, own, first, g):
    @jax.jit
    def run(own, g):
        h, pull = jax.vjp(lambda *own: gated_scan(*own, first, backend=backend), *own)
        return h, pull(g)

    return run(own, g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, T])
def test_states_and_gradients_are_those_of_the_recurrence(backend, length):
    own, first, g = inputs(length)
    h, gradients = states_and_gradients(backend, own, first, g)
    expected, parts = gated(*own, first)
    assert_close(h, expected, n_operations=T)
    assert_close(gradients, gated_back(expected, parts, g), n_operations=B * T)


def test_what_is_kept_for_the_gradient_are_inputs_and_states():
    own, first, _ = inputs()
    _, pull = jax.vjp(lambda *own: gated_scan(*own, first, backend="chunked"), *own)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.size >= B * T)
    assert kept <= own[0].size + 2 * own[1].size + first.size


@pytest.mark.parametrize("backend", ["chunked", "pallas"])
def test_gradients_have_gradients(backend):
    own, first, g = inputs()
    direction = [np.random.default_rng(1).normal(size=part.shape) for part in own]

    @jax.jit
    def curvature(own):
        def squared(own):
            _, pull = jax.vjp(lambda *own: gated_scan(*own, first, backend=backend), *own)
            return sum((part**2).sum() for part in pull(g))

        return jax.grad(squared)(own)

    def squared(step):
        moved = [np.asarray(part, np.float64) + step * d
                 for part, d in zip(own, direction, strict=True)]
        return sum((part**2).sum() for part in gated_back(*gated(*moved, first), g))

    expected = (squared(1e-5) - squared(-1e-5)) / 2e-5
    found = sum((part * d).sum() for part, d in zip(curvature(own), direction, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_states_have_the_dtype_of_what_is_read():
    (gates, c, *rest), first, _ = inputs()
    h = gated_scan(gates.astype(jnp.bfloat16), c.astype(jnp.bfloat16), *rest, first,
                   backend="chunked")
    assert h.dtype == jnp.bfloat16


def test_an_unknown_backend_is_refused():
    own, first, _ = inputs()
    with pytest.raises(ConfigError, match="sequential, associative, chunked, pallas"):
        gated_scan(*own, first, backend="parallel")


def test_a_tpu_gets_one_kernel_per_pass():
    B, T, E = 8, 16, 128
    shapes = [(2, B, T, E), (B, T, E), (E,), (E,)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def both_passes(*arrays):
        h, pull = jax.vjp(lambda *own: gated_scan(
            *own, jnp.zeros((B, T), bool), backend="pallas"), *arrays)
        return h, pull(h)

    text = jax.jit(both_passes).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2
