"""Buu: the decoder's very logits at first; then what an adapter may know, and how it decodes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.backbones.loading import build_decoder, load_backbone
from hippocampus.backbones.rotary import Rope
from hippocampus.config_adapters import AdaptersConfig, SlotMemoryConfig, adapted_layers
from hippocampus.config_hybrid import SSMConfig
from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.layers.slot_memory import largest
from hippocampus.models.buu import Buu, BuuInterventions
from hippocampus.testing import (
    check_batch_invariance,
    check_causality,
    check_chunked_equals_full,
    check_document_isolation,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

FIXTURES = Path(__file__).resolve().parents[1] / "backbones" / "fixtures"
TINY = Architecture("llama", 64, 16, 2, 1, 8, 64, (LayerSpec(16, Rope(1e4)),) * 4, 1e-6, 8**-0.5)
B, T, S = 2, 11, 6
SSM = SSMConfig(expansion=1.0, backend="associative")
MEMORY = SlotMemoryConfig(slots=S, heads=2, width=8)


def ids(seed=0, rows=B, length=T):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length), np.int32)


def batch_of(tokens, **fields):
    return Batch(tokens, tokens, np.ones(tokens.shape, np.float32), **fields)


def opened(params, seed=1):
    """Parameters with adapters that say something."""
    rng = np.random.default_rng(seed)
    return {**params, "adapters": jax.tree.map(
        lambda leaf: leaf + rng.normal(scale=0.3, size=leaf.shape).astype(np.float32),
        params["adapters"])}


@functools.cache
def made(**fields):
    """(model, parameters with open gates, jitted forward of a batch and interventions)."""
    adapters = AdaptersConfig(**{"layers": (1, 3), "ssm": SSM, "memory": MEMORY, **fields})
    model = Buu(TINY, adapters)
    params = opened(jax.jit(model.init)(jax.random.key(0), ids())["params"])

    @jax.jit
    def forward(batch, interventions=None):
        return model.apply({"params": params}, batch, interventions=interventions,
                           method="forward")[:2]

    return model, params, forward


def base_hidden(tokens):
    decoder, params = build_decoder(TINY), made()[1]["backbone"]
    return jax.jit(lambda batch: decoder.apply({"params": params}, batch, method="forward")[0])(
        batch_of(tokens))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma3n"])
def test_behind_a_closed_gate_adapters_change_no_bit_of_the_logits(family):
    decoder = load_backbone(FIXTURES / family)
    config, tokens = decoder.model.config, ids()
    model = Buu(config, AdaptersConfig(layers=tuple(range(config.n_layers)), ssm=SSM,
                                       memory=MEMORY))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    assert jax.tree.map(np.shape, shapes["backbone"]) == jax.tree.map(np.shape, decoder.params)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes["adapters"])
    for adapter in adapters.values():
        adapter["residual_scale"] = np.float32(0)
    found = jax.jit(model.apply)(
        {"params": {"backbone": decoder.params, "adapters": adapters}}, tokens)[0]
    assert np.array_equal(found, jax.jit(decoder.model.apply)({"params": decoder.params},
                                                              tokens)[0])


@pytest.mark.parametrize("mix", ["residual", "interpolate"])
def test_fresh_adapters_leave_the_logits_as_they_are_and_others_do_not(mix):
    tokens, base = ids(), made()[1]["backbone"]
    wanted = jax.jit(build_decoder(TINY).apply)({"params": base}, tokens)[0]
    model = Buu(TINY, AdaptersConfig(count=2, mix=mix, ssm=SSM, memory=MEMORY))
    assert model.layers == (2, 3)
    fresh = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    assert set(fresh["adapters"]) == {"layers_2", "layers_3"}
    apply = jax.jit(lambda params: model.apply({"params": {**params, "backbone": base}},
                                               tokens)[0])
    if mix == "residual":
        assert np.array_equal(apply(fresh), wanted)
    else:
        assert 0 < np.abs(apply(fresh) - wanted).max() < 1e-2
    assert np.abs(apply(opened(fresh)) - wanted).max() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"mix": "interpolate", "gate_bias": 0.0,
                                         "gate_width": "channel"}], ids=str)
def test_adapters_see_no_future_no_other_row_and_no_other_document(fields):
    model, params, _ = made(**fields)

    def hidden(tokens, document_ids_BT=None, positions_BT=None):
        batch = batch_of(tokens, document_ids_BT=document_ids_BT, positions_BT=positions_BT)
        return model.apply({"params": params}, batch, method="forward")[0]

    run = jax.jit(hidden)
    check_causality(run, jnp.asarray(ids()), positions=(0, 4, T - 1), jit=False)
    check_batch_invariance(run, jnp.asarray(ids()), jit=False)
    check_document_isolation(hidden, jnp.asarray(ids()), [4, 1, 6])


@pytest.mark.parametrize("fields", [{}, {"layers": (0, 1, 2, 3), "ssm": SSMConfig(
    kind="s6", expansion=1.0, d_state=2, backend="associative")}], ids=str)
def test_reading_in_chunks_gives_what_reading_at_once_gives(fields):
    model, params, forward = made(**fields)
    extend = jax.jit(lambda tokens, cache: model.apply(
        model.decode_variables(params, T), tokens, cache, method="extend"))
    check_chunked_equals_full(lambda tokens: forward(batch_of(tokens))[0],
                              lambda: model.init_cache(B, T), extend, jnp.asarray(ids()),
                              [(4, 1, 6), (1,) * T], n_operations=400)


def test_tokens_that_do_not_count_leave_the_cache_and_a_reset_row_starts_afresh():
    model, params, forward = made()
    extend = jax.jit(lambda tokens, cache, valid: model.apply(
        {"params": params}, tokens, cache, valid, method="extend"))
    tokens, cache = ids(), model.init_cache(B, T)
    _, cache = extend(tokens[:, :4], cache, np.ones((B, 4), bool))
    _, same = extend(tokens[:, :4], cache, np.zeros((B, 4), bool))
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(same), strict=True):
        assert np.array_equal(one, other)
    cleared = model.reset(cache, np.array([True, False]))
    assert cleared.length_B.tolist() == [0, 4]
    assert set(cleared.inserted) == {"layers_1", "layers_3"}
    found, _ = extend(tokens[:, :4], cleared, np.ones((B, 4), bool))
    wanted = forward(batch_of(tokens[:, :4]))[0]
    np.testing.assert_allclose(found[0], wanted[0], atol=2e-5)
    assert np.abs(found[1] - wanted[1]).max() > 1e-3  # it went on


@pytest.fixture
def full_compiles():
    """With all optimisations, because they are what could change the bits."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("full_compiles")
def test_interventions_that_change_nothing_keep_every_bit():
    model, params, _ = made()
    # Everything is an argument: what XLA folds as a constant, it rounds in another way.
    run = jax.jit(lambda params, batch, interventions: model.apply(
        {"params": params}, batch, interventions=interventions, method="forward")[0],
        compiler_options=quick_xla.USUAL_EMITTERS)
    batch = batch_of(ids())
    assert np.array_equal(run(params, batch, BuuInterventions.neutral(2, S)),
                          run(params, batch, None))


def test_interventions_do_what_they_say():
    forward, tokens = made()[2], ids()
    neutral = BuuInterventions.neutral(2, S)
    out = forward(batch_of(tokens), neutral)[1]
    assert set(out) == set(forward(batch_of(tokens))[1])
    off = forward(batch_of(tokens), neutral.replace(enabled_L=np.zeros(2, np.float32)))[0]
    np.testing.assert_allclose(off, base_hidden(tokens), atol=1e-5)
    first = forward(batch_of(tokens), neutral.replace(enabled_L=np.float32([1, 0])))[1]
    assert np.array_equal(first["layers.1.residual"], out["layers.1.residual"])
    assert np.all(first["layers.3.adapter.out"] == 0)
    silent = forward(batch_of(tokens), neutral.replace(memory_scale_L=np.zeros(2, np.float32)))[1]
    assert np.all(silent["layers.3.adapter.memory"] == 0)
    assert np.abs(silent["layers.3.adapter.out"]).max() > 1e-3
    order = np.tile(np.roll(np.arange(S, dtype=np.int32), 1), (2, 1))
    shuffled = forward(batch_of(tokens), neutral.replace(slot_order_LS=order))[1]
    assert np.array_equal(shuffled["layers.1.adapter.weights"], out["layers.1.adapter.weights"])
    assert np.abs(shuffled["layers.1.adapter.memory"] - out["layers.1.adapter.memory"]).max() > 1e-3


def test_a_layer_that_is_off_is_the_decoders_in_every_bit_of_the_same_program():
    _, params, forward = made(layers=(0, 1, 2, 3))
    tokens = ids()
    neutral = BuuInterventions.neutral(4, S)
    off = forward(batch_of(tokens), neutral.replace(enabled_L=np.zeros(4, np.float32)))[0]
    decoder = build_decoder(TINY)
    base = jax.jit(lambda batch: decoder.apply({"params": params["backbone"]}, batch,
                                               method="forward")[0])(batch_of(tokens))
    assert np.array_equal(off, base)


def test_the_named_intermediates_are_what_the_monitors_read():
    model, params, forward = made()
    hidden, out = forward(batch_of(ids()))
    D = TINY.d_model
    found = model.apply({"params": params}, out["final"], method="norm_out")
    np.testing.assert_allclose(found, hidden, atol=1e-6)
    for i in model.layers:
        part = {name: out[f"layers.{i}.adapter.{name}"]
                for name in ("gate", "ssm", "memory", "weights", "out", "scale", "beta")}
        assert {name: value.shape for name, value in part.items()} == {
            "gate": (B, T, 1), "ssm": (B, T, D), "memory": (B, T, D), "weights": (B, T, S),
            "out": (B, T, D), "scale": (), "beta": (2,)}
        assert all(value.dtype == jnp.float32 for value in part.values())
        np.testing.assert_allclose(part["weights"].sum(-1), 1, atol=1e-5)
        assert np.all((part["gate"] > 0) & (part["gate"] < 1))
    assert not any(name.startswith("layers.0.adapter") for name in out)
    wide = made(mix="interpolate", gate_bias=0.0, gate_width="channel")[2](batch_of(ids()))[1]
    assert wide["layers.1.adapter.gate"].shape == (B, T, D)


def test_a_token_reads_its_top_slots_alone():
    p = np.float32([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(largest(p, 2), [[0, 4 / 7, 0, 3 / 7], p[1]], rtol=1e-6)
    weights = made(memory=SlotMemoryConfig(slots=S, heads=1, width=8, top_k=2))[2](
        batch_of(ids()))[1]["layers.3.adapter.weights"]
    assert np.all((np.asarray(weights) > 0).sum(-1) == 2)


def test_scanned_and_unrolled_layers_agree():
    model, params, forward = made(layers=(2, 3))
    unrolled = model.clone(scan_layers=False)
    found, out = jax.jit(lambda batch: unrolled.apply({"params": params}, batch,
                                                      method="forward")[:2])(batch_of(ids()))
    wanted, names = forward(batch_of(ids()))
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    assert set(out) == set(names)


def test_layers_with_adapters_are_compiled_once_and_so_are_those_without():
    model, params, _ = made(layers=(2, 3))
    program = jax.make_jaxpr(lambda batch: model.apply({"params": params}, batch,
                                                       method="forward")[0])(batch_of(ids()))
    loops = [eqn.params["length"] for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert loops == [2, 2]


def test_an_edit_reaches_an_adapter_and_one_that_changes_nothing_changes_nothing():
    model, params, forward = made()
    seen = []

    def run(edit):
        edited = model.clone(edit=edit)
        return jax.jit(lambda batch: edited.apply({"params": params}, batch,
                                                  method="forward")[0])(batch_of(ids()))

    def watch(name, value):
        seen.append(name)
        return value

    np.testing.assert_allclose(run(watch), forward(batch_of(ids()))[0], atol=2e-5)
    assert {f"layers.{i}.adapter.{name}" for i in (1, 3)
            for name in ("gate", "ssm", "memory", "out")} <= set(seen)
    without = run(lambda name, value: value * 0 if name.endswith("adapter.out") else value)
    np.testing.assert_allclose(without, base_hidden(ids()), atol=2e-5)


def test_which_layers_have_an_adapter():
    assert adapted_layers(AdaptersConfig(count=3), 5) == (2, 3, 4)
    assert adapted_layers(AdaptersConfig(layers=(4, 1)), 5) == (1, 4)
    assert adapted_layers(AdaptersConfig(count=0), 5) == ()
    for wrong in (AdaptersConfig(count=6), AdaptersConfig(layers=(5,)),
                  AdaptersConfig(layers=(1, 1))):
        with pytest.raises(ConfigError, match=r"model\.adapters"):
            adapted_layers(wrong, 5)
