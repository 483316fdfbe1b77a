"""Count-based lines that a trained model must beat: `ngram_lines`, `NgramModel`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64, Integer, UInt64

from hippocampus.errors import DataError

MAX_COUNTED = 10_000_000
"""Training tokens that bigrams and trigrams are counted on: half a GB of memory, 10 seconds."""

_CHUNK = 1 << 22  # ids of a memory map taken into memory at once


def ngram_lines(
    train_ids: Integer[np.ndarray, " n"],
    validation_ids: Integer[np.ndarray, " m"],
    vocab_size: int,
    max_counted: int = MAX_COUNTED,
    scored: Bool[np.ndarray, " m"] | None = None,
) -> dict[str, float]:
    """Score a held-out text with count-based models of the training text.

    `uniform` is ln V; `unigram` has add-one smoothing, (c(w) + 1) / (n + V), and counts all of
    the training text; `bigram` and `trigram` are interpolated with Witten–Bell weights, see
    `NgramModel`, and count its first `max_counted` tokens. Scored is what a model predicts:
    every id but the first, with its true history. The second id has a history of one id only, so
    that there the trigram line takes the bigram.

    Args:
        train_ids: ids counted, each below `vocab_size`; may be a memory map of any length.
        validation_ids: ids scored; may be a memory map.
        vocab_size: V; above 2.6 million (V³ must fit in 64 bits) there is no trigram line.
        max_counted: most training tokens that bigrams and trigrams are counted on.
        scored: which ids count, each with its true history all the same; None: all but the first.

    Returns:
        Mean negative log-likelihood in nats per token of `uniform`, `unigram`, `bigram` and
        `trigram`.

    Raises:
        DataError: the training text is empty, or the other one has nothing to predict.
    """
    for part, ids, least in (("training", train_ids, 1), ("held-out", validation_ids, 2)):
        if len(ids) < least:
            raise DataError(f"the {part} text has {len(ids)} tokens", "use a longer text")
    if scored is None:
        scored = np.ones(len(validation_ids), bool)
    cost = -np.log((count_ids(train_ids, vocab_size) + 1) / (len(train_ids) + vocab_size))
    lines = {"uniform": math.log(vocab_size),
             "unigram": _mean_cost(validation_ids, 1, lambda ids: cost[ids], scored)}
    orders = {name: n for name, n in (("bigram", 2), ("trigram", 3)) if vocab_size**n < 2**64}
    model = NgramModel.fit(train_ids[:max_counted], vocab_size, max(orders.values(), default=1))
    for name, order in orders.items():
        lines[name] = _mean_cost(validation_ids, order, functools.partial(_nats, model, order),
                                 scored)
    return lines


def smoothing_note(train_tokens: int, vocab_size: int, max_counted: int = MAX_COUNTED) -> str:
    """What a table has to say about its n-gram lines: smoothing, and what they were counted on.

    Args:
        train_tokens: length of the training text.
        vocab_size: V.
        max_counted: as given to `ngram_lines`.
    """
    note = "unigram: add-one smoothing; bigram and trigram: interpolated Witten-Bell; counted on "
    if train_tokens <= max_counted:
        note += f"all {train_tokens:,} training tokens"
    else:
        note += (f"{train_tokens:,} training tokens (unigram) and on the first {max_counted:,} of "
                 "them (bigram, trigram)")
    if vocab_size**3 >= 2**64:
        note += "; no trigram for so large a vocabulary"
    return note


def count_ids(ids: Integer[np.ndarray, " n"], vocab_size: int) -> Int64[np.ndarray, " V"]:
    """How often each id occurs, of a memory map too: a few megabytes of it at a time."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, len(ids), _CHUNK):
        counts += np.bincount(ids[first : first + _CHUNK], minlength=vocab_size)
    return counts


def _nats(model: NgramModel, order: int, ids: np.ndarray) -> np.ndarray:
    return -np.log(model.score(ids, order))


def _mean_cost(
    ids: Integer[np.ndarray, " m"], order: int, cost: Callable[[np.ndarray], np.ndarray],
    scored: Bool[np.ndarray, " m"],
) -> float:
    """Average the cost of ids that count, a chunk at a time, each with its history."""
    sums = []
    for first in range(1, len(ids), _CHUNK):
        begin = max(0, first - order + 1)
        costs = cost(ids[begin : first + _CHUNK])[first - begin :]
        sums.append(float(costs[scored[first : first + _CHUNK]].sum()))
    return math.fsum(sums) / int(scored[1:].sum())


@dataclass(frozen=True, eq=False)
class NgramModel:
    """An n-gram model with Witten–Bell interpolation.

    With c(h) the times that history h goes on, T(h) the number of distinct ids it goes on with,
    and h' the history without its oldest id:

        p(w | h) = (c(h w) + T(h) p(w | h')) / (c(h) + T(h))

    down to p(w | nothing), which is interpolated with 1/V. A history never seen leaves p(w | h').

    Source: Witten & Bell, "The Zero-Frequency Problem" (IEEE Trans. Information Theory 37, 1991),
    method C; in this interpolated form Chen & Goodman, "An Empirical Study of Smoothing
    Techniques for Language Modeling" (Harvard TR-10-98, 1998), Witten–Bell smoothing.

    Attributes:
        vocab_size: V.
        levels: the counts for histories of 0, 1, 2, … ids.
    """

    vocab_size: int
    levels: tuple[_Counts, ...]

    @classmethod
    def fit(cls, ids: Integer[np.ndarray, " n"], vocab_size: int, order: int) -> NgramModel:
        """Count the n-grams of a text.

        Args:
            ids: the text, each id below `vocab_size`.
            vocab_size: V; V ** order must fit in 64 bits.
            order: length of the longest n-gram, which is the longest history and one id.

        Returns:
            The model.
        """
        levels = (_Counts.of(_grams(ids, n, vocab_size), vocab_size) for n in range(1, order + 1))
        return cls(vocab_size, tuple(levels))

    def probability(
        self, history: Integer[np.ndarray, "m h"], ids: Integer[np.ndarray, " m"]
    ) -> Float64[np.ndarray, " m"]:
        """Return p(id | history), row by row.

        Args:
            history: the ids before, oldest first; any number of them below the model's order.
            ids: the id that follows each history.

        Returns:
            The probabilities, which sum to 1 over the vocabulary for every history.
        """
        p = np.full(len(ids), 1 / self.vocab_size)
        for level in range(history.shape[1] + 1):
            recent = history[:, history.shape[1] - level :]
            key = _join((*recent.T, np.asarray(ids)), self.vocab_size)
            p = self.levels[level].interpolate(key, p, self.vocab_size)
        return p

    def score(self, ids: Integer[np.ndarray, " m"], order: int) -> Float64[np.ndarray, " m"]:
        """Return the probability of every id of a text given the order - 1 ids before it.

        Args:
            ids: the text.
            order: 1 for unigrams, …; at most the order of the model.

        Returns:
            The probabilities; the first ids are given the shorter histories that they have.
        """
        ids = np.asarray(ids)
        start = [
            self.probability(ids[None, :n], ids[n : n + 1]) for n in range(min(order - 1, len(ids)))
        ]
        windows = np.lib.stride_tricks.sliding_window_view
        full = windows(ids, order) if len(ids) >= order else np.empty((0, order), np.int64)
        return np.concatenate([*start, self.probability(full[:, :-1], full[:, -1])])


@dataclass(frozen=True, eq=False)
class _Counts:
    """Counts of all n-grams of one length and of their histories, as sorted keys."""

    grams: UInt64[np.ndarray, " g"]
    gram_counts: Integer[np.ndarray, " g"]
    histories: UInt64[np.ndarray, " h"]
    history_counts: Integer[np.ndarray, " h"]
    continuations: Integer[np.ndarray, " h"]

    @classmethod
    def of(cls, keys: np.ndarray, vocab_size: int) -> _Counts:
        grams, gram_counts = np.unique(keys, return_counts=True)
        # The newest id is the last digit of a key: one history's n-grams stand side by side.
        histories, first, continuations = np.unique(
            grams // np.uint64(vocab_size), return_index=True, return_counts=True
        )
        history_counts = np.add.reduceat(gram_counts, first) if len(first) else gram_counts
        return cls(grams, gram_counts, histories, history_counts, continuations)

    def interpolate(self, keys: np.ndarray, shorter: np.ndarray, vocab_size: int) -> np.ndarray:
        """Mix the counts of each n-gram with its probability under the shorter history."""
        history = keys // np.uint64(vocab_size)
        distinct = _look_up(self.histories, self.continuations, history)
        total = _look_up(self.histories, self.history_counts, history) + distinct
        count = _look_up(self.grams, self.gram_counts, keys)
        return np.where(total > 0, (count + distinct * shorter) / np.maximum(total, 1), shorter)


def _grams(ids: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    last = len(ids) - n + 1
    return _join([ids[i : max(last, 0) + i] for i in range(n)], vocab_size)


def _join(digits: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Read columns of ids, oldest first, as the digits of one number in base V."""
    key = np.zeros(len(digits[0]), np.uint64)
    for digit in digits:
        key = key * np.uint64(vocab_size) + digit.astype(np.uint64)
    return key


def _look_up(keys: np.ndarray, values: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Return the value of each queried key, 0 where it is not among the sorted keys."""
    if len(keys) == 0:
        return np.zeros(len(query), np.int64)
    place = np.minimum(np.searchsorted(keys, query), len(keys) - 1)
    return np.where(keys[place] == query, values[place], 0)
