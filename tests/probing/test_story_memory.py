"""The memory suite on a model whose memory is known to help, and on one whose memory is shut."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import planted_memory
import pytest
from planted import column, table
from planted_memory import SETTINGS

import hippocampus.probe
from hippocampus.config_files import defaults, load_config
from hippocampus.data.story_rows import StoryStreams
from hippocampus.data.story_tokens import StorySplit
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.evaluation.answers import AnswerScore
from hippocampus.evaluation.result_table import Protocol
from hippocampus.generation.language_model import LanguageModel
from hippocampus.probing import command
from hippocampus.probing.memory import study
from hippocampus.probing.memory.findings import Answer, CurvePoint, Findings, judge
from hippocampus.probing.memory.opening import Request, StoryProbe, flags_of, settings_of
from hippocampus.probing.memory.study import (
    CONDITIONS,
    ask_stories,
    choose_questions,
    choose_stories,
    user_of,
)
from hippocampus.probing.memory.subject import STORY, Point, Settings, points
from hippocampus.probing.memory.writing import load_memories, memory_path, write_stories
from hippocampus.probing.results import read_suite, write_suite
from hippocampus.probing.suites import SkipSuite, memory

pytestmark = pytest.mark.usefixtures("quick_compiles")

STORIES = planted_memory.stories()
PROTOCOL = Protocol("tales", "0" * 64, "validation", 40, "bytes", byte_tokenizer().digest, 256, 16,
                    16, "packed", "raw", 7)
WITHOUT_TEXT = ("memory", "empty", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The memories of the model that helps."""
    folder = tmp_path_factory.mktemp("memories")
    write_stories(planted_memory.subject(), STORIES, SETTINGS, folder, step=7)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return ask_stories(planted_memory.subject(), STORIES, SETTINGS, folder)


@pytest.fixture(scope="module")
def shut(tmp_path_factory):
    folder, subject = tmp_path_factory.mktemp("shut"), planted_memory.subject(0.0)
    few = dataclasses.replace(SETTINGS, delays=(), interferers=(1,), slots=(12,))
    write_stories(subject, STORIES, few, folder)
    return ask_stories(subject, STORIES, few, folder)


def invented(gain, stories=12, spread=0.3):
    """Findings without a model: log p of the memory is so much over that of both controls."""
    rng = np.random.default_rng(0)

    def answer(condition, i, log_p):
        return Answer(condition, f"s{i}", i, "Who?", ("he",), "he", log_p, 2,
                      AnswerScore(0, 0.5, 0.5), 0, False)

    answers = [answer(condition, i, rng.normal(scale=spread) + (gain if condition == "memory"
                                                               else 0.0))
               for condition in CONDITIONS for i in range(stories)]
    log_p = {a.key: a.log_p for a in answers if a.condition == "memory"}
    return Findings(tuple(answers), (CurvePoint("story", 0, log_p),), (100,) * stories, 0.5, 12, 15,
                    3)


# ---------------------------------------------------------------- what a memory is worth

def test_a_memory_that_carries_the_story_beats_both_controls(found):
    assert judge(found).passed
    for measure in ("exact match", "F1", "ROUGE-L"):
        assert set(found.by_story("memory", measure).values()) == {1.0}
        assert set(found.by_story("other", measure).values()) == {0.0}
    for theirs in ("empty", "other"):
        one = found.compare("memory", theirs, "log p")
        assert one.beats and one.paired.better == len(STORIES) and one.paired.low > 0


def test_a_shut_memory_gives_the_bits_of_an_empty_one_and_a_null_result(shut):
    by = {name: [a.log_p for a in shut.of(name)] for name in WITHOUT_TEXT}
    assert by["memory"] == by["empty"] == by["other"]
    texts = {name: [a.text for a in shut.of(name)] for name in WITHOUT_TEXT}
    assert texts["memory"] == texts["empty"] == texts["other"]
    verdict = judge(shut)
    assert not verdict.passed and verdict.lines[0].startswith("null result")
    assert "seed 0" in verdict.lines[0] and "to the bit" in verdict.lines[-1]
    assert shut.gate == 0


def test_a_null_result_says_what_would_have_been_found():
    weak, strong = judge(invented(0.02)), judge(invented(1.0))
    assert strong.passed and not weak.passed
    assert all("with a chance of 80% at p < 0.01" in line for line in weak.lines[1:3])
    assert "12 stories (seed 3)" in weak.lines[0]
    few = judge(invented(5.0, stories=5))
    assert not few.passed and "nothing could have been found" in few.lines[-1]


@pytest.mark.parametrize("swapped", [("memory", "other"), ("memory", "empty")])
def test_with_a_control_in_the_place_of_the_memory_nothing_passes(found, swapped):
    names = dict([swapped, swapped[::-1]])
    other = dataclasses.replace(found, answers=tuple(dataclasses.replace(
        a, condition=names.get(a.condition, a.condition)) for a in found.answers))
    assert judge(found).passed and not judge(other).passed


# ---------------------------------------------------------------- curves

def test_what_is_written_between_is_forgotten_for_and_a_small_memory_holds_less(found):
    def gains(kind):
        return {point.amount: np.mean(list(found.gain(point).values()))
                for point in found.curve(kind)}

    delay, between, slots = gains("delay"), gains("interference"), gains("slots")
    assert list(delay) == [0, 1, 4] and list(between) == [0, 1, 2] and list(slots) == [4, 12]
    assert delay[0] == between[0] == slots[12] > 10
    assert delay[0] - 10 > delay[4] and between[0] > between[1] > between[2]
    assert slots[4] != slots[12]


def test_points_that_cannot_be_are_left_out_with_a_reason():
    subject = planted_memory.subject()
    few, notes = points(subject, Settings(interferers=(1, 4, 9), delays=(), slots=(2, 4, 40)), 5)
    assert few == (STORY, Point("interference", 1), Point("interference", 4), Point("slots", 4),
                   Point("slots", 40))
    assert len(notes) == 2 and "there are 5" in notes[0] and "fewer than 4" in notes[1]
    usual, _ = points(subject, Settings(), 40)
    assert [p.amount for p in usual if p.kind == "slots"] == [6]  # of 12, with 4 writes a chunk
    learned = planted_memory.subject(initial="learned")
    assert not [p for p in points(learned, Settings(slots=(4,)), 40)[0] if p.kind == "slots"]
    with pytest.raises(ConfigError, match="slots of a new memory are learned"):
        learned.with_slots(4)


def test_a_learned_first_memory_is_what_a_new_user_has():
    fresh = planted_memory.subject(initial="learned").new_memories(2)
    assert fresh.valid_BS.all() and fresh.values_BSHd.shape[0] == 2 and fresh.values_BSHd.any()
    assert not planted_memory.subject().new_memories(1).valid_BS.any()


# ---------------------------------------------------------------- what is asked

@pytest.fixture
def heard(monkeypatch, folder):
    """Condition -> the prompts that reach the model, without running it."""
    heard, said = {}, []

    def log_probabilities(subject, memories, prompts, **shape):
        heard.setdefault(said[-1].rsplit(" ", 1)[-1], prompts)
        return np.zeros(len(prompts))

    monkeypatch.setattr(study, "log_probabilities", log_probabilities)
    monkeypatch.setattr(study, "written_answers",
                        lambda subject, memories, prompts, **shape: [""] * len(prompts))
    ask_stories(planted_memory.subject(), STORIES, SETTINGS, folder, say=said.append)
    return heard


def test_no_story_stands_in_front_of_a_question_to_a_memory(heard):
    asked = choose_questions(planted_memory.subject(), STORIES, SETTINGS.questions)
    decode = byte_tokenizer().decode
    for name, prompts in heard.items():
        for one, prompt in zip(asked, prompts, strict=True):
            story = STORIES[one.story].text[:8] in decode(prompt.ids)
            assert story == (name in study.WITH_TEXT), name
            if name not in study.WITH_TEXT:  # the points of the curves too
                assert prompt.ids.tolist() == one.ids.prompt.tolist()
            assert prompt.ids[0] == planted_memory.BEGIN
    assert {"memory", "empty", "other", "delay_4", "slots_4"} < set(heard)


def test_every_condition_opens_the_memory_that_it_says(heard):
    n = len(STORIES)
    users = {name: [prompt.user for prompt in prompts] for name, prompts in heard.items()}
    assert users["memory"] == users["delay_4"] == list(range(n))
    assert users["empty"] == users["story"] == users["snippet"] == [n] * n
    assert sorted(users["other"]) == list(range(n))
    assert not any(a == b for a, b in zip(users["other"], users["memory"], strict=True))
    assert all(user_of("other", i, 3) != i for i in range(3))


def test_a_snippet_has_at_most_the_bytes_of_the_memory_file_and_fits(folder):
    subject, text = planted_memory.subject(), STORIES[0].text
    asked = choose_questions(subject, STORIES, 1)
    for size in (0, 9, 25, 10**6):
        fronts = study._Fronts(subject, STORIES, SETTINGS, [size] * len(STORIES))
        front = fronts.of("snippet", asked[0])
        room = SETTINGS.context_tokens - len(asked[0].ids.prompt) - 2 - SETTINGS.answer_tokens
        assert front.n_bytes == min(size, room, len(text)) == len(front.ids) - 2
        assert fronts.of("story", asked[0]).n_bytes == min(room, len(text))
        assert fronts.of("memory", asked[0]).n_bytes == 0
    long = dataclasses.replace(STORIES[0], text="word " * 99)
    cut = study._Fronts(subject, [long], SETTINGS, [9]).of("story", asked[0])
    assert cut.cut and len(cut.ids) + len(asked[0].ids.prompt) <= SETTINGS.context_tokens
    none = dataclasses.replace(SETTINGS, context_tokens=8)
    with pytest.raises(ConfigError, match="no text fits into 8 tokens"):
        study._Fronts(subject, STORIES, none, [9] * 10).of("story", asked[0])


def test_the_findings_say_how_many_bytes_stood_in_front(found):
    for answer, size in zip(found.of("snippet"), found.memory_bytes, strict=True):
        assert 0 < answer.context_bytes <= size
    assert {a.context_bytes for name in WITHOUT_TEXT for a in found.of(name)} == {0}


def test_the_end_of_an_answer_is_not_counted_and_stories_are_the_unit(found):
    assert {a.tokens for a in found.of("memory")} == {4}  # four letters, and no end
    two = dataclasses.replace(SETTINGS, questions=2)
    assert len(choose_questions(planted_memory.subject(), STORIES, two.questions)) == 20
    answers = invented(1.0).answers
    doubled = dataclasses.replace(invented(1.0), answers=answers + answers)
    assert doubled.compare("memory", "empty", "log p") == invented(1.0).compare(
        "memory", "empty", "log p")


def test_stories_are_evenly_spaced_and_two_are_needed():
    assert [s.name for s in choose_stories(STORIES, 3)] == ["tale a", "tale e", "tale j"]
    assert choose_stories(STORIES, 0) == STORIES
    with pytest.raises(DataError, match="takes two or more"):
        choose_stories(STORIES[:1], 0)


# ---------------------------------------------------------------- files and processes

def test_a_story_is_written_in_the_rows_of_the_training():
    subject, story = planted_memory.subject(), STORIES[2]
    ids = np.frombuffer(story.text.encode(), np.uint8).astype(np.int32)
    split = StorySplit(ids, np.array([0, len(ids)]), False, (story.name,), ((),))
    trained = StoryStreams(split, [()], subject.context, 1, 0, subject.begin_id, 1.0)
    tokens, valid = subject.rows(story)
    for step in range(len(tokens)):
        batch = trained.batch(step)
        assert np.array_equal(batch.tokens_BT[0], tokens[step])
        assert np.array_equal(batch.document_ids_BT[0] > 0, valid[step])
    assert trained.batch(len(tokens)).reset_B.all()


def test_another_process_that_writes_gives_the_same_bits(folder, found, tmp_path, request):
    quick = "0" if request.config.getoption("--full") else "1"
    subprocess.run([sys.executable, planted_memory.__file__, tmp_path], check=True, timeout=300,
                   env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": quick,
                        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.memory"))
    assert len(names) == 10 * 6 and len(list(tmp_path.rglob("*.memory"))) == 10 * 5
    subject = planted_memory.subject()
    for point in (STORY, Point("delay", 4)):
        ours, _ = load_memories(subject, STORIES, point, folder)
        theirs, _ = load_memories(subject, STORIES, point, tmp_path)
        assert all(np.array_equal(theirs.arrays()[name], array)
                   for name, array in ours.arrays().items())
    again = ask_stories(subject, STORIES, planted_memory.FEW, tmp_path)
    assert again.lines() == found.lines() and again.curves == found.curves[:-1]


def test_a_memory_of_something_else_is_refused(folder, tmp_path):
    subject = planted_memory.subject()
    load_memories(subject, STORIES, STORY, folder)
    with pytest.raises(DataError, match="has the story 'tale a'"):
        load_memories(subject, STORIES[1:], STORY, folder)
    with pytest.raises(DataError, match="has the text"):
        load_memories(subject, [dataclasses.replace(s, text="x") for s in STORIES], STORY, folder)
    with pytest.raises(DataError, match="has the seed '0'"):
        load_memories(subject, STORIES, Point("delay", 1), folder, seed=5)
    with pytest.raises(CheckpointError, match="the memory of another model"):
        load_memories(planted_memory.subject(0.0), STORIES, STORY, folder)
    with pytest.raises(CheckpointError, match="there is no memory at"):
        load_memories(subject, STORIES, STORY, tmp_path)
    with pytest.raises(DataError, match="takes two or more"):
        write_stories(subject, STORIES[:1], SETTINGS, tmp_path)


# ---------------------------------------------------------------- the suite and the verb

def config(family):
    return SimpleNamespace(name="tiny", model=SimpleNamespace(family=family))


def test_the_suite_is_written_as_tables_and_pictures(found, folder, monkeypatch, tmp_path):
    subject = planted_memory.subject()
    lm = SimpleNamespace(config=config("chopt"))
    probe = StoryProbe(Path("nowhere"), lm, subject, STORIES, PROTOCOL, SETTINGS, folder)
    monkeypatch.setattr(memory, "ask_stories", lambda *given, **how: found)
    kept = []
    result = memory.run(probe, keep=kept.append)
    again, _ = read_suite(write_suite(tmp_path, result, {}))
    assert kept == [found] and again.notes == judge(found).lines
    assert [plot.name for plot in again.plots] == [
        "conditions", "scores", "delay", "interference", "slots"]
    conditions = table(again, "conditions")
    assert column(conditions, "name") == list(CONDITIONS)
    assert column(conditions, "memory_kib")[0] * 1024 == pytest.approx(
        memory_path(folder, STORY, 0).stat().st_size, rel=0.1)
    assert column(conditions, "text_kib")[:3] == [0, 0, 0]
    comparisons = table(again, "comparisons")
    assert len(comparisons.rows) == 20 and comparisons.rows[0]["p_flip"] < 0.01
    assert column(table(again, "curves"), "amount", kind="slots") == [4, 12]
    with open(tmp_path / "memory_conditions.csv", encoding="utf-8") as file:
        assert {row["text"] for row in csv.DictReader(file)} == {"tales"}
    lines = [json.loads(line) for line in found.lines().splitlines()]
    assert len(lines) == 5 * len(STORIES) and lines[0]["score"]["f1"] == 1.0
    probe.lm.config.model.family = "hybrid"
    with pytest.raises(SkipSuite, match="looks into chopt models, and this is of the hybrid"):
        memory.run(probe)


def test_a_shut_memory_is_a_table_of_all_columns_without_what_is_not_known(shut, tmp_path):
    result = memory.result_of(shut, PROTOCOL)
    rows = table(result, "comparisons").rows
    assert [row["effect"] for row in rows[:2]] == [None, None]
    assert [row["p_flip"] for row in rows[:2]] == [1.0, 1.0]
    assert [plot.name for plot in result.plots] == ["conditions", "scores", "interference"]


def test_only_models_with_a_memory_are_asked_about_stories(monkeypatch):
    family = []
    monkeypatch.setattr(command, "open_folder", lambda workdir: (None, config(family[-1])))
    names = ("paths", "tokens", "memory")
    family.append("hybrid")
    assert command._fitting("RUN", names, False, "") == ("paths", "tokens")
    with pytest.raises(ConfigError, match="memory is not for RUN, a model of the hybrid family"):
        command._fitting("RUN", names, True, "")
    family.append("chopt")
    assert command._fitting("RUN", names, False, "") == names
    assert command._fitting("RUN", names, False, "a.txt") == ("paths", "tokens")
    with pytest.raises(ConfigError, match="is for windows of a text"):
        command.story_request(Request(), {"text": "a.txt"})


def test_a_run_says_how_its_model_reads_and_is_asked():
    run = load_config(defaults("chopt"), {
        "data.tokenizer": "backbone", "data.form": "stories",
        "model.chunk": 8, "data.context": 24, "data.stories.template": "{question}? {answer}"})
    subject, plain = planted_memory.subject(), byte_tokenizer()
    found = settings_of(LanguageModel(subject.model, subject.params, plain, run))
    assert (found.context, found.begin_id, found.end_id) == (8, None, None)
    assert found.template.prompt("who") == "who?"
    assert settings_of(LanguageModel(subject.model, subject.params, plain, run), 12).context == 12
    marked = SimpleNamespace(begin_id=5, end_ids=(7, 9))
    found = settings_of(SimpleNamespace(model=None, params=None, tokenizer=marked, config=run))
    assert (found.begin_id, found.end_id) == (5, 7)


@pytest.mark.parametrize("request_", [
    Request("tales", seed=3, step=40, weights="raw", context=64, settings=Settings(
        stories=9, questions=2, delays=(), interferers=(3,), slots=(8, 16), users=3)), Request()])
def test_the_process_that_writes_is_asked_for_the_same(request_, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(command, "write_memories", lambda workdir, stories, **settings: (
        asked.update(workdir=workdir, request=command.story_request(stories, settings))))
    hippocampus.probe.main(["--workdir=RUN", *flags_of(request_, tmp_path)])
    assert asked["workdir"] == "RUN"
    assert asked["request"] == dataclasses.replace(request_, stage="write",
                                                   memories=str(tmp_path))


@pytest.mark.parametrize(("message", "flags"), [
    ("--stage=ask needs the folder", ["--stage=ask"]),
    ("--stage=write is for the suite memory", ["--stage=write", "--memories=m", "--suite=paths"]),
    ("is no list of numbers", ["--delays=one"]),
    ("interferers is (0,)", ["--interferers=0"]),
    ("users is 0", ["--users=0"])])
def test_flags_that_make_no_sense_are_refused(message, flags):
    with pytest.raises(ConfigError) as refused:
        hippocampus.probe.main(["--workdir=RUN", *flags])
    assert message in refused.value.message
