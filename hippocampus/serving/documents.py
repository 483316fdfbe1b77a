"""A folder of text that can be searched, read and asked whether it says something: `Documents`.

The folder is read once, when it is opened, and what is asked later is looked up in memory: no name
that a model writes ever becomes a path. Links are not followed, hidden files not read.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from hippocampus.errors import DataError
from hippocampus.evaluation.bm25 import BM25, split_passages

SUFFIXES = (".csv", ".json", ".jsonl", ".markdown", ".md", ".rst", ".text", ".tsv", ".txt")
"""Of the files that are read."""
LARGEST_FILE = 16 * 2**20
LARGEST_FOLDER = 256 * 2**20
"""Bytes that are read of one file and in all."""
WORDS = 80
"""Of a passage."""
_SUPPORTED, _PARTLY = 0.9, 0.5
_ARTICLES = frozenset(("a", "an", "the"))
_WORD = re.compile(r"\w+")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?!\s|$)[^.!?\n]*)*[.!?]*")
_NEGATIONS = frozenset((
    "no", "not", "never", "none", "nobody", "nothing", "neither", "nor", "cannot", "without"))


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
      document: its name, the path within the folder.
      number: of the passage in it, from 0.
      score: how well it answers the query (BM25).
      text: the passage.
    """

    document: str
    number: int
    score: float
    text: str


@dataclass(frozen=True)
class Verdict:
    """Whether a folder says a thing, judged by its words alone.

    Attributes:
      verdict: "supported": one sentence has nearly all that the claim says, its numbers and as
        many negations; "conflicting": one has nearly all its words, but another number or
        negation; "partly supported"; "not found".
      coverage: share of the claim's words that the sentence has, rare ones counting more.
      document, evidence: the sentence and where it is; empty where nothing was found.
    """

    verdict: Literal["supported", "conflicting", "partly supported", "not found"]
    coverage: float
    document: str
    evidence: str


class Documents:
    """The text files of a folder, by name."""

    def __init__(self, texts: dict[str, str], words: int = WORDS):
        """Cuts texts into passages.

        Args:
          texts: name -> text.
          words: of a passage.
        """
        self.texts = dict(texts)
        self._words = words
        self._parts = {name: split_passages(text, words) for name, text in self.texts.items()}
        self._where = [(name, n) for name, parts in self._parts.items() for n in range(len(parts))]

    @classmethod
    def read(cls, folder: str | Path, words: int = WORDS) -> Documents:
        """Reads a folder.

        Args:
          folder: of files in UTF-8 with one of `SUFFIXES`; what is none is left out.
          words: of a passage.

        Raises:
          DataError: it cannot be read, has no text, or more than `LARGEST_FOLDER` bytes.
        """
        texts: dict[str, str] = {}
        total = 0
        for name, content in _files(Path(folder)):
            total += len(content)
            if total > LARGEST_FOLDER:
                raise DataError(f"{folder} has more than {LARGEST_FOLDER >> 20} MiB of text",
                                "give a smaller folder")
            try:
                texts[name] = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                continue
        if not any(map(str.strip, texts.values())):
            raise DataError(f"{folder} has no text", f"its files end in {', '.join(SUFFIXES)}")
        return cls(dict(sorted(texts.items())), words)

    def search(self, query: str, limit: int = 3) -> list[Passage]:
        """The passages that answer a query best, best first.

        Args:
          query: words.
          limit: most passages; those with no word of the query are left out.
        """
        scores = self._index.scores(query)
        best = np.argsort(-scores, kind="stable")[:max(0, limit)]
        return [Passage(self._where[i][0], self._where[i][1], round(float(scores[i]), 4),
                        self._index.passages[i])
                for i in best if scores[i] > 0]

    def retrieve(self, document: str, first: int = 0, count: int = 1) -> str:
        """Passages of a document, as in the folder.

        Args:
          document: its name, as `search` gives it.
          first: number of the first passage.
          count: how many.

        Raises:
          DataError: there is no such document or passage.
        """
        parts = self._parts.get(document)
        if parts is None:
            raise DataError(f"there is no document {document[:80]!r}",
                            "search gives the names of documents")
        if not 0 <= first < len(parts):
            raise DataError(f"{document} has no passage {first}",
                            f"its passages are 0 to {len(parts) - 1}")
        return "\n".join(parts[first:first + max(1, count)])

    def verify(self, claim: str) -> Verdict:
        """Whether a sentence of the folder says what a claim says.

        Only words are compared, in whatever order they are: what is said in other words is not
        found, and words may be of a sentence that means something else.

        Args:
          claim: one statement.
        """
        wanted = Counter(word for word in _terms(claim))
        if not wanted:
            return Verdict("not found", 0.0, "", "")
        weights = {word: math.log1p(len(self._sentences) / (1 + self._frequency[word]))
                   for word in wanted}
        whole = sum(weights.values()) or 1.0
        best = (0.0, 0, "", "")
        for name, sentence, terms in self._sentences:
            coverage = sum(weights[word] for word in wanted if word in terms) / whole
            found = (coverage, -len(terms), name, sentence)  # the shortest of equally good ones
            if found[:2] > best[:2] and coverage:
                best = found
        coverage, _, name, sentence = best
        if not sentence:
            return Verdict("not found", 0.0, "", "")
        return Verdict(_judge(claim, sentence, coverage), round(coverage, 3), name, sentence)

    @cached_property
    def _index(self) -> BM25:
        return BM25([part for parts in self._parts.values() for part in parts])

    @cached_property
    def _sentences(self) -> list[tuple[str, str, frozenset[str]]]:
        return [(name, sentence.strip(), terms) for name, text in self.texts.items()
                for sentence in _SENTENCE.findall(text) if (terms := frozenset(_terms(sentence)))]

    @cached_property
    def _frequency(self) -> Counter[str]:
        return Counter(word for _, _, terms in self._sentences for word in terms)


def _judge(claim: str, sentence: str,
           coverage: float) -> Literal["supported", "conflicting", "partly supported", "not found"]:
    # Numbers and negations turn a statement round, however few of its words they are.
    asked, said = _terms(claim), _terms(sentence)
    numbers = {word for word in asked if word[0].isdigit()}
    words = [word for word in asked if word not in numbers and word not in _NEGATIONS]
    same = sum(word in set(said) for word in words) / max(1, len(words))
    odd = (sum(word in _NEGATIONS for word in asked) - sum(word in _NEGATIONS for word in said)) % 2
    if same >= _SUPPORTED and words:
        if odd or not numbers <= set(said):
            return "conflicting"
        return "supported"
    return "partly supported" if coverage >= _PARTLY else "not found"


def _terms(text: str) -> list[str]:
    words = _WORD.findall(text.lower().replace("n't", " not").replace(",", ""))
    return [word for word in words if word not in _ARTICLES]


def _files(folder: Path) -> list[tuple[str, bytes]]:
    """(name, content) of the files of a folder, by descriptors, so that no link is followed."""
    found: list[tuple[str, bytes]] = []
    try:
        root = str(folder.resolve(strict=True))  # the user's own link to the folder is his choice
        for here, folders, names, handle in os.fwalk(root, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                    continue
                content = _content(name, handle)
                if content is not None:  # a name that is no text would end a server's pipe
                    path = os.fsencode(os.path.relpath(os.path.join(here, name), root))
                    found.append((path.decode("utf-8", "replace"), content))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}",
                        "--folder names a folder of text files") from None
    return found


def _content(name: str, folder: int) -> bytes | None:
    """Of a plain file that is not too large; None for anything else."""
    try:  # without waiting, should it be a pipe
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
            return None
        return file.read(LARGEST_FILE)


def _raise(error: OSError) -> None:
    raise error
