"""Views of the three memories, on models whose parameters say what they must find."""

import math

import numpy as np
import pytest
from planted import CONTEXT, HEADS, WINDOWS, column, runner, table

from hippocampus.ops import hopfield as hopfield_ops
from hippocampus.probing.suites import SkipSuite, attention, energy, hopfield, ssm

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def run(built, tiny_config):
    return runner(built, tiny_config)


def of_path(path, **overrides):
    return {"model.paths": (path,), "model.segments.train": 1,
            **{name.replace("__", "."): value for name, value in overrides.items()}}


# ---------------------------------------------------------------- state space

def constant_decays(params):
    """Gates at 1/2 whatever is read: layer 0 keeps half of its state, layer 1 almost all."""
    for i, decay in enumerate((0.5, 0.999)):
        path = params[f"layers_{i}"]["ssm"]
        path["gates"]["kernel"][:], path["gates"]["bias"][:] = 0, 0
        path["log_decay"][:] = math.log(math.expm1(-math.log(decay) / 4))


def test_a_constant_decay_has_the_memory_of_its_power(run):
    found = table(run(ssm, of_path("ssm"), constant_decays), "memory")
    np.testing.assert_allclose(column(found, "decay"), [0.5, 0.999], rtol=1e-5)
    expected = [1 / math.log(2), -1 / math.log(0.999)]
    for key in ("low", "median", "high"):
        np.testing.assert_allclose(column(found, key), expected, rtol=1e-3)
    assert column(found, "beyond") == [0, 1]
    np.testing.assert_allclose(column(found, "selectivity"), 0, atol=1e-2)
    assert column(found, "channels") == [24, 24]


def test_decays_that_read_the_token_are_selective(run):
    result = run(ssm, of_path("ssm"))
    assert min(column(table(result, "memory"), "selectivity")) > 0.05
    assert "layer 1" in result.plots[0].svg and "tokens" in result.plots[0].svg


@pytest.mark.full
def test_other_kinds_have_a_memory_too(run):
    diagonal = table(run(ssm, of_path("ssm", model__ssm__kind="diagonal")), "memory")
    assert column(diagonal, "channels") == [24 * 4, 24 * 4]
    np.testing.assert_allclose(column(diagonal, "selectivity"), 0, atol=1e-2)
    gru = table(run(ssm, of_path("ssm", model__ssm__kind="gru")), "memory")
    assert min(column(gru, "median")) > 0 and any("update gate" in note for note in gru.notes)
    for kind, channels, note in (("s6", 24 * 4, "N decays"), ("ssd", 3, "heads are counted")):
        found = table(run(ssm, of_path("ssm", model__ssm__kind=kind, model__ssm__head_width=8)),
                      "memory")
        assert column(found, "channels") == [channels] * 2
        assert min(column(found, "median")) > 0 and min(column(found, "selectivity")) > 0.05
        assert any(note in n for n in found.notes)


# ---------------------------------------------------------------- associative memory

SLOTS = of_path("hopfield", model__hopfield__patterns="slots")
BETAS = (8.5, -9.0)


def sharp_and_even(params):
    """Layer 0 finds one slot of five, layer 1 the mean of all; depth gates that read nothing."""
    for i, (log_beta, share) in enumerate(zip(BETAS, (0.25, 0.9), strict=True)):
        path = params[f"layers_{i}"]["hopfield"]
        path["log_beta"][:] = log_beta
        path["depth_gate"]["kernel"][:] = 0
        path["depth_gate"]["bias"][:] = np.log([share, 1 - share])


def test_one_slot_that_dominates_is_a_single_pattern(run):
    found = table(run(hopfield, SLOTS, sharp_and_even), "retrievals")
    assert min(column(found, "single", layer=0)) > 0.97  # two slots may be equally near
    np.testing.assert_allclose(column(found, "effective", layer=0), 1, atol=0.02)
    np.testing.assert_allclose(column(found, "entropy", layer=0), 0, atol=0.02)
    np.testing.assert_allclose(column(found, "beta", layer=0), math.exp(8.5), rtol=1e-5)


def test_slots_that_are_all_alike_are_a_global_mean_of_them(run):
    found = table(run(hopfield, SLOTS, sharp_and_even), "retrievals")
    assert column(found, "head") == [f"layer {i} head {h}" for i in range(2) for h in range(HEADS)]
    assert column(found, "global", layer=1) == [1.0] * HEADS
    assert column(found, "patterns") == [5.0] * 2 * HEADS
    np.testing.assert_allclose(column(found, "effective", layer=1), 5, rtol=1e-4)
    np.testing.assert_allclose(column(found, "entropy", layer=1), math.log(5), rtol=1e-4)


def test_depth_gates_are_those_that_the_parameters_say(run):
    result = run(hopfield, SLOTS, sharp_and_even)
    found = table(result, "depths")
    np.testing.assert_allclose(column(found, "depth_1"), [0.25, 0.9], rtol=1e-5)
    np.testing.assert_allclose(column(found, "mean"), [1.75, 1.1], rtol=1e-5)
    assert [plot.name for plot in result.plots] == ["regimes", "sweep", "depths"]


def even(params):
    """Every pattern counts alike."""
    for i in range(2):
        params[f"layers_{i}"]["hopfield"]["log_beta"][:] = -9.0


def test_patterns_of_the_context_are_those_before_a_token_in_its_document(run):
    found = table(run(hopfield, of_path("hopfield"), even, documents=True), "retrievals")
    probe = run.probe(of_path("hopfield"), even, documents=True)
    seen = np.concatenate([batch.positions_BT.ravel() + 1 for batch in probe.host_batches])
    assert (seen < CONTEXT).sum() > WINDOWS * (CONTEXT - 1)  # a document begins within a window
    mean = seen[seen >= 4].mean()
    np.testing.assert_allclose(column(found, "patterns"), mean, rtol=1e-5)
    np.testing.assert_allclose(column(found, "effective"), mean, rtol=1e-3)
    np.testing.assert_allclose(column(found, "entropy"), np.log(seen[seen >= 4]).mean(), rtol=1e-4)


def shallow_and_deep(params):
    """Layer 0 reads its first step alone, layer 1 its last; both move at every step."""
    for i, bias in enumerate(((80, -80), (-9, 9))):
        path = params[f"layers_{i}"]["hopfield"]
        path["log_beta"][:], path["depth_gate"]["kernel"][:] = 2.0, 0
        path["depth_gate"]["bias"][:] = bias


def test_the_trained_depth_costs_nothing_and_another_only_where_it_is_read(run):
    found = table(run(hopfield, SLOTS, shallow_and_deep), "depth_sweep")
    assert column(found, "name") == [f"k_{k}" for k in range(1, 5)] + [
        f"k_{k}_layer_{i}" for i in range(2) for k in range(1, 5)]
    delta = dict(zip(column(found, "name"), column(found, "delta"), strict=True))
    assert delta["k_2"] == delta["k_2_layer_0"] == delta["k_2_layer_1"] == 0
    np.testing.assert_allclose(column(found, "delta", layer=0), 0, atol=1e-6)
    assert all(abs(delta[name]) > 1e-5 for name in ("k_1_layer_1", "k_3_layer_1", "k_1", "k_4"))
    assert set(column(found, "category")) == {"depth"}


# ---------------------------------------------------------------- energy

def test_the_energy_falls_and_the_numbers_are_those_of_the_layer(run):
    found = table(run(energy, of_path("hopfield"), shallow_and_deep), "energy")
    probe = run.probe(of_path("hopfield"), shallow_and_deep)
    assert column(found, "step") == [f"layer {i} step {j}" for i in range(2) for j in range(3)]
    assert "no retrieval raised its energy" in found.notes
    for i in range(2):
        rows = [row for row in found.rows if row["layer"] == i]
        assert [row.get("rose") for row in rows] == [None, 0, 0]
        assert rows[1]["fell"] > 0.5 and rows[1]["change"] < 0 >= rows[2]["change"]
    tokens = np.concatenate([batch.tokens_BT for batch in probe.host_batches])
    _, cache = probe.lm.run_with_cache(tokens, "layers.1.hopfield.energy")
    every = np.asarray(cache["layers.1.hopfield.energy"], np.float64)
    np.testing.assert_allclose(column(found, "energy", layer=1), every.mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(column(found, "spread", layer=1), every.std((1, 2, 3)), rtol=1e-3)


def test_a_step_that_goes_too_far_is_flagged(run, monkeypatch):
    step = hopfield_ops.retrieve
    monkeypatch.setattr(hopfield_ops, "retrieve", lambda xi, *a, **k: 4 * step(xi, *a, **k))
    found = table(run(energy, of_path("hopfield")), "energy")
    flagged = [row["step"] for row in found.rows if row.get("flag") == "!"]
    assert flagged and any("ROSE" in note for note in found.notes)
    assert max(row.get("largest_rise") or 0 for row in found.rows) > 0.1


# ---------------------------------------------------------------- attention

def blind(params):
    """Queries of zero in layer 0: its heads attend evenly."""
    params["layers_0"]["attention"]["query"]["kernel"][:] = 0


def test_heads_that_ask_for_nothing_attend_evenly(run):
    result = run(attention, of_path("attention"), blind)
    found = table(result, "heads")
    assert column(found, "head") == [f"layer {i} head {h}" for i in range(2) for h in range(HEADS)]
    n = np.arange(2, CONTEXT + 1)
    for key, value in {"entropy": np.log(n).mean(), "distance": ((n - 1) / 2).mean(),
                       "first": (1 / n).mean(), "itself": (1 / n).mean()}.items():
        np.testing.assert_allclose(column(found, key, layer=0), value, rtol=1e-4)
    assert max(column(found, "entropy", layer=1)) < np.log(n).mean() - 0.01
    np.testing.assert_allclose(column(found, "entropy_stderr", layer=0), 0, atol=1e-6)
    assert all(f">{label}<" in result.plots[0].svg for label in ("layer 0", "layer 1", "head"))


def test_even_attention_ends_at_documents_and_at_the_window(run):
    grouped = of_path("attention", model__attention__window=4, model__attention__n_kv_heads=1)
    found = table(run(attention, grouped, blind, documents=True), "heads")
    probe = run.probe(grouped, blind, documents=True)
    places = np.concatenate([batch.positions_BT.ravel() for batch in probe.host_batches])
    n = np.minimum(places[places > 0] + 1, 4)
    np.testing.assert_allclose(column(found, "entropy", layer=0), np.log(n).mean(), rtol=1e-4)
    first = np.where(places[places > 0] < 4, 1 / n, 0)
    np.testing.assert_allclose(column(found, "first", layer=0), first.mean(), rtol=1e-4)


# ---------------------------------------------------------------- what is not there

@pytest.mark.parametrize("suite, path", [(ssm, "attention"), (attention, "ssm"),
                                         (hopfield, "ssm"), (energy, "attention")])
def test_a_model_without_the_path_is_told_in_one_line(run, suite, path):
    with pytest.raises(SkipSuite, match="the model has no"):
        suite.run(run.probe(of_path(path)))
