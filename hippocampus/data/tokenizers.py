"""Text to ids and back: `build_tokenizer`, `Tokenizer`.

Whatever its kind, a tokenizer is a valid Hugging Face `tokenizer.json`, so that any tool can read
what a run leaves behind. Bytes and characters, which need no library to encode, take a numpy
path that is more than a hundred times faster and gives the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from hippocampus.errors import ConfigError, DataError
from hippocampus.files import write_atomically


def build_tokenizer(kind: str, text: str) -> Tokenizer:
    """Build a tokenizer for a text.

    Args:
        kind: `"bytes"` (256 ids, the id of a byte is its value) or `"characters"` (one id for
            each distinct character of the text, in code point order).
        text: what the vocabulary is taken from; `bytes` does not look at it.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: the kind is unknown.
        DataError: the text has no characters, or one that UTF-8 cannot express.
    """
    if kind == "bytes":
        library = _library_bytes()
    elif kind == "characters":
        _utf8(text)
        if not text:
            raise DataError(
                "an empty text has no characters to build a vocabulary from",
                "use a text, or --config.data.tokenizer=bytes",
            )
        library = _library_characters({c: i for i, c in enumerate(sorted(set(text)))})
    else:
        raise ConfigError(f"data.tokenizer: {kind!r} is not one of: bytes, characters")
    return Tokenizer(library.to_str(pretty=True))


class Tokenizer:
    """A Hugging Face tokenizer with numpy ids in and out."""

    def __init__(self, document: str):
        """Make a tokenizer from its JSON.

        Args:
            document: the text of a `tokenizer.json`.

        Raises:
            DataError: the text is not one that the `tokenizers` library reads.
        """
        try:
            self._library = LibraryTokenizer.from_str(document)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"not a valid tokenizer.json: {error}") from None
        self._document = document
        self._vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: the file.

        Returns:
            The tokenizer.

        Raises:
            DataError: the file is missing, unreadable or not a tokenizer.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"there is no tokenizer at {path}", "a run folder keeps its own tokenizer.json"
            ) from None
        except OSError as error:
            raise DataError(f"the tokenizer {path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, DataError) as error:
            raise DataError(
                f"the tokenizer {path} is damaged: {error}",
                "restore it from a copy, or from the run that it belongs to",
            ) from None

    def save(self, path: str | Path) -> None:
        """Write the `tokenizer.json`, all of it or nothing.

        Args:
            path: the file to make or to replace.

        Raises:
            OSError: the folder cannot be written to.
        """
        write_atomically(Path(path), self._document.encode())

    def to_json(self) -> str:
        """Return the text of the `tokenizer.json`, unchanged since it was built or loaded."""
        return self._document

    @cached_property
    def digest(self) -> str:
        """The sha256 of the JSON, whatever its spacing and the order of its keys."""
        canonical = json.dumps(json.loads(self._document), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @cached_property
    def kind(self) -> str:
        """`"bytes"` or `"characters"` where it is exactly what we build, else `"other"`."""
        # Compared after the library has read both, because a version may add fields of its own.
        # One different part (a normalizer, another unknown token) and the numpy path would be
        # wrong, so a family likeness is not enough.
        same = self._library.to_str()
        if same == _library_bytes().to_str():
            return "bytes"
        if (
            self._vocabulary
            and all(len(token) == 1 for token in self._vocabulary)
            and same == _library_characters(self._vocabulary).to_str()
        ):
            return "characters"
        return "other"

    @cached_property
    def vocab_size(self) -> int:
        """How many ids a model has to know: the highest id plus one."""
        return max(self._vocabulary.values(), default=-1) + 1

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Turn a text into ids, adding no special tokens.

        Args:
            text: any text.

        Returns:
            ids: int32[T].

        Raises:
            DataError: the text has a character that the vocabulary lacks or UTF-8 cannot express.
        """
        if self.kind == "bytes":
            return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)
        if self.kind == "characters":
            return self._encode_characters(text)
        _utf8(text)
        return np.asarray(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Turn ids into a text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: integers [T], each below `vocab_size`.

        Returns:
            The text.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        array = np.asarray(ids, np.int64).reshape(-1)
        outside = (array < 0) | (array >= self.vocab_size)
        if outside.any():  # the library would leave it out without a word
            raise DataError(
                f"id {array[outside][0]} is outside the vocabulary of {self.vocab_size} ids",
                "is this the tokenizer that the model was trained with?",
            )
        text: str = self._library.decode(array.tolist(), skip_special_tokens=False)
        return text

    def count_bytes(self, ids: np.ndarray) -> int:
        """How many UTF-8 bytes of text the ids stand for."""
        return len(ids) if self.kind == "bytes" else len(self.decode(ids).encode())

    def _encode_characters(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        table = self._id_of_code_point
        ids = table[np.minimum(codes, len(table) - 1)]
        if (unknown := ids < 0).any():
            position = int(unknown.argmax())
            raise DataError(
                f"the character {text[position]!r} at position {position} is not in the vocabulary",
                f"this tokenizer knows {self.vocab_size} characters: remove it from the text, or "
                "train with --config.data.tokenizer=bytes",
            )
        return ids

    @cached_property
    def _id_of_code_point(self) -> np.ndarray:
        """Ids by code point, -1 where there is none; the last entry stands for all above it."""
        table = np.full(max(map(ord, self._vocabulary)) + 2, -1, np.int32)
        for character, index in self._vocabulary.items():
            table[ord(character)] = index
        return table


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate, {text[error.start]!r}, at position {error.start}",
            "it was not read as UTF-8",
        ) from None


def _library_bytes() -> LibraryTokenizer:
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    return _library(
        models.BPE(vocab=vocabulary, merges=[]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )


def _library_characters(vocabulary: dict[str, int]) -> LibraryTokenizer:
    return _library(
        models.WordLevel(vocabulary),
        # A dot would let line ends through uncut.
        pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
        decoders.Fuse(),
    )


def _library(
    model: models.Model, splitter: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder
) -> LibraryTokenizer:
    library = LibraryTokenizer(model)
    library.pre_tokenizer = splitter
    library.decoder = decoder
    return library


def _byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in GPT-2's byte-level alphabet.

    A printable Latin-1 byte stands for itself; the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet, spare = [], 0x100
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return alphabet
