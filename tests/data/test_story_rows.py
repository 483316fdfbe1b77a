"""Rows of stories: a memory that is reset where they say has seen a story, and only it."""

import dataclasses
from collections import Counter
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import story_files
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hippocampus.data.batches import Batch
from hippocampus.data.story_forms import Question
from hippocampus.data.story_rows import StoryStreams
from hippocampus.data.story_tokens import StorySplit, Template, tokenize_questions
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.errors import ConfigError, DataError

TOKENIZER = byte_tokenizer()
TEMPLATE = Template("Q: {question}\nA: {answer}")
BEGIN, END = 256, 257
CONTEXT = 120
LENGTHS = (30, 120, 119, 240, 238, 335, 66, 1, 188)
"""Of the stories; some are whole chunks, with and without a token in front of each."""

# Where an order is not one to one, its walk may never end.
pytestmark = pytest.mark.timeout(30)


@cache
def split_of(n):
    stories = story_files.make_stories(n, sentences=8)
    texts = [TOKENIZER.encode(story.text)[: LENGTHS[i % 9]] for i, story in enumerate(stories)]
    starts = np.cumsum([0, *map(len, texts)])
    return StorySplit(np.concatenate(texts), starts, False, tuple(s.name for s in stories),
                      # Some stories have few questions, or none.
                      tuple(s.questions[: i % 5] for i, s in enumerate(stories)))


@cache
def questions_of(n):
    return tokenize_questions(split_of(n).questions, TOKENIZER, TEMPLATE, begin_id=BEGIN,
                              end_id=END)


def streams(n=9, batch_size=3, **changes):
    fields = {"context": CONTEXT, "seed": 1, "begin_id": BEGIN, "story_weight": 0.5, **changes}
    return StoryStreams(split_of(n), questions_of(n), batch_size=batch_size, **fields)


def rows_by_user(source, steps):
    """What each user reads, row by row; numpy arrays."""
    batches = [source.batch(step) for step in range(steps)]
    names = [field.name for field in dataclasses.fields(batches[0])]
    return [[SimpleNamespace(**{name: getattr(batch, name)[user] for name in names})
             for batch in batches] for user in range(source.batch_size)]


def visits_by_user(source, steps):
    """The rows of each user, cut where they reset; the last visit may be cut short: left out."""
    found = []
    for rows in rows_by_user(source, steps):
        found.append([])
        for row in rows:
            if row.reset_B:
                found[-1].append([])
            found[-1][-1].append(row)
        found[-1].pop()
    return found


def visits(source, steps):
    """Those of all users."""
    return [visit for own in visits_by_user(source, steps) for visit in own]


# An example takes long enough that looking for a smaller one would outlast the time limit.
QUICK = settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
SOURCES = st.fixed_dictionaries({
    "batch_size": st.integers(1, 4), "seed": st.integers(0, 2**32),
    "begin_id": st.sampled_from([None, BEGIN]), "question_rows": st.integers(0, 2)})


@QUICK
@given(SOURCES)
def test_every_visit_is_one_whole_story_and_then_questions_about_it_alone(fields):
    source = streams(**fields)
    for visit in visits(source, 60):
        story = int(visit[0].story_B)
        assert all(int(row.story_B) == story for row in visit)
        asked = [bool(row.question_B) for row in visit]
        assert asked == sorted(asked)  # no chunk comes behind a question
        read = np.concatenate([row.tokens_BT[row.document_ids_BT > 0]
                               for row in visit if not row.question_B])
        np.testing.assert_array_equal(read[read != BEGIN], split_of(9).story_ids(story))
        known = Counter(TEMPLATE.prompt(one.text) for one in split_of(9).questions[story])
        put = Counter(prompt for row in visit if row.question_B for prompt, _ in documents(row))
        assert put <= known
        if not source.question_rows:
            assert put == known


def documents(row):
    """Prompts and answers of a row of questions, as text."""
    for document in range(1, row.document_ids_BT.max() + 1):
        here = row.document_ids_BT == document
        answers = row.loss_weight_BT[here] == 1
        prompt = row.tokens_BT[here][: answers.argmax() + 1]
        assert prompt[0] == BEGIN and not row.loss_weight_BT[here][~answers].any()
        targets = row.targets_BT[here][answers]
        assert targets[-1] == END and answers[answers.argmax():].all()
        yield TOKENIZER.decode(prompt[1:]), TOKENIZER.decode(targets[:-1])


@QUICK
@given(SOURCES)
def test_rows_reset_where_a_story_begins_and_nowhere_else(fields):
    source = streams(**fields)
    for rows in rows_by_user(source, 60):
        last = None
        for row in rows:
            new = not row.question_B and np.array_equal(
                row.tokens_BT[row.document_ids_BT > 0][source.begin_id is not None:],
                split_of(9).story_ids(int(row.story_B))[: source.chunk])
            assert bool(row.reset_B) == new
            assert new or (last is not None and last == int(row.story_B))
            last = int(row.story_B)


@QUICK
@given(SOURCES, st.integers(0, 10**6))
def test_a_batch_depends_on_seed_and_step_alone(fields, step):
    whole = streams(**fields).batch(step)
    used = streams(**fields)
    for other in (step + 3, 0, step):
        used.batch(other)
    jax.tree.map(np.testing.assert_array_equal, used.batch(step), whole)
    parts = [used.batch(step, slice(b, b + 1)) for b in range(used.batch_size)]
    jax.tree.map(lambda leaf, *rows: np.testing.assert_array_equal(leaf, np.concatenate(rows)),
                 whole, *parts)


def test_another_seed_reads_in_another_order():
    orders = {tuple(int(visit[0].story_B) for visit in visits(streams(seed=seed), 30))
              for seed in range(6)}
    assert len(orders) == 6


@QUICK
@given(SOURCES)
def test_padding_has_no_weight_no_document_no_id_and_no_target(fields):
    source = streams(**fields)
    for step in range(40):
        batch = source.batch(step)
        padding = batch.document_ids_BT == 0
        for name in ("tokens_BT", "targets_BT", "loss_weight_BT", "positions_BT"):
            assert not getattr(batch, name)[padding].any(), name
        assert padding.any(axis=1).tolist() == (np.diff(padding.astype(int)).clip(0).sum(1)
                                                > 0).tolist()  # at the end of a row alone


@pytest.mark.parametrize("begin", [None, BEGIN])
def test_every_story_token_is_a_target_once_with_its_weight(begin):
    source = streams(begin_id=begin)
    for visit in visits(source, 80):
        ids = split_of(9).story_ids(int(visit[0].story_B))
        told = [row for row in visit if not row.question_B]
        targets = np.concatenate([row.targets_BT[row.loss_weight_BT > 0] for row in told])
        np.testing.assert_array_equal(targets, ids if begin else ids[1:])
        assert {w for row in told for w in row.loss_weight_BT.tolist()} <= {0.0, 0.5}


def test_targets_are_what_comes_next():
    for visit in visits(streams(), 80):
        for row in visit:
            inside = (row.document_ids_BT[1:] == row.document_ids_BT[:-1]) & (
                row.document_ids_BT[1:] > 0)
            np.testing.assert_array_equal(row.targets_BT[:-1][inside], row.tokens_BT[1:][inside])
            begins = np.diff(row.document_ids_BT, prepend=0) > 0
            assert not row.positions_BT[begins].any()
            np.testing.assert_array_equal(np.diff(row.positions_BT)[inside], 1)


def test_without_weight_on_the_story_only_answers_count():
    for visit in visits(streams(story_weight=0.0), 60):
        assert all(bool(row.loss_weight_BT.any()) == bool(row.question_B) for row in visit)


def test_every_story_is_read_by_one_user_and_loads_are_even():
    source = streams(n=60, batch_size=4)
    found = visits_by_user(source, 400)
    read = [Counter(int(visit[0].story_B) for visit in own) for own in found]
    assert sorted(story for own in read for story in own) == list(range(60))
    for own in read:  # again and again, none more often than another
        assert min(own.values()) >= 3 and max(own.values()) - min(own.values()) <= 2
    rows = [{int(visit[0].story_B): len(visit) for visit in own} for own in found]
    loads = [sum(own.values()) for own in rows]
    assert max(loads) - min(loads) <= max(max(own.values()) for own in rows)
    assert sum(loads) == source.windows_per_epoch


def test_a_user_reads_in_another_order_every_time():
    source = streams(n=12, batch_size=2)
    order = [int(visit[0].story_B) for visit in visits_by_user(source, 200)[0]]
    own = len(set(order))
    rounds = [tuple(order[i : i + own]) for i in range(0, len(order) - own, own)]
    assert len(rounds) >= 3 and len(set(rounds)) == len(rounds)
    assert all(sorted(one) == sorted(rounds[0]) for one in rounds)


def test_questions_are_sampled_anew_and_every_answer_gets_its_turn():
    source = streams(question_rows=1)
    put, answers = {}, set()
    for visit in visits(source, 300):
        asked = [row for row in visit if row.question_B]
        assert len(asked) <= 1
        for prompt, answer in documents(asked[0]) if asked else ():
            put.setdefault(int(visit[0].story_B), set()).add(prompt)
            answers.add((int(visit[0].story_B), prompt, answer))
    every = split_of(9).questions
    assert put == {i: {TEMPLATE.prompt(one.text) for one in asked}
                   for i, asked in enumerate(every) if asked}
    assert answers == {(i, TEMPLATE.prompt(one.text), TEMPLATE.reply(answer))
                       for i, asked in enumerate(every) for one in asked for answer in one.answers}


def test_a_row_of_questions_holds_as_many_as_fit():
    for visit in visits(streams(), 80):
        room = [int((row.document_ids_BT == 0).sum()) for row in visit if row.question_B]
        # Only the one that was filled last, wherever it comes, has room for the longest question.
        assert sum(left >= 57 for left in room) <= 1
    assert max(int(row.document_ids_BT.max()) for visit in visits(streams(), 80)
               for row in visit) >= 2


def test_a_batch_is_the_trainers():
    batch = streams().batch(0)
    assert isinstance(batch, Batch)
    for field in dataclasses.fields(batch):
        kind = {"loss_weight_BT": np.float32, "reset_B": np.bool_, "question_B": np.bool_}
        assert getattr(batch, field.name).dtype == kind.get(field.name, np.int32), field.name
    assert batch.tokens_BT.shape == (3, CONTEXT) and batch.story_B.shape == (3,)


def test_more_users_than_stories_and_rows_without_room_are_refused():
    with pytest.raises(DataError, match="9 stories for 10 users"):
        streams(batch_size=10)
    with pytest.raises(ConfigError, match="no room for a story"):
        streams(context=1)
    with pytest.raises(ConfigError, match="has 57 tokens with its answer") as caught:
        streams(context=56)
    assert "--config.data.context" in caught.value.hint
    streams(context=57)


def test_the_marker_in_front_of_a_story_is_none_of_its_tokens():
    ids = np.array([9, 1, 2, 3, 9, 4, 5])
    split = StorySplit(ids, np.array([0, 4, 7]), True, ("a", "b"), ((), ()))
    source = StoryStreams(split, ((), ()), 4, 1, 0, 9, 1.0)
    found = {tuple(row.tokens_BT.tolist()) for row in rows_by_user(source, 2)[0]}
    assert found == {(9, 1, 2, 3), (9, 4, 5, 0)}


def test_a_story_without_questions_is_read_all_the_same():
    question = Question("Who?", ("Ann",))
    split = dataclasses.replace(split_of(2), questions=((question,), ()))
    asked = tokenize_questions(split.questions, TOKENIZER, TEMPLATE, begin_id=None, end_id=None)
    source = StoryStreams(split, asked, CONTEXT, 2, 0, None, 1.0)
    rows = [row for rows in rows_by_user(source, 20) for row in rows]
    assert {(int(row.story_B), bool(row.question_B)) for row in rows} == {
        (0, False), (0, True), (1, False)}
