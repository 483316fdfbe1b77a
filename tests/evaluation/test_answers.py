"""Scores of answers against SQuAD's script and rouge-score 0.1.2, whose values stand here."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippocampus.evaluation.answers import (
    AnswerScore,
    by_story,
    exact_match,
    normalized,
    rouge_l,
    score_answer,
    token_f1,
)

ROUGE = [  # RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    ("the cat sat on the mat", "the cat lay on a mat", 0.6666666666666666),
    ("He stole the king's golden ring.", "the ring of the King, stolen by him",
     0.26666666666666666),
    ("because she was afraid of wolves", "She was afraid", 0.6666666666666666),
    ("", "ring", 0.0),
    ("rex", "Rex!", 1.0),
    ("a b c d e f", "f e d c b a", 0.16666666666666666),
    ("naïve café owner", "the café owner was naive", 0.4444444444444445),
    ("one two three two one", "two one three one two", 0.6),
]


@pytest.mark.parametrize(("prediction", "reference", "value"), ROUGE)
def test_rouge_l_is_that_of_the_rouge_score_package(prediction, reference, value):
    assert rouge_l(prediction, reference) == pytest.approx(value, abs=1e-12)


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_counts_the_longest_of_all_common_subsequences(ours, theirs):
    def subsequences(words):
        return {tuple(kept) for n in range(len(words) + 1) for kept in combinations(words, n)}

    longest = max(map(len, subsequences(ours) & subsequences(theirs)))
    expected = 2 * longest / (len(ours) + len(theirs)) if longest else 0.0
    assert rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("prediction", "reference", "f1", "exact"), [
    ("The Cat!", "a cat", 1.0, 1.0),  # case, punctuation and articles do not count
    ("the theatre", "theatre", 1.0, 1.0),
    ("king's ring", "kings ring", 1.0, 1.0),
    ("the golden ring", "a ring", 2 / 3, 0.0),  # 1 shared of 2 and 1
    ("ring ring ring", "ring of gold", 1 / 3, 0.0),  # a word is shared as often as both have it
    ("gold of ring", "ring of gold", 1.0, 0.0),  # order is nothing to F1
    ("", "ring", 0.0, 0.0),
    ("the", "A", 1.0, 1.0),  # nothing is left of either
    ("mouse", "ring", 0.0, 0.0),
])
def test_f1_and_exact_match_are_squads(prediction, reference, f1, exact):
    assert token_f1(prediction, reference) == pytest.approx(f1, abs=1e-12)
    assert exact_match(prediction, reference) == exact


def test_normalizing_takes_articles_as_words_alone():
    assert normalized(" The  anthem\nof an  Ant, a theme. ") == "anthem of ant theme"


def test_each_score_is_its_largest_over_the_references():
    found = score_answer("a golden ring", ["ring golden old", "the golden ring of a king", "mouse"])
    # F1: 2 shared of 2 and 3 (first), of 2 and 4 (second). ROUGE-L: "golden ring" in order.
    assert found.f1 == pytest.approx(0.8)
    assert found.rouge_l == pytest.approx(4 / 9)
    assert found.exact_match == 0.0
    assert score_answer("mouse", ["ring", "Mouse."]) == AnswerScore(1.0, 1.0, 1.0)


def test_stories_weigh_the_same_however_many_questions_they_have():
    right, wrong, half = AnswerScore(1, 1, 1), AnswerScore(0, 0, 0), AnswerScore(0, 0.5, 0.25)
    found = by_story([("b", right), ("a", wrong), ("b", half), ("a", wrong), ("b", wrong)])
    assert list(found) == ["b", "a"]
    assert found["b"] == AnswerScore(pytest.approx(1 / 3), 0.5, pytest.approx(1.25 / 3))
    assert found["a"] == wrong
