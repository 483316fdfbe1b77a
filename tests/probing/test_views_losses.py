"""Views of gates, losses and states, on models whose parameters say what they must find."""

import math

import jax
import numpy as np
import pytest
from planted import CONTEXT, WINDOWS, column, runner, table

from hippocampus.probing.suites import SkipSuite, flow, gates, lens, tokens

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHARES = ((0.7, 0.2, 0.1), (0.1, 0.3, 0.6))
ONE_PASS = {"model.segments.train": 1}
PLAIN = {"model.segments.train": 1, "model.paths": ("attention",)}
TWO_PATHS = {"model.paths": ("hopfield", "attention")}


@pytest.fixture(scope="module")
def run(built, tiny_config):
    return runner(built, tiny_config)


# ---------------------------------------------------------------- gates

def deaf_mixer(params):
    """Gates of `SHARES` whatever is read, and an attention path that outshouts the others."""
    for i, shares in enumerate(SHARES):
        mixer = params[f"layers_{i}"]["mixer"]
        mixer["gate"]["kernel"][:], mixer["gate"]["bias"][:] = 0, np.log(shares)
        mixer["norm_attention"]["scale"][:] = 200.0


def test_gates_that_read_nothing_are_their_mean(run):
    result = run(gates, ONE_PASS, deaf_mixer)
    found = table(result, "gates")
    assert column(found, "place")[:3] == ["layer 0 ssm", "layer 0 hopfield", "layer 0 attention"]
    np.testing.assert_allclose(column(found, "gate"), np.ravel(SHARES), rtol=1e-5)
    np.testing.assert_allclose(column(found, "spread"), 0, atol=1e-6)
    assert column(found, "wins") == [1, 0, 0, 0, 0, 1]
    assert column(found, "first_pass") == [None] * 6
    for i in range(2):
        assert math.fsum(column(found, "share", layer=i)) == pytest.approx(1)
    entropies = [-sum(s * math.log(s) for s in shares) for shares in SHARES]
    np.testing.assert_allclose(column(table(result, "mixers"), "entropy"), entropies, rtol=1e-5)
    assert column(table(result, "mixers"), "saturated") == [0, 0]


def test_holding_such_gates_at_their_mean_costs_nothing_and_even_ones_do(run):
    found = table(run(gates, ONE_PASS, deaf_mixer), "fixed_gates")
    deltas = dict(zip(column(found, "name"), column(found, "delta"), strict=True))
    assert list(deltas) == ["gates_uniform", "gates_mean", "gates_mean_ssm", "gates_mean_hop",
                            "gates_mean_attn", "gates_mean_layer_0", "gates_mean_layer_1"]
    even = deltas.pop("gates_uniform")
    np.testing.assert_allclose(list(deltas.values()), 0, atol=1e-6)
    assert abs(even) > 1e-4
    assert set(column(found, "category")) == {"gates"}


def test_a_text_shows_the_path_that_adds_most_and_not_the_one_with_the_largest_gate(run):
    (text,), (plot,) = (result := run(gates, ONE_PASS, deaf_mixer)).texts, result.plots
    assert text.legend == ("ssm", "hopfield", "attention") and set(text.classes) == {2}
    assert min(text.strengths) > 0.8
    probe = run.probe(ONE_PASS, deaf_mixer)
    assert "".join(text.tokens) == probe.lm.tokenizer.decode(probe.host_batches[0].tokens_BT[0])
    assert plot.svg.count("layer 1") == 3 and ">attention<" in plot.svg


def test_gates_that_read_the_token_change_the_loss_by_being_held(run):
    result = run(gates, TWO_PATHS)
    assert all(abs(delta) > 1e-6 for delta in column(table(result, "fixed_gates"), "delta"))
    found = table(result, "gates")
    assert min(column(found, "spread")) > 1e-3
    assert any(abs(a - b) > 1e-3 for a, b in zip(  # the controller moves those of the second pass
        column(found, "gate"), column(found, "first_pass"), strict=True))


@pytest.mark.full
def test_layers_without_a_path_are_left_out(run):
    result = run(gates, {**ONE_PASS, "model.layer_paths": ("attention", "ssm+attention")})
    assert column(table(result, "gates"), "place") == [
        "layer 0 attention", "layer 1 ssm", "layer 1 attention"]
    assert column(table(result, "mixers"), "layer") == ["layer 1"]
    assert result.texts[0].legend == ("ssm", "attention")


def test_one_path_alone_is_not_weighed(run):
    with pytest.raises(SkipSuite, match="nothing to weigh"):
        gates.run(run.probe({**ONE_PASS, "model.paths": ("ssm",)}))


# ---------------------------------------------------------------- logit lens

def idle(params, layers=(1,)):
    """Layer 1 adds nothing."""
    for i in layers:
        for name, part in params[f"layers_{i}"]["mixer"].items():
            if name.startswith("norm_"):
                part["scale"][:] = 0
        for part in params[f"layers_{i}"]["mlp"].values():
            part["kernel"][:] = 0


def all_idle(params):
    idle(params, (0, 1))


def test_the_lens_at_the_last_layer_is_the_model_and_an_idle_layer_changes_nothing(run):
    result = run(lens, TWO_PATHS, idle)
    found = table(result, "lens")
    assert column(found, "state") == ["embedding", "pass 1 layer 0", "pass 1 layer 1",
                                      "pass 2 layer 0", "pass 2 layer 1"]
    model = column(table(run(flow, TWO_PATHS, idle), "passes"), "loss")
    assert column(found, "loss")[2::2] == pytest.approx(model, rel=1e-5)
    for key in ("loss", "agrees", "divergence"):
        assert column(found, key, depth=1) == column(found, key, depth=2)
    assert column(found, "agrees")[-1] == 1 and abs(column(found, "divergence")[-1]) < 1e-6
    assert column(found, "divergence")[0] > 1e-3
    assert "unigram" in result.plots[0].svg and "pass 2" in result.plots[0].svg


@pytest.mark.full
def test_a_model_that_does_nothing_predicts_from_its_embeddings(run):
    found = table(run(lens, ONE_PASS, all_idle), "lens")
    assert column(found, "state") == ["embedding", "layer 0", "layer 1"]
    np.testing.assert_allclose(column(found, "loss"), column(found, "loss")[0], rtol=1e-6)
    assert column(found, "agrees") == [1, 1, 1]


# ---------------------------------------------------------------- token losses

def guessing(params):
    """A table of zeros: every token is as likely as any other."""
    params["embedding"][:] = 0


def test_a_model_that_guesses_loses_log_v_everywhere(run):
    result = run(tokens, PLAIN, guessing)
    places, frequencies = table(result, "places"), table(result, "frequencies")
    for found in (places, frequencies):
        np.testing.assert_allclose(column(found, "loss"), math.log(256), rtol=1e-5)
        errors = [error for error in column(found, "loss_stderr") if error is not None]
        np.testing.assert_allclose(errors, 0, atol=1e-5)  # unknown for a class of one window
        assert sum(column(found, "tokens")) == WINDOWS * CONTEXT
    assert column(places, "place") == ["0", "1", "2-3", "4-7", "8-15", "16-23"]
    assert column(places, "tokens") == [WINDOWS * n for n in (1, 1, 2, 4, 8, 8)]


def test_frequencies_are_those_of_what_is_predicted(run):
    found = table(run(tokens, PLAIN, documents=True), "frequencies")
    probe = run.probe(PLAIN, documents=True)
    targets = np.concatenate([batch.targets_BT.ravel() for batch in probe.host_batches])
    share = np.bincount(targets, minlength=256) / len(targets)
    common = targets[share[targets] >= 0.1]
    assert column(found, "share")[0] == "10 % or more"
    assert column(found, "tokens")[0] == len(common)
    assert column(found, "kinds")[0] == (share >= 0.1).sum()
    assert column(found, "unigram")[0] == pytest.approx(-np.log(share[common]).mean())
    assert sum(column(found, "kinds")) == len(np.unique(targets))


def test_losses_of_places_are_means_of_the_tokens_there(run):
    found = table(run(tokens, PLAIN, documents=True), "places")
    probe = run.probe(PLAIN, documents=True)

    def log_p(model, params, batch):
        hidden, _, _ = model.apply({"params": params}, batch, method="forward")
        return jax.nn.log_softmax(model.head(params).logits(hidden)[..., :256])

    targets, place = (np.stack([getattr(batch, name) for batch in probe.host_batches])
                      for name in ("targets_BT", "positions_BT"))
    loss = -np.take_along_axis(probe.map(log_p), targets[..., None], -1)[..., 0]
    assert loss[(place >= 2) & (place < 4)].mean() == pytest.approx(
        column(found, "loss", place="2-3")[0], rel=1e-5)
    assert column(found, "tokens", place="0") == [WINDOWS + 1]  # a document begins in a window


def test_a_passage_shows_what_is_predicted_and_how_hard_it_was(run):
    text = run(tokens, PLAIN, documents=True).texts[0]
    probe = run.probe(PLAIN, documents=True)
    assert "".join(text.tokens) == probe.lm.tokenizer.decode(probe.host_batches[0].targets_BT[0])
    assert all(0 <= strength <= 1 for strength in text.strengths)
    assert set(text.classes) == {0, 1}  # some are easier, some harder than the mean


# ---------------------------------------------------------------- flow

def test_without_a_velocity_network_the_passes_stand_alone(run):
    result = run(flow, TWO_PATHS, idle)
    assert [found.name for found in result.tables] == ["ways", "passes"]
    passes = table(result, "passes")
    assert column(passes, "result") == ["pass 1", "pass 2"]
    assert column(passes, "move")[0] is None and column(passes, "move")[1] > 1e-3
    assert column(passes, "loss")[1] != column(passes, "loss")[0]


def test_one_layer_that_moves_is_a_straight_way(run):
    found = table(run(flow, TWO_PATHS, idle), "ways")
    assert column(found, "ratio") == pytest.approx([1, 1], rel=1e-5)
    # The state stands at its end after half of the layers: off by half the way.
    assert column(found, "off") == pytest.approx([0.25, 0.25], rel=1e-2)


def still(params):
    """A velocity of zero."""
    params["flow"]["out"]["kernel"][:], params["flow"]["out"]["bias"][:] = 0, 0


def test_a_velocity_of_zero_misses_the_whole_way_and_skips_nothing(run):
    result = run(flow, {**TWO_PATHS, "loss.rectified_flow.segment_weight": 0.1}, still)
    np.testing.assert_allclose(column(table(result, "velocity"), "miss"), 1, atol=0.05)
    passes = table(result, "passes")
    loss = dict(zip(column(passes, "result"), column(passes, "loss"), strict=True))
    assert loss["skip"] == pytest.approx(loss["pass 1"], rel=1e-4)
    assert abs(loss["pass 2"] - loss["pass 1"]) > 1e-3
    assert all(0 < ratio < 1 for ratio in column(table(result, "ways"), "ratio"))


@pytest.mark.full
def test_what_a_model_scores_is_what_its_views_say(run):
    """Views run the trained number of passes, though more are there for probes."""
    loss = run.probe().baseline.loss
    found = table(run(lens), "lens")
    assert column(found, "loss")[-1] == pytest.approx(loss, rel=1e-5)
