"""Every path of a block: causal, row by row, document by document, and what its maths promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hippocampus.config import AttentionConfig, HopfieldConfig, SSMConfig
from hippocampus.layers.gru import GRU
from hippocampus.layers.mamba import MambaS6, MambaSSD
from hippocampus.layers.modern_ssm import DECAY_RANGE, BlockDiagonal, ModernSSM
from hippocampus.layers.mor_hopfield import MoRHopfield, inverse_temperature
from hippocampus.layers.self_attention import SelfAttention
from hippocampus.ops.attention import attention
from hippocampus.testing import (
    assert_close,
    check_batch_invariance,
    check_causality,
    check_causality_by_gradient,
    check_document_isolation,
    pack,
    tolerance,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, H = 2, 12, 16, 4
LENGTHS = (5, 1, 4)  # and two tokens of padding
U = jax.random.normal(jax.random.key(0), (B, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


def ssm(**settings):
    return ModernSSM(SSMConfig(**{"backend": "chunked", **settings}), H)


def hopfield(depth, **settings):
    return MoRHopfield(HopfieldConfig(n_slots=5, **settings), H, depth)


def self_attention(theta=100.0, **settings):
    return SelfAttention(AttentionConfig(backend="xla", **settings), H, theta)


LAYERS = {
    "ssm": ssm(),
    "ssm sequential, input scale": ssm(backend="sequential", input_scale=True),
    "ssm associative, no convolution": ssm(backend="associative", d_conv=1),
    "ssm diagonal": ssm(kind="diagonal"),
    "ssm diagonal, input scale": ssm(kind="diagonal", input_scale=True, backend="associative"),
    "gru": GRU(SSMConfig(kind="gru")),
    "ssm s6": MambaS6(SSMConfig(kind="s6", backend="chunked")),
    "ssm ssd": MambaSSD(SSMConfig(kind="ssd", backend="chunked", n_groups=3, head_width=8)),
    "hopfield context": hopfield(1),
    "hopfield context, K=3, rope": hopfield(3, rope=True),
    "hopfield context, K=2, rms": hopfield(2, normalize="rms", step_size=0.5),
    "hopfield slots": hopfield(1, patterns="slots", normalize="rms"),
    "hopfield slots, K=3": hopfield(3, patterns="slots", rope=True),
    "hopfield both, K=2, rope, rms": hopfield(2, patterns="both", rope=True, normalize="rms"),
    "hopfield both, K=3": hopfield(3, patterns="both", step_size=0.3),
    "attention": self_attention(),
    "attention, one group": self_attention(n_kv_heads=1),
    "attention, two groups, window, no norm": self_attention(
        n_kv_heads=2, window=3, qk_norm=False),
    "attention without positions": self_attention(theta=0.0, qk_norm=False),
}


@functools.cache
def parameters(layer):
    """Random: a gate that starts at zero would hide what it reads."""
    @jax.jit
    def make(key):
        params = layer.init(key, U, None, POSITIONS)["params"]
        leaves, form = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(form, [
            leaf + 0.1 * jax.random.normal(k, leaf.shape)
            for leaf, k in zip(leaves, keys, strict=True)])

    return make(jax.random.key(1))


@functools.cache
def first_parameters(layer):
    return jax.jit(lambda key: layer.init(key, U, None, POSITIONS)["params"])(jax.random.key(0))


def start(layer, u=U):
    """What a layer gives with its first parameters."""
    return jax.jit(lambda params: layer.apply({"params": params}, u, None, POSITIONS))(
        first_parameters(layer))


@functools.cache
def run(layer):
    params = parameters(layer)
    return jax.jit(lambda u, ids, positions: layer.apply({"params": params}, u, ids, positions))


ONE = jnp.ones((B, T), jnp.int32)


def outputs(layer):
    """(u, ids, positions) -> the output and every named intermediate, all beginning with B,T."""
    compiled = run(layer)

    def apply(u, ids, positions):
        y, out = compiled(u, ids, positions)
        return {"y": y, **{name: np.moveaxis(a, 0, 2) if name == "energy" else a
                           for name, a in out.items() if name != "beta"}}

    return apply


@pytest.mark.parametrize("name", LAYERS)
def test_a_path_reads_the_past_of_its_own_row_and_document_only(name):
    apply = outputs(LAYERS[name])
    packed = pack(LENGTHS, B, T)
    check_causality(lambda u: apply(u, ONE, POSITIONS), U, jit=False)
    check_causality(lambda u: apply(u, *packed), U, jit=False, positions=(0, 4, 5, 6, 9, 10))
    check_batch_invariance(lambda u: apply(u, *packed), U, jit=False)
    check_document_isolation(apply, U, LENGTHS, n_operations=T * D, jit=False)


@pytest.mark.parametrize("name", LAYERS)
def test_no_gradient_of_a_path_reaches_the_future(name):
    layer = LAYERS[name]
    params = parameters(layer)
    check_causality_by_gradient(
        lambda u: layer.apply({"params": params}, u, None, POSITIONS)[0], U)


@pytest.mark.parametrize("name", ["ssm", "ssm s6", "ssm ssd", "hopfield context, K=2, rms",
                                  "hopfield both, K=3", "attention, two groups, window, no norm"])
def test_rows_without_document_ids_are_rows_of_one_document(name):
    y, _ = run(LAYERS[name])(U, None, POSITIONS)
    same, _ = run(LAYERS[name])(U, ONE, POSITIONS)
    assert_close(y, same, n_operations=T)


@pytest.mark.parametrize("name", [n for n in LAYERS if "slots" not in n and "window" not in n])
def test_a_path_with_a_memory_reaches_far_back(name):
    y, _ = run(LAYERS[name])(U, ONE, POSITIONS)
    moved, _ = run(LAYERS[name])(U.at[:, 0].add(1.0), ONE, POSITIONS)
    assert (y[:, -1] != moved[:, -1]).any()


def test_a_window_ends_where_it_should():
    layer = self_attention(window=3)
    y, _ = run(layer)(U, ONE, POSITIONS)
    moved, _ = run(layer)(U.at[:, 2].add(1.0), ONE, POSITIONS)
    assert (y != moved).any(-1).any(0).tolist() == [False] * 2 + [True] * 3 + [False] * 7


# ---------------------------------------------------------------- state space

def test_the_decay_starts_in_the_documented_range():
    """At the gate's first value of 1/2 the decay lies on the ring of DECAY_RANGE."""
    low, high = DECAY_RANGE
    layer = ModernSSM(SSMConfig(expansion=16, backend="chunked"), H)
    params = first_parameters(layer)
    decay = np.exp(-4 * jax.nn.softplus(params["log_decay"]))
    assert decay.min() >= low - 1e-5 and decay.max() <= high + 1e-5
    # Uniform in area: the mean of the squares is that of the borders' squares.
    np.testing.assert_allclose((decay**2).mean(), (low**2 + high**2) / 2, rtol=0.1)
    assert np.ptp(decay) > 0.9 * (high - low)
    assert not params["gates"]["bias"].any()  # so the first gates are about 1/2
    _, out = start(layer, U * 0)
    np.testing.assert_allclose(out["decay"][0, 0], decay, rtol=1e-5)


def test_time_constants_of_the_diagonal_kind_spread_over_one_to_a_thousand_tokens():
    layer = ModernSSM(SSMConfig(kind="diagonal", expansion=16, backend="chunked"), H)
    params = first_parameters(layer)
    tokens = np.exp(-np.asarray(params["log_decay"]))
    assert 1 <= tokens.min() < 1.5 and 700 < tokens.max() <= 1000 * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["gated", "diagonal", "gru"])
def test_decay_and_state_are_float32_in_half_precision_too(kind):
    layer = (LAYERS["gru"] if kind == "gru" else ssm(kind=kind)).clone(dtype=jnp.bfloat16)
    params = parameters(layer)
    y, out = jax.eval_shape(layer.apply, {"params": params}, U.astype(jnp.bfloat16), None,
                            POSITIONS)
    assert y.dtype == jnp.bfloat16
    assert out["decay"].dtype == out["state"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_the_gated_state_is_the_recurrence_of_the_docstring():
    layer = ssm(input_scale=True)
    params = jax.tree.map(np.asarray, parameters(layer))
    _, out = run(layer)(U, ONE, POSITIONS)
    a = np.asarray(out["decay"], np.float64)
    g_forget = np.asarray(out["gate_forget"], np.float64)
    np.testing.assert_allclose(
        a, np.exp(-8 * np.logaddexp(0, params["log_decay"]) * g_forget), rtol=1e-5)
    x = np.split(np.asarray(U) @ params["in"]["kernel"], 2, axis=-1)[0]
    c = np.zeros_like(x) + params["conv_bias"]
    for j in range(4):
        c[:, j:] += params["conv_kernel"][j] * x[:, :T - j]
    c = c / (1 + np.exp(-c))
    h = np.zeros_like(a)
    for t in range(T):
        size = np.sqrt(1 - a[:, t] ** 2) if t else 1.0
        h[:, t] = (a[:, t] * h[:, t - 1] if t else 0) + (
            size * out["gate_in"][:, t] * params["input_scale"] * c[:, t])
    assert_close(out["state"], h, n_operations=T * D)


def test_the_gru_is_the_recurrence_of_flaxs_own_cell():
    layer, E = LAYERS["gru"], 24
    params = parameters(layer)
    _, out = run(layer)(U, ONE, POSITIONS)
    names = ("r", "z", "n")
    inputs = np.split(np.asarray(params["in"]["kernel"]), 3, axis=1)
    biases = np.split(np.asarray(params["in"]["bias"]), 3)
    states = np.split(np.asarray(params["recurrent_kernel"]), 3, axis=1)
    cell = {f"i{n}": {"kernel": w, "bias": b}
            for n, w, b in zip(names, inputs, biases, strict=True)}
    cell |= {f"h{n}": {"kernel": w} for n, w in zip(names, states, strict=True)}
    cell["hn"]["bias"] = params["recurrent_bias"]
    h = jnp.zeros((B, E))
    for t in range(T):
        h, _ = nn.GRUCell(E).apply({"params": cell}, h, U[:, t])
        assert_close(out["state"][:, t], h, n_operations=T * E)


def test_the_input_scale_starts_neutral():
    with_scale, without = ssm(input_scale=True), ssm()
    params = first_parameters(with_scale)
    assert set(params) == {*first_parameters(without), "input_scale"}
    plain = {name: value for name, value in params.items() if name != "input_scale"}
    apply = jax.jit(lambda params: without.apply({"params": params}, U, None, POSITIONS)[0])
    assert_close(start(with_scale)[0], apply(plain), n_operations=T)


def test_block_diagonal_maps_do_not_mix_their_blocks():
    layer = BlockDiagonal(4, 2)
    params = layer.init(jax.random.key(0), U)["params"]
    changed = np.asarray(layer.apply({"params": params}, U) != layer.apply(
        {"params": params}, U.at[..., 5].add(1.0)))
    assert changed.shape == (2, B, T, D)
    assert changed.any((0, 1, 2)).tolist() == [False] * 4 + [True] * 4 + [False] * 8


@pytest.mark.parametrize("name", [
    "ssm", "ssm diagonal", "ssm s6", "ssm ssd", "hopfield context, K=2, rms", "hopfield slots",
    "hopfield both, K=3"])
def test_values_and_gradients_are_finite_at_the_extremes_of_decay_and_beta(name):
    layer, params = LAYERS[name], parameters(LAYERS[name])
    leaf = "log_decay" if "ssm" in name else "log_beta"

    @jax.jit
    def values_and_gradients(params, u_BTD):
        def total(params, u_BTD):
            y_BTD, out = layer.apply({"params": params}, u_BTD, None, POSITIONS[:, :u_BTD.shape[1]])
            return y_BTD.sum(), (y_BTD, out)

        return jax.value_and_grad(total, (0, 1), has_aux=True)(params, u_BTD)

    for u_BTD in (U, U[:, :1]):
        for value in (-1e4, -100.0, -20.0, 20.0, 100.0, 1e4):
            extreme = {**params, leaf: jnp.full_like(params[leaf], value)}
            found = values_and_gradients(extreme, u_BTD)
            for path, array in jax.tree.leaves_with_path(found):
                assert np.isfinite(array).all(), (value, u_BTD.shape, jax.tree_util.keystr(path))


# ---------------------------------------------------------------- Hopfield

def test_one_whole_step_over_the_context_is_attention_with_keys_as_values():
    layer = hopfield(1)
    params = parameters(layer)
    y, out = run(layer)(U, ONE, POSITIONS)
    beta = np.asarray(out["beta"])[:, None]
    read = attention(out["query"] * beta, out["key"], out["key"], scale=1.0)
    assert_close(y, read.reshape(B, T, D) @ params["out"]["kernel"], n_operations=T * D)


@pytest.mark.parametrize("name", ["hopfield both, K=3", "attention, one group"])
def test_what_the_heads_read_times_the_output_matrix_is_the_output(name):
    _, out = run(LAYERS[name])(U, ONE, POSITIONS)
    kernel = parameters(LAYERS[name])["out"]["kernel"]
    parts = np.einsum("bthd,hde->bthe", out["heads"], np.reshape(kernel, (H, D // H, D)))
    assert_close(parts.sum(2), out["out"], n_operations=D)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_gates_sum_to_one_and_start_uniform(depth):
    layer = hopfield(depth, patterns="slots")
    _, out = run(layer)(U, ONE, POSITIONS)
    assert_close(out["depth_gates"].sum(-1), np.ones((B, T)), dtype=jnp.float32)
    _, out = start(layer)
    assert_close(out["depth_gates"], np.full((B, T, depth), 1 / depth))


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("hopfield")])
def test_the_energy_never_rises_along_the_steps_of_a_layer(name):
    _, out = run(LAYERS[name])(U, *pack(LENGTHS, B, T))
    energy = np.asarray(out["energy"])
    assert energy.shape == (LAYERS[name].depth + 1, B, T, H)
    slack = tolerance(jnp.float32, T * D) * np.abs(energy).max()
    assert (np.diff(energy, axis=0) <= slack).all()
    assert energy.min() >= -slack
    assert (energy[0] - energy[-1]).max() > 10 * slack


def test_beta_starts_at_the_root_of_the_head_width():
    for normalize, beta in (("l2", 2.0), ("rms", 0.5)):  # d = 4
        layer = hopfield(1, normalize=normalize)
        params = first_parameters(layer)
        np.testing.assert_allclose(np.exp(params["log_beta"]), beta, rtol=1e-6)


def test_bounds_of_beta_change_nothing_between_them():
    log_beta = jnp.linspace(-9, 9, 19)
    np.testing.assert_array_equal(inverse_temperature(log_beta), jnp.exp(log_beta))
    assert inverse_temperature(jnp.asarray([-50.0, 50.0])).tolist() == [
        np.exp(np.float32(-9)), np.exp(np.float32(9))]


def test_queries_and_keys_have_the_norm_asked_for():
    for normalize, norm in (("l2", 1.0), ("rms", 2.0)):
        _, out = run(hopfield(1, normalize=normalize))(U, ONE, POSITIONS)
        for name in ("query", "key"):
            np.testing.assert_allclose(np.linalg.norm(out[name], axis=-1), norm, rtol=1e-3)


def test_slots_alone_have_no_key_and_read_token_by_token():
    layer = hopfield(2, patterns="slots")
    assert "key" not in parameters(layer)
    y, _ = run(layer)(U, ONE, POSITIONS)
    moved, _ = run(layer)(U.at[:, 3].add(1.0), ONE, POSITIONS)
    assert (y != moved).any((0, 2)).tolist() == [t == 3 for t in range(T)]


def test_rope_changes_a_layer_and_positions_do_not_otherwise():
    for rope in (False, True):
        layer = hopfield(1, rope=rope)
        y, _ = run(layer)(U, ONE, POSITIONS)
        stretched, _ = run(layer)(U, ONE, POSITIONS * 3)
        assert (y != stretched).any() == rope
