"""Tokenizers of pretrained decoders: ids as their makers count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as LibraryTokenizer

from hippocampus.data.tokenizers import Tokenizer


class HubTokenizer(Tokenizer):
    """A tokenizer.json that puts its own first token in front of a text, and may end in several."""

    def __init__(self, document: str, end_ids: Sequence[int] = ()):
        """Make a tokenizer from its JSON.

        Args:
            document: the text of a `tokenizer.json`.
            end_ids: the ids that end a text; empty: `<|endoftext|>` where there is one.

        Raises:
            DataError: the text is not one that the `tokenizers` library reads.
        """
        super().__init__(document)
        self._end_ids = tuple(end_ids)

    @classmethod
    def load(cls, path: str | Path, end_ids: Sequence[int] = ()) -> HubTokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: the file.
            end_ids: as for the class.

        Raises:
            DataError: the file is missing, unreadable or not a tokenizer.
        """
        found = super().load(path)
        assert isinstance(found, HubTokenizer)
        found._end_ids = tuple(end_ids)
        return found

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return self._end_ids or super().end_ids

    @cached_property
    def begin_id(self) -> int | None:
        """The id that the tokenizer puts in front of a text; None if it does not."""
        ids = self._library.encode("", add_special_tokens=True).ids
        return int(ids[0]) if ids else None

    def encode(self, text: str) -> Int32[np.ndarray, " T"]:
        """Turn a text into ids, with the first token in front unless the text begins with it.

        Args:
            text: any text; special tokens in it, as a chat template writes them, are read as such.

        Returns:
            ids: int32[T].

        Raises:
            DataError: the text has a character that UTF-8 cannot express.
        """
        ids = super().encode(text)
        if self.begin_id is None or (len(ids) and ids[0] == self.begin_id):
            return ids
        return np.concatenate((np.array([self.begin_id], np.int32), ids))

    def special_tokens(self) -> dict[str, str]:
        """What a chat template calls bos_token and eos_token, as far as they are known."""
        named = {"bos_token": self.begin_id, "eos_token": next(iter(self.end_ids), None)}
        return {name: str(self._library.id_to_token(index)) for name, index in named.items()
                if index is not None}


def scored_pieces(pieces: Sequence[str], scores: Sequence[float], specials: Mapping[int, str], *,
                  space: str, add_begin: int | None, unknown: int = 0,
                  first_space: bool = True) -> str:
    """The tokenizer.json of a SentencePiece BPE that is known by its pieces and their scores.

    Of all pairs of pieces that make a piece, the one of the highest score is merged first.

    Args:
        pieces: by id; bytes as `<0x0A>`.
        scores: of the pieces.
        specials: id -> text of the special tokens.
        space: the character that stands for a space in the pieces.
        add_begin: the special id that comes in front of every text; None = none does.
        unknown: the id of what nothing stands for.
        first_space: whether a space is put in front of every text.

    Source: Kudo & Richardson 2018 (arXiv:1808.06226), section 3.
    """
    texts = [specials.get(i, piece) for i, piece in enumerate(pieces)]
    vocabulary: dict[str, int] = {}
    for i, text in enumerate(texts):
        vocabulary.setdefault(text, i)
    ranked = sorted((i for i in vocabulary.values() if i not in specials),
                    key=lambda i: (-scores[i], i))
    merges = [(text[:cut], text[cut:]) for text in (texts[i] for i in ranked)
              for cut in range(1, len(text))
              if text[:cut] in vocabulary and text[cut:] in vocabulary]
    library = LibraryTokenizer(models.BPE(
        vocab=vocabulary, merges=merges, unk_token=texts[unknown], byte_fallback=True,
        fuse_unk=True))
    before: list[Any] = [normalizers.Prepend(space)] if first_space else []
    library.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", space)])
    behind: list[Any] = [decoders.Strip(" ", 1, 0)] if first_space else []
    library.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *behind])
    library.add_special_tokens([AddedToken(text, special=True, normalized=False)
                                for text in specials.values()])
    if add_begin is not None:
        begin = specials[add_begin]
        library.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, add_begin)])
    return str(library.to_str())
