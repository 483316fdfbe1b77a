"""Synthetic tasks: what stands before an answer determines it, and nothing less does."""

import collections
import dataclasses

import numpy as np
import pytest

from hippocampus.config import RECALL_TASKS, DataConfig, RecallConfig
from hippocampus.config_files import defaults, load_config
from hippocampus.config_recall import Kind, least_length
from hippocampus.data.recall_rows import RecallRows, RecallWindows
from hippocampus.data.synthetic import digest_of, make_examples
from hippocampus.errors import ConfigError

SETTINGS = RecallConfig(vocab_size=64)
KINDS = {"mqar": Kind(48, 6), "noisy": Kind(48, 6), "induction": Kind(24, 3),
         "selective_copy": Kind(24, 5), "delayed_copy": Kind(24, 5)}


def examples(task, n=200, split="train", kind=None, settings=SETTINGS):
    return make_examples(task, settings, split, kind or KINDS[task], np.arange(n))


def look_up(tokens, asked):
    """Reads from left to right: what stood behind the last occurrence of each id asked about."""
    behind, found = {}, {}
    for i, token in enumerate(tokens):
        if i in asked:
            found[i] = behind.get(token)
        if i:
            behind[tokens[i - 1]] = token
    return found


def repeat(tokens, asked):
    """The ids that are no mark and no filler, in their order."""
    kept = [token for token in tokens if token > 1]
    return dict(zip(sorted(asked), kept, strict=True))


ORACLES = {"mqar": look_up, "noisy": look_up, "induction": look_up,
           "selective_copy": repeat, "delayed_copy": repeat}


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_a_look_up_of_what_stands_before_answers_everything(task):
    made = examples(task)
    for tokens, answers in zip(made.tokens_NL.tolist(), made.answers_NL.tolist(), strict=True):
        asked = {i: answer for i, answer in enumerate(answers) if answer}
        assert len(asked) == KINDS[task].pairs
        assert ORACLES[task](tokens, asked) == asked


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_an_answer_does_not_stand_at_the_place_that_asks_nor_right_behind_it(task):
    made = examples(task)
    row, at = np.nonzero(made.answers_NL)
    answer = made.answers_NL[row, at]
    assert (made.tokens_NL[row, at] != answer).all()
    behind = made.tokens_NL[row, np.minimum(at + 1, made.kind.length - 1)]
    assert (behind != answer).mean() > 0.9


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_counting_answers_and_pairs_hardly_helps(task):
    train, test = examples(task, 3000), examples(task, 500, "test")
    by_token, overall = collections.defaultdict(collections.Counter), collections.Counter()
    for row, at in np.argwhere(train.answers_NL):
        answer = train.answers_NL[row, at]
        by_token[train.tokens_NL[row, at]][answer] += 1
        overall[answer] += 1
    right = [[test.answers_NL[row, at] == counts.most_common(1)[0][0]
              for counts in (overall, by_token[test.tokens_NL[row, at]] or overall)]
             for row, at in np.argwhere(test.answers_NL)]
    assert (np.mean(right, axis=0) < 0.08).all()


@pytest.mark.parametrize("task", ["mqar", "noisy"])
def test_filler_is_no_key_and_no_value_of_its_example(task):
    made = examples(task)
    for tokens, answers in zip(made.tokens_NL, made.answers_NL, strict=True):
        keys, values = set(tokens[answers > 0]), set(answers[answers > 0])
        assert len(keys) == KINDS[task].pairs and not keys & values
        times = collections.Counter(tokens.tolist())
        bound = KINDS[task].pairs + (3 if task == "noisy" else 0)
        assert sum(times[key] for key in keys) == bound + len(keys)
        assert all(times[value] == 1 for value in values)


def test_keys_lie_in_the_first_half_and_values_in_the_second():
    made = examples("mqar")
    assert made.tokens_NL[made.answers_NL > 0].max() < 32 <= made.answers_NL[
        made.answers_NL > 0].min()
    assert set(np.unique(made.tokens_NL)) == set(range(1, 64))


def test_the_newest_of_two_bindings_counts_and_both_orders_occur():
    made = examples("noisy", settings=dataclasses.replace(SETTINGS, updates=1.0, noise=0.0))
    firsts = set()
    for tokens, answers in zip(made.tokens_NL.tolist(), made.answers_NL.tolist(), strict=True):
        for i, answer in enumerate(answers):
            if answer:
                places = [p for p in range(0, 24, 2) if tokens[p] == tokens[i]]
                assert len(places) == 2 and tokens[places[1] + 1] == answer
                firsts.add(tokens[places[0] + 1] != answer)
    assert firsts == {True}


def test_query_places_have_the_published_distribution():
    kind, n = Kind(64, 4), 4000
    made = examples("mqar", n, kind=kind, settings=SETTINGS)
    asked = (made.answers_NL > 0)[:, 8::2].mean(0)
    draw, p = np.random.default_rng(0), 0.01 * np.arange(1, 29) ** (0.01 - 1)
    expected = np.zeros(28)
    for _ in range(n):
        expected[draw.choice(28, 4, replace=False, p=p / p.sum())] += 1 / n
    np.testing.assert_allclose(asked, expected, atol=0.04)
    assert not (made.answers_NL > 0)[:, 9::2].any()


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_an_example_depends_on_seed_split_and_number_alone(task):
    made = examples(task, 50)
    for chosen in ([7], [49, 3]):
        again = make_examples(task, SETTINGS, "train", KINDS[task], np.array(chosen))
        assert np.array_equal(again.tokens_NL, made.tokens_NL[chosen])
        assert np.array_equal(again.answers_NL, made.answers_NL[chosen])
    for other in (examples(task, 50, "validation"),
                  examples(task, 50, settings=dataclasses.replace(SETTINGS, seed=1))):
        assert (other.tokens_NL != made.tokens_NL).any(1).all()
    assert len(np.unique(made.tokens_NL, axis=0)) == 50


@pytest.mark.parametrize("task", RECALL_TASKS)
def test_the_shortest_examples_can_be_made(task):
    kind = Kind(least_length(task, SETTINGS, 4), 4)
    made = examples(task, 20, kind=kind)
    assert ((made.answers_NL > 0).sum(1) == 4).all()
    assert made.tokens_NL.min() >= 0 and made.tokens_NL.max() < 64


def test_the_digest_stands_for_the_settings():
    data = DataConfig(corpus="recall:mqar", recall=SETTINGS)
    others = [dataclasses.replace(data, corpus="recall:noisy"),
              *(dataclasses.replace(data, recall=dataclasses.replace(SETTINGS, **change))
                for change in ({"seed": 1}, {"power": 1.0}, {"examples": (1,) * 5}))]
    assert len({digest_of(one) for one in (data, *others)}) == 5
    assert digest_of(data) == digest_of(dataclasses.replace(data))


# ---------------------------------------------------------------- rows

def two_kinds():
    return (examples("mqar", 10, kind=Kind(16, 2)), examples("mqar", 7, kind=Kind(32, 4)))


def example_ids(batch):
    """The examples of a batch, as tuples of their ids."""
    found = []
    for tokens, documents in zip(batch.tokens_BT, batch.document_ids_BT, strict=True):
        for document in range(1, documents.max() + 1):
            found.append(tuple(tokens[documents == document].tolist()))
    return found


def test_an_epoch_visits_every_example_once_and_epochs_differ():
    rows = RecallRows(two_kinds(), 32, 3, seed=5)
    assert rows.windows_per_epoch == 5 + 7
    epochs = [[e for step in range(4 * k, 4 * k + 4) for e in example_ids(rows.batch(step))]
              for k in range(2)]
    wanted = sorted(tuple(row) for e in two_kinds() for row in e.tokens_NL.tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == wanted
    assert epochs[0] != epochs[1]


def test_batches_are_a_function_of_seed_and_step():
    rows = RecallRows(two_kinds(), 32, 4, seed=5)
    first = rows.batch(9)
    again = RecallRows(two_kinds(), 32, 4, seed=5).batch(9, slice(1, 3))
    other = RecallRows(two_kinds(), 32, 4, seed=6).batch(9)
    assert np.array_equal(again.tokens_BT, first.tokens_BT[1:3])
    assert np.array_equal(again.targets_BT, first.targets_BT[1:3])
    assert not np.array_equal(other.tokens_BT, first.tokens_BT)


def test_only_answers_have_weight_and_every_example_is_a_document():
    batch = RecallRows(two_kinds(), 40, 12, seed=0).batch(0)
    assert set(np.unique(batch.loss_weight_BT)) == {0.0, 1.0}
    assert (batch.targets_BT[batch.loss_weight_BT == 1] >= 32).all()
    assert (batch.targets_BT[batch.loss_weight_BT == 0] == 0).all()
    assert (batch.document_ids_BT[:, 32:] == 0).all()  # what no example has room in
    for documents, positions in zip(batch.document_ids_BT, batch.positions_BT, strict=True):
        for document in range(1, documents.max() + 1):
            at = positions[documents == document]
            assert at.tolist() == list(range(len(at)))


def test_windows_hold_every_example_once_kind_by_kind():
    windows = RecallWindows(two_kinds(), 32, 4)
    batches = list(windows)
    assert len(batches) == len(windows) == len(windows.parts) == 2 + 2
    assert windows.parts == ("16x2", "16x2", "32x4", "32x4")
    assert [e for batch in batches for e in example_ids(batch)] == [
        tuple(row) for e in two_kinds() for row in e.tokens_NL.tolist()]
    assert windows.n_targets == sum(batch.loss_weight_BT.sum() for batch in batches) == 20 + 28
    assert {batch.tokens_BT.shape for batch in batches} == {(4, 32)}


def test_a_bounded_evaluation_takes_an_equal_share_of_every_kind():
    windows = RecallWindows(two_kinds(), 32, 4, max_windows=4)
    assert windows.parts == ("16x2", "32x4")
    assert windows.n_windows == 4
    assert windows.n_targets == sum(batch.loss_weight_BT.sum() for batch in windows) == 8 + 8


# ---------------------------------------------------------------- configs

GOOD = {"data.corpus": "recall:mqar", "data.tokenizer": "ids", "data.documents": "packed",
        "data.context": 256}


def test_published_settings_are_the_defaults():
    recall = load_config(defaults(), GOOD).data.recall
    assert list(zip(recall.lengths, recall.pairs, recall.examples, strict=True)) == [
        (64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000),
        (256, 64, 20_000)]
    assert (recall.vocab_size, recall.power, recall.test_examples) == (8192, 0.01, 1000)
    assert (recall.test_lengths[-1], recall.test_pairs[-1]) == (1024, 256)


@pytest.mark.parametrize(("change", "words"), [
    ({"data.corpus": "recall:mqra"}, "recall:mqar"),
    ({"data.tokenizer": "bytes"}, "ids"),
    ({"data.documents": "joined"}, "packed"),
    ({"data.order": "streams"}, "shuffled"),
    ({"data.recall.pairs": (4, 8)}, "data.recall.pairs"),
    ({"data.recall.examples": (4,)}, "data.recall.examples"),
    ({"data.recall.test_pairs": ()}, "data.recall.test_pairs"),
    ({"data.recall.pairs": (17, 8, 16, 32, 64)}, "it needs 68"),
    ({"data.recall.vocab_size": 130}, "it needs 132"),
    ({"data.corpus": "recall:noisy", "data.recall.lengths": (64, 128, 256, 256, 320)}, "it needs"),
    ({"data.corpus": "recall:induction", "data.recall.vocab_size": 8}, "it needs 10"),
    ({"data.context": 128}, "data.context is 128"),
    ({"data.recall.test_lengths": (512,), "data.recall.test_pairs": (4,)}, "test_lengths"),
    ({"data.corpus": "pydoc", "data.documents": "joined"}, "data.tokenizer is ids"),
])
def test_settings_without_examples_are_refused_in_one_line(change, words):
    load_config(defaults(), GOOD)
    with pytest.raises(ConfigError) as refused:
        load_config(defaults(), {**GOOD, **change})
    assert words in f"{refused.value.message} {refused.value.hint}"
