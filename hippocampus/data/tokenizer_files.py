"""What the tokenizers are for the `tokenizers` library: `library_bytes`, `library_words`, ….

Each of our kinds is a valid `tokenizer.json`; `kind_of` recognises one that is exactly what we
build, whoever wrote it.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
END_OF_TEXT = "<|endoftext|>"
MIN_PAIR_COUNT = 2


def library_bytes() -> LibraryTokenizer:
    """One id for each byte, which is its value."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    return _library(
        models.BPE(vocab=vocabulary, merges=[]),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )


def library_characters(vocabulary: dict[str, int]) -> LibraryTokenizer:
    """One id for each character."""
    return _library(
        models.WordLevel(vocabulary),
        # A dot would let line ends through uncut.
        pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"),
        decoders.Fuse(),
    )


def library_words(vocabulary: dict[str, int]) -> LibraryTokenizer:
    """One id for each word between white space; a line end is `<eos>`, an unknown word `<unk>`.

    Decoded, every word has a space before it and `<eos>` is a line end, as in WikiText's files.
    """
    library = _library(
        models.WordLevel(vocabulary, unk_token=UNKNOWN),
        pre_tokenizers.WhitespaceSplit(),
        decoders.Sequence([
            decoders.Replace(Regex(f"^(?!{END_OF_LINE}$)"), " "),
            decoders.Replace(END_OF_LINE, "\n"),
            decoders.Fuse(),
        ]),
    )
    library.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
    return library


def library_ids(vocab_size: int) -> LibraryTokenizer:
    """Every id is the word that is its number; decoded, with a space between two."""
    library = LibraryTokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def library_bpe() -> LibraryTokenizer:
    """Byte-level BPE with GPT-2's pre-tokenizer, to be trained."""
    return _library(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        decoders.ByteLevel(),
    )


def bpe_trainer(vocab_size: int, show_progress: bool) -> trainers.BpeTrainer:
    """Merges pairs that occur at least twice; `<|endoftext|>` is id 0, then come the bytes."""
    return trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(_byte_alphabet()),
        show_progress=show_progress,
    )


def kind_of(library: LibraryTokenizer) -> str:
    """The name in `hippocampus.config.TOKENIZERS` of what we build, else `"other"`."""
    # Compared after the library has read both, because a version may add fields of its own.
    # One different part (a normalizer, another unknown token) and the numpy path would be
    # wrong, so a family likeness is not enough.
    same, vocabulary = library.to_str(), library.get_vocab(with_added_tokens=True)
    if same == library_bytes().to_str():
        return "bytes"
    if (
        vocabulary
        and all(len(token) == 1 for token in vocabulary)
        and same == library_characters(vocabulary).to_str()
    ):
        return "characters"
    if {UNKNOWN, END_OF_LINE} <= vocabulary.keys() and (
        same == library_words(vocabulary).to_str()
    ):
        return "words"
    if same == library_ids(len(vocabulary)).to_str():
        return "ids"
    empty = library_bpe()
    empty.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    if _frame(same) == _frame(empty.to_str()) and set(_byte_alphabet()) <= vocabulary.keys():
        return "bpe"
    return "other"


def _frame(document: str) -> Any:
    """A tokenizer.json without what it learned."""
    content = json.loads(document)
    for learned in ("vocab", "merges"):
        content["model"].pop(learned, None)
    return content


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
