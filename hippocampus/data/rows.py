"""Rows of text through Hugging Face `datasets`: `open_files`, `open_saved`, `open_repository`.

Whether the rows lie in local .jsonl or .parquet files, in a folder of `save_to_disk`, in a copy of
a hub repository or on the hub, they come as one `Table` and are read in batches from memory maps
or a stream, never all at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.data import text_files
from hippocampus.data.cache import cache_folder
from hippocampus.errors import DataError

ROWS_PER_READ = 1000
HUB_TIMEOUT_SECONDS = 5
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Table:
    """The splits of a data set.

    Attributes:
        name: what it was asked for by.
        splits: names of its splits.
        digest: changes whenever its rows may have changed.
        opener: split (or a slice such as `train[:99%]`) -> a `datasets` data set.
        streaming: whether its length is unknown and a second pass costs a second download.
    """

    name: str
    splits: tuple[str, ...]
    digest: str
    opener: Callable[[str], Any]
    streaming: bool = False

    def open(self, split: str) -> Any:
        """Return a `datasets` data set of a split.

        Raises:
            DataError: there is no such split, or its files are damaged.
        """
        with _translated(self.name):
            return self.opener(split)

    def texts(self, split: str, column: str) -> Iterator[str | None]:
        """Yield the text of every row.

        Raises:
            DataError: there is no such split or column, or the column is not UTF-8 text.
        """
        for batch in self._batches(split, column):
            try:
                yield from batch.column(column).to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data.corpus: column {column!r} of {self.name} is not UTF-8 "
                    f"(byte 0x{error.object[error.start]:02x} at offset {error.start} of a row)",
                    "repair the data set",
                ) from None

    def columns(self, split: str) -> tuple[str, ...]:
        """Names of the columns of a split; DataError where there is no such split."""
        dataset = self.open(split)
        with _translated(self.name):
            return tuple(dataset.column_names or next(iter(dataset), {}))

    def records(self, split: str, fields: Sequence[str], rows_per_read: int = ROWS_PER_READ
                ) -> Iterator[tuple[Any, ...]]:
        """Yield some fields of every row; dots lead into a struct, and the rest is not decoded.

        Raises:
            DataError: there is no such split or field.
        """
        import pyarrow.compute

        dataset = self.open(split)
        with _translated(self.name):
            if dataset.column_names is not None:
                whole = dict.fromkeys(field.partition(".")[0] for field in fields)
                nested = isinstance(dataset, _ParquetFiles)
                dataset = dataset.select_columns(list(fields if nested else whole))
            batches = iter(dataset.with_format("arrow").iter(batch_size=rows_per_read))
        while True:
            with _translated(self.name):
                batch = next(batches, None)
            if batch is None:
                return
            found = []
            for field in fields:
                column, *inner = field.split(".")
                _check_column(self.name, column, batch.column_names)
                try:
                    values = batch.column(column)
                    found.append((pyarrow.compute.struct_field(values, inner) if inner
                                  else values).to_pylist())
                except (pyarrow.ArrowException, UnicodeDecodeError) as error:
                    raise DataError(f"data.corpus: {self.name} has no text in {field!r} ({error})",
                                    "is it the data set that was meant?") from None
            yield from zip(*found, strict=True)

    def _batches(self, split: str, column: str) -> Iterator[Any]:
        """Arrow tables of the one column."""
        dataset = self.open(split)
        with _translated(self.name):
            if dataset.column_names is not None:
                _check_column(self.name, column, dataset.column_names)
                dataset = dataset.select_columns([column])
            batches = iter(dataset.with_format("arrow").iter(batch_size=ROWS_PER_READ))
        checked = False
        while True:
            with _translated(self.name):
                batch = next(batches, None)
            if batch is None:
                return
            _check_column(self.name, column, batch.column_names)
            if not checked:
                checked = _check_type(self.name, column, str(batch.schema.field(column).type))
            yield batch


def open_files(parts: Mapping[str, Sequence[Path]]) -> Table:
    """Open local .jsonl or .parquet files, without making a copy of them.

    Args:
        parts: split -> its files, all of one format.

    Raises:
        DataError: a file is missing, empty, or (.jsonl) not UTF-8.
    """
    import datasets

    every = [path for paths in parts.values() for path in paths]
    kind = FORMATS[every[0].suffix]
    if kind == "json":
        digests = [text_files.scan(path).sha256 for path in every]
    else:
        digests = [_digest(path) for path in every]
    sizes = [(split, len(paths)) for split, paths in parts.items()]

    def open_split(split: str) -> Any:
        if kind == "parquet":
            return _ParquetFiles(parts[split])
        files = [str(path) for path in parts[split]]
        return datasets.load_dataset("json", data_files={"train": files}, split="train",
                                     streaming=True)

    name = str(every[0]) if len(every) == 1 else f"{every[0]} and {len(every) - 1} more"
    return Table(name, tuple(parts), _key("files", sizes, digests), open_split)


class _ParquetFiles:
    """Local .parquet files with the few methods of a `datasets` data set that are used here.

    The library's own reader decodes ahead of what is taken, and its memory grows with the file.
    """

    def __init__(self, paths: Sequence[Path], columns: list[str] | None = None):
        self._paths, self._columns = paths, columns

    @property
    def column_names(self) -> list[str]:
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(self._paths[0]).names)

    def select_columns(self, columns: list[str]) -> _ParquetFiles:
        return _ParquetFiles(self._paths, columns)

    def with_format(self, kind: str) -> _ParquetFiles:
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[Any]:
        import pyarrow.parquet

        for path in self._paths:
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
                yield from file.iter_batches(batch_size, columns=self._columns, use_threads=False)


def is_saved(path: Path) -> bool:
    """Whether a folder is one of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def open_saved(path: Path, train_split: str) -> Table:
    """Open a folder of `save_to_disk`; a single data set is its `train_split`.

    Raises:
        DataError: it is damaged.
    """
    import datasets

    with _translated(str(path)):
        loaded = datasets.load_from_disk(str(path))
    splits = loaded if isinstance(loaded, dict) else {train_split.split("[")[0]: loaded}
    facts = [
        (name, part._fingerprint, part.num_rows,
         [os.path.getsize(file["filename"]) for file in part.cache_files])
        for name, part in splits.items()
    ]
    return Table(str(path), tuple(splits), _key("saved", facts), _slicer(str(path), splits))


def open_repository(name: str, subset: str, streaming: bool) -> Table:
    """Open a hub data set, or a local folder with the files of one.

    Args:
        name: `owner/name`, or the folder.
        subset: which of its configurations; "" for the only or default one.
        streaming: read over the network as it goes, keeping nothing.

    Raises:
        DataError: it cannot be reached, or there is no such data set or subset.
    """
    import datasets

    local = os.path.isdir(name)
    reach = contextlib.nullcontext("") if local else _hub()
    asked = f"{name} with subset {subset}" if subset else name
    with reach as unreachable, _translated(asked, unreachable), _bars(datasets):
        builder = datasets.load_dataset_builder(name, subset or None)
        content = ""
        if local:
            # The library knows local files by their times, to the second: ask for its copy of
            # this very content.
            content = _key([(str(split), [_digest(Path(file)) for file in files])
                            for split, files in builder.config.data_files.items()])
            builder = datasets.load_dataset_builder(
                name, subset or None, cache_dir=str(cache_folder() / "datasets" / content[:32]))
        if streaming:
            splits = builder.as_streaming_dataset()
            names = tuple(splits)
        else:
            builder.download_and_prepare()
            names = tuple(builder.info.splits)
    if streaming:
        opener = _slicer(name, splits)
    else:
        def opener(split: str) -> Any:
            _check_split(name, split, names)
            return builder.as_dataset(split=split)
    digest = _key("repository", builder.repo_id, builder.config.name, content or builder.hash)
    return Table(name, names, digest, opener, streaming)


def _slicer(name: str, splits: Any) -> Callable[[str], Any]:
    """An opener of splits that are there already."""
    def open_split(split: str) -> Any:
        _check_split(name, split, tuple(splits))
        base, bracket, _ = split.partition("[")
        if not bracket:
            return splits[base]
        if not hasattr(splits[base], "num_rows"):
            raise DataError(f"data.corpus: {split} of {name} cannot be streamed",
                            "slices of a split need --config.data.streaming=False")
        first, last = _slice(split, splits[base].num_rows)
        return splits[base].select(range(first, last))
    return open_split


def _slice(split: str, rows: int) -> tuple[int, int]:
    import datasets

    base = split.partition("[")[0]
    instruction = datasets.ReadInstruction.from_spec(split).to_absolute({base: rows})
    return instruction[0].from_ or 0, rows if instruction[0].to is None else instruction[0].to


def _check_split(name: str, split: str, names: Sequence[str]) -> None:
    if split.partition("[")[0] not in names:
        raise DataError(f"data.corpus: {name} has no split {split!r}",
                        f"it has: {', '.join(names) or 'none'}")


def _check_column(name: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise DataError(f"data.corpus: {name} has no column {column!r}; "
                        f"it has: {', '.join(names) or 'none'}",
                        "choose one with --config.data.column")


def _check_type(name: str, column: str, kind: str) -> bool:
    """Refuses a column without text; True once a type says that it has."""
    if kind not in ("string", "large_string", "string_view", "null"):
        raise DataError(f"data.corpus: column {column!r} of {name} holds {kind}, not text",
                        "choose another one with --config.data.column")
    return kind != "null"


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"data.corpus: {path} cannot be read: {error.strerror}",
                        "check the path and its permissions") from None


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextlib.contextmanager
def _bars(datasets: Any) -> Iterator[None]:
    """Progress bars of downloads on a terminal only."""
    shown = datasets.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _hub() -> Iterator[str]:
    """Asks once, with a short time-out, whether the hub is there.

    The libraries would retry for half a minute. Where it is not, they use their cache alone; the
    value is then the reason.
    """
    import datasets
    from huggingface_hub import constants

    flags: tuple[Any, ...] = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in flags]
    reason = "HF_HUB_OFFLINE is set" if any(before) else ""
    if not reason:
        endpoint = constants.ENDPOINT
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
                pass
        except urllib.error.HTTPError:
            pass  # it answers, which is all that was asked
        except (OSError, ValueError) as error:
            reason = f"{endpoint} cannot be reached ({getattr(error, 'reason', error)})"
    try:
        if reason:
            for module in flags:
                module.HF_HUB_OFFLINE = True
        yield reason
    finally:
        for module, value in zip(flags, before, strict=True):
            module.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _translated(name: str, unreachable: str = "") -> Iterator[None]:
    """Turns what the library raises into one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        kind, text = type(error).__name__, " ".join(str(error).split())
        if unreachable:
            raise DataError(
                f"data.corpus: there is no file {name}, no local copy of a data set of that "
                f"name, and {unreachable}",
                "connect once, copy the hub's cache here, name local files, or use pydoc",
            ) from None
        if isinstance(error, ConnectionError):
            raise DataError(f"data.corpus: {name} cannot be read from the hub: {text[:200]}",
                            "try again later, or name local files") from None
        if kind == "DatasetNotFoundError":
            raise DataError(f"data.corpus: there is no file {name}, and no data set of that name "
                            "on the hub", "check the name; a private one needs `hf auth login`"
                            ) from None
        if isinstance(error, ValueError) and "onfig" in text:
            found = text[text.find("["): text.rfind("]") + 1]
            raise DataError(f"data.corpus: {name} has no such subset, or needs one",
                            f"choose with --config.data.subset one of {found}") from None
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"data.corpus: {name} cannot be read: {error.strerror}",
                            "check the disk and its permissions") from None
        raise DataError(f"data.corpus: {name} cannot be read ({kind}: {text[:200]})",
                        "is it a text data set that `datasets` can load?") from None
