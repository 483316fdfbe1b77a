"""Stories with questions about them, from whatever form they come in: `open_stories`.

A source is NarrativeQA (a hub id, a folder or file of parquet or jsonl, one row per question) or
FairytaleQA (jsonl, one line per story); which of the two is told by the fields. Questions come
grouped by story, and texts as they are asked for, a few at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hippocampus.data import text_files
from hippocampus.data.corpora import Corpus
from hippocampus.data.documents import Chunks
from hippocampus.data.rows import FORMATS, Table, open_files, open_repository
from hippocampus.data.story_forms import Form, Rows, Story, form_of
from hippocampus.data.story_text import CLEANING
from hippocampus.errors import DataError
from hippocampus.files import expand

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""Splits, and how the names of their files may begin."""

TEXTS = ("document", "summary")
"""What the text of one of NarrativeQA's stories can be: all of it, or its plot in a page."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HELD_OUT = 10
_HINT = ("name a hub id such as deepmind/narrativeqa, a .jsonl or .parquet file, or a folder with "
         "train.jsonl or train*.parquet, with --config.data.corpus")


@dataclass(frozen=True)
class Stories:
    """Stories in their splits, read as they are asked for; no story is in two splits.

    Attributes:
        name: what they were asked for by.
        digest: hex sha256 that changes whenever a story may have changed.
        splits: "train", "validation" and, where there is one, "test".
        reader: split -> a fresh stream of its stories.
        namer: split -> a fresh stream of their names, which reads no text.
    """

    name: str
    digest: str
    splits: tuple[str, ...]
    reader: Callable[[str], Iterator[Story]]
    namer: Callable[[str], Iterator[str]]

    def read(self, split: str) -> Iterator[Story]:
        """Yield the stories of a split, each once, in the order of the source.

        Stories without text are left out, with a warning at the end.

        Raises:
            DataError: there is no such split, or what it is read from is damaged.
        """
        if split not in self.splits:
            raise DataError(f"data.corpus: {self.name} has no split {split!r}",
                            f"it has: {', '.join(self.splits)}")
        blank = 0
        for story in self.reader(split):
            if story.text:
                yield story
            blank += not story.text
        if blank:
            warnings.warn(f"{blank} stories of {self.name} ({split}) have no text and are left "
                          "out", stacklevel=2)

    def check_splits(self) -> None:
        """Refuse a source that has a story in two splits.

        Raises:
            DataError: naming the story.
        """
        split_of: dict[str, str] = {}
        for split in self.splits:
            for name in self.namer(split):
                if split_of.setdefault(name, split) != split:
                    raise DataError(
                        f"data.corpus: the story {name[:60]!r} of {self.name} is in the splits "
                        f"{split_of[name]} and {split}", "a held-out story must not be trained on")

    def corpus(self) -> Corpus:
        """The texts alone, every story a document."""
        def chunks(split: str) -> Chunks:
            return ((True, story.text) for story in self.read(split))

        return Corpus(self.name, self.digest, self.splits, chunks)


def read_stories(source: str, split: str, *, text: str = "document", streaming: bool = False
                 ) -> Iterator[Story]:
    """Yield the stories of a split; see `open_stories`."""
    return open_stories(source, text=text, streaming=streaming).read(split)


def open_stories(source: str, *, text: str = "document", streaming: bool = False) -> Stories:
    """Open stories, whatever form they are in.

    Args:
        source: a hub id such as `deepmind/narrativeqa`; a folder with `<split>*.parquet`,
            `data/<split>-*.parquet` or `<split>*.jsonl`; or one such file, which is all training
            stories. A validation split may be called `val`, `valid` or `dev` too.
        text: of NarrativeQA, "document" or "summary".
        streaming: read a hub data set over the network, keeping nothing; the rows of a story must
            follow each other there, and there must be a validation split.

    Returns:
        The stories. Where there is a training split and no validation split, a tenth of the
        training stories is held out: those whose names hash lowest.

    Raises:
        DataError: there is no such source, or its fields are of neither form.
    """
    if text not in TEXTS:
        raise DataError(f"the text of a story is {' or '.join(TEXTS)}, not {text!r}")
    path, streams = expand(source), False
    if not path.exists() and _HUB_NAME.fullmatch(source) and path.suffix not in FORMATS:
        table = open_repository(source, "", streaming)
        digest, parts, streams = table.digest, _table_parts(table, table.splits), streaming
    else:
        digest, parts = _local(path)
    forms = {split: form_of(source, rows, text, streams) for split, rows in parts.items()}
    digest = hashlib.sha256(json.dumps([CLEANING, digest, text]).encode()).hexdigest()
    if "validation" in forms or "train" not in forms:
        return Stories(source, digest, tuple(forms), lambda split: forms[split].stories(),
                       lambda split: iter(forms[split].names()))
    if streams:
        raise DataError(f"data.corpus: {source} has no validation split to stream",
                        "read it with --config.data.streaming=False")
    return _held_out(source, digest, forms)


def _local(path: Path) -> tuple[str, dict[str, Rows]]:
    """Digest and rows of a file, or of a folder's files by split."""
    if path.is_dir():
        files = _split_files(path)
    elif path.suffix in FORMATS:
        files = {"train": [path]}
    else:
        raise DataError(f"data.corpus: there are no stories at {path}", _HINT)
    if next(iter(files.values()))[0].suffix == ".parquet":
        table = open_files(files)
        return table.digest, _table_parts(table, tuple(files))
    scanned = {split: [text_files.scan(file) for file in found] for split, found in files.items()}
    facts = {split: [file.sha256 for file in found] for split, found in scanned.items()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return digest, {split: _JsonLines(tuple(found)) for split, found in scanned.items()}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of every split, all of one format."""
    for place, suffix in ((folder / "data", ".parquet"), (folder, ".parquet"),
                          (folder, ".jsonl")):
        found = {split: files for split, names in SPLITS.items() if (files := [
            file for file in sorted(place.glob("*")) if file.suffix == suffix and file.is_file()
            and re.split(r"[^a-z]", file.name.lower(), maxsplit=1)[0] in names])}
        if found:
            return found
    raise DataError(f"data.corpus: there are no stories in the folder {folder}", _HINT)


def _table_parts(table: Table, splits: Sequence[str]) -> dict[str, Rows]:
    return {split: _TableRows(table, split) for split in SPLITS if split in splits}


@dataclass(frozen=True)
class _TableRows:
    table: Table
    split: str

    def fields(self) -> Sequence[str]:
        return self.table.columns(self.split)

    def read(self, fields: Sequence[str], rows_per_read: int) -> Iterator[tuple[Any, ...]]:
        return self.table.records(self.split, fields, rows_per_read)


@dataclass(frozen=True)
class _JsonLines:
    """Read line by line: no type is guessed from the first rows, and no copy is made."""

    files: tuple[text_files.TextFile, ...]

    def fields(self) -> Sequence[str]:
        return tuple(next(self._objects())[1])

    def read(self, fields: Sequence[str], rows_per_read: int) -> Iterator[tuple[Any, ...]]:
        for place, record in self._objects():
            values = []
            for field in fields:
                value: Any = record
                for name in field.split("."):
                    if not isinstance(value, dict) or name not in value:
                        raise DataError(f"data.corpus: {place} has no field {field!r}",
                                        "repair the file")
                    value = value[name]
                values.append(value)
            yield tuple(values)

    def _objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in self.files:
            for number, line in enumerate(text_files.lines(file.path, file.stamp), 1):
                if line.isspace():
                    continue
                place = f"{file.path} line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict):
                    raise DataError(f"data.corpus: {place} is not a JSON object",
                                    "write one object per line")
                yield place, record


class _HeldOut:
    """The names of the training stories that validate."""

    def __init__(self, source: str, train: Form):
        self._source, self._train = source, train

    @cached_property
    def names(self) -> frozenset[str]:
        names = sorted(self._train.names(), key=lambda name: hashlib.sha256(
            name.encode("utf-8", "surrogatepass")).digest())
        if len(names) < 2:
            raise DataError(f"data.corpus: {self._source} has {len(names)} stories, and a tenth of "
                            "at least 2 is held out", "name a folder with a validation split too")
        return frozenset(names[:-(-len(names) // _HELD_OUT)])


def _held_out(source: str, digest: str, forms: Mapping[str, Form]) -> Stories:
    held = _HeldOut(source, forms["train"])

    def belongs(split: str, name: str) -> bool:
        return split == "test" or (name in held.names) == (split == "validation")

    def form(split: str) -> Form:
        return forms[split if split == "test" else "train"]

    return Stories(
        source, digest, tuple(split for split in SPLITS if split in (*forms, "validation")),
        lambda split: (story for story in form(split).stories() if belongs(split, story.name)),
        lambda split: (name for name in form(split).names() if belongs(split, name)))
