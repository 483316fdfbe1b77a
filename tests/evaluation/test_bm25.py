"""BM25 against an example worked out by hand, and snippets of exactly so many bytes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippocampus.errors import ConfigError
from hippocampus.evaluation.bm25 import BM25, split_passages

PASSAGES = ("the king lost the ring", "the mouse found a ring", "Rain")


def test_scores_are_those_worked_out_by_hand():
    # Lengths 5, 5, 1, so the mean is 11/3. "ring" is in 2 of 3: idf = ln(1 + 1.5/2.5); "king" in
    # 1 of 3: ln(1 + 2.5/1.5). A long passage: k1 (1 - b + b 5/(11/3)) = 1.5 (0.25 + 0.75 15/11).
    long = 1.5 * (0.25 + 0.75 * 15 / 11)
    ring, king = math.log(1.6) * 2.5 / (1 + long), math.log(8 / 3) * 2.5 / (1 + long)
    np.testing.assert_allclose(BM25(PASSAGES).scores("King? Ring!"), [king + ring, ring, 0.0])
    # Twice in a passage: f = 2; a word that is asked for twice counts twice.
    the = math.log(1.6) * np.array([5 / (2 + long), 2.5 / (1 + long), 0.0])
    np.testing.assert_allclose(BM25(PASSAGES).scores("the"), the)
    np.testing.assert_allclose(BM25(PASSAGES).scores("the The"), 2 * the)


def test_the_parameters_are_those_of_the_formula():
    flat = BM25(PASSAGES, k1=0.0).scores("the rain")  # without k1 only presence counts
    np.testing.assert_allclose(flat, [math.log(1.6), math.log(1.6), math.log(8 / 3)])
    same = BM25(("ring", "ring of gold and silver"), b=0.0).scores("ring")
    assert same[0] == same[1] > 0
    held_back = BM25(("ring", "ring of gold and silver"), b=0.75).scores("ring")
    assert held_back[0] > held_back[1]


def test_a_word_in_every_passage_never_counts_against_one():
    assert (BM25(("a b", "a c", "a d")).scores("a") > 0).all()
    assert not BM25(PASSAGES).scores("wolf").any()
    assert BM25(()).scores("wolf").shape == (0,) and BM25(()).snippets("wolf", 9) == ""
    assert not BM25(("", "...")).scores("x").any()


def test_the_best_passage_comes_first_and_equal_ones_in_their_order():
    assert BM25(PASSAGES).snippets("who found it", 1000).split("\n") == [
        PASSAGES[1], PASSAGES[0], PASSAGES[2]]
    assert BM25(PASSAGES).snippets("wolf", 1000).split("\n") == list(PASSAGES)


@given(text=st.text("ab éß€𝄞\n", min_size=1, max_size=120), words=st.integers(1, 9),
       n_bytes=st.integers(0, 300), query=st.sampled_from(["a", "é b", ""]))
def test_snippets_have_as_many_bytes_as_are_granted(text, words, n_bytes, query):
    passages = split_passages(text, words)
    found = BM25(passages).snippets(query, n_bytes).encode()
    there = len("\n".join(passages).encode())
    assert len(found) <= n_bytes
    assert len(found) > min(n_bytes, there) - 4  # the longest character has 4 bytes
    if there <= n_bytes:
        assert len(found) == there


def test_ascii_snippets_have_exactly_the_bytes():
    text = " ".join(f"word{i}" for i in range(500))
    for n_bytes in (1, 100, 1024):
        assert len(BM25(split_passages(text, 20)).snippets("word250", n_bytes).encode()) == n_bytes


@given(st.text("ab \n", max_size=80), st.integers(1, 7))
def test_passages_hold_every_word_once_in_order(text, words):
    passages = split_passages(text, words)
    assert " ".join(passages).split() == text.split()
    assert all(len(passage.split()) == words for passage in passages[:-1])
    assert all(passage == passage.strip() for passage in passages)


def test_passages_of_no_words_are_refused():
    with pytest.raises(ConfigError, match="passages of 0 words"):
        split_passages("a", 0)


def test_a_fact_is_found_in_a_long_story():
    filler = " ".join(f"On day {i} it rained on the hills and everybody stayed inside."
                      for i in range(300))
    text = f"{filler} Cleo hid the silver bell under the bridge. {filler}"
    found = BM25(split_passages(text, 40)).snippets("Where did Cleo hide the silver bell?", 300)
    assert "under the bridge" in found and len(found.encode()) == 300
