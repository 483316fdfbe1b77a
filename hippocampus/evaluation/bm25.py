"""The fair opponent of a memory: as many bytes of the story itself, looked up by BM25.

    score(q, p) = sum over words w of q:  idf(w) f (k1 + 1) / (f + k1 (1 - b + b |p| / mean |p|))
    idf(w)      = ln(1 + (N - n + 1/2) / (n + 1/2))

with f how often w is in passage p, |p| its words, and n of the N passages holding w. A word that
is in most passages counts little, and never against a passage.

Source: Robertson & Zaragoza 2009, The probabilistic relevance framework: BM25 and beyond, section
3.4; the idf that is never negative, Lucene's BM25Similarity.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from hippocampus.errors import ConfigError

K1, B = 1.5, 0.75

SEPARATOR = "\n"
"""Between passages; its byte counts too."""

_WORD = re.compile(r"\w+")
_WORD_AND_SPACE = re.compile(r"\s*\S+")


def split_passages(text: str, words: int) -> list[str]:
    """Cuts a text into passages of so many words, the last one of what is left.

    Args:
      text: any text.
      words: words between white space, at least 1.

    Returns:
      The passages, without white space at their ends; within, as in the text.
    """
    if words < 1:
        raise ConfigError(f"passages of {words} words", "a passage needs at least one")
    found = _WORD_AND_SPACE.findall(text)
    return ["".join(found[first : first + words]).strip() for first in range(0, len(found), words)]


class BM25:
    """Passages that can be looked up."""

    def __init__(self, passages: Sequence[str], k1: float = K1, b: float = B):
        """Counts the words.

        Args:
          passages: of a story.
          k1: how much a word counts that comes again; 0 = once is all.
          b: how much long passages are held back; 0 = not.
        """
        self.passages = tuple(passages)
        self._counts = [Counter(_words(passage)) for passage in self.passages]
        self._within = Counter(word for counts in self._counts for word in counts)
        lengths = np.array([counts.total() for counts in self._counts], np.float64)
        mean = lengths.mean() if lengths.sum() else 1.0
        self._k1, self._saturation = k1, k1 * (1 - b + b * lengths / mean)

    def scores(self, query: str) -> Float64[np.ndarray, " N"]:
        """How well each passage answers a query; a word that comes twice in it counts twice.

        Args:
          query: such as a question.
        """
        total = np.zeros(len(self.passages))
        for word, times in Counter(_words(query)).items():
            n = self._within[word]
            if not n:
                continue
            idf = math.log1p((len(self.passages) - n + 0.5) / (n + 0.5))
            here = np.array([i for i, counts in enumerate(self._counts) if word in counts])
            f = np.array([self._counts[i][word] for i in here], np.float64)
            total[here] += times * idf * (self._k1 + 1) * f / (f + self._saturation[here])
        return total

    def snippets(self, query: str, n_bytes: int) -> str:
        """The best passages, best first, cut to a number of bytes.

        Args:
          query: such as a question.
          n_bytes: how many, in UTF-8; as many as a memory takes, for a comparison that is fair.

        Returns:
          Passages under each other, equally good ones in their order; those that have nothing of
          the query come last. It has fewer bytes only where the passages have, or by up to three
          where the cut would go through a character.
        """
        order = np.argsort(-self.scores(query), kind="stable")
        text = SEPARATOR.join(self.passages[i] for i in order)
        return text.encode()[:max(0, n_bytes)].decode(errors="ignore")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
