"""Token ids on disk: `token_split`, `TokenSplit`, `open_split`, `verify`.

A split is a folder `$HIPPOCAMPUS_CACHE/shards/<hash>/<split>` with `ids.bin` (uint16 where the
vocabulary fits, else uint32; little-endian), `document_starts.bin` (int64) and `manifest.json`. It
is written as `<split>.partial`, chunk by chunk, each followed by a line of a journal; a process
that was killed is continued behind the last line, and the folder gets its name when it is
complete. The hash stands for corpus, tokenizer and format: what is there is right, and is reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hippocampus.data.cache import cache_folder, cannot_write, locked
from hippocampus.data.corpora import Corpus
from hippocampus.data.documents import Piece, count_words
from hippocampus.data.progress import Progress
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import DataError
from hippocampus.files import write_atomically

FORMAT = 1
CHUNK_CHARACTERS = 2**24
VERIFIED_BYTES = 2**30
IDS, STARTS, MANIFEST, JOURNAL = "ids.bin", "document_starts.bin", "manifest.json", "journal.jsonl"

_ENTRIES = 13
"""Of a manifest without its digest."""


@dataclass(frozen=True, eq=False)
class TokenSplit:
    """One split of a corpus as ids.

    Attributes:
        ids: uint16 or uint32 [tokens], a memory map; documents one after the other.
        document_starts: int64 [documents], a memory map: where each begins; the first is 0.
        n_bytes: UTF-8 bytes of the text.
        n_words: WikiText's count: words between white space, and one <eos> for every line.
        n_documents: documents.
        n_unknown: ids that are <unk> (words), else 0.
    """

    ids: np.ndarray
    document_starts: np.ndarray
    n_bytes: int
    n_words: int
    n_documents: int
    n_unknown: int


@dataclass
class _Totals:
    """What was written so far; one line of the journal."""

    pieces: int = 0
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    words: int = 0
    unknown: int = 0


def token_split(corpus: Corpus, tokenizer: Tokenizer, split: str) -> TokenSplit:
    """Tokenize a split, or take it from the cache.

    One process writes; others wait for it and take what it wrote. Memory stays bounded: a chunk
    of 16 million characters at a time.

    Args:
        corpus: where the text comes from.
        tokenizer: what makes ids of it.
        split: one of `corpus.splits`.

    Returns:
        The ids, mapped into memory.

    Raises:
        DataError: the split is empty or unusable, the tokenizer does not know a character, or the
            cache cannot be written.
    """
    folder = split_folder(corpus, tokenizer, split)
    with locked(folder):
        if folder.exists():
            try:
                return open_split(folder, tokenizer)
            except DataError as error:
                warnings.warn(f"{error.message}: made again", stacklevel=2)
                shutil.rmtree(folder)
        try:
            _build(corpus, tokenizer, split, folder)
        except OSError as error:
            raise cannot_write(folder, error) from None
        finally:
            _forget_if_empty(_partial(folder))
        return open_split(folder, tokenizer, verified=True)


def split_folder(corpus: Corpus, tokenizer: Tokenizer, split: str) -> Path:
    """Return where a split is kept, whether it is there or not."""
    facts = json.dumps([FORMAT, corpus.digest, tokenizer.digest])
    return cache_folder() / "shards" / hashlib.sha256(facts.encode()).hexdigest()[:32] / split


def open_split(folder: Path, tokenizer: Tokenizer, verified: bool = False) -> TokenSplit:
    """Map a split that is on disk.

    Args:
        folder: the split's.
        tokenizer: what the ids must belong to.
        verified: leave out the digests. Else those of files up to a gigabyte are checked, which
            takes about a second per gigabyte; `verify` checks larger ones too.

    Raises:
        DataError: files are missing or damaged, or the ids belong to another tokenizer.
    """
    manifest = _read_manifest(folder)
    if manifest["tokenizer"] != tokenizer.digest:
        raise DataError(
            f"the ids in {folder} belong to the tokenizer {manifest['tokenizer'][:12]}, not to "
            f"{tokenizer.digest[:12]}", "open them with the tokenizer of the same run")
    if not verified:
        _check(folder, manifest, limit=VERIFIED_BYTES)
    ids = np.memmap(folder / IDS, manifest["dtype"], mode="r")
    starts = np.memmap(folder / STARTS, np.int64, mode="r")
    return TokenSplit(ids, starts, *(manifest[name] for name in
                                     ("bytes", "words", "documents", "unknown")))


def verify(folder: Path) -> None:
    """Check sizes and digests of a split on disk, about a second per gigabyte.

    Raises:
        DataError: what is damaged.
    """
    _check(folder, _read_manifest(folder), limit=None)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        digest = manifest.pop("digest", None)
        # Earlier versions wrote none: those are held to be what they look like.
        if digest in (None, _manifest_digest(manifest)) and _is_manifest(manifest):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DataError(f"the shards in {folder} are damaged ({MANIFEST})", "delete that folder")


def _is_manifest(manifest: dict[str, Any]) -> bool:
    """Whether every entry is there and of its kind, and the counts are those of the files."""
    files, counts = manifest["files"], [manifest[field.name] for field in fields(_Totals)[1:]]
    sizes = {IDS: manifest["tokens"] * {"<u2": 2, "<u4": 4}[manifest["dtype"]],
             STARTS: manifest["documents"] * 8}
    return (manifest["format"] == FORMAT and files.keys() == sizes.keys()
            and len(manifest) == _ENTRIES
            and all(type(count) is int and count >= 0 for count in counts)
            and all(isinstance(manifest[name], str) for name in ("tokenizer", "corpus"))
            and all(isinstance(files[name]["sha256"], str) and files[name]["size"] == size
                    for name, size in sizes.items()))


def _manifest_digest(manifest: dict[str, Any]) -> str:
    """Of the manifest without its digest: a flipped digit of a count would go unnoticed."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check(folder: Path, manifest: dict[str, Any], limit: int | None) -> None:
    for name, facts in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size == facts["size"] and (limit is not None and size > limit):
            continue
        if size != facts["size"] or _digest(path) != facts["sha256"]:
            raise DataError(f"the shards in {folder} are damaged ({name})", "delete that folder")


def _build(corpus: Corpus, tokenizer: Tokenizer, split: str, folder: Path) -> None:
    """Write a split; goes on where a killed process stopped."""
    partial = _partial(folder)
    partial.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    totals = _resume(partial, dtype)
    task = f"tokenizing {corpus.name} ({split}, {tokenizer.kind})"
    with (Progress(task) as progress, (partial / IDS).open("ab") as ids_file,
          (partial / STARTS).open("ab") as starts_file, (partial / JOURNAL).open("ab") as journal,
          ThreadPoolExecutor(1) as reader):
        pieces = islice(corpus.pieces(split), totals.pieces, None)
        coming = reader.submit(_take, pieces)
        while chunk := coming.result():
            coming = reader.submit(_take, pieces)  # read on while the library's threads encode
            ids, starts = _encode(tokenizer, chunk, totals)
            for file, array in ((ids_file, ids.astype(dtype)), (starts_file, starts)):
                file.write(array.tobytes())
                _sync(file)
            journal.write(json.dumps(asdict(totals)).encode() + b"\n")  # last: the chunk counts
            _sync(journal)
            progress.add(sum(len(piece.text) for piece in chunk), f", {totals.tokens:,} tokens")
    files = {name: {"size": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
             for name in (IDS, STARTS)}
    counts = {name: count for name, count in asdict(totals).items() if name != "pieces"}
    manifest = {"format": FORMAT, "name": corpus.name, "split": split, "corpus": corpus.digest,
                "tokenizer": tokenizer.digest, "vocab_size": tokenizer.vocab_size,
                "dtype": dtype.str, **counts, "files": files}
    manifest["digest"] = _manifest_digest(manifest)
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    partial.replace(folder)
    (folder / JOURNAL).unlink()


def _take(pieces: Any) -> list[Piece]:
    """The next chunk of pieces; empty at the end."""
    chunk: list[Piece] = []
    characters = 0
    for piece in pieces:
        chunk.append(piece)
        characters += len(piece.text)
        if characters >= CHUNK_CHARACTERS:
            break
    return chunk


def _encode(tokenizer: Tokenizer, chunk: list[Piece], totals: _Totals
            ) -> tuple[np.ndarray, np.ndarray]:
    """The ids and document starts of a chunk; counts them."""
    encoded = tokenizer.encode_pieces(chunk)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    places = totals.tokens + np.cumsum(lengths) - lengths
    starts = places[np.fromiter((piece.starts for piece in chunk), bool, len(chunk))]
    ids = np.concatenate(encoded)
    totals.pieces += len(chunk)
    totals.tokens += len(ids)
    totals.documents += len(starts)
    totals.bytes += sum(len(piece.text.encode()) for piece in chunk)
    totals.words += sum(count_words(piece.text, piece.ends) for piece in chunk)
    if tokenizer.unknown_id is not None:
        totals.unknown += int((ids == tokenizer.unknown_id).sum())
    return ids, starts


def _resume(partial: Path, dtype: np.dtype) -> _Totals:
    """What is there of an unfinished split; cuts off what no line of the journal vouches for."""
    (partial / MANIFEST).unlink(missing_ok=True)
    totals = _Totals()
    journal = partial / JOURNAL
    kept = b""
    for line in journal.read_bytes().splitlines(keepends=True) if journal.exists() else ():
        try:
            found = _Totals(**json.loads(line))
        except (ValueError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        totals, kept = found, kept + line
    sizes = {IDS: totals.tokens * dtype.itemsize, STARTS: totals.documents * 8}
    if any(not (partial / name).exists() or (partial / name).stat().st_size < size
           for name, size in sizes.items()):
        totals, kept, sizes = _Totals(), b"", dict.fromkeys(sizes, 0)
    for name, size in {**sizes, JOURNAL: len(kept)}.items():
        with (partial / name).open("ab") as file:
            file.truncate(size)
    return totals


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _forget_if_empty(partial: Path) -> None:
    """Removes what an error left that came before the first chunk."""
    if partial.exists() and not (partial / JOURNAL).stat().st_size:
        shutil.rmtree(partial)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


