"""selective_scan: every backend against the recurrence and its adjoint in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from hippocampus.errors import ConfigError
from hippocampus.ops import selective_scan as module
from hippocampus.ops.kernels import selective_scan_hopper
from hippocampus.testing import assert_close, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

BACKENDS = ("sequential", "associative", "chunked")
NAMES = ("y", "h", "du", "ddelta", "dA", "dB", "dC", "dD", "dh0")
B, E, N = 2, 3, 4
ON_GPU = jax.default_backend() == "gpu"

selective_scan = jax.jit(module.selective_scan, static_argnames="backend")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 8)


def reference(u, delta, A, Bm, C, D, h0, reset, g, g_h):
    """y, the last state and the gradients of all inputs, step by step in float64."""
    u, delta, A, Bm, C, D, h0, g, g_h = (
        np.asarray(v, np.float64) for v in (u, delta, A, Bm, C, D, h0, g, g_h))
    T, kept = u.shape[1], np.where(np.asarray(reset), 0.0, 1.0)[:, :, None, None]
    decay = kept * np.exp(delta[..., None] * A)
    h, states = h0, [h0]
    for t in range(T):
        h = decay[:, t] * h + (delta[:, t] * u[:, t])[..., None] * Bm[:, t, None]
        states.append(h)
    before, after = np.stack(states[:-1], 1), np.stack(states[1:], 1)
    y = (after * C[:, :, None]).sum(-1) + D * u
    adjoint, later = np.zeros_like(after), g_h
    for t in reversed(range(T)):
        adjoint[:, t] = later + g[:, t, :, None] * C[:, t, None]
        later = decay[:, t] * adjoint[:, t]
    dx, dlog = (adjoint * Bm[:, :, None]).sum(-1), adjoint * decay * before
    return (y, h, dx * delta + D * g, dx * u + (dlog * A).sum(-1),
            (dlog * delta[..., None]).sum((0, 1)), (adjoint * (delta * u)[..., None]).sum(2),
            (g[..., None] * after).sum(2), (g * u).sum((0, 1)), later)


def inputs(T, E=E, N=N, B=B, resets=0.2, seed=0):
    rng = np.random.default_rng(seed)
    u, delta, g = rng.normal(size=(3, B, T, E))
    Bm, C = rng.normal(size=(2, B, T, N))
    h0, g_h = rng.normal(size=(2, B, E, N))
    A = -np.arange(1, N + 1) * np.exp(0.1 * rng.normal(size=(E, N)))
    arrays = (u, np.logaddexp(0, delta - 1), A, Bm, C, rng.normal(size=E), h0)
    return (*(jnp.asarray(v, jnp.float32) for v in arrays), rng.uniform(size=(B, T)) < resets,
            jnp.asarray(g, jnp.float32), jnp.asarray(g_h, jnp.float32))


def with_gradients(scan):
    @jax.jit
    def run(u, delta, A, Bm, C, D, h0, reset, g, g_h):
        out, vjp = jax.vjp(lambda *arrays: scan(*arrays, reset), u, delta, A, Bm, C, D, h0)
        return *out, *vjp((g, g_h))

    return run


@functools.cache
def runner(backend):
    def scan(u, delta, A, Bm, C, D, h0, reset):
        return module.selective_scan(
            u, delta, A, Bm, C, D, h0_BEN=h0, reset_BT=reset, backend=backend)

    return with_gradients(scan)


def compare(found, arrays, n_operations):
    for name, actual, desired in zip(NAMES, found, reference(*arrays), strict=True):
        assert_close(actual, desired, n_operations=n_operations, what=name)


@pytest.mark.parametrize("T", [1, 7, 24, 33])
@pytest.mark.parametrize("backend", [*BACKENDS, "pallas"])
def test_outputs_states_and_gradients_are_those_of_the_recurrence(backend, T):
    for resets in (0.0, 0.2):
        arrays = inputs(T, resets=resets, seed=T)
        compare(runner(backend)(*arrays), arrays, n_operations=T + N)


def test_absent_inputs_count_as_zero():
    u, delta, A, Bm, C, D, h0, *_ = inputs(9)
    none = np.zeros((B, 9), bool)
    y, h = selective_scan(u, delta, A, Bm, C)
    full = selective_scan(u, delta, A, Bm, C, D * 0, h0_BEN=h0 * 0, reset_BT=none)
    np.testing.assert_array_equal(y, full[0])
    np.testing.assert_array_equal(h, full[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_any_length_give_what_the_whole_gives(backend):
    u, delta, A, Bm, C, D, h0, reset, *_ = inputs(33, resets=0.05)
    whole, last = selective_scan(u, delta, A, Bm, C, D, h0_BEN=h0, reset_BT=reset, backend=backend)
    parts, h = [], h0
    for part in (slice(0, 1), slice(1, 20), slice(20, 33)):
        y, h = selective_scan(u[:, part], delta[:, part], A, Bm[:, part], C[:, part], D, h0_BEN=h,
                              reset_BT=reset[:, part], backend=backend)
        parts.append(y)
    assert_close(jnp.concatenate(parts, 1), whole, n_operations=33)
    assert_close(h, last, n_operations=33)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_crosses_a_reset(backend):
    u, delta, A, Bm, C, D, h0, *_ = inputs(24)
    reset = np.zeros((B, 24), bool)
    reset[:, 10] = True
    before, h = selective_scan(u, delta, A, Bm, C, D, h0_BEN=h0, reset_BT=reset, backend=backend)
    after, h_after = selective_scan(u.at[:, :10].add(7), delta, A, Bm, C, D, h0_BEN=h0 + 5,
                                    reset_BT=reset, backend=backend)
    np.testing.assert_array_equal(before[:, 10:], after[:, 10:])
    np.testing.assert_array_equal(h, h_after)
    assert not np.array_equal(before[:, :10], after[:, :10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scan_is_causal(backend):
    u, delta, A, Bm, C, D, *_ = inputs(12)
    check_causality(lambda u: selective_scan(u, delta, A, Bm, C, D, backend=backend)[0], u)
    check_causality(lambda delta: selective_scan(u, delta, A, Bm, C, D, backend=backend)[0], delta)


def test_bfloat16_goes_in_and_out_and_states_stay_in_float32():
    u, delta, A, Bm, C, D, *_ = inputs(33)
    low = [v.astype(jnp.bfloat16) for v in (u, delta, Bm, C)]
    y, h = selective_scan(low[0], low[1], A, *low[2:], D)
    exact = [v.astype(jnp.float32) for v in low]
    expected, h_expected = selective_scan(exact[0], exact[1], A, *exact[2:], D)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(h, h_expected)
    assert_close(y, expected, dtype=jnp.bfloat16)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="sequential, associative, chunked, pallas"):
        selective_scan(*inputs(2)[:5], backend="parallel")


@pytest.mark.skipif(ON_GPU, reason="there the kernels run")
def test_where_there_is_no_kernel_its_backend_runs_chunks():
    arrays = inputs(12, E=128, N=3, B=1)
    for found, expected in zip(runner("pallas")(*arrays), runner("chunked")(*arrays), strict=True):
        assert_close(found, expected, n_operations=2)


def test_kernels_have_a_second_derivative():
    """That of |dL/du|^2, as the Jacobian's term of the equilibrium model takes it."""
    *arrays, reset, g, g_h = inputs(6, E=128, N=2, B=1)

    def squares(arrays, backend):
        def scan(*arrays):
            return module.selective_scan(*arrays[:6], h0_BEN=arrays[6], reset_BT=reset,
                                         backend=backend)
        return sum((d * d).sum() for d in jax.vjp(scan, *arrays)[1]((g, g_h)))

    for found, expected in zip(*(jax.jit(jax.grad(functools.partial(squares, backend=backend)))(
            arrays) for backend in ("pallas", "sequential")), strict=True):
        assert_close(found, expected, n_operations=64)


SCHEDULES = {
    "one piece, tiles whole in registers": ((1, 4, 4, 2, True), 9, 16),
    "pieces, groups within tiles": ((2, 4, 2, 2, False), 15, 5),
}


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if i else pytest.mark.full) for i, name in enumerate(SCHEDULES)])
def test_kernels_for_gpus_are_the_recurrence(name):
    cut, T, N = SCHEDULES[name]
    scan = functools.partial(
        module._fused, selective_scan_hopper.Schedule(*cut), not ON_GPU)
    arrays = inputs(T, E=100, N=N, B=1, resets=0.1)
    compare(with_gradients(scan)(*arrays), arrays, n_operations=4 * T)


def test_few_rows_are_cut_into_more_pieces_but_not_into_crumbs():
    def pieces(*shape):
        return selective_scan_hopper.schedule(shape).pieces

    assert [pieces(B, 2048, 1536) for B in (64, 8, 1)] == [1, 4, 32]
    assert [pieces(1, T, 128) for T in (2, 127, 128, 65_536)] == [1, 1, 2, 512]


def test_kernels_lower_for_nvidia_gpus_without_one():
    @jax.jit
    def step(u, delta, A, Bm, C):
        return jax.vjp(lambda u: module.selective_scan(u, delta, A, Bm, C, backend="pallas"),
                       u)[1]((u, A[None] + 0 * u[:, 0, :, None]))

    shapes = [((1, 256, 128), jnp.bfloat16), ((1, 256, 128), jnp.float32),
              ((128, 16), jnp.float32), ((1, 256, 16), jnp.bfloat16), ((1, 256, 16), jnp.bfloat16)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 4


@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("T", [300, 1024])
def test_kernels_on_the_gpu_are_the_recurrence(T):
    arrays = inputs(T, E=256, N=16, resets=0.01)
    compare(runner("pallas")(*arrays), arrays, n_operations=T)
