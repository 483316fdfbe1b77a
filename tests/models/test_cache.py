"""The model read on from a cache: the law for every kind of model, rows apart, and rows anew."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config_files import load_config
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.testing import assert_close, check_chunked_equals_full

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, V = 2, 12, 31
CHUNKS = (5, 1, 1, 5)
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V, jnp.int32)
ONE_LAYER = {"model.n_layers": 1}
MODELS = {
    "all paths, R=2": ONE_LAYER,
    "all paths, R=3, both, feedback, learned, untied": ONE_LAYER | {
        "model.segments.train": 3, "model.hopfield.patterns": "both", "model.mlp.kind": "gelu",
        "model.segments.feedback": True, "model.position": "learned",
        "model.tie_embeddings": False, "model.segments.gradient": "stop"},
    "ssm, R=1, no positions, narrow tables": ONE_LAYER | {
        "model.paths": ("ssm",), "model.segments.train": 1, "model.position": "none",
        "model.embedding_width": 8},
    "hopfield, rope, rms, K=3": ONE_LAYER | {
        "model.paths": ("hopfield",), "model.hopfield.rope": True, "model.segments.train": 1,
        "model.hopfield.normalize": "rms", "model.hopfield.depth_schedule": (3,),
        "model.hopfield.step_size": 0.5},
    "attention, grouped, window, learned, R=2, feedback": ONE_LAYER | {
        "model.paths": ("attention",), "model.attention.n_kv_heads": 1,
        "model.attention.window": 4, "model.position": "learned",
        "model.segments.feedback": True},
    "layers of their own, diagonal, scan, remat": {
        "model.n_layers": 3, "model.layer_paths": ("attention", "ssm+hopfield", "ssm+hopfield"),
        "model.ssm.kind": "diagonal", "model.ssm.input_scale": True, "model.segments.train": 1,
        "model.scan_layers": True, "model.remat": "full", "model.hopfield.patterns": "slots"},
    "s6, learned": ONE_LAYER | {
        "model.paths": ("ssm",), "model.segments.train": 1, "model.position": "learned",
        "model.ssm.kind": "s6", "model.ssm.conv_bias": False},
    "ssd and attention, scan": {
        "model.paths": ("ssm", "attention"), "model.segments.train": 1, "model.ssm.kind": "ssd",
        "model.ssm.head_width": 8, "model.ssm.n_groups": 3, "model.scan_layers": True},
    "bfloat16, all paths, R=1": ONE_LAYER | {
        "model.compute_dtype": "bfloat16", "model.segments.train": 1},
}
FLOW = ONE_LAYER | {
    "loss.rectified_flow.segment_weight": 0.1, "model.hopfield.patterns": "both",
    "model.segments.feedback": True, "model.embedding_width": 8, "model.position": "learned"}


@functools.cache
def extend(model, **options):
    @jax.jit
    def step(params, tokens_Bn, cache, valid_Bn):
        return model.apply({"params": params}, tokens_Bn, cache, valid_Bn, method="extend",
                           **options)

    return step


@functools.cache
def forward(model):
    return jax.jit(model.apply)


def all_valid(tokens_Bn):
    return jnp.ones(tokens_Bn.shape, bool)


def check_law(model, params, *, chunks=CHUNKS, passes=None, tokens=TOKENS):
    vocabulary = model.config.vocab_size

    def step(tokens_Bn, cache):
        hidden, cache = model.apply({"params": params}, tokens_Bn, cache, method="extend")
        return model.head(params).logits(hidden)[..., :vocabulary], cache

    depth = len(model.config.layer_paths or "x" * model.config.n_layers)
    check_chunked_equals_full(
        lambda tokens: model.apply({"params": params}, tokens)[0],
        lambda: model.init_cache(B, T, passes), step, tokens, [chunks],
        n_operations=tokens.shape[1] * model.config.d_model * depth,
        dtype=model.config.compute_dtype)


@pytest.mark.parametrize("name", [  # the first one's kind is that of an experiment below
    pytest.param(name, marks=pytest.mark.full if name == "all paths, R=2" else ())
    for name in MODELS])
def test_a_model_read_in_chunks_gives_what_it_gives_at_once(built, name):
    check_law(*built(MODELS[name]))


def tiny(path):
    """The experiment of a config file at widths that compile quickly."""
    config = load_config(path)
    n_layers = min(config.model.n_layers, 3)
    changes = {
        "model.d_model": 16, "model.n_layers": n_layers, "model.n_heads": 2,
        "model.vocab_size": V, "model.mixer.width": 8, "model.mlp.width": 16, "data.context": 24,
        "model.segments.controller_width": 8, "model.compute_dtype": "float32",
        "model.layer_paths": config.model.layer_paths[:n_layers],
        "model.ssm.head_width": min(config.model.ssm.head_width, 8),
        "model.attention.n_kv_heads": min(config.model.attention.n_kv_heads, 1),
        "model.hopfield.n_slots": min(config.model.hopfield.n_slots, 5)}
    if config.model.embedding_width:
        changes["model.embedding_width"] = 8
    return load_config(path, changes)


CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = ("quickstart", "shakespeare:3.5m")
SHIPPED = [
    pytest.param(f"{file}{size}", id=f"{file.stem}{size}",
                 marks=() if f"{file.stem}{size}" in QUICK else pytest.mark.full)
    for file in sorted(CONFIGS.glob("*.py"))
    for size in ((":3.5m", ":10m", ":50m") if file.stem == "shakespeare" else ("",))]


@pytest.mark.parametrize("path", SHIPPED)
def test_every_experiment_read_in_chunks_gives_what_it_gives_at_once(path, random_parameters):
    model = build_model(tiny(path))
    check_law(model, random_parameters(model))


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_cache_for_other_passes_runs_those_passes(built, passes):
    model, params = built(FLOW)
    hidden, cache = extend(model)(params, TOKENS, model.init_cache(B, T, passes),
                                  all_valid(TOKENS))
    assert len(cache.passes) == passes
    if passes <= 2:  # what training ran
        _, out = forward(model)({"params": params}, TOKENS)
        assert_close(hidden, out["segments.hidden"][passes - 1], n_operations=T * 16)
    else:
        other, _ = extend(model)(params, TOKENS, model.init_cache(B, T, 2), all_valid(TOKENS))
        assert jnp.abs(hidden - other).max() > 1e-3


def test_skipping_passes_in_chunks_gives_what_training_measured(built):
    model, params = built(FLOW)
    _, out = forward(model)({"params": params}, TOKENS)
    cache, found = model.init_cache(B, T, 1), []
    for start in (0, 6):
        tokens = TOKENS[:, start:start + 6]
        hidden, cache = extend(model, skip=True)(params, tokens, cache, all_valid(tokens))
        found.append(hidden)
    assert_close(jnp.concatenate(found, 1), out["flow.skip_hidden"], n_operations=T * 16)


# ---------------------------------------------------------------- rows apart

def bits(tree):
    return [np.atleast_1d(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def row(tree, b):
    return jax.tree.map(lambda array: array[b], tree)


def assert_same_bits(a, b):
    for one, other in zip(bits(a), bits(b), strict=True):
        np.testing.assert_array_equal(one, other)


KINDS = ["all paths, R=2", "layers of their own, diagonal, scan, remat",
         "attention, grouped, window, learned, R=2, feedback"]


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_other_lengths_read_together_are_each_as_alone(built, name):
    model, params = built(MODELS[name])
    wanted, _ = forward(model)({"params": params}, TOKENS)
    # Of the three chunks row 0 has 5, 5 and 2 tokens, row 1 has 3, 0 and 4.
    counts, cache = np.asarray([[5, 5, 2], [3, 0, 4]]), model.init_cache(B, T)
    for c in range(3):
        before = cache
        tokens, valid = np.full((B, 5), V - 1, np.int32), np.arange(5) < counts[:, c, None]
        for b, (begin, n) in enumerate(zip(counts[:, :c].sum(1), counts[:, c], strict=True)):
            tokens[b, :n] = TOKENS[b, begin:begin + n]
        hidden, cache = extend(model)(params, tokens, cache, valid)
        logits = model.head(params).logits(hidden)[..., :V]
        for b, (begin, n) in enumerate(zip(counts[:, :c].sum(1), counts[:, c], strict=True)):
            assert_close(logits[b, :n], wanted[b, begin:begin + n], n_operations=T * 16 * 3)
            if n == 0:
                assert_same_bits(row(before, b), row(cache, b))
    assert cache.length_B.tolist() == [12, 7]


@pytest.mark.parametrize("name", KINDS)
def test_a_row_begun_anew_is_as_a_fresh_one_and_the_others_keep_every_bit(built, name):
    model, params = built(MODELS[name])
    chunk = TOKENS[:, :5]
    fresh_hidden, fresh = extend(model)(params, chunk, model.init_cache(B, T), all_valid(chunk))
    _, used = extend(model)(params, TOKENS[:, 5:10], fresh, all_valid(chunk))
    reset = model.reset(used, jnp.asarray([True, False]))
    assert_same_bits(row(reset, 0), row(model.init_cache(B, T), 0))
    assert_same_bits(row(reset, 1), row(used, 1))
    hidden, cache = extend(model)(params, chunk, reset, all_valid(chunk))
    assert_same_bits(hidden[0], fresh_hidden[0])
    assert_same_bits(row(cache, 0), row(fresh, 0))
    assert cache.length_B.tolist() == [5, 15]


# ---------------------------------------------------------------- parameters of a decoder

@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.full)])
def test_parameters_cast_once_give_the_same_bits(built, tied):
    model, params = built(FLOW | {
        "model.compute_dtype": "bfloat16", "model.tie_embeddings": tied,
        "model.ssm.input_scale": True,
        "model.ssm.kind": "gated" if tied else "diagonal"})
    cast = model.decode_params(params)
    narrow = {leaf.dtype for leaf in jax.tree.leaves(cast)}
    assert narrow == {jnp.dtype("float32"), jnp.dtype("bfloat16")}
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
             for tree in (params, cast)]
    assert sizes[1] < 0.6 * sizes[0]
    found = [extend(model, skip=True)(tree, TOKENS, model.init_cache(B, T), all_valid(TOKENS))
             for tree in (params, cast)]  # all passes, and the flow behind them
    assert_same_bits(*found)
    assert_same_bits(*(model.head(tree).logits(hidden) for tree, (hidden, _) in zip(
        (params, cast), found, strict=True)))


def test_parameters_of_a_float32_model_are_left_as_they_are(built):
    model, params = built(FLOW)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(
            model.decode_params(params)), strict=True):
        assert before is after


def test_every_parameter_that_is_kept_in_float32_would_change_bits(built):
    model, params = built(FLOW | {"model.compute_dtype": "bfloat16",
                                  "model.ssm.input_scale": True})
    kept = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(
        model.decode_params(params)) if leaf.dtype == jnp.float32]
    assert kept and not any("embedding" in name and "up" not in name for name in kept)
    assert all(any(part in name for part in (
        "scale", "log_", "slots", "['gate']", "['out']")) for name in kept), kept
    shapes = parameter_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
