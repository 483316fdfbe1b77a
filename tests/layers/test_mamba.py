"""Mamba and Mamba-2: the recurrences of the module's docstring, their first values, their types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import SSMConfig
from hippocampus.layers.mamba import SSD_RATES, STEP_RANGE, MambaS6, MambaSSD
from hippocampus.testing import assert_close, pack

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D = 2, 12, 16
U = jax.random.normal(jax.random.key(0), (B, T, D))
IDS, POSITIONS = pack((5, 1, 6), B, T)
S6 = MambaS6(SSMConfig(kind="s6", backend="chunked", expansion=2, d_state=3, dt_rank=2,
                       projection_bias=True))
SSD = MambaSSD(SSMConfig(kind="ssd", backend="chunked", expansion=2, d_state=3, n_groups=2,
                         head_width=8), norm_epsilon=1e-3)


@functools.cache
def first_parameters(layer):
    return jax.jit(lambda key: layer.init(key, U, None, POSITIONS)["params"])(jax.random.key(0))


def parameters(layer):
    """Every number moved off its first value."""
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda a: np.asarray(a + 0.3 * draw.normal(size=a.shape), np.float32),
                        first_parameters(layer))


def silu(x):
    return x / (1 + np.exp(-x))


def convolved(params, x):
    """silu of the causal convolution over the tokens of the same document, one by one."""
    y = np.zeros_like(x) + params["conv_bias"]
    for t in range(T):
        for j in range(min(4, POSITIONS[0, t] + 1)):
            y[:, t] += params["conv_kernel"][j] * x[:, t - j]
    return silu(y)


def test_s6_is_the_recurrence_of_the_docstring():
    params = jax.tree.map(np.float64, parameters(S6))
    y, out = jax.jit(lambda p: S6.apply({"params": p}, U, IDS, POSITIONS))(parameters(S6))
    x, z = np.split(np.asarray(U) @ params["in"]["kernel"] + params["in"]["bias"], 2, -1)
    c = convolved(params, x)
    s, write, read = np.split(c @ params["select"]["kernel"], [2, 5], -1)
    delta = np.logaddexp(0, s @ params["step"]["kernel"] + params["step_bias"])
    decay = np.exp(-delta[..., None] * np.exp(params["log_decay"]))
    h, scan = np.zeros((B, 2 * D, 3)), np.zeros_like(c)
    for t in range(T):
        h = h * decay[:, t] * (POSITIONS[0, t] > 0) + (
            (delta * c)[:, t, :, None] * write[:, t, None])
        scan[:, t] = (h * read[:, t, None]).sum(-1) + params["skip"] * c[:, t]
    wanted = (scan * silu(z)) @ params["out"]["kernel"] + params["out"]["bias"]
    assert_close(y, wanted, n_operations=T * D)
    assert_close({name: out[name] for name in ("delta", "decay", "write", "read", "scan", "out")},
                 {"delta": delta, "decay": decay.reshape(B, T, -1), "write": write, "read": read,
                  "scan": scan, "out": wanted}, n_operations=T * D)


def test_ssd_is_the_recurrence_of_the_docstring():
    params, E, N, H = jax.tree.map(np.float64, parameters(SSD)), 2 * D, 3, 4
    y, out = jax.jit(lambda p: SSD.apply({"params": p}, U, IDS, POSITIONS))(parameters(SSD))
    z, mixed, s = np.split(np.asarray(U) @ params["in"]["kernel"], [E, 2 * E + 4 * N], -1)
    c, write, read = np.split(convolved(params, mixed), [E, E + 2 * N], -1)
    delta = np.logaddexp(0, s + params["step_bias"])
    decay = np.exp(-delta * np.exp(params["log_decay"]))
    of_head = [v.reshape(B, T, 2, N).repeat(H // 2, 2) for v in (write, read)]
    c = c.reshape(B, T, H, E // H)
    h, scan = np.zeros((B, H, E // H, N)), np.zeros_like(c)
    for t in range(T):
        h = h * (decay[:, t] * (POSITIONS[0, t] > 0))[..., None, None] + (
            (delta[..., None] * c)[:, t, ..., None] * of_head[0][:, t, :, None])
        scan[:, t] = (h * of_head[1][:, t, :, None]).sum(-1) + (
            params["skip"][:, None] * c[:, t])
    scan = scan.reshape(B, T, E)
    groups = (scan * silu(z)).reshape(B, T, 2, E // 2)
    normed = groups / np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-3)
    wanted = (normed.reshape(B, T, E) * params["norm_scale"]) @ params["out"]["kernel"]
    assert_close(y, wanted, n_operations=T * D)
    assert_close({name: out[name] for name in ("delta", "decay", "write", "read", "scan", "out")},
                 {"delta": delta, "decay": decay, "write": write, "read": read, "scan": scan,
                  "out": wanted}, n_operations=T * D)


def test_first_values_are_those_of_the_papers():
    wide = SSMConfig(expansion=16, d_state=16, head_width=1, backend="chunked")
    s6, ssd = (first_parameters(kind(wide)) for kind in (MambaS6, MambaSSD))
    for params in (s6, ssd):
        step = np.logaddexp(0, params["step_bias"])
        assert step.min() >= STEP_RANGE[0] * 0.999 and step.max() <= STEP_RANGE[1] * 1.001
        # Log-uniform: a half lies below the geometric mean.
        assert abs((step < np.sqrt(np.prod(STEP_RANGE))).mean() - 0.5) < 0.1
        assert (params["skip"] == 1).all()
    np.testing.assert_allclose(np.exp(s6["log_decay"]), np.tile(np.arange(1, 17), (256, 1)),
                               rtol=1e-6)
    assert s6["step"]["kernel"].shape == (1, 256)  # the rank is D / 16, rounded up
    rates = np.exp(ssd["log_decay"])
    assert rates.min() >= SSD_RATES[0] and rates.max() <= SSD_RATES[1] and np.ptp(rates) > 13


@pytest.mark.parametrize("layer", [S6, SSD], ids=["s6", "ssd"])
def test_steps_decays_and_states_are_float32_in_half_precision_too(layer):
    half, params = layer.clone(dtype=jnp.bfloat16), first_parameters(layer)
    y, out = jax.eval_shape(half.apply, {"params": params}, U.astype(jnp.bfloat16), None,
                            POSITIONS)
    assert y.dtype == out["scan"].dtype == jnp.bfloat16
    assert out["decay"].dtype == out["delta"].dtype == jnp.float32
    cache = half.init_cache(B, T, D)
    assert cache.state.dtype == jnp.float32 and cache.conv_BwC.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize("layer", [S6, SSD], ids=["s6", "ssd"])
def test_an_edit_of_any_part_but_the_decays_reaches_the_output(layer):
    params, seen = first_parameters(layer), []

    @jax.jit
    def apply(factors):
        def edit(name, value):
            seen.append(name)
            return value * factors[name]

        return layer.clone(edit=edit).apply({"params": params}, U, IDS, POSITIONS)[0]

    factors = dict.fromkeys(("delta", "out", "read", "scan", "write"), 1.0)
    plain = apply(factors)
    assert sorted(seen) == sorted(factors)
    for name in seen:
        assert (apply({**factors, name: 2.0}) != plain).any(), name
