"""Caches of every path: chunks of any size, rows of any length, and what happens past the ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import AttentionConfig, HopfieldConfig, SSMConfig
from hippocampus.layers.gru import GRU
from hippocampus.layers.mamba import MambaS6, MambaSSD
from hippocampus.layers.modern_ssm import ModernSSM
from hippocampus.layers.mor_hopfield import MoRHopfield
from hippocampus.layers.self_attention import SelfAttention
from hippocampus.ops import hopfield as hopfield_ops
from hippocampus.testing import assert_close, check_chunked_equals_full

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, H = 3, 12, 16, 4
CHUNKINGS = ((5, 1, 5, 1), (1, 1, 5, 5))  # prefill and single steps; few sizes, few compilations
U = jax.random.normal(jax.random.key(0), (B, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


def ssm(**settings):
    return ModernSSM(SSMConfig(**{"backend": "chunked", **settings}), H)


def hopfield(depth, **settings):
    return MoRHopfield(HopfieldConfig(n_slots=5, **settings), H, depth)


def attention(theta=100.0, dtype=jnp.float32, **settings):
    return SelfAttention(AttentionConfig(backend="xla", **settings), H, theta, dtype=dtype)


LAYERS = {
    "ssm": ssm(),
    "ssm sequential, input scale": ssm(backend="sequential", input_scale=True),
    "ssm associative, no convolution": ssm(backend="associative", d_conv=1),
    "ssm, convolution longer than a chunk": ssm(d_conv=8),
    "ssm diagonal, input scale": ssm(kind="diagonal", input_scale=True),
    "gru": GRU(SSMConfig(kind="gru")),
    "s6": MambaS6(SSMConfig(kind="s6", backend="chunked")),
    "ssd, two groups": MambaSSD(SSMConfig(kind="ssd", backend="chunked", expansion=2, n_groups=2,
                                          head_width=8, conv_bias=False, projection_bias=True)),
    "hopfield context": hopfield(1),
    "hopfield context, K=3, rope": hopfield(3, rope=True),
    "hopfield context, K=2, rms, half steps": hopfield(2, normalize="rms", step_size=0.5),
    "hopfield slots, K=3, rope": hopfield(3, patterns="slots", rope=True),
    "hopfield both, K=3, small steps": hopfield(3, patterns="both", step_size=0.3),
    "hopfield both, K=2, rope, rms": hopfield(2, patterns="both", rope=True, normalize="rms"),
    "attention": attention(),
    "attention, one group": attention(n_kv_heads=1),
    "attention, two groups, window, no norm": attention(n_kv_heads=2, window=3, qk_norm=False),
    "attention without positions": attention(theta=0.0, window=20),
}
ONE_OF_A_KIND = ("ssm", "ssm diagonal, input scale", "gru", "s6", "ssd, two groups",
                 "hopfield context, K=3, rope", "hopfield both, K=3, small steps",
                 "attention, two groups, window, no norm")
HALF = {
    "ssm": ModernSSM(SSMConfig(backend="chunked"), H, dtype=jnp.bfloat16),
    "s6": LAYERS["s6"].clone(dtype=jnp.bfloat16),
    "ssd": LAYERS["ssd, two groups"].clone(dtype=jnp.bfloat16),
    "hopfield": MoRHopfield(HopfieldConfig(patterns="both", n_slots=5), H, 2, dtype=jnp.bfloat16),
    "attention": attention(dtype=jnp.bfloat16),
}


@functools.cache
def parameters(layer):
    """Random: a gate that starts at zero would hide what it reads."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), U, None, POSITIONS)["params"]
    draw = np.random.default_rng(0)

    def leaf(path, shape):
        start = 1.0 if path[-1].key == "scale" else -2.0 if path[-1].key == "log_decay" else 0.0
        size = shape.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.3
        return (start + size * draw.normal(size=shape.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def run(layer):
    """u -> what the layer gives at once, and its intermediates."""
    params = parameters(layer)
    return jax.jit(lambda u: layer.apply(
        {"params": params}, u, None, jnp.broadcast_to(jnp.arange(u.shape[1]), u.shape[:2])))


@functools.cache
def extend(layer):
    params = parameters(layer)

    @jax.jit
    def step(u_BnD, length_B, cache, valid_Bn):
        positions = length_B[:, None] + jnp.cumsum(valid_Bn, 1) - valid_Bn
        y, cache = layer.apply({"params": params}, u_BnD, positions, cache, valid_Bn,
                               method="extend")
        return y, length_B + valid_Bn.sum(1), cache

    return step


def read(layer, u, chunks, max_length=T, valid=None):
    """Outputs and the last cache after reading in chunks."""
    length, cache = jnp.zeros(u.shape[0], jnp.int32), layer.init_cache(u.shape[0], max_length, D)
    start, outputs = 0, []
    for n in chunks:
        here = slice(start, start + n)
        flags = jnp.ones((u.shape[0], n), bool) if valid is None else valid[:, here]
        y, length, cache = extend(layer)(u[:, here], length, cache, flags)
        outputs.append(y)
        start += n
    return jnp.concatenate(outputs, 1), (length, cache)


def check_law(layer):
    def step(u_BnD, state):
        length, cache = state
        y, length, cache = extend(layer)(u_BnD, length, cache, jnp.ones(u_BnD.shape[:2], bool))
        return y, (length, cache)

    check_chunked_equals_full(
        lambda u: run(layer)(u)[0],
        lambda: (jnp.zeros(B, jnp.int32), layer.init_cache(B, T, D)), step, U, CHUNKINGS,
        n_operations=T * D)


@pytest.mark.parametrize("name", LAYERS)
def test_a_path_read_in_chunks_gives_what_it_gives_at_once(name):
    check_law(LAYERS[name])


@pytest.mark.parametrize("name", HALF)
def test_a_path_in_bfloat16_read_in_chunks_gives_what_it_gives_at_once(name):
    check_law(HALF[name])


def bits(tree):
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(a, b):
    for one, other in zip(bits(a), bits(b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_tokens_that_do_not_count_leave_every_bit_of_a_cache(name):
    layer = LAYERS[name]
    _, (length, cache) = read(layer, U, (5, 5))
    for n in (1, 5):
        junk = jnp.full((B, n, D), 100.0)
        for some in (jnp.zeros((B, n), bool), jnp.arange(n)[None] < jnp.asarray([[0], [n], [0]])):
            u = jnp.where(some[..., None], U[:, :n], junk)
            _, _, after = extend(layer)(u, length, cache, some)
            idle = np.flatnonzero(~np.asarray(some[:, 0]))
            assert_same_bits(jax.tree.map(lambda a, i=idle: a[i], cache),
                             jax.tree.map(lambda a, i=idle: a[i], after))
            if some.any():
                assert any((a[1] != b[1]).any() for a, b in zip(
                    bits(cache), bits(after), strict=True)) or not bits(cache)


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_rows_of_other_lengths_read_together_are_each_as_alone(name):
    layer, lengths = LAYERS[name], np.asarray([7, 12, 3])
    # A row has so many tokens of each chunk; the rest of the chunk is padding.
    counts, chunks = np.asarray([[5, 1, 1], [5, 5, 2], [0, 3, 0]]), (5, 5, 5)
    u, valid = np.full((B, 15, D), 100, np.float32), np.zeros((B, 15), bool)
    for b in range(B):
        taken = 0
        for c, n in enumerate(counts[b]):
            u[b, 5 * c:5 * c + n] = U[b, taken:taken + n]
            valid[b, 5 * c:5 * c + n] = True
            taken += n
        assert taken == lengths[b]
    y, _ = read(layer, jnp.asarray(u), chunks, valid=jnp.asarray(valid))
    wanted, _ = run(layer)(U)
    for b in range(B):
        assert_close(y[b][valid[b]], wanted[b, :lengths[b]], n_operations=T * D, what=f"row {b}")


# ---------------------------------------------------------------- past the ring

LONG = jax.random.normal(jax.random.key(2), (B, 21, D))
RING = 6


LONG_CHUNKS = [(5, *[1] * 6, 5, 5), (16, 5)]


@pytest.mark.parametrize("chunks", LONG_CHUNKS, ids=str)
@pytest.mark.parametrize("window", [0, 4])
def test_past_the_ring_attention_sees_the_last_tokens(chunks, window):
    settings = {"n_kv_heads": 2, "window": window}
    y, (_, cache) = read(attention(**settings), LONG, chunks, max_length=RING)
    seen = min(window or RING, RING)
    assert cache.key_BGCd.shape[2] == seen
    windowed = attention(**{**settings, "window": seen})
    assert_close(y, run(windowed)(LONG)[0], n_operations=T * D)


def retrieval_by_hand(layer, u):
    """The Hopfield path with the last RING keys of each token as its patterns, one by one."""
    params, cfg = parameters(layer), layer.config
    taps = jax.tree.map(np.asarray, run(layer)(u)[1])
    outputs = []
    for t in range(u.shape[1]):
        keys = taps["key"][:, max(0, t + 1 - RING):t + 1]
        xi, mixed = taps["query"][:, t], 0.0
        for k in range(layer.depth):
            p = np.exp(np.einsum("h,bhd,bshd->bhs", taps["beta"], xi, keys))
            new = np.einsum("bhs,bshd->bhd", p / p.sum(-1, keepdims=True), keys)
            xi = (1 - cfg.step_size) * xi + cfg.step_size * new
            mixed += taps["depth_gates"][:, t, k, None, None] * xi
        outputs.append(mixed.reshape(B, D) @ params["out"]["kernel"])
    return np.stack(outputs, 1)


@pytest.mark.parametrize("chunks", LONG_CHUNKS, ids=str)
def test_past_the_ring_hopfield_memory_retrieves_from_the_last_tokens(chunks):
    layer = hopfield(2, step_size=0.7, rope=True)
    y, (_, cache) = read(layer, LONG, chunks, max_length=RING)
    assert cache.key_BHCd.shape[2] == RING
    assert_close(y, retrieval_by_hand(layer, LONG), n_operations=T * D)


@pytest.mark.parametrize("name", ["ssm", "ssm diagonal, input scale", "s6", "ssd, two groups",
                                  "hopfield slots, K=3, rope"])
def test_paths_without_a_ring_go_on_as_if_there_were_no_end(name):
    y, (_, cache) = read(LAYERS[name], LONG, (5, 1, 5, 5, 5), max_length=RING)
    assert_close(y, run(LAYERS[name])(LONG)[0], n_operations=T * D)
    form = [leaf.shape for leaf in jax.tree.leaves(cache)]
    assert form == [leaf.shape for leaf in jax.tree.leaves(
        LAYERS[name].init_cache(B, 10**6, D))]


def test_retrieval_of_a_decoder_is_the_retrieval_of_a_sequence():
    keys, slots = jax.random.normal(jax.random.key(3), (2, B, 5, H, 4))
    beta, xi = jnp.arange(1.0, H + 1), jax.random.normal(jax.random.key(4), (B, 1, H, 4))
    wanted = hopfield_ops.retrieve(jnp.tile(xi, (1, 5, 1, 1)), keys, slots[0], beta,
                                   alpha=0.6)[:, -1:]
    patterns, visible = hopfield_ops.patterns_at_hand(
        jnp.moveaxis(keys, 1, 2), jnp.ones((B, 1, 5), bool), slots[0], xi)
    found = hopfield_ops.retrieve_from(xi, patterns, visible, beta, alpha=0.6)
    assert_close(found, wanted, n_operations=20)
