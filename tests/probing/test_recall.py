"""The recall suite where the answer is known: one path has the memory, one text its n-grams."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
import recall_run
import tiny_run

from hippocampus.generation.language_model import LanguageModel
from hippocampus.probing import repeats
from hippocampus.probing.probe import open_probe
from hippocampus.probing.suites import recall


def rows_of(result, table=0):
    return {(row["name"], row["path"]): row for row in result.tables[table].rows}


@pytest.fixture(scope="module")
def task():
    """What the suite finds of a run whose slots cannot know the context."""
    return recall.run(open_probe(recall_run.trained()))


def test_only_the_path_with_the_memory_is_missed(task):
    rows = rows_of(task)
    assert rows["6x1", "all"]["accuracy"] > 0.99
    assert rows["6x1", "no hop"]["accuracy"] > 0.8
    assert rows["6x1", "no attn"]["accuracy"] < 0.3


def test_every_kind_and_one_of_twice_the_length_are_measured(task):
    names = list(dict.fromkeys(row["name"] for row in task.tables[0].rows))
    assert names == ["6x1", "12x1", "24x1", "48x2"]
    assert {row["category"] for row in task.tables[0].rows} == {"recall"}
    protocol, = task.tables[0].protocols
    assert (protocol.split, protocol.tokens) == ("test", 3 * 60 + 2 * 60)


def test_accuracy_is_that_of_the_evaluate_verb(task):
    from hippocampus.evaluation.stand_alone import Request, evaluate_run

    report, _ = evaluate_run(recall_run.trained(), Request(split="test", context=24, weights="ema"))
    accuracy = report.about["accuracy"]["ema"]
    assert {name: rows_of(task)[name, "all"]["accuracy"] for name in ("6x1", "12x1", "24x1")} == {
        name: pytest.approx(value) for name, value in accuracy.items() if name != "all"}


def test_noise_is_swept_on_the_noisy_task():
    probe = open_probe(recall_run.trained())
    lm = LanguageModel(probe.model, probe.params, probe.lm.tokenizer, recall_run.config(
        data__corpus="recall:noisy", data__context=24, data__recall__lengths=(24,),
        data__recall__pairs=(2,), data__recall__test_lengths=(24, 24),
        data__recall__test_pairs=(3, 2)))
    result = recall.run(dataclasses.replace(probe, lm=lm))
    assert [row["name"] for row in result.tables[1].rows if row["path"] == "all"] == [
        "24x2, noise 0", "24x2, noise 0.5", "24x2, noise 1", "24x2, noise 2"]


def by_hand(probe, n):
    """Hits of every window, by looking back through it."""
    text = tiny_run.corpus().read_text()
    train = text[:len(text) * 9 // 10]
    hits = []
    for batch in probe.host_batches:
        for tokens, targets in zip(batch.tokens_BT, batch.targets_BT, strict=True):
            seen: collections.Counter = collections.Counter()
            for t in range(len(tokens)):
                gram = bytes([*tokens[t + 2 - n:t + 1], targets[t]]) if t + 2 >= n else b""
                hits.append(bool(seen[gram] and train.count(gram.decode()) <= 20))
                if gram:
                    seen[gram] += 1
    return np.array(hits)


@pytest.fixture
def text(monkeypatch):
    """A probe of a run on a text, and what the suite finds where 20 times is frequent."""
    monkeypatch.setattr(recall, "FREQUENT", 20)
    probe = open_probe(tiny_run.trained())
    compilations: list = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name))
    result = recall.run(probe)
    return probe, result, compilations.count("/jax/core/compile/backend_compile_duration")


def test_the_loss_of_a_text_is_split_by_what_the_window_has_had_before(text):
    probe, result, compilations = text
    rows = rows_of(result)
    for n in (2, 6):
        hits, other = (rows[f"{name}, {n}-grams", "all"] for name in ("AR hits", "AR misses"))
        assert hits["tokens"] == by_hand(probe, n).sum()
        assert hits["tokens"] + other["tokens"] == probe.windows.n_targets
        assert hits["share"] + other["share"] == pytest.approx(1)
        mean = (hits["tokens"] * (hits["loss"] or 0) + other["tokens"] * other["loss"]
                ) / probe.windows.n_targets
        assert mean == pytest.approx(probe.baseline.loss, rel=1e-5)
    assert compilations <= 1


def test_damage_of_both_classes_adds_up_to_that_of_the_whole(text):
    from hippocampus.models.interventions import Interventions

    probe, result, _ = text
    rows, chosen = rows_of(result), recall.variants(probe.paths)
    for i, variant in enumerate(chosen[1:], 1):
        mask = recall.path_masks(chosen, probe.n_layers)[i]
        whole = probe.measure(Interventions(path_mask_LP=mask)).minus(probe.baseline)
        parts = [rows[f"{name}, 2-grams", variant.name] for name in ("AR hits", "AR misses")]
        assert sum(row["share"] * (row["delta"] or 0) for row in parts) == pytest.approx(
            whole.nats, abs=1e-5)


def test_a_run_with_one_path_has_no_rows_without_it():
    assert recall.variants(("attention",)) == (recall.Variant("all", ""),)
    assert repeats.FREQUENT == 1250
