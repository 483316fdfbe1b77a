"""Tasks that only a memory can solve, made of ids: `Examples`, `make_examples`.

    mqar            k1 v1 k2 v2 … then keys again, among filler: after a key, its value
    noisy           mqar in which keys are bound again later (the newest value counts), with pairs
                    of filler among the bindings
    induction       filler, a mark, x, filler, the mark again: x
    selective_copy  ids scattered over filler, then marks: the ids in their order
    delayed_copy    ids, filler, then marks: the ids in their order

An example is a pure function of (seed, split, kind, index): it is computed from hashes, and no
generator's state is kept. The answer is predicted *at* a key or mark; what follows there is filler
(or the next mark), never the answer itself.

Source: Arora et al. 2023 (arXiv:2312.04927), section 4 and the published code, for mqar. There,
the filler between the queries is any id, the example's own keys too, which asks for answers that
nothing determines; here it is none of the example's keys and values. Fu et al. 2022
(arXiv:2212.14052), section 3.1, for induction; Gu & Dao 2023 (arXiv:2312.00752), section 3.1, for
selective copying.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Int32, Int64, UInt64

from hippocampus.config import DataConfig, RecallConfig
from hippocampus.config_recall import Kind, extra_events
from hippocampus.data.permutation import mix, permute

VERSION = 1
"""Of the examples: it changes where the same settings give other examples."""

EXAMPLES_AT_ONCE = 2048

Keys = UInt64[np.ndarray, " N"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples of one kind.

    Attributes:
        kind: their size.
        tokens_NL: ids read.
        answers_NL: the id to be predicted at each of them; 0 where nothing is asked.
    """

    kind: Kind
    tokens_NL: Int32[np.ndarray, "N L"]
    answers_NL: Int32[np.ndarray, "N L"]

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.tokens_NL)


def make_examples(task: str, recall: RecallConfig, split: str, kind: Kind,
                  index_N: Int64[np.ndarray, " N"]) -> Examples:
    """Makes examples by their numbers.

    Args:
        task: one of `hippocampus.config.RECALL_TASKS`.
        recall: the settings.
        split: "train", "validation" or "test": each has examples of its own.
        kind: their size.
        index_N: which ones; each is the same whenever and with whatever others it is made.

    Returns:
        The examples.
    """
    keys_N = _example_keys(task, recall.seed, split, kind, np.asarray(index_N))
    tokens = np.empty((len(keys_N), kind.length), np.int32)
    answers = np.empty_like(tokens)
    for first in range(0, len(keys_N), EXAMPLES_AT_ONCE):
        part = slice(first, first + EXAMPLES_AT_ONCE)
        tokens[part], answers[part] = _TASKS[task](recall, kind, keys_N[part])
    return Examples(kind, tokens, answers)


def digest_of(data: DataConfig) -> str:
    """Hex sha256 that stands for the examples of all splits."""
    facts = [VERSION, data.corpus, [(field.name, getattr(data.recall, field.name))
                                    for field in fields(data.recall)]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ---------------------------------------------------------------- the tasks


def _mqar(recall: RecallConfig, kind: Kind, keys_N: Keys) -> tuple[np.ndarray, np.ndarray]:
    return _bind_and_ask(recall, kind, keys_N, updates=0, noise=0)


def _noisy(recall: RecallConfig, kind: Kind, keys_N: Keys) -> tuple[np.ndarray, np.ndarray]:
    return _bind_and_ask(recall, kind, keys_N, *extra_events("noisy", recall, kind.pairs))


def _bind_and_ask(recall: RecallConfig, kind: Kind, keys_N: Keys, updates: int, noise: int,
                  ) -> tuple[np.ndarray, np.ndarray]:
    """Bindings, then every key once more among filler.

    Events 0 .. pairs-1 bind the key of that number, the `updates` after them the first keys once
    more, and the rest is filler; their order is the example's own, and of two bindings of a key
    the later one counts. Every binding has another value.
    """
    N, n, L = len(keys_N), kind.pairs, kind.length
    bound, events = n + updates, n + updates + noise
    ids = _Ids(recall.vocab_size, keys_N, n, bound)
    tokens_NL = ids.filler(L)
    answers_NL = np.zeros_like(tokens_NL)
    event_Ne = (_shuffled(keys_N, events) if events > n
                else np.broadcast_to(np.arange(n), (N, n)))
    place_Ne = np.argsort(event_Ne, axis=1)  # where in the order each event is
    key_Nb = ids.key(np.broadcast_to(np.arange(bound) % n, (N, bound)))
    value_Nb = ids.value(np.broadcast_to(np.arange(bound), (N, bound)))
    np.put_along_axis(tokens_NL, 2 * place_Ne[:, :bound], key_Nb, 1)
    np.put_along_axis(tokens_NL, 2 * place_Ne[:, :bound] + 1, value_Nb, 1)

    newest_Nn = value_Nb[:, :n].copy()
    later_Nu = place_Ne[:, n:bound] > place_Ne[:, :updates]
    newest_Nn[:, :updates] = np.where(later_Nu, value_Nb[:, n:], newest_Nn[:, :updates])
    asked_Nn = 2 * events + 2 * _queries(keys_N, L // 2 - events, n, recall.power)
    np.put_along_axis(tokens_NL, asked_Nn, key_Nb[:, :n], 1)
    np.put_along_axis(answers_NL, asked_Nn, newest_Nn, 1)
    return tokens_NL, answers_NL


def _induction(recall: RecallConfig, kind: Kind, keys_N: Keys) -> tuple[np.ndarray, np.ndarray]:
    """Marks 1 .. pairs stand once in the filler, each before an id, and at the end again."""
    N, n, L = len(keys_N), kind.pairs, kind.length
    tokens = n + 1 + _below(keys_N, _FILL, L, recall.vocab_size - n - 1).astype(np.int32)
    answers = np.zeros_like(tokens)
    space = (L - n) // 2
    at_Nn = 2 * _queries(keys_N, space, n, 1.0)
    mark_Nn = np.broadcast_to(np.arange(1, n + 1, dtype=np.int32), (N, n))
    np.put_along_axis(tokens, at_Nn, mark_Nn, 1)
    asked_Nn = L - n + _shuffled(keys_N, n)
    np.put_along_axis(tokens, asked_Nn, mark_Nn, 1)
    np.put_along_axis(answers, asked_Nn, np.take_along_axis(tokens, at_Nn + 1, 1), 1)
    return tokens, answers


def _selective_copy(recall: RecallConfig, kind: Kind, keys_N: Keys
                    ) -> tuple[np.ndarray, np.ndarray]:
    n, space = kind.pairs, kind.length - kind.pairs
    return _copy(recall, kind, keys_N, np.sort(_queries(keys_N, space, n, 1.0), axis=1))


def _delayed_copy(recall: RecallConfig, kind: Kind, keys_N: Keys) -> tuple[np.ndarray, np.ndarray]:
    shape = len(keys_N), kind.pairs
    return _copy(recall, kind, keys_N, np.broadcast_to(np.arange(kind.pairs), shape))


def _copy(recall: RecallConfig, kind: Kind, keys_N: Keys, at_Nn: np.ndarray,
          ) -> tuple[np.ndarray, np.ndarray]:
    """Filler 0, ids of 2 and more at their places, marks 1 at the end."""
    n, L = kind.pairs, kind.length
    tokens = np.zeros((len(keys_N), L), np.int32)
    answers = np.zeros_like(tokens)
    ids_Nn = 2 + _below(keys_N, _FILL, n, recall.vocab_size - 2).astype(np.int32)
    np.put_along_axis(tokens, at_Nn, ids_Nn, 1)
    tokens[:, L - n:] = 1
    answers[:, L - n:] = ids_Nn
    return tokens, answers


_TASKS: dict[str, Callable[[RecallConfig, Kind, Keys], tuple[np.ndarray, np.ndarray]]] = {
    "mqar": _mqar, "noisy": _noisy, "induction": _induction, "selective_copy": _selective_copy,
    "delayed_copy": _delayed_copy}
"""Settings, kind and the key of each example -> tokens_NL, answers_NL."""


# ---------------------------------------------------------------- draws

_KEYS, _VALUES, _FILL, _PLACES, _ORDER = range(1, 6)
"""Independent streams of draws of one example."""


class _Ids:
    """The keys, the values and the filler of mqar: disjoint in every example.

    Keys are ids 1 .. V/2 - 1, values V/2 .. V - 1, each without repetition: the first images of a
    permutation of its half, keyed by the example. What lies behind them is the filler.
    """

    def __init__(self, vocab_size: int, keys_N: Keys, n_keys: int, n_values: int):
        self._half = vocab_size // 2
        self._n = {_KEYS: self._half - 1, _VALUES: vocab_size - self._half}
        self._used = {_KEYS: n_keys, _VALUES: n_values}
        self._keys_N = keys_N

    def key(self, number_Nn: np.ndarray) -> Int32[np.ndarray, "N n"]:
        """The example's key of a number below `n_keys`."""
        return self._image(_KEYS, number_Nn)

    def value(self, number_Nn: np.ndarray) -> Int32[np.ndarray, "N n"]:
        """The example's value of a number below `n_values`."""
        return self._image(_VALUES, number_Nn)

    def filler(self, n: int) -> Int32[np.ndarray, "N n"]:
        """Ids that are neither, each as likely as any other."""
        free_keys = self._n[_KEYS] - self._used[_KEYS]
        free_values = self._n[_VALUES] - self._used[_VALUES]
        drawn_Nn = _below(self._keys_N, _FILL, n, free_keys + free_values)
        is_key_Nn = drawn_Nn < free_keys
        ids = np.empty(drawn_Nn.shape, np.int32)
        for stream, chosen, number in (
                (_KEYS, is_key_Nn, drawn_Nn + self._used[_KEYS]),
                (_VALUES, ~is_key_Nn, drawn_Nn - free_keys + self._used[_VALUES])):
            row_M = np.nonzero(chosen)[0]
            ids[chosen] = self._permuted(stream, number[chosen], self._keys_N[row_M])
        return ids

    def _image(self, stream: int, number_Nn: np.ndarray) -> np.ndarray:
        return self._permuted(stream, number_Nn, np.broadcast_to(
            self._keys_N[:, None], number_Nn.shape))

    def _permuted(self, stream: int, number: np.ndarray, keys: np.ndarray) -> np.ndarray:
        first = 1 if stream == _KEYS else self._half
        image = permute(number, self._n[stream], mix(keys ^ np.uint64(stream)))
        return (first + image).astype(np.int32)


def _example_keys(task: str, seed: int, split: str, kind: Kind, index_N: np.ndarray) -> Keys:
    """64 bits for each example, from which all of it follows."""
    facts = json.dumps([VERSION, task, seed, split, *kind]).encode()
    of_kind = np.uint64(int.from_bytes(hashlib.sha256(facts).digest()[:8], "little"))
    return mix(of_kind ^ mix(index_N.astype(np.uint64)))


def _bits(keys_N: Keys, stream: int, n: int) -> UInt64[np.ndarray, "N n"]:
    start_N = mix(mix(keys_N) ^ np.uint64(stream))
    return mix(start_N[:, None] + np.arange(n, dtype=np.uint64))


def _below(keys_N: Keys, stream: int, n: int, bound: int) -> Int64[np.ndarray, "N n"]:
    """n integers in [0, bound) for every example."""
    return (_bits(keys_N, stream, n) % np.uint64(bound)).astype(np.int64)


def _uniform(keys_N: Keys, stream: int, n: int) -> Float[np.ndarray, "N n"]:
    """n numbers in (0, 1) for every example."""
    return ((_bits(keys_N, stream, n) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _shuffled(keys_N: Keys, n: int) -> Int64[np.ndarray, "N n"]:
    """0 .. n-1 in an order of its own for every example."""
    return np.argsort(_uniform(keys_N, _ORDER, n), axis=1)


def _queries(keys_N: Keys, space: int, n: int, power: float) -> Int64[np.ndarray, "N n"]:
    """n of `space` places without repetition, drawn one after another with p(i) ~ i^(power - 1).

    The largest of log p + Gumbel noise, in falling order, have the distribution of draws without
    replacement (Efraimidis & Spirakis 2006), which the published code takes from numpy.
    """
    log_p = (power - 1) * np.log(np.arange(1, space + 1))
    score = log_p - np.log(-np.log(_uniform(keys_N, _PLACES, space)))
    return np.argsort(-score, axis=1)[:, :n]
