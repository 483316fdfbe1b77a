"""The hybrid model: causal in every configuration, and its switches change what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hippocampus.config import PATHS
from hippocampus.data.batches import Batch
from hippocampus.layers.layer_stack import layer_parameters
from hippocampus.models.build_model import build_model, count_parameters, parameter_shapes
from hippocampus.models.hybrid_lm import noisy
from hippocampus.testing import (
    assert_close,
    check_batch_invariance,
    check_causality,
    check_causality_by_gradient,
    check_document_isolation,
    pack,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, V = 2, 24, 16, 31
LENGTHS = (9, 1, 11)  # and three tokens of padding
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V, jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
ONE = jnp.ones((B, T), jnp.int32)

# Every value of every switch, and most pairs of them, in few models.
CONFIGS = {
    "all paths": {},
    "all paths, R=3, both, stop, feedback, scan, remat, learned, untied": {
        "model.segments.train": 3, "model.hopfield.patterns": "both",
        "model.segments.gradient": "stop", "model.segments.feedback": True,
        "model.scan_layers": True, "model.remat": "full", "model.position": "learned",
        "model.tie_embeddings": False, "model.mlp.kind": "gelu"},
    "ssm, R=1, no positions": {
        "model.paths": ("ssm",), "model.segments.train": 1, "model.position": "none",
        "model.ssm.backend": "associative", "model.scan_layers": True, "model.mlp.kind": "gelu"},
    "hopfield, both, rope, rms, K=(3, 1)": {
        "model.paths": ("hopfield",), "model.hopfield.patterns": "both",
        "model.hopfield.rope": True, "model.hopfield.normalize": "rms",
        "model.hopfield.step_size": 0.5, "model.hopfield.depth_schedule": (3, 1)},
    "attention, R=3, grouped, window, feedback": {
        "model.paths": ("attention",), "model.segments.train": 3,
        "model.attention.n_kv_heads": 1, "model.attention.window": 4,
        "model.position": "learned", "model.segments.feedback": True, "model.remat": "dots"},
    "ssm + hopfield, diagonal, slots, stop, flow": {
        "model.paths": ("ssm", "hopfield"), "model.ssm.kind": "diagonal",
        "model.ssm.input_scale": True, "model.hopfield.patterns": "slots",
        "model.segments.gradient": "stop", "loss.rectified_flow.segment_weight": 0.1},
    "ssm + attention, R=1, sequential, remat dots, untied": {
        "model.paths": ("ssm", "attention"), "model.segments.train": 1,
        "model.ssm.backend": "sequential", "model.remat": "dots", "model.scan_layers": True,
        "model.tie_embeddings": False},
    "hopfield + attention, no positions, remat": {
        "model.paths": ("hopfield", "attention"), "model.position": "none",
        "model.attention.qk_norm": False, "model.remat": "full"},
    "three layers of their own, dominant": {
        "model.n_layers": 3, "model.layer_paths": ("attention", "ssm+attention", "ssm+hopfield"),
        "model.ssm.dominant_from_layer": 1, "model.segments.feedback": True},
    "three layers, first without ssm, scan": {
        "model.n_layers": 3, "model.ssm.first_layer": 1, "model.scan_layers": True,
        "model.paths": ("ssm", "hopfield"), "model.hopfield.depth_schedule": (2, 1, 1),
        "model.hopfield.patterns": "slots"},
}


@functools.cache
def first_parameters(model):
    return jax.jit(lambda key: model.init(key, TOKENS)["params"])(jax.random.key(1))


def batch_of(tokens, ids=None, positions=None):
    return Batch(tokens, tokens, jnp.ones(tokens.shape), ids, positions)


@functools.cache
def forward(model):
    """(params, tokens, ids, positions) -> (states of the passes B,T,R,D; logits)."""
    @jax.jit
    def run(params, tokens, ids=None, positions=None):
        hidden, out, _ = model.apply({"params": params}, batch_of(tokens, ids, positions),
                                     method="forward")
        result = {"passes": jnp.moveaxis(out["segments.hidden"], 0, 2),
                  "logits": model.head(params).logits(hidden)[..., :V]}
        if "flow.skip_hidden" in out:
            result["skip"] = out["flow.skip_hidden"]
        return result

    return run


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differs(a, b):
    return bool((np.asarray(a) != np.asarray(b)).any())


# ---------------------------------------------------------------- invariants of every model

@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_reads_the_past_of_its_own_row_and_document_only(name, built):
    model, params = built(CONFIGS[name])
    run, packed = functools.partial(forward(model), params), pack(LENGTHS, B, T)
    check_causality(lambda tokens: run(tokens, ONE, POSITIONS), TOKENS, jit=False)
    check_causality(lambda tokens: run(tokens, *packed), TOKENS, jit=False,
                    positions=(0, 8, 9, 10, 20, 21))
    check_batch_invariance(lambda tokens: run(tokens, *packed), TOKENS, jit=False)
    check_document_isolation(run, TOKENS, LENGTHS, n_operations=T * D * 8, jit=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_of_a_model_reaches_the_future(name, built):
    overrides = CONFIGS[name]
    if not {"model.n_layers", "model.scan_layers"} & set(overrides):
        overrides = {**overrides, "model.n_layers": 1}  # the passes still go one after the other
    model, params = built(overrides)
    ids, positions = pack(LENGTHS, 1, T)
    tokens = jnp.arange(T)[None]  # every token has its own row of the table

    def apply(x_BTD):
        table = params["embedding"].at[:T].set(x_BTD[0])
        _, out, _ = model.apply({"params": {**params, "embedding": table}},
                                batch_of(tokens, ids, positions), method="forward")
        return jnp.moveaxis(out["segments.hidden"], 0, 2)

    check_causality_by_gradient(apply, params["embedding"][None, :T], positions=(0, 5, 8, 9, 23))


@pytest.mark.parametrize("name", ["all paths"])
def test_rows_without_document_ids_are_rows_of_one_document(name, built):
    model, params = built(CONFIGS[name])
    assert_close(forward(model)(params, TOKENS), forward(model)(params, TOKENS, ONE, POSITIONS),
                 n_operations=T * D)
    check_causality(lambda tokens: forward(model)(params, tokens), TOKENS, jit=False)


def test_positions_follow_from_document_ids(built):
    model, params = built(CONFIGS["ssm + attention, R=1, sequential, remat dots, untied"])
    ids, positions = pack(LENGTHS, B, T)
    assert_close(forward(model)(params, TOKENS, ids), forward(model)(
        params, TOKENS, ids, positions), n_operations=T * D)


# ---------------------------------------------------------------- switches that change no number

@functools.cache
def loss_and_gradient(model):
    @jax.jit
    def run(params):
        def loss(params):
            _, out, _ = model.apply({"params": params}, batch_of(TOKENS), method="forward")
            states = out["segments.hidden"]
            return (states * jax.random.normal(jax.random.key(3), states.shape)).sum()

        return jax.value_and_grad(loss)(params)

    return run


@pytest.mark.parametrize("switch", [
    {"model.remat": "full"}, {"model.remat": "mlp"}, {"model.scan_layers": True},
    {"model.scan_layers": True, "model.remat": "dots"}])
def test_remat_and_scan_change_no_value_and_no_gradient(switch, built):
    overrides = {"model.segments.train": 1, "model.paths": ("ssm", "attention")}
    plain, params = built(overrides)
    switched, _ = built({**overrides, **switch})
    assert_close(loss_and_gradient(switched)(params), loss_and_gradient(plain)(params),
                 n_operations=T * D * 8)


def test_remat_of_the_mlp_costs_its_first_product_again_and_no_other(built):
    width = 256

    def flops(remat):  # of a scan's body XLA counts one turn; unrolled, a CPU's compiler undoes it
        model, params = built({"model.segments.train": 1, "model.paths": ("attention",),
                               "model.scan_layers": True, "model.mlp.width": width,
                               "model.remat": remat})
        compiled = jax.jit(loss_and_gradient(model)).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    product = 2 * B * T * D * 2 * width
    assert flops("mlp") - flops("none") == pytest.approx(product, rel=0.2)


def test_layers_made_by_a_loop_are_those_of_module_param_bit_by_bit():
    def init(key, spec):
        return {"w": jax.random.normal(key, (3, spec))}

    class Looped(nn.Module):
        def setup(self):
            self.layers = layer_parameters(self, ["a", "b", "c"], [2, 4, 2], init)

        def __call__(self):
            return self.layers

    class Single(nn.Module):
        def setup(self):
            self.layers = [self.param(n, init, s) for n, s in zip("abc", [2, 4, 2], strict=True)]

        def __call__(self):
            return self.layers

    looped, single = (kind().init(jax.random.key(3))["params"] for kind in (Looped, Single))
    assert_same(looped, single)
    assert Looped().apply({"params": looped})[2]["w"] is looped["c"]["w"]


def test_scanned_and_unrolled_models_start_with_the_same_bits(built):
    small = {"model.segments.train": 1, "model.paths": ("hopfield",)}
    plain, scanned = (first_parameters(built({**small, "model.scan_layers": scan})[0])
                      for scan in (False, True))
    assert_same(plain, scanned)
    assert differs(plain["layers_0"]["mlp"]["up"]["kernel"],
                   plain["layers_1"]["mlp"]["up"]["kernel"])


def test_parameters_lie_as_one_tree_per_layer(built):
    params = built({"model.scan_layers": True})[1]
    assert set(params) == {"embedding", "layers_0", "layers_1", "norm_out", "reasoner"}
    assert set(params["layers_0"]) == {"norm_paths", "ssm", "hopfield", "attention", "mixer",
                                       "norm_mlp", "mlp"}
    shapes = [jax.tree.map(jnp.shape, params[f"layers_{i}"]) for i in range(2)]
    assert shapes[0] == shapes[1]


def test_bfloat16_keeps_parameters_and_logits_in_float32(built):
    small = {"model.n_layers": 1, "model.hopfield.patterns": "both"}
    model, params = built({**small, "model.compute_dtype": "bfloat16"})
    assert {leaf.dtype for leaf in jax.tree.leaves(parameter_shapes(model))} == {
        np.dtype("float32")}
    result = forward(model)(params, TOKENS)
    assert result["logits"].dtype == jnp.float32 and result["passes"].dtype == jnp.bfloat16
    assert np.isfinite(result["logits"]).all()
    expected = forward(built(small)[0])(params, TOKENS)["logits"]
    off = np.abs(result["logits"] - expected).mean() / np.abs(expected).mean()
    assert off < 0.05


# ---------------------------------------------------------------- the public call

def test_the_public_call_gives_the_logits_of_the_vocabulary_deterministically(built):
    model, params = built()
    apply = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens)[0])
    logits = apply(params, TOKENS)
    assert logits.shape == (B, T, V) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, apply(params, TOKENS))
    assert_close(logits, forward(model)(params, TOKENS)["logits"], n_operations=T * D)


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_padding_of_the_tables_is_not_counted(tied, tables, built):
    model, _ = built({"model.tie_embeddings": tied})
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in
              jax.tree_util.tree_leaves_with_path(parameter_shapes(model))}
    padded = {name for name, leaf in leaves.items() if leaf.shape == (128, D)}
    assert len(padded) == tables
    others = sum(leaf.size for name, leaf in leaves.items() if name not in padded)
    assert count_parameters(model) == others + tables * V * D


def compiled(model, params, names, T=64):
    tokens = jnp.zeros((1, T), jnp.int32)

    def run(params, tokens):
        logits, out = model.apply({"params": params}, tokens)
        return logits, {name: out[name] for name in names}

    return jax.jit(run).lower(params, tokens).compile()


def test_intermediates_that_nobody_reads_cost_nothing(built):
    overrides = {"model.paths": ("hopfield",), "model.n_layers": 1, "model.segments.train": 1}
    model, params = built(overrides)

    class Lean(type(model)):  # the same model, whose `out` is thrown away inside
        def __call__(self, tokens):
            return super().__call__(tokens)[0], {}

    plain = compiled(model, params, ())
    lean = compiled(Lean(model.config), params, ())
    full = compiled(model, params, ("layers.0.hopfield.energy",))

    def flops(program):
        cost = program.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    assert flops(plain) == flops(lean)
    assert flops(full) > 1.1 * flops(plain)


# ---------------------------------------------------------------- segments

def test_the_second_pass_starts_as_a_copy_of_the_first(built):
    model, _ = built({"model.segments.feedback": True, "model.segments.train": 3,
                      "model.n_layers": 1})
    passes = forward(model)(first_parameters(model), TOKENS)["passes"]
    for r in (1, 2):
        assert_close(passes[:, :, r], passes[:, :, 0], n_operations=T * D)


def test_later_passes_differ_once_the_controller_speaks(built):
    passes = np.asarray(forward(built()[0])(built()[1], TOKENS)["passes"])
    assert np.abs(passes[:, :, 1] - passes[:, :, 0]).max() > 1e-3


def test_stop_lets_no_gradient_into_the_first_pass(built):
    """A loss of the last pass only: through the controller, or not at all."""
    def gradients(mode):
        model, params = built({"model.segments.gradient": mode, "model.n_layers": 1,
                               "model.paths": ("hopfield", "attention")})

        @jax.jit
        def gradient(params):
            def loss(offset):
                # An offset that only the first pass sees.
                edited = model.clone(edit=lambda name, value: value + offset
                                     if name == "segments.0.hidden" else value)
                hidden, _, _ = edited.apply({"params": params}, batch_of(TOKENS),
                                            method="forward")
                return (hidden * jax.random.normal(jax.random.key(3), hidden.shape)).sum()

            return jax.grad(loss)(jnp.zeros((B, T, D)))

        def total(params):
            hidden, _, _ = model.apply({"params": params}, batch_of(TOKENS), method="forward")
            return (hidden * jax.random.normal(jax.random.key(3), hidden.shape)).sum()

        return gradient(params), jax.jit(jax.grad(total))(params)

    (into_stopped, stopped), (into_full, full) = gradients("stop"), gradients("full")
    assert not np.asarray(into_stopped).any()
    assert np.asarray(into_full).any()
    # The controller itself learns either way, the layers differently.
    for tree in (stopped, full):
        assert np.asarray(tree["reasoner"]["controller"]["out"]["kernel"]).any()
    assert_close(stopped["reasoner"], full["reasoner"], n_operations=T * D * 8)
    assert np.abs(stopped["layers_0"]["mlp"]["up"]["kernel"]
                  - full["layers_0"]["mlp"]["up"]["kernel"]).max() > 1e-4


# ---------------------------------------------------------------- gates, dropout, tables

def test_the_gate_of_the_state_space_path_starts_at_its_dominance(built):
    model, _ = built({"model.ssm.dominant_from_layer": 1, "model.ssm.dominance": 0.7,
                      "model.hopfield.depth_schedule": (1,), "model.segments.train": 1})

    @jax.jit
    def gates(params):
        _, out = model.apply({"params": params}, TOKENS)
        return out["layers.0.mixer.gates"], out["layers.1.mixer.gates"]

    first, second = gates(first_parameters(model))
    assert_close(first, np.full((B, T, len(PATHS)), 1 / 3))
    assert_close(second, np.broadcast_to([0.7, 0.15, 0.15], (B, T, len(PATHS))))


def test_dropout_acts_in_training_only(built):
    model, params = built({"model.dropout": 0.5, "model.mixer.path_dropout": 0.5,
                           "model.n_layers": 1, "model.paths": ("ssm", "attention")})

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, train):
        return model.apply({"params": params}, batch_of(TOKENS), train=train, method="forward",
                           rngs={"dropout": key})[0]

    keys = jax.random.key(1), jax.random.key(2)
    assert not differs(run(keys[0], False), run(keys[1], False))
    assert differs(run(keys[0], True), run(keys[1], True))
    assert not differs(run(keys[0], True), run(keys[0], True))


def test_a_narrow_table_is_read_and_written_through_projections(tiny_config, random_parameters):
    """The logits are those of the wide table that the narrow one and its projections make."""
    small = {"model.paths": ("attention",), "model.n_layers": 1, "model.segments.train": 1}
    narrow = build_model(tiny_config({**small, "model.embedding_width": 8}))
    wide = build_model(tiny_config({**small, "model.tie_embeddings": False}))
    params = random_parameters(narrow)
    assert params["embedding"].shape == (128, 8)
    up, down = params["embedding_up"]["kernel"], params["head_down"]
    assert up.shape == (8, D) and down.shape == (D, 8)
    rest = {name: tree for name, tree in params.items()
            if name not in ("embedding", "embedding_up", "head_down")}
    # A table is scaled to unit size by the root of its own width.
    table = params["embedding"] @ up * (8 / D) ** 0.5
    whole = {**rest, "embedding": table, "head": params["embedding"] @ down.T}
    actual, _ = jax.jit(narrow.apply)({"params": params}, TOKENS)
    expected, _ = jax.jit(wide.apply)({"params": whole}, TOKENS)
    assert_close(actual, expected, n_operations=D * D)
    assert count_parameters(narrow) == sum(
        leaf.size for leaf in jax.tree.leaves(rest)) + V * 8 + 2 * 8 * D


def test_token_noise_reads_the_next_rows_tokens_and_only_in_training(tiny_config):
    tokens = jnp.arange(4 * 500).reshape(4, 500)
    read = np.asarray(noisy(tokens, 0.2, jax.random.key(0)))
    changed = read != np.asarray(tokens)
    assert 0.15 < changed.mean() < 0.25
    np.testing.assert_array_equal(read[changed], np.roll(tokens, -1, axis=0)[changed])

    model = build_model(tiny_config({"model.token_noise": 0.5, "model.paths": ("attention",)}))
    params, batch = first_parameters(model), batch_of(TOKENS)

    @functools.partial(jax.jit, static_argnums=0)
    def embedding(train):
        return model.apply({"params": params}, batch, method="forward", train=train,
                           rngs={"dropout": jax.random.key(2)})[1]["embedding"]

    clean, trained = np.asarray(embedding(False)), np.asarray(embedding(True))
    np.testing.assert_array_equal(clean, params["embedding"][TOKENS] * D**0.5)
    assert 0.2 < (clean != trained).any(-1).mean() < 0.8
