"""Text to ids and back: `Tokenizer`, `byte_tokenizer`, `character_tokenizer`, `id_tokenizer`.

Whatever its kind, a tokenizer is a valid Hugging Face `tokenizer.json`, so that any tool can read
what a run leaves behind. Bytes, characters and words, which need no library to encode, take a
numpy path that is faster and gives the same ids. `hippocampus.data.vocabularies` learns words and
BPE from a corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import repeat
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer as LibraryTokenizer

from hippocampus.data.documents import Piece, cut
from hippocampus.data.tokenizer_files import (
    END_OF_LINE,
    END_OF_TEXT,
    UNKNOWN,
    kind_of,
    library_bytes,
    library_characters,
    library_ids,
)
from hippocampus.errors import DataError
from hippocampus.files import write_atomically

LARGEST_VOCABULARY = 2**24
"""Ids that a model can have (`model.vocab_size`)."""

# White space to Python alone: the library would not split there.
_SEPARATORS = re.compile("[\x1c-\x1f]")


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer of 256 ids in which the id of a byte is its value."""
    return Tokenizer(library_bytes().to_str(pretty=True))


def character_tokenizer(characters: Iterable[str]) -> Tokenizer:
    """Build the tokenizer with one id for each distinct character, in code point order.

    Args:
        characters: a text, or its characters in any order.

    Raises:
        DataError: there are none, or one that UTF-8 cannot express.
    """
    distinct = sorted(set(characters))
    if not distinct:
        raise DataError(
            "an empty text has no characters to build a vocabulary from",
            "use a text, or --config.data.tokenizer=bytes",
        )
    _utf8("".join(distinct))
    library = library_characters({c: i for i, c in enumerate(distinct)})
    return Tokenizer(library.to_str(pretty=True))


def id_tokenizer(vocab_size: int) -> Tokenizer:
    """Build the tokenizer whose words are the ids themselves: "5" is id 5.

    Args:
        vocab_size: how many there are, from 0.
    """
    return Tokenizer(library_ids(vocab_size).to_str())


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
            self._library = _whole_texts(LibraryTokenizer.from_str(document))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"not a valid tokenizer.json: {error}") from None
        self._document = document
        self._vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        if not 0 < self.vocab_size <= LARGEST_VOCABULARY:
            raise DataError(f"not a usable tokenizer.json: its ids go up to {self.vocab_size - 1:,}"
                            if self._vocabulary else "not a usable tokenizer.json: it has no tokens"
                            )

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
        """The name in `hippocampus.config.TOKENIZERS` of what is exactly as we build it.

        Any other is `"other"`.
        """
        return kind_of(self._library)

    @cached_property
    def end_id(self) -> int | None:
        """The id of `<|endoftext|>`, which stands in front of every document; None without one."""
        return self._vocabulary.get(END_OF_TEXT)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text which a model writes."""
        return () if self.end_id is None else (self.end_id,)

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that every word outside the vocabulary gets; None for other kinds than words."""
        return self._vocabulary[UNKNOWN] if self.kind == "words" else None

    @cached_property
    def vocab_size(self) -> int:
        """How many ids a model has to know: the highest id plus one."""
        return max(self._vocabulary.values(), default=-1) + 1

    def ids_with(self, character: str) -> tuple[int, ...]:
        """The ids whose text has a character of ASCII, those that stand for its byte included."""
        byte = f"<0x{ord(character):02X}>"
        return tuple(sorted(index for token, index in self._vocabulary.items()
                            if character in token or token == byte))

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Turn a text into ids, adding no special tokens.

        Args:
            text: any text.

        Returns:
            ids: int32[T].

        Raises:
            DataError: the text has a character that the vocabulary lacks or UTF-8 cannot express.
        """
        encoded = self._encode_directly(text)
        if encoded is None:
            _utf8(text)
            with _library_errors():
                ids = self._library.encode(text, add_special_tokens=False).ids
            return np.asarray(ids, np.int32)
        return encoded

    def encode_document(self, text: str) -> Int32[np.ndarray, " T"]:
        """Turn a whole document into ids, as training reads it.

        Args:
            text: the document.

        Returns:
            ids: int32[T]. Other than from `encode`, `<|endoftext|>` comes first where there is
            one, and with words a last line without a line end has its `<eos>` too.

        Raises:
            DataError: as `encode`.
        """
        return np.concatenate(self.encode_pieces(list(cut([(True, text)]))))

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Turn pieces of documents into ids, with all cores where the library does it.

        What looks like a special token in the text of a document is text.

        Args:
            pieces: from `Corpus.pieces`.

        Returns:
            int32 ids of each; those of all pieces of a document, put together, are the document's.

        Raises:
            DataError: as `encode`.
        """
        if self.kind in ("bytes", "characters"):
            encoded = [self.encode(piece.text) for piece in pieces]
        elif self.kind == "words":
            encoded = [self.encode(piece.text + "\n" if self._lacks_line_end(piece) else piece.text)
                       for piece in pieces]
        else:
            with _library_errors():
                batch = self._plain_library.encode_batch_fast(
                    [piece.text for piece in pieces], add_special_tokens=False)
            encoded = [np.array(one.ids, np.int32) for one in batch]
        if self.end_id is None:
            return encoded
        marker = np.array([self.end_id], np.int32)
        return [np.concatenate((marker, ids)) if piece.starts else ids
                for piece, ids in zip(pieces, encoded, strict=True)]

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
        """How many UTF-8 bytes of text the ids stand for; `<|endoftext|>` for none."""
        if self.kind == "bytes":
            return len(ids)
        ids = np.asarray(ids)
        return len(self.decode(ids if self.end_id is None else ids[ids != self.end_id]).encode())

    def _encode_directly(self, text: str) -> np.ndarray | None:
        """Ids without the library, for the kinds that can do so."""
        if self.kind == "bytes":
            return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)
        if self.kind == "characters":
            return self._encode_characters(text)
        if self.kind == "words" and not _SEPARATORS.search(text):
            return self._encode_words(text)
        if self.kind == "ids" and not _SEPARATORS.search(text):
            return self._encode_ids(text)
        return None

    def _encode_ids(self, text: str) -> np.ndarray:
        words = text.split()
        ids = np.fromiter(map(self._vocabulary.get, words, repeat(-1)), np.int32, len(words))
        if (ids < 0).any():
            raise DataError(
                f"the word {words[int((ids < 0).argmax())][:60]!r} is not in the vocabulary",
                f"its words are the numbers from 0 to {self.vocab_size - 1}")
        return ids

    def _encode_words(self, text: str) -> np.ndarray:
        """Split as the library does: at white space, every line end being a word."""
        words = text.replace("\n", f" {END_OF_LINE} ").split()
        ids = map(self._vocabulary.get, words, repeat(self._vocabulary[UNKNOWN]))
        return np.fromiter(ids, np.int32, len(words))

    @staticmethod
    def _lacks_line_end(piece: Piece) -> bool:
        return piece.ends and not piece.text.endswith("\n")

    @cached_property
    def _plain_library(self) -> LibraryTokenizer:
        """A second one, for texts that may quote special tokens."""
        library = _whole_texts(LibraryTokenizer.from_str(self._document))
        library.encode_special_tokens = True
        return library

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


def _whole_texts(library: LibraryTokenizer) -> LibraryTokenizer:
    """Without the cut and the padding that a tokenizer.json may ask for: all of a text counts."""
    library.no_truncation()
    library.no_padding()
    return library


@contextlib.contextmanager
def _library_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"the tokenizer cannot read the text: {error}",
                        "is its tokenizer.json damaged?") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate, {text[error.start]!r}, at position {error.start}",
            "it was not read as UTF-8",
        ) from None
