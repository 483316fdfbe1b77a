"""The suite of adapters on a tiny Buu beside its controls, and on findings that are made up."""

import dataclasses
import json
import math

import numpy as np
import planted_adapters
import pytest
from planted import column, table

import hippocampus.probe
from hippocampus.data.queries import CATEGORIES, make_queries
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.answers import AnswerScore
from hippocampus.evaluation.paired import effect_size
from hippocampus.probing import command
from hippocampus.probing.adapters import tables
from hippocampus.probing.adapters.findings import EXACT, F1, LOG_P, Answer, Losses
from hippocampus.probing.adapters.opening import Request, open_adapter_probe, systems
from hippocampus.probing.results import read_suite, write_suite
from hippocampus.probing.suites import buu

pytestmark = pytest.mark.usefixtures("quick_compiles")

SYSTEMS = ("base", "base + LoRA", "adapters", "memory zeroed", "memory shuffled")


@pytest.fixture(scope="module")
def kept():
    """The suite's result and its findings."""
    found = []
    result = buu.run(planted_adapters.probe(), keep=found.append)
    return result, found[0]


def test_every_system_is_measured_on_the_same_queries_and_windows(kept):
    result, found = kept
    assert found.systems == SYSTEMS == tuple(column(table(result, "controls"), "name"))
    for name in SYSTEMS:
        assert [a.number for a in found.answers if a.system == name] == list(range(6))
        np.testing.assert_array_equal(found.losses[name].weight_W, found.losses["base"].weight_W)
    losses = [found.losses[name].loss for name in SYSTEMS]
    assert len({round(loss, 6) for loss in losses}) == len(SYSTEMS), losses


def test_a_control_costs_what_it_does_as_a_model_of_its_own(kept):
    """Interventions of one program, beside the controls with parameters of their own."""
    _, found = kept
    probe = planted_adapters.probe()
    batch = probe.probe.host_batches[0]
    ids = [*batch.tokens_BT[0], batch.targets_BT[0, -1]]
    for name in SYSTEMS:
        score = probe.systems[name].writer.score(bytes(int(i) for i in ids).decode())
        assert found.losses[name].nll_W[0] == pytest.approx(score.nats, rel=1e-5), name
        assert score.tokens == found.losses[name].weight_W[0]


def test_layers_are_enabled_one_by_one_from_none_to_all(kept):
    result, found = kept
    assert [stage.name for stage in found.stages] == [
        "none", "up to layer 0", "up to layer 1", "layer 0 alone", "layer 1 alone"]
    none, first, both, alone, second = (stage.losses.loss for stage in found.stages)
    assert none == pytest.approx(found.losses["base"].loss, abs=1e-6)
    assert both == pytest.approx(found.losses["adapters"].loss, abs=1e-6)
    assert first == pytest.approx(alone, abs=1e-6) and abs(second - both) > 1e-4
    rows = table(result, "layers")
    assert column(rows, "share")[0] == pytest.approx(0, abs=1e-6)
    assert column(rows, "share")[2] == pytest.approx(1, abs=1e-6)


def test_log_p_is_of_the_answer_alone(kept):
    _, found = kept
    probe = planted_adapters.probe()
    for answer in found.answers[:6]:
        lm = probe.systems[answer.system].writer
        both = f"{answer.prompt} {answer.references[0]}"
        assert answer.tokens == len(answer.references[0]) + 1  # bytes, and the space
        wanted = -lm.score(both).nats + lm.score(answer.prompt).nats
        assert answer.log_p == pytest.approx(wanted, rel=1e-3)


def test_creative_queries_have_no_right_answer(kept):
    result, found = kept
    for answer in found.answers:
        assert (answer.score is None) == (answer.text is None) == (answer.category == "creative")
    scores = table(result, "scores")
    assert column(scores, EXACT, queries="creative") == [None] * 5
    assert all(value is not None for value in column(scores, LOG_P, queries="creative"))
    assert column(scores, "n", queries="all") == [6] * 5


def test_gates_are_told_by_category_and_slots_by_layer(kept):
    result, found = kept
    texts = ["all", *CATEGORIES, "held-out text"]
    assert column(table(result, "gates"), "texts") == texts * 2
    tokens = column(table(result, "gates"), "tokens", layer=1)
    assert tokens[0] == sum(tokens[1:])
    assert tokens[-1] == planted_adapters.probe().protocol.tokens
    assert column(table(result, "slots"), "layer") == [0, 1]
    hits = column(table(result, "hottest"), "hits", layer=0)
    assert sum(hits) == tokens[0]
    assert found.health.vitals.identity < 1e-6


def test_what_is_found_is_written_and_read_again(kept, tmp_path):
    result, found = kept
    again, _ = read_suite(write_suite(tmp_path, result, {"command": ["probe"]}))
    assert [t.name for t in again.tables] == [
        "controls", "layers", "layer_queries", "scores", "effects", "gates", "slots", "hottest",
        "health"]
    assert [p.name for p in again.plots] == [
        "controls", "scores", "effects", "layers", "gates", "slots"]
    assert all("<svg" in plot.svg for plot in again.plots)
    answers = [json.loads(line) for line in found.lines().splitlines()]
    assert len(answers) == 6 * len(SYSTEMS) and answers[0]["system"] == "base"


def test_a_control_that_is_not_equal_is_told(kept):
    result, _ = kept
    notes = table(result, "controls").notes
    assert any("no control of equal size" in note for note in notes)
    lm = planted_adapters.probe().lm
    found, notes = systems(lm, None, 0)
    assert "base + LoRA" not in found and "--lora=RUN" in notes[0]
    other = planted_adapters.lora()
    other.model = other.model.clone(config=dataclasses.replace(other.model.config, d_model=96))
    with pytest.raises(ConfigError, match="another decoder"):
        systems(lm, other, 0)


# --- Findings that are made up -------------------------------------------------------------------


def invented(kept, gain, spread=0.2, n=60):
    """The findings with a gain of the adapters over the decoder alone that is known."""
    _, found = kept
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.3, n)
    losses = {name: Losses(100 * (base - (gain if name == "adapters" else 0)
                                  + (0 if name == "base" else spread * rng.normal(size=n))),
                           np.full(n, 100.0)) for name in ("base", "adapters", "memory zeroed")}
    answers = []
    for name in losses:
        for i, query in enumerate(make_queries(n)):
            right = float(rng.random() < 0.3 + (gain if name == "adapters" else 0))
            score = None if query.category == "creative" else AnswerScore(right, right, right)
            answers.append(Answer(name, i, query.category, "", "", ("x",),
                                  -4.0 + 2 * gain * (name == "adapters"), 2,
                                  None if score is None else "x", score))
    return dataclasses.replace(found, losses=losses, answers=tuple(answers),
                               trained=dict.fromkeys(losses, 7))


def test_a_gain_that_is_there_is_found_and_told(kept):
    found = invented(kept, 0.5)
    lines = buu.verdict(found)
    assert all("adapters are better than" in line for line in lines) and len(lines) == 2
    shown = tables.control_table(found, planted_adapters.probe())
    gain, = column(shown, "gain", name="adapters")
    low, = column(shown, "low", name="adapters")
    assert low < gain == pytest.approx(0.5, abs=0.1) and low > 0.3
    assert column(shown, "delta", name="adapters") == [pytest.approx(-gain, abs=1e-6)]
    effect, = column(shown, "effect", name="adapters")
    assert effect == pytest.approx(0.5 / 0.2, rel=0.3)


def test_a_null_result_is_told_as_such(kept):
    assert all("no different, as far as can be told, from" in line
               for line in buu.verdict(invented(kept, 0.0)))
    assert all("worse than" in line for line in buu.verdict(invented(kept, -0.5)))


def test_differences_of_answers_are_paired_by_query(kept):
    shown = tables.effect_table(invented(kept, 0.4), planted_adapters.probe())
    for category in CATEGORIES:
        assert column(shown, "difference", queries=category, measure=LOG_P) == [pytest.approx(0.4)]
        # All are moved by the same: there is no spread to measure an effect by.
        assert column(shown, "effect", queries=category, measure=LOG_P) == [None]
    assert column(shown, "measure", queries="creative") == [LOG_P]
    assert column(shown, "measure", queries="memory") == [EXACT, F1, LOG_P]
    difference, = column(shown, "difference", queries="all", measure=EXACT, theirs="base")
    assert difference == pytest.approx(0.4, abs=0.2)


def test_effect_size_of_known_differences():
    ours, theirs = {"a": 3.0, "b": 5.0, "c": 1.0}, {"a": 2.0, "b": 2.0, "d": 0.0}
    assert effect_size(ours, theirs) == pytest.approx(2 / math.sqrt(2))
    assert effect_size({"a": 1.0}, {"a": 0.0}) is None
    assert effect_size({"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 1.0}) is None


# --- Flags ---------------------------------------------------------------------------------------


def test_flags_reach_the_suite(monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "probe_run",
                        lambda *_, adapters, **__: asked.update(adapters=adapters))
    hippocampus.probe.main(["--workdir=RUN", "--suite=buu", "--lora=OTHER", "--queries=q.jsonl",
                            "--n_queries=50", "--max_written=5", "--base_text=b.txt"])
    assert asked["adapters"] == Request("OTHER", "q.jsonl", 50, 5, "b.txt")
    with pytest.raises(ConfigError, match="--n_queries is 0"):
        hippocampus.probe.main(["--workdir=RUN", "--n_queries=0"])


def test_queries_and_texts_of_ones_own_are_read(tmp_path):
    probe = planted_adapters.probe().probe
    (tmp_path / "q.jsonl").write_text('{"category": "memory", "prompt": "a", "answer": "b"}\n')
    (tmp_path / "b.txt").write_text("A text.")
    opened = open_adapter_probe(probe, Request(
        queries=str(tmp_path / "q.jsonl"), base_text=str(tmp_path / "b.txt")))
    assert len(opened.queries) == 1 and opened.base_text == "A text."
    assert len(open_adapter_probe(probe, Request(n_queries=10)).queries) == 10
    with pytest.raises(DataError, match="cannot read"):
        open_adapter_probe(probe, Request(base_text=str(tmp_path / "none.txt"), n_queries=5))
