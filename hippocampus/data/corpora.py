"""Texts to train on, split into documents and into train, validation and test: `open_corpus`.

A corpus is named (`pydoc`, `tinyshakespeare`, `wikitext_mini`), lies in local files or a folder, or
is a data set of the Hugging Face hub. It is never read whole: `Corpus.pieces` and
`Corpus.documents` stream. Every corpus carries a digest, so that two results can be said to rest
on the same data.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hippocampus.config import DataConfig
from hippocampus.data import named_texts, text_files
from hippocampus.data.documents import Chunks, Piece, count, cut, group_lines, join, select, whole
from hippocampus.data.rows import (
    FORMATS,
    Table,
    is_saved,
    open_files,
    open_repository,
    open_saved,
)
from hippocampus.errors import DataError
from hippocampus.files import expand

TRAIN_PERCENT = 90
STREAMED_VALIDATION_DOCUMENTS = 5000
NAMES = ("pydoc", "tinyshakespeare", "wikitext_mini")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_FIELDS = {"train": "corpus", "validation": "validation_files", "test": "test_files"}


@dataclass(frozen=True)
class Corpus:
    """Documents in their splits, read as they are asked for.

    Attributes:
        name: the name, path or hub id it was asked for by.
        digest: hex sha256 that stands for the documents and how they are split. For one text
            that is split by characters (and for `pydoc`) it is that of the text in UTF-8.
        splits: "train", "validation", and "test" where there is one.
        chunks: split -> a fresh stream of its documents.
    """

    name: str
    digest: str
    splits: tuple[str, ...]
    chunks: Callable[[str], Chunks]

    def pieces(self, split: str) -> Iterator[Piece]:
        """Yield a split in the pieces that are tokenized, the same in every call.

        Raises:
            DataError: the split is empty, or what it is read from is unusable.
        """
        empty = True
        for piece in cut(self.chunks(split)):
            empty = False
            yield piece
        if empty:
            raise DataError(f"data.corpus: the {split} split of {self.name} has no text",
                            "choose another split or file")

    def documents(self, split: str) -> Iterator[str]:
        """Yield a split's documents, whole and never empty.

        Raises:
            DataError: the split is empty, or what it is read from is unusable.
        """
        return join(self.pieces(split))


def open_corpus(data: DataConfig) -> Corpus:
    """Open the corpus that a config names.

    Args:
        data: `corpus` and the fields that say how it is read; see `hippocampus.config`.

    Returns:
        The corpus. Without a validation split or file, the last tenth is held out: of the
        characters where the corpus is one text, of the documents otherwise.

    Raises:
        DataError: the name is unknown, or the text is missing, empty, damaged or not UTF-8.
    """
    name = data.corpus
    if name in NAMES:
        return _named(name)
    path = expand(name)
    if path.is_dir():
        return _folder(path, data)
    if _looks_like_path(name):
        return _local_files(data)
    if _HUB_NAME.fullmatch(name):
        return _from_table(open_repository(name, data.subset, data.streaming), data)
    known = ", ".join(NAMES)
    nearest = difflib.get_close_matches(name.lower(), NAMES, n=1)
    suggestion = f"did you mean {nearest[0]}? " if nearest else ""
    raise DataError(
        f"data.corpus: unknown corpus {name!r}; known: {known}",
        f"{suggestion}a local file works too: --config.data.corpus=/path/to/file.txt, and a hub "
        "data set: owner/name",
    )


def hub_id(name: str) -> str | None:
    """The data set of the hub that a `data.corpus` names; None for everything else."""
    other = name in NAMES or expand(name).is_dir() or _looks_like_path(name)
    return name if not other and _HUB_NAME.fullmatch(name) else None


def _looks_like_path(name: str) -> bool:
    path = expand(name)
    if path.exists() or glob.has_magic(name):
        return True
    known = path.suffix in (".txt", ".tokens", *FORMATS)
    return known or (("/" in name or os.sep in name) and not _HUB_NAME.fullmatch(name))


def _named(name: str) -> Corpus:
    if name == "pydoc":
        from hippocampus.data.standard_library import read_modules

        train, validation = read_modules()
        return _in_memory(name, _sha256(train + validation), train, validation)
    if name == "wikitext_mini":
        train, validation = named_texts.wikitext_mini()
        # Lengths too: the same text in other documents is another corpus.
        lengths = json.dumps([list(map(len, train)), list(map(len, validation))])
        return _in_memory(name, _sha256([*train, *validation, lengths]), train, validation)
    text = named_texts.tinyshakespeare()
    at = len(text) * TRAIN_PERCENT // 100
    return _in_memory(name, _sha256([text]), [text[:at]], [text[at:]])


def _in_memory(name: str, digest: str, train: list[str], validation: list[str]) -> Corpus:
    parts = {"train": train, "validation": validation}
    return Corpus(name, digest, tuple(parts), lambda split: whole(parts[split]))


def _folder(path: Path, data: DataConfig) -> Corpus:
    if is_saved(path):
        return _from_table(open_saved(path, data.train_split), data)
    # As far down as the hub's data sets keep their files; a home folder is not searched.
    if not any(p.suffix in FORMATS for pattern in ("*", "*/*") for p in path.glob(pattern)):
        raise DataError(f"data.corpus: {path} is a directory without a data set in it",
                        "name a text file, a glob such as 'folder/*.txt', or a save_to_disk folder")
    return _from_table(open_repository(str(path), data.subset, streaming=False), data)


def _from_table(table: Table, data: DataConfig) -> Corpus:
    """A corpus of the splits of a data set."""
    asked = {"train": data.train_split, "validation": data.validation_split,
             "test": data.test_split}
    found = {split: name or (split if split in table.splits else "")
             for split, name in asked.items()}
    sources = {split: _rows(table, name, data) for split, name in found.items() if name}
    for name in filter(None, found.values()):
        table.open(name)  # refuses a split that is not there before anything is read
    digest = _key(table.digest, found, data.column, data.document_start)
    held = _streamed_hold_out if table.streaming else _held_out
    return _corpus(table.name, digest, sources, held)


def _rows(table: Table, split: str, data: DataConfig) -> Callable[[], Chunks]:
    if not data.document_start:
        return lambda: whole(table.texts(split, data.column))
    start = re.compile(data.document_start)
    # The hub's WikiText keeps line ends in full rows and has "" for an empty line.
    return lambda: group_lines(
        (text if text.endswith("\n") else text + "\n"
         for text in table.texts(split, data.column) if text is not None), start)


def _local_files(data: DataConfig) -> Corpus:
    """A corpus of text, .jsonl or .parquet files."""
    parts = {}
    for split, field in _FILE_FIELDS.items():
        if pattern := getattr(data, field):
            parts[split] = _matching(pattern, f"data.{field}")
    kinds = {FORMATS.get(path.suffix, "text") for paths in parts.values() for path in paths}
    if len(kinds) > 1:
        raise DataError(f"data.corpus: files of different formats ({', '.join(sorted(kinds))})",
                        "name files of one format")
    if kinds != {"text"}:
        table = open_files(parts)
        sources = {split: _rows(table, split, data) for split in parts}
        digest = _key(table.digest, data.column, data.document_start)
        return _corpus(data.corpus, digest, sources, _held_out)
    scanned = {split: [text_files.scan(path, ", ".join(NAMES), f"data.{_FILE_FIELDS[split]}")
                       for path in paths] for split, paths in parts.items()}
    if len(scanned) == 1 and len(scanned["train"]) == 1 and not data.document_start:
        return _one_text(data.corpus, scanned["train"][0])
    digest = _key({split: [file.sha256 for file in files] for split, files in scanned.items()},
                  data.document_start)
    sources = {split: _text_source(files, data.document_start)
               for split, files in scanned.items()}
    return _corpus(data.corpus, digest, sources, _held_out)


def _matching(pattern: str, field: str) -> list[Path]:
    path = expand(pattern)
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise DataError(f"{field}: no file matches {pattern}", "check the pattern")
    return found


def _one_text(name: str, file: text_files.TextFile) -> Corpus:
    """One text is split by characters and keeps the digest of the file."""
    at = file.n_characters * TRAIN_PERCENT // 100
    ends = {"train": (0, at), "validation": (at, file.n_characters)}

    def chunks(split: str) -> Chunks:
        for i, text in enumerate(text_files.read(file.path, *ends[split], stamp=file.stamp)):
            yield i == 0, text

    return Corpus(name, file.sha256, tuple(ends), chunks)


def _text_source(files: list[text_files.TextFile], document_start: str) -> Callable[[], Chunks]:
    def chunks() -> Chunks:
        for file in files:
            if document_start:
                yield from group_lines(text_files.lines(file.path, file.stamp),
                                       re.compile(document_start))
            else:
                for i, text in enumerate(text_files.read(file.path, stamp=file.stamp)):
                    yield i == 0, text
    return chunks


class _HoldOut:
    """Where the documents of a source are cut in two; they are counted when that is needed."""

    def __init__(self, name: str, source: Callable[[], Chunks]):
        self._name, self._source = name, source

    @cached_property
    def _place(self) -> int:
        total = count(self._source())
        if total < 2:
            raise DataError(f"data.corpus: {self._name} has {total} documents, and the last tenth "
                            "of at least 2 is held out",
                            "name a validation split or file, or set data.document_start")
        return min(total - 1, total * TRAIN_PERCENT // 100)

    def chunks(self, split: str) -> Chunks:
        validates = split == "validation"
        first, last = (self._place, None) if validates else (0, self._place)
        return select(self._source(), first, last)


def _held_out(name: str, source: Callable[[], Chunks]) -> Callable[[str], Chunks]:
    return _HoldOut(name, source).chunks


def _streamed_hold_out(name: str, source: Callable[[], Chunks]) -> Callable[[str], Chunks]:
    """The beginning validates: the end of a stream is known only when it comes."""
    at = STREAMED_VALIDATION_DOCUMENTS
    return lambda split: (select(source(), 0, at) if split == "validation"
                          else select(source(), at, None))


def _corpus(name: str, digest: str, sources: dict[str, Callable[[], Chunks]],
            hold_out: Callable[[str, Callable[[], Chunks]], Callable[[str], Chunks]]) -> Corpus:
    """A corpus of sources; without one to validate on, part of the first is held out."""
    splits = tuple(split for split in _FILE_FIELDS if split in {*sources, "validation"})
    if "validation" in sources:
        return Corpus(name, digest, splits, lambda split: sources[split]())
    halves = hold_out(name, sources["train"])
    return Corpus(name, digest, splits,
                  lambda split: sources["test"]() if split == "test" else halves(split))


def _sha256(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def _key(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
