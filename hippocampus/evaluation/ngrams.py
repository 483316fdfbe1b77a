"""Count-based lines that a trained model must beat: `ngram_lines`, `NgramModel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Integer, UInt64

from hippocampus.errors import DataError


def ngram_lines(
    train_ids: Integer[np.ndarray, " n"],
    validation_ids: Integer[np.ndarray, " m"],
    vocab_size: int,
) -> dict[str, float]:
    """Score a validation text with count-based models of the training text.

    `uniform` is ln V; `unigram` has add-one smoothing, (c(w) + 1) / (n + V); `bigram` and
    `trigram` are interpolated with Witten–Bell weights, see `NgramModel`. Every validation id is
    scored with its true history: by the trigram from the third id on. The first id has no
    history and the second only one id, so there the trigram (the bigram) line takes the model of
    the longest history there is.

    Args:
        train_ids: ids counted, each below `vocab_size`.
        validation_ids: ids scored.
        vocab_size: V, at most 2.6 million (V³ must fit in 64 bits).

    Returns:
        Mean negative log-likelihood in nats per token of `uniform`, `unigram`, `bigram` and
        `trigram`.

    Raises:
        DataError: one of the texts is empty.
    """
    for part, ids in (("training", train_ids), ("validation", validation_ids)):
        if len(ids) == 0:
            raise DataError(f"the {part} text has no tokens", "use a longer text")
    counts = np.bincount(train_ids, minlength=vocab_size)
    add_one = (counts + 1) / (len(train_ids) + vocab_size)
    model = NgramModel.fit(train_ids, vocab_size, order=3)
    return {
        "uniform": float(np.log(vocab_size)),
        "unigram": float(-np.log(add_one[validation_ids]).mean()),
        "bigram": float(-np.log(model.score(validation_ids, order=2)).mean()),
        "trigram": float(-np.log(model.score(validation_ids, order=3)).mean()),
    }


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
