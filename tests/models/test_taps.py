"""Named intermediates: the names are stable, reading is free, an edit changes what follows it."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.models.taps import editable_names, run_with_cache, run_with_edits
from hippocampus.testing import assert_close

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T = 2, 8
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, 31, jnp.int32)

# The names of a layer with all paths and two retrieval steps. They are what other people's
# scripts ask for: add to them, and rename none.
EDITABLE = [
    "ssm.decay", "ssm.state", "ssm.out",
    "hopfield.query", "hopfield.key", "hopfield.step1", "hopfield.step2", "hopfield.depth_gates",
    "hopfield.heads", "hopfield.out", "attention.query", "attention.key", "attention.value",
    "attention.heads", "attention.out",
    "mixer.gates", "mixer.out", "mlp.out", "residual"]
READABLE = [
    *EDITABLE, "ssm.gate_in", "ssm.gate_forget", "hopfield.energy", "hopfield.effective_patterns",
    "hopfield.n_patterns", "hopfield.entropy", "hopfield.regime", "hopfield.beta", "mixer.entropy",
    "mixer.contribution", "mixer.terms"]


@pytest.fixture(scope="module")
def small(built):
    """Two layers of two paths, two passes."""
    return built({"model.paths": ("hopfield", "attention")})


@pytest.fixture(scope="module")
def smallest(built):
    """One layer of two paths, one pass."""
    return built({"model.paths": ("hopfield", "attention"), "model.n_layers": 1,
                  "model.segments.train": 1})


@pytest.fixture(scope="module")
def plain(small):
    return run_with_cache(*small, TOKENS)


def same(a, b):
    return bool((np.asarray(a) == np.asarray(b)).all())


def of_layers(names, layers):
    return [f"layers.{i}.{name}" for i in range(layers) for name in names]


def in_pass(r, names):
    return [f"segments.{r}.{name}" for name in names]


@pytest.mark.parametrize("scan", [False, True])
def test_the_names_are_the_published_ones(built, scan):
    model, params = built({"model.scan_layers": scan,
                           "loss.rectified_flow.segment_weight": 0.1})
    names = jax.eval_shape(lambda: model.apply({"params": params}, TOKENS))[1]
    layers = of_layers(READABLE, 2)
    assert set(names) == {
        "embedding", "controller.bias", "segments.hidden", "segments.0.hidden",
        "segments.1.hidden", "flow.skip_hidden", *layers, *in_pass(0, layers)}
    editable = ["hidden", *of_layers(EDITABLE, 2)]
    assert set(editable_names(model, params, TOKENS)) == {
        "embedding", "controller.bias", "segments.1.controller.bias", *editable,
        *in_pass(0, editable), *in_pass(1, editable)}


def test_intermediates_have_the_shapes_that_their_layers_document(plain):
    shapes = {name: value.shape for name, value in plain[1].items()}
    assert shapes["segments.hidden"] == (2, B, T, 16)
    assert shapes["layers.1.hopfield.step2"] == (B, T, 2, 8)
    assert shapes["layers.1.hopfield.energy"] == (3, B, T, 2)
    assert shapes["layers.1.mixer.gates"] == (B, T, 2)
    assert shapes["controller.bias"] == (2, B, T, 3)


def test_a_glob_chooses_and_changes_no_value(small, plain):
    logits, cache = run_with_cache(*small, TOKENS, "layers.*.mixer.gates")
    assert set(cache) == {"layers.0.mixer.gates", "layers.1.mixer.gates"}
    assert_close((logits, cache), (plain[0], {name: plain[1][name] for name in cache}),
                 n_operations=T * 16)
    _, cache = run_with_cache(*small, TOKENS, ["embedding", "segments.0.layers.1.hopfield.step?"])
    assert set(cache) == {"embedding", "segments.0.layers.1.hopfield.step1",
                          "segments.0.layers.1.hopfield.step2"}


def test_without_edits_the_bits_are_those_of_the_plain_run(smallest):
    logits, cache = run_with_cache(*smallest, TOKENS, ())
    edited, nothing = run_with_edits(*smallest, TOKENS, {})
    assert cache == nothing == {}
    assert same(logits, edited)


def test_an_edit_that_changes_nothing_changes_no_value(smallest):
    logits, _ = run_with_edits(*smallest, TOKENS, {"layers.0.mixer.out": lambda y: y})
    assert_close(logits, run_with_cache(*smallest, TOKENS, ())[0], n_operations=T * 16)


def test_an_edit_changes_what_follows_and_nothing_before(small, plain):
    edit = {"segments.0.layers.1.hopfield.step1": lambda xi: xi + 1.0}
    logits, cache = run_with_edits(*small, TOKENS, edit, "*")
    first = "segments.0.layers.1."
    changed = {name for name in plain[1] if not np.allclose(
        cache[name], plain[1][name], rtol=1e-4, atol=1e-5)}
    before = {name for name in plain[1] if name.startswith("segments.0.layers.0.")}
    assert not before & changed
    assert not {first + name for name in (
        "hopfield.query", "hopfield.key", "mixer.gates", "attention.out")} & changed
    assert {first + name for name in (
        "hopfield.step1", "hopfield.step2", "hopfield.out", "mixer.out", "residual")} <= changed
    assert {"controller.bias", "layers.0.mixer.gates", "segments.1.hidden"} <= changed
    # What the second pass reads of the tokens is not the first pass's business.
    assert not {"embedding", "layers.0.hopfield.out", "layers.0.attention.out"} & changed
    assert not np.allclose(logits, plain[0])


def test_an_edit_without_a_pass_acts_in_every_pass(built):
    small = built({"model.paths": ("hopfield", "attention"), "model.n_layers": 1})
    name = "layers.0.mixer.gates"
    half = lambda gates: gates * 0 + 0.5  # noqa: E731
    _, cache = run_with_edits(*small, TOKENS, {name: half}, [name, f"segments.0.{name}"])
    assert (np.asarray(cache[name]) == 0.5).all()
    assert (np.asarray(cache[f"segments.0.{name}"]) == 0.5).all()
    _, cache = run_with_edits(*small, TOKENS, {f"segments.1.{name}": half},
                              [name, f"segments.0.{name}"])
    assert (np.asarray(cache[name]) == 0.5).all()
    assert (np.asarray(cache[f"segments.0.{name}"]) != 0.5).any()


def test_a_path_edited_to_zero_is_a_path_that_adds_nothing(smallest):
    model, params = smallest
    logits, _ = run_with_edits(model, params, TOKENS, {"layers.0.attention.out": jnp.zeros_like})
    layer = params["layers_0"]
    silent = {**params, "layers_0": {**layer, "attention": jax.tree.map(
        jnp.zeros_like, layer["attention"])}}
    assert_close(logits, run_with_cache(model, silent, TOKENS, ())[0], n_operations=T * 16)


def test_a_scanned_model_is_edited_like_an_unrolled_one(built):
    overrides = {"model.paths": ("hopfield", "attention"), "model.segments.train": 1}
    unrolled, params = built(overrides)
    scanned, _ = built({**overrides, "model.scan_layers": True})
    edit = {"layers.1.hopfield.out": lambda y: 2 * y}
    names = "layers.*.residual"
    assert_close(run_with_edits(scanned, params, TOKENS, edit, names),
                 run_with_edits(unrolled, params, TOKENS, edit, names), n_operations=T * 16)
    assert_close(run_with_cache(scanned, params, TOKENS, names),
                 run_with_cache(unrolled, params, TOKENS, names), n_operations=T * 16)


def test_an_unknown_name_is_refused_with_the_nearest_one(small):
    with pytest.raises(ConfigError, match=r"mean layers\.1\.hopfield\.step2"):
        run_with_cache(*small, TOKENS, "layers.1.hopfield.step22")
    with pytest.raises(ConfigError, match=r"mean layers\.1\.mixer\.gates"):
        run_with_edits(*small, TOKENS, {"layers.1.mixer.gate": lambda g: g})
    # Readable, but computed from other values: editing it would change nothing.
    with pytest.raises(ConfigError, match="no editable intermediate"):
        run_with_edits(*small, TOKENS, {"layers.1.hopfield.energy": lambda e: e})
