"""Monitors of adapters on a tiny Buu whose gates and slots are set by hand."""

import dataclasses
import math
import re

import adapted
import jax
import numpy as np
import pytest

from hippocampus.errors import ConfigError, DataError
from hippocampus.models.adapter_statistics import GateSummary, SlotSummary
from hippocampus.probing.adapters import monitors as adapter_monitors
from hippocampus.probing.adapters.controls import (
    bare,
    controls,
    enabled,
    shuffled,
    slot_orders,
    zeroed,
)
from hippocampus.probing.adapters.health import WEIGHTS, Vitals, general_text, judge
from hippocampus.probing.adapters.monitors import HotSlot, MemoryUsage

pytestmark = pytest.mark.usefixtures("quick_compiles")

TEXTS = {"one": ["the cat sat on the mat", "a dog"], "two": ["x y z x y z x y z"]}
TOKENS = sum(len(text) - 1 for own in TEXTS.values() for text in own)


def memory_of(lm, layer=1):
    return lm.params["adapters"][f"layers_{layer}"]["memory"]


def with_gate(lm, bias, layers=(0, 1)):
    """Gates that are sigmoid(bias) for every token."""
    for i in layers:
        gate = lm.params["adapters"][f"layers_{i}"]["gate"]
        gate["kernel"][:], gate["bias"][:] = 0, bias
    return lm


@pytest.fixture(scope="module")
def lm():
    return adapted.adapted()


# --- Controls ------------------------------------------------------------------------------------


@jax.jit
def states(params, tokens, given):
    from hippocampus.data.batches import Batch

    batch = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))
    return adapted.model().apply({"params": params}, batch, method="forward",
                                 interventions=given)[0]


def test_a_control_says_the_same_as_a_model_and_as_interventions(lm):
    tokens = np.frombuffer(b"The quick brown fox jumps", np.uint8)[None].astype(np.int32)
    given = controls(lm, seed=3)
    found = {name: np.asarray(states(lm.params, tokens, one)) for name, one in given.items()}
    for name, own in (("memory zeroed", zeroed(lm)), ("memory shuffled", shuffled(lm, 3))):
        theirs = np.asarray(states(own.params, tokens, given["adapters"]))
        np.testing.assert_allclose(found[name], theirs, rtol=1e-4, atol=1e-5, err_msg=name)
    alone = bare(lm)
    logits, _ = jax.jit(alone.model.apply)({"params": alone.params}, tokens)
    head = lm.model.head(lm.params)
    np.testing.assert_allclose(head.logits(found["base"])[..., :256], logits, rtol=1e-5, atol=1e-5)
    assert "adapters" not in alone.params
    apart = [np.abs(found[name] - found["adapters"]).max() for name in found]
    assert all(x > 1e-3 for name, x in zip(found, apart, strict=True) if name != "adapters")
    both = np.asarray(states(lm.params, tokens, enabled(lm, (0, 1))))
    np.testing.assert_array_equal(both, found["adapters"])
    np.testing.assert_array_equal(np.asarray(states(lm.params, tokens, enabled(lm, ()))),
                                  found["base"])


def test_the_original_model_is_not_changed_by_its_controls(lm):
    before = jax.tree.map(np.copy, lm.params)
    for control in (zeroed, shuffled):
        control(lm)
    jax.tree.map(np.testing.assert_array_equal, before, lm.params)


@pytest.mark.parametrize("S", [1, 2, 9])
def test_shuffled_slots_all_move_and_none_is_lost(S):
    orders = slot_orders(3, S, seed=1)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(S), (3, 1)))
    assert S == 1 or (orders != np.arange(S)).all()
    np.testing.assert_array_equal(orders, slot_orders(3, S, seed=1))


# --- Gates and slots -----------------------------------------------------------------------------


def test_gates_are_summed_up_by_layer_and_category():
    lm = with_gate(with_gate(adapted.adapted(), math.log(3), (0,)), -20.0, (1,))
    report = lm.gate_statistics(TEXTS)
    assert set(report.layers) == {0, 1} and set(report.categories) == {"one", "two"}
    assert report.layers[0].mean == pytest.approx(0.75, rel=1e-5)
    assert report.layers[0].saturated == 0 and report.layers[1].closed == pytest.approx(1)
    assert report.layers[0].scale == pytest.approx(
        math.tanh(lm.params["adapters"]["layers_0"]["residual_scale"]), rel=1e-5)
    tokens = [report.categories[name][0].tokens for name in TEXTS]
    assert tokens == [21 + 4, 16] and report.layers[0].tokens == TOKENS == sum(tokens)


def test_a_long_text_is_read_in_parts_and_no_token_twice(lm):
    text = "abcdefgh" * 30
    report = lm.gate_statistics(text)
    assert report.categories == {} and report.layers[1].tokens == len(text) - 1
    assert len(text) > 3 * adapted.CONTEXT


def test_slots_that_are_alike_are_read_alike_and_counted():
    lm = adapted.adapted()
    memory = memory_of(lm)
    memory["key_slots"][:] = memory["key_slots"][:1]
    memory["value_slots"][5] = memory["value_slots"][2]
    usage = lm.memory_usage(1, TEXTS)
    assert usage.slots.effective == pytest.approx(adapted.SLOTS, rel=1e-4)
    assert usage.slots.read_entropy == pytest.approx(math.log(adapted.SLOTS), rel=1e-4)
    assert (usage.same_keys, usage.same_values) == (adapted.SLOTS - 1, 1)
    assert usage.slots.dead == 0
    assert usage.duplicates == 1


def test_the_hottest_slots_are_those_that_tokens_read_most():
    lm = adapted.adapted()
    memory_of(lm)["log_beta"][:] = 8.0
    usage = lm.memory_usage(1, TEXTS)
    assert usage.slots.effective < adapted.SLOTS and usage.slots.read_entropy < 0.1
    uses = [hot.usage for hot in usage.hottest]
    assert uses == sorted(uses, reverse=True)
    assert sum(hot.hits for hot in usage.hottest) == TOKENS
    # Read sharply, the use of a slot is how many tokens chose it.
    for hot in usage.hottest:
        assert hot.hits / TOKENS == pytest.approx(hot.usage, abs=0.05)
        assert sum(n for _, n in hot.tokens) <= hot.hits
        assert all(any(token in text for own in TEXTS.values() for text in own)
                   for token, _ in hot.tokens)


def test_without_adapters_there_is_one_line_of_error(lm):
    for call in (lambda m: m.gate_statistics(), lambda m: m.memory_usage(1),
                 lambda m: m.health_report()):
        with pytest.raises(ConfigError) as refused:
            call(bare(lm))
        assert "\n" not in str(refused.value) and "the model has no adapters" in str(refused.value)
    with pytest.raises(ConfigError, match=re.escape("layer 7 has no adapter (layers 0, 1 have")):
        lm.memory_usage(7)
    for texts in ([], {}, {"one": []}):
        with pytest.raises(ConfigError, match="no text"):
            lm.gate_statistics(texts)
    with pytest.raises(DataError, match="shorter than two tokens"):
        lm.gate_statistics(["a"])


def test_training_logs_every_adapted_layer():
    model, B, T, S = adapted.model(), 2, 3, adapted.SLOTS
    out = {}
    for i in (0, 1):
        out |= {f"layers.{i}.adapter.gate": np.full((B, T, 1), 0.25 + 0.5 * i, np.float32),
                f"layers.{i}.adapter.weights": np.full((B, T, S), 1 / S, np.float32),
                f"layers.{i}.adapter.out": np.ones((B, T, 4), np.float32)}
    found = model.statistics(out, np.ones((B, T), np.float32))
    assert {name.split("/")[2] for name in found} == {"0", "1"}
    assert float(found["adapters/gate/1"]) == pytest.approx(0.75 * B * T)
    assert float(found["adapters/effective_slots/0"]) == pytest.approx(S * B * T, rel=1e-4)
    assert set(model.distributions(out)) == {
        f"adapters/{name}/layer_{i}" for name in ("gate", "slot_use") for i in (0, 1)}


# --- Health --------------------------------------------------------------------------------------


def vitals(**changes):
    gate = GateSummary(100, 0.4, 0.1, (0.2, 0.3, 0.4, 0.5, 0.6), 0.0, 0.0, 0.1)
    memory = MemoryUsage(3, SlotSummary(100, (0.01,) * 100, 2.0), 0, 0, 0,
                         (HotSlot(0, 0.01, 1, ()),))
    return Vitals(**{"finite": True, "identity": 0.0, "compute_dtype": "float32",
                     "gates": {3: gate}, "memories": {3: memory}, "base_bits": 1.0,
                     "adapted_bits": 1.0, **changes})


def gate_of(closed):
    return GateSummary(100, 0.0, 0.0, (0.0,) * 5, closed, 0.0)


def memory_with(usage, duplicates=0):
    return MemoryUsage(4, SlotSummary(100, tuple(usage), 0.0), 0, 0, duplicates, ())


def test_a_model_with_nothing_amiss_has_the_full_score():
    report = judge(vitals())
    assert report.healthy and report.score == pytest.approx(100)
    assert sum(WEIGHTS.values()) == pytest.approx(1) and set(WEIGHTS) == set(report.parts)
    assert str(report).startswith("healthy; score 100 of 100")


@pytest.mark.parametrize(("failure", "changes"), [
    ("finite", {"finite": False}), ("identity", {"identity": 1e-3}),
    ("identity", {"identity": math.nan}),
    ("gates", {"gates": {3: gate_of(0.0), 4: gate_of(0.995)}}),
    ("gates", {"gates": {3: gate_of(math.nan)}}),
    ("slots", {"memories": {3: memory_with([0.01] * 100), 4: memory_with([0.25] * 4 + [0] * 96)}}),
    ("slots", {"memories": {3: memory_with([math.nan] * 4)}}),
    ("base text", {"adapted_bits": 1.051}), ("base text", {"adapted_bits": math.nan})])
def test_each_hard_failure_fails_alone_and_is_named(failure, changes):
    report = judge(vitals(**changes))
    assert [check.name for check in report.failures] == [failure]
    assert not report.healthy and str(report).startswith(f"unhealthy: {failure}")
    assert report.score <= 100


def test_just_within_the_limits_is_healthy():
    report = judge(vitals(
        identity=1e-5, gates={3: gate_of(0.99)}, adapted_bits=1.0499,
        memories={3: memory_with([1 / 6] * 6 + [0] * 94)}))
    assert report.healthy
    assert judge(vitals(identity=0.02, compute_dtype="bfloat16")).healthy


def test_the_score_is_the_weighted_mean_of_its_parts():
    report = judge(vitals(
        gates={3: gate_of(0.5), 4: gate_of(0.0)}, adapted_bits=1.025,
        memories={3: memory_with([0.1] * 10 + [0] * 90, duplicates=20)}))
    assert report.parts == pytest.approx({
        "gates": 0.75, "slots in use": 0.2, "live slots": 0.1, "distinct slots": 0.8,
        "base text": 0.5})
    assert report.score == pytest.approx(
        100 * sum(WEIGHTS[name] * share for name, share in report.parts.items()))


def test_a_model_is_examined_on_its_own(monkeypatch):
    monkeypatch.setattr(adapter_monitors, "QUERIES", 10)
    lm = adapted.adapted()
    for i in (0, 1):
        lm.params["adapters"][f"layers_{i}"]["residual_scale"][...] = 0
    text = "A general text of some length. " * 6
    report = lm.health_report(text)
    assert report.healthy and report.vitals.identity == 0
    assert report.vitals.regression == pytest.approx(0, abs=1e-6)
    assert report.vitals.adapted_bits == pytest.approx(lm.score(text).bits_per_byte, rel=1e-4)
    broken = with_gate(adapted.adapted(), 100.0)
    assert "gates" in [check.name for check in broken.health_report(text).failures]
    memory_of(broken)["value_slots"][0, 0] = np.nan
    found = [check.name for check in broken.health_report(text).failures]
    assert {"finite", "base text"} <= set(found) and "identity" not in found


def test_general_text_comes_with_python():
    assert len(general_text(500)) == 500
    with pytest.raises(DataError, match="base text is shorter"):
        adapted.adapted().health_report("a")


def test_the_fixture_is_as_wide_as_the_tests_assume():
    assert adapted.model().layers == (0, 1)
    assert dataclasses.replace(adapted.model().adapters).memory.slots == adapted.SLOTS
