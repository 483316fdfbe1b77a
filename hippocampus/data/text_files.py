"""Local UTF-8 text files, read in blocks: `scan`, `read`, `lines`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hippocampus.errors import DataError

BLOCK_BYTES = 2**22

Stamp = tuple[int, int, int]
"""What tells a file from itself after a change: inode, size, time of the last change."""


@dataclass(frozen=True)
class TextFile:
    """What one pass over a file finds.

    Attributes:
        path: where it is.
        sha256: hex digest of its bytes.
        n_characters: how many characters it has.
        stamp: of the file that was scanned.
    """

    path: Path
    sha256: str
    n_characters: int
    stamp: Stamp


def scan(path: Path, known: str = "", field: str = "data.corpus") -> TextFile:
    """Read a file once, to see that it is text (about a second per gigabyte).

    Args:
        path: the file.
        known: what could be named instead, for the hint.
        field: the field that named it, for the message.

    Returns:
        Its digest and length.

    Raises:
        DataError: it is missing, unreadable, blank, or not UTF-8.
    """
    digest, characters, blank = hashlib.sha256(), 0, True
    stamp = _stamp(os.stat(path)) if path.exists() else (0, 0, 0)
    for text in read(path, known=known, field=field, stamp=stamp):
        digest.update(text.encode())
        characters += len(text)
        blank = blank and not text.strip()
    if blank:
        raise DataError(f"{field}: {path} is empty", "name a file with text in it")
    return TextFile(path, digest.hexdigest(), characters, stamp)


def read(
    path: Path,
    first: int = 0,
    last: int | None = None,
    known: str = "",
    field: str = "data.corpus",
    stamp: Stamp | None = None,
) -> Iterator[str]:
    """Yield the characters first .. last - 1 of a file, block by block, line ends as they are.

    Raises:
        DataError: the file is missing, unreadable, not UTF-8, or not the one of the stamp any more.
    """
    place = 0
    for text in _decoded(path, known, field, stamp):
        if last is not None and place >= last:
            return
        end = None if last is None else last - place
        if kept := text[max(0, first - place) : end]:
            yield kept
        place += len(text)


def lines(path: Path, stamp: Stamp | None = None) -> Iterator[str]:
    """Yield the lines of a file, each with its line end."""
    rest = ""
    for text in read(path, stamp=stamp):
        parts = (rest + text).split("\n")  # splitlines would also split at U+2028 and others
        rest = parts.pop()
        for part in parts:
            yield part + "\n"
    if rest:
        yield rest


def _decoded(path: Path, known: str, field: str, stamp: Stamp | None) -> Iterator[str]:
    """Decode without translating line ends: the digest is that of the file."""
    carry, offset = b"", 0
    for block in _blocks(path, known, field, stamp):
        content = carry + block
        try:
            text, carry = content.decode("utf-8"), b""
            bad = -1
        except UnicodeDecodeError as error:
            text, bad = content[: error.start].decode("utf-8"), error.start
            carry = content[bad:]
        if (nul := text.find("\0")) >= 0:
            bad = len(text[:nul].encode())
        # Up to three bytes may be the beginning of a character that the next block ends.
        elif bad >= 0 and block and len(carry) < 4 and _is_prefix(carry):
            bad = -1
        if bad >= 0:
            raise DataError(
                f"{field}: {path} is not UTF-8 text "
                f"(byte 0x{content[bad]:02x} at offset {offset + bad})",
                "convert it first, for example with iconv -t UTF-8",
            )
        offset += len(content) - len(carry)
        if text:
            yield text


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _is_prefix(content: bytes) -> bool:
    """Whether bytes that do not decode could be the beginning of a character."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _blocks(path: Path, known: str, field: str, stamp: Stamp | None) -> Iterator[bytes]:
    """The bytes of a file; the last block is empty."""
    try:
        with path.open("rb") as file:
            more = True
            while more:
                block = file.read(BLOCK_BYTES)
                # Behind the read: a block that is passed on is of the file that was scanned.
                if stamp and _stamp(os.fstat(file.fileno())) != stamp:
                    raise DataError(f"{field}: {path} changed while it was read",
                                    "wait until it is complete, then start the same command again")
                yield block
                more = bool(block)
    except FileNotFoundError:
        hint = f"check the path, or use one of: {known}" if known else "check the path"
        raise DataError(f"{field}: there is no file {path}", hint) from None
    except IsADirectoryError:
        raise DataError(f"{field}: {path} is a directory", "name a file inside it") from None
    except OSError as error:
        raise DataError(
            f"{field}: {path} cannot be read: {error.strerror}", "check its permissions"
        ) from None
