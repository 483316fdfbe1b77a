"""Documents as they stream by, in bounded memory: `Piece`, `cut`, `group_lines`, `select`.

A source yields chunks `(starts, text)`: a stretch of text, and whether a document starts with
it. Chunks may be of any size. `cut` makes of them the pieces that are tokenized, which depend on
the documents alone and not on how they came.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Chunks = Iterator[tuple[bool, str]]

PIECE_CHARACTERS = 2**18

_CHUNK_CHARACTERS = 2**20
_LAST_WORD_END = re.compile(r"\S(?=[ \n])")


class Piece(NamedTuple):
    """A stretch of one document, at most `PIECE_CHARACTERS` long.

    Attributes:
        text: never empty.
        starts: whether the document starts with it.
        ends: whether the document ends with it.
    """

    text: str
    starts: bool
    ends: bool


def cut(chunks: Iterable[tuple[bool, str]]) -> Iterator[Piece]:
    """Cut documents into pieces, each before the white space behind a word.

    GPT-2's pre-tokenizer never looks across such a place, so that the pieces of a long document
    have the ids of the whole; only a stretch of a quarter of a million characters without a
    space or line end is cut anywhere.

    Args:
        chunks: documents in any chunking.

    Yields:
        The pieces; most documents are one.
    """
    text, starts = "", True
    for new, chunk in chunks:
        if new and text:
            yield Piece(text, starts, True)
            text, starts = "", True
        text += chunk
        while len(text) > PIECE_CHARACTERS:
            at = _cut_place(text)
            yield Piece(text[:at], starts, False)
            text, starts = text[at:], False
    if text:
        yield Piece(text, starts, True)


def join(pieces: Iterable[Piece]) -> Iterator[str]:
    """Put pieces together to whole documents."""
    parts: list[str] = []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            yield "".join(parts)
            parts = []


def group_lines(lines: Iterable[str], start: re.Pattern[str]) -> Chunks:
    """Make documents of lines; each line that matches begins a new one.

    Lines before the first match are a document of their own, unless they are blank: then they
    belong to the first document (WikiText's files begin with an empty line).

    Args:
        lines: each with its line end, if it has one.
        start: searched in every line without its line end.

    Yields:
        Chunks.
    """
    parts: list[str] = []
    size, starts = 0, True
    for line in lines:
        if start.search(line.rstrip("\r\n")) and (not starts or any(map(str.strip, parts))):
            yield starts, "".join(parts)
            parts, size, starts = [], 0, True
        parts.append(line)
        size += len(line)
        if size > _CHUNK_CHARACTERS:
            yield starts, "".join(parts)
            parts, size, starts = [], 0, False
    if any(map(str.strip, parts)) or (parts and not starts):
        yield starts, "".join(parts)


def whole(texts: Iterable[str | None]) -> Chunks:
    """Make every text that is not blank a document."""
    for text in texts:
        if text and not text.isspace():
            yield True, text


def select(chunks: Chunks, first: int, last: int | None) -> Chunks:
    """Keep the documents first .. last - 1 (to the end if None)."""
    index = -1
    for starts, text in chunks:
        index += starts
        if last is not None and index >= last:
            return
        if index >= first:
            yield starts, text


def count(chunks: Chunks) -> int:
    """How many documents there are; reads them all."""
    return sum(starts for starts, _ in chunks)


def _cut_place(text: str) -> int:
    """The last place in reach that lies behind a word and before white space."""
    for low in (PIECE_CHARACTERS - 4096, 0):
        places = [match.end() for match in
                  _LAST_WORD_END.finditer(text, low, PIECE_CHARACTERS + 1)]
        if places:
            return places[-1]
    return PIECE_CHARACTERS
