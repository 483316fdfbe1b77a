"""A probe measures the model that was trained, on whole windows, paired, in one program."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.config import PATHS
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.evaluate import evaluate
from hippocampus.evaluation.ngrams import NgramModel
from hippocampus.models.interventions import Interventions
from hippocampus.probing.measured import Measured
from hippocampus.probing.probe import _sums, about, open_probe

CONTEXT = 16


@pytest.fixture(scope="module")
def probe():
    return open_probe(tiny_run.trained(), max_windows=20)


def test_a_model_that_nothing_changes_scores_as_in_a_plain_evaluation(probe):
    plain = evaluate(probe.model, probe.params, probe.windows, 1.0)
    assert probe.baseline.loss == pytest.approx(plain.nats_per_token, rel=1e-6)
    assert plain.tokens == probe.protocol.tokens == 16 * CONTEXT


def test_windows_are_whole_and_evenly_spaced_in_full_batches(probe):
    """20 windows are asked for in batches of 8: the 16 that fill two."""
    assert len(probe.batches) == 2 and probe.windows.batch_size == 8
    tokens = np.concatenate([batch.tokens_BT for batch in probe.host_batches])
    weights = np.concatenate([batch.loss_weight_BT for batch in probe.host_batches])
    assert tokens.shape == (16, CONTEXT) and (weights == 1).all()
    ids = np.asarray(probe.text.ids)
    n = (len(ids) - 1) // CONTEXT
    for row, window in zip(tokens, np.arange(16) * n // 16, strict=True):
        np.testing.assert_array_equal(row, ids[window * CONTEXT:][:CONTEXT])


def test_all_windows_of_a_text_are_those_without_padding():
    probe = open_probe(tiny_run.trained(), max_windows=0, batch_size=1)
    assert probe.windows.n_windows == (len(probe.text.ids) - 1) // CONTEXT
    assert probe.windows.n_targets == probe.windows.n_windows * CONTEXT


def test_lines_are_scored_on_the_predictions_of_the_windows(probe):
    text = tiny_run.corpus().read_text()
    train = np.frombuffer(text[: len(text) * 90 // 100].encode(), np.uint8).astype(int)
    held = np.asarray(probe.text.ids).astype(int)
    counts = np.bincount(train, minlength=256)
    cost = {"unigram": -np.log((counts[held] + 1) / (len(train) + 256)),
            "trigram": -np.log(NgramModel.fit(train, 256, 3).score(held, 3))}
    predicted = (probe.windows.starts[:, None] + 1 + np.arange(CONTEXT)).ravel()
    assert set(probe.lines) == {"uniform", "unigram", "bigram", "trigram"}
    assert probe.lines["uniform"] == pytest.approx(math.log(256))
    for name, costs in cost.items():
        assert probe.lines[name] == pytest.approx(costs[predicted].mean(), rel=1e-9)
        assert probe.lines[name] != pytest.approx(costs[1:].mean(), rel=1e-6)


def test_every_intervention_runs_the_same_program(probe):
    ones = jnp.ones((1, 3))
    probe.measure()
    programs = _sums._cache_size()
    probe.measure(Interventions(path_mask_LP=ones.at[0, 2].set(0)))
    probe.measure(Interventions(segments=1, controller=2, renormalize=False))
    probe.measure(Interventions(depth_L=np.asarray([1]), gate_override_LP=0.5 * ones))
    seen = []

    def change(i, batch):
        seen.append((i, type(batch.tokens_BT)))
        return Interventions(shuffle_LP=ones, source_PBT=np.zeros((3, 8, CONTEXT), int))

    moved = probe.measure(change)
    assert seen == [(0, np.ndarray), (1, np.ndarray)]
    assert moved.loss != probe.baseline.loss
    assert _sums._cache_size() == programs


def test_contributions_are_shares_of_what_the_mixers_add(probe):
    found = probe.contributions
    assert set(found) == set(tiny_run.PATHS) and sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert min(found.values()) > 0
    lone = probe.measure(Interventions(path_mask_LP=np.asarray([[1, 1, 0]])))
    np.testing.assert_allclose(lone.share_LP, [[0, 1, 0]], atol=1e-6)
    norms = probe.contribution_norms
    for path in tiny_run.PATHS:
        assert norms[path] == probe.baseline.norm_LP[0, PATHS.index(path)] > 0


def test_damage_is_paired_over_windows():
    """By hand: differences 1, 2, 6 over 2, 2, 4 tokens; the ratio is 9/8."""
    zero = np.zeros((1, 3))
    weight = np.asarray([2.0, 2.0, 4.0])
    before = Measured(np.asarray([10.0, 20.0, 30.0]), weight, zero, zero)
    after = Measured(np.asarray([11.0, 22.0, 36.0]), weight, zero, zero)
    damage = after.minus(before)
    assert before.loss == 60 / 8 and damage.nats == 9 / 8
    residuals = np.asarray([1 - 2.25, 2 - 2.25, 6 - 4.5])
    assert damage.standard_error == pytest.approx(
        math.sqrt((residuals**2).sum() / 2 / 3) / (8 / 3))
    # Windows of equal length: the standard error of a mean of differences.
    even = np.full(3, 2.0)
    damage = Measured(after.nll_W, even, zero, zero).minus(Measured(before.nll_W, even, zero, zero))
    assert damage.standard_error == pytest.approx(np.std([0.5, 1, 3], ddof=1) / math.sqrt(3))
    alone = Measured(np.ones(1), np.ones(1), zero, zero)
    assert math.isnan(alone.minus(alone).standard_error)


def test_a_view_is_compiled_once_and_stacked_over_batches(probe):
    traces = []

    def view(model, params, batch):
        traces.append(0)
        return {"mean": batch.tokens_BT.mean(), "tokens": batch.tokens_BT}

    seen = probe.map(view)
    assert len(traces) == 1 and seen["tokens"].shape == (2, 8, CONTEXT)
    np.testing.assert_allclose(seen["mean"], seen["tokens"].mean((1, 2)), rtol=1e-6)


def test_a_text_of_ones_own_is_probed_and_a_short_one_is_one_short_window(tmp_path):
    (tmp_path / "short.txt").write_text("the cat")
    probe = open_probe(tiny_run.trained(), text=str(tmp_path / "short.txt"))
    assert probe.windows.context == probe.protocol.tokens == 6
    assert probe.protocol.split == "text" and math.isfinite(probe.baseline.loss)


def test_results_say_what_made_them(probe):
    made = about(probe)
    assert set(made) == {"version", "commit", "command", "devices", "run", "config", "step",
                         "weights", "seed", "date"}
    assert (made["config"], made["weights"], made["step"]) == ("tiny", "ema", probe.lm.step)


def test_an_exported_model_is_probed_like_the_run(probe, tmp_path):
    from hippocampus.evaluation.export_run import Request, export_run

    export_run(tiny_run.trained(), tmp_path / "export", Request())
    exported = open_probe(tmp_path / "export", max_windows=20)
    assert exported.protocol == probe.protocol and exported.lines == probe.lines
    assert exported.baseline.loss == probe.baseline.loss


def test_weights_are_the_average_where_there_is_one(probe):
    raw = open_probe(tiny_run.trained(), weights="raw", max_windows=8)
    assert (probe.protocol.weights, raw.protocol.weights) == ("ema", "raw")
    assert (np.asarray(raw.params["embedding"]) != np.asarray(probe.params["embedding"])).any()


@pytest.mark.parametrize(("error", "message", "settings"), [
    (DataError, "no run folder at", {"workdir": "/nowhere"}),
    (DataError, "has no test split", {"split": "test"}),
    (DataError, "there is no file", {"text": "/nowhere.txt"}),
    (ConfigError, "--context is 0", {"context": 0}),
    (ConfigError, "--max_windows is -1", {"max_windows": -1}),
])
def test_what_cannot_be_probed_is_refused_in_one_line(error, message, settings):
    with pytest.raises(error, match=message) as caught:
        open_probe(settings.pop("workdir", tiny_run.trained()), **settings)
    assert "\n" not in caught.value.message


def test_a_probe_of_packed_documents_knows_where_they_begin(probe):
    text = dataclasses.replace(probe.text, document_starts=np.asarray([0, 5, 40]))
    from hippocampus.evaluation.report import Windows
    from hippocampus.probing.probe import whole_windows

    (batch,) = whole_windows(text, Windows(CONTEXT, 0, 2), 2)
    np.testing.assert_array_equal(batch.document_ids_BT[0], [1] * 5 + [2] * 11)
