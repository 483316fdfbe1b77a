"""N-gram lines: true distributions, the formula by hand, and the order that data must give."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.errors import DataError
from hippocampus.evaluation.ngrams import NgramModel, ngram_lines

V = 5
TEXTS = st.lists(st.integers(0, V - 1), min_size=1, max_size=60).map(np.array)


def by_hand(train, history, token):
    """The recursion of the docstring, with dictionaries."""
    grams = Counter(tuple(train[i : i + n + 1]) for n in range(3) for i in range(len(train) - n))
    p = 1 / V
    for n in range(len(history) + 1):
        h = tuple(history[len(history) - n :])
        follow = {g[-1]: c for g, c in grams.items() if len(g) == n + 1 and g[:-1] == h}
        if follow:
            p = (follow.get(token, 0) + len(follow) * p) / (sum(follow.values()) + len(follow))
    return p


@given(train=TEXTS, history=st.lists(st.integers(0, V - 1), max_size=2))
def test_probabilities_sum_to_one_for_any_history(train, history):
    model = NgramModel.fit(train, V, order=3)
    rows = np.array([history] * V, np.int64).reshape(V, len(history))
    p = model.probability(rows, np.arange(V))
    assert p.min() > 0
    assert math.isclose(p.sum(), 1, rel_tol=1e-12)


@given(train=TEXTS, validation=TEXTS)
def test_lines_are_those_computed_by_hand(train, validation):
    t, v = train.tolist(), validation.tolist()
    unigram = [(t.count(w) + 1) / (len(t) + V) for w in v]
    bigram = [by_hand(t, v[max(i - 1, 0) : i], w) for i, w in enumerate(v)]
    trigram = [by_hand(t, v[max(i - 2, 0) : i], w) for i, w in enumerate(v)]
    lines = ngram_lines(train, validation, V)
    assert list(lines) == ["uniform", "unigram", "bigram", "trigram"]
    expected = [math.log(V)] + [-np.log(p).mean() for p in (unigram, bigram, trigram)]
    assert list(lines.values()) == pytest.approx(expected, rel=1e-12)


def test_large_vocabulary_needs_no_table():
    train = np.random.default_rng(0).integers(0, 250_000, 5_000, dtype=np.uint32)
    lines = ngram_lines(train, train, vocab_size=250_000)
    assert lines["trigram"] < lines["bigram"] < lines["unigram"] < lines["uniform"]


def test_ids_of_every_width_give_the_same_lines():
    ids = np.random.default_rng(0).integers(0, 256, 3_000)
    lines = [
        ngram_lines(ids.astype(d), ids.astype(d), 256) for d in (np.uint8, np.uint16, np.int32)
    ]
    assert lines[0] == lines[1] == lines[2]


def test_text_of_one_symbol_is_predicted_almost_surely():
    ids = np.zeros(10_000, np.int32)
    assert ngram_lines(ids, ids, 256)["trigram"] < 1e-3


@pytest.mark.parametrize("part", ["training", "validation"])
def test_empty_text_is_an_error(part):
    texts = {"training": np.ones(5, np.int32), "validation": np.ones(5, np.int32)}
    texts[part] = texts[part][:0]
    with pytest.raises(DataError, match=f"the {part} text has no tokens"):
        ngram_lines(texts["training"], texts["validation"], 2)


def test_tinyshakespeare_lines_have_their_known_values(tinyshakespeare_path):
    ids = byte_tokenizer().encode(tinyshakespeare_path.read_text())
    at = len(ids) * 9 // 10
    lines = ngram_lines(ids[:at], ids[at:], 256)
    bits = [nats / math.log(2) for nats in lines.values()]
    assert bits == pytest.approx([8, 4.8295, 3.5862, 2.9564], abs=1e-4)
