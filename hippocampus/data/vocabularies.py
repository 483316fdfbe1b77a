"""Tokenizers made from a corpus: `build_tokenizer`, `bpe_shortfall`.

What was learned is kept in `$HIPPOCAMPUS_CACHE/tokenizers`, under a hash of the corpus and the
settings.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers

from hippocampus.config import DataConfig
from hippocampus.data.cache import cache_folder, locked
from hippocampus.data.corpora import Corpus
from hippocampus.data.progress import Progress
from hippocampus.data.tokenizer_files import (
    END_OF_LINE,
    UNKNOWN,
    bpe_trainer,
    library_bpe,
    library_words,
)
from hippocampus.data.tokenizers import Tokenizer, byte_tokenizer, character_tokenizer
from hippocampus.errors import DataError
from hippocampus.files import expand, write_atomically

FORMAT = 1
DEFAULT_BPE_SIZE = 32_768


def build_tokenizer(data: DataConfig, corpus: Corpus) -> Tokenizer:
    """Build the tokenizer that a config asks for, or take it from the cache.

    `bytes`: the id of a byte is its value. `characters`: one id for each distinct character of
    all splits, in code point order. `words`, as in WikiText: words stand between white space,
    every line ends with `<eos>`, and a word that is not among the `data.vocab_size` most frequent
    of the training split is `<unk>` (id 0; `<eos>` is 1; then by falling frequency, equally
    frequent ones in code point order). `bpe`: byte-level BPE with GPT-2's pre-tokenizer, learned
    from the training split. Words and BPE learn from at most the first
    `data.tokenizer_megabytes`, streaming.

    Args:
        data: `tokenizer`, `vocab_size` and `tokenizer_megabytes`.
        corpus: what is learned from.

    Returns:
        The tokenizer.

    Raises:
        DataError: the corpus is unusable, or a tokenizer.json is missing or damaged.
    """
    if data.tokenizer == "bytes":
        return byte_tokenizer()
    if data.tokenizer not in ("characters", "words", "bpe"):
        return Tokenizer.load(expand(data.tokenizer))
    path = cache_folder() / "tokenizers" / f"{_key(data, corpus)}.json"
    with locked(path):
        try:
            return Tokenizer(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, DataError):
            pass  # not there, or damaged: it is made again
        tokenizer = _learn(data, corpus)
        write_atomically(path, tokenizer.to_json())
    return tokenizer


def bpe_shortfall(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Say in one line that BPE found fewer pairs than it was asked for; "" where it did not."""
    asked = data.vocab_size or DEFAULT_BPE_SIZE
    if data.tokenizer != "bpe" or tokenizer.vocab_size >= asked:
        return ""
    return (f"note: BPE stopped at {tokenizer.vocab_size:,} of {asked:,} ids: no other pair occurs "
            f"twice; the model has {tokenizer.vocab_size:,}")


def _key(data: DataConfig, corpus: Corpus) -> str:
    facts = [FORMAT, corpus.digest, data.tokenizer]
    if data.tokenizer != "characters":
        facts += [_size(data), data.tokenizer_megabytes]
    if data.tokenizer == "bpe":  # its ties may be broken otherwise in another version
        facts.append(tokenizers.__version__)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _size(data: DataConfig) -> int:
    return data.vocab_size or (DEFAULT_BPE_SIZE if data.tokenizer == "bpe" else 0)


def _learn(data: DataConfig, corpus: Corpus) -> Tokenizer:
    # The library draws bars of its own.
    live = data.tokenizer != "bpe"
    with Progress(f"learning {data.tokenizer} of {corpus.name}", live) as progress:
        if data.tokenizer == "characters":
            found: set[str] = set()
            for split in corpus.splits:
                for text in progress.watch(piece.text for piece in corpus.pieces(split)):
                    found.update(text)
            return character_tokenizer(found)
        texts = progress.watch(_beginning(corpus, data.tokenizer_megabytes))
        if data.tokenizer == "words":
            return _learn_words(texts, data.vocab_size)
        library = library_bpe()
        library.train_from_iterator(texts, bpe_trainer(_size(data), sys.stderr.isatty()))
        return Tokenizer(library.to_str(pretty=True))


def _learn_words(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    for word in (UNKNOWN, END_OF_LINE):
        counts.pop(word, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    kept = ranked[: vocab_size - 2] if vocab_size else ranked
    vocabulary = {word: i for i, word in enumerate((UNKNOWN, END_OF_LINE, *kept))}
    return Tokenizer(library_words(vocabulary).to_str())


def _beginning(corpus: Corpus, megabytes: int) -> Iterator[str]:
    """The training split, piece by piece, until so much of it has passed."""
    left = megabytes * 10**6
    for piece in corpus.pieces("train"):
        yield piece.text
        left -= len(piece.text.encode())
        if left <= 0:
            return
