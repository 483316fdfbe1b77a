"""The text that is predicted, with the counts that its metrics are divided by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer

from hippocampus.data.documents import count_words
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.shards import TokenSplit
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import DataError


@dataclass(frozen=True, eq=False)
class HeldOutText:
    """Ids to predict: all but the first, which has nothing before it.

    Attributes:
      name: of the corpus or file.
      digest: of the corpus or file.
      split: "validation", "test" or, for a file, "text".
      tokenizer: that the ids belong to.
      ids: all of them.
      document_starts: where documents begin; None: they are read as one stream.
      n_bytes: UTF-8 bytes of the predicted text. What is not text (`<|endoftext|>` in front of a
        document) has none, and is predicted all the same.
      n_words: WikiText's count over the whole text.
      n_unknown: how many ids are `<unk>`.
    """

    name: str
    digest: str
    split: str
    tokenizer: Tokenizer
    ids: Integer[np.ndarray, " n"]
    document_starts: Int64[np.ndarray, " d"] | None
    n_bytes: int
    n_words: int
    n_unknown: int

    @property
    def predictions(self) -> int:
        """Ids with something before them."""
        return len(self.ids) - 1

    @property
    def bytes_per_token(self) -> float | None:
        """Per prediction; None for what is not a text."""
        return self.n_bytes / max(1, self.predictions)

    @property
    def words_per_token(self) -> float | None:
        """Per prediction; None for what is not a text."""
        return self.n_words / max(1, self.predictions)

    @property
    def unknown_rate(self) -> float:
        """Share of the ids that are `<unk>`."""
        return self.n_unknown / max(1, len(self.ids))

    def windows(self, context: int, stride: int, batch_size: int,
                max_windows: int = 0) -> EvaluationWindows:
        """The windows that predict the text."""
        return EvaluationWindows(self.ids, context, batch_size, max_windows, stride,
                                 self.document_starts)


def take_split(name: str, digest: str, split: str, tokens: TokenSplit, tokenizer: Tokenizer,
               packed: bool) -> HeldOutText:
    """A split of a corpus.

    Args:
      name: of the corpus.
      digest: of the corpus.
      split: "validation" or "test".
      tokens: its ids and counts.
      tokenizer: that the ids belong to.
      packed: documents are kept apart.
    """
    return HeldOutText(
        name, digest, split, tokenizer, tokens.ids, tokens.document_starts if packed else None,
        tokens.n_bytes - tokenizer.count_bytes(tokens.ids[:1]), tokens.n_words, tokens.n_unknown)


def read_text(path: Path, tokenizer: Tokenizer) -> HeldOutText:
    """A UTF-8 file as one document.

    Raises:
      DataError: missing, not UTF-8, too short, or with a character that the tokenizer lacks.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", "--text takes the path of a UTF-8 text"
                        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} at offset "
                        f"{error.start})", "convert it first, for example with iconv -t UTF-8"
                        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check the path") from None
    ids = tokenizer.encode_document(text) if text else np.zeros(0, np.int32)
    if len(ids) < 2:
        raise DataError(f"{path} has {len(ids)} tokens", "a prediction needs 2: use a longer text")
    unknown = 0 if tokenizer.unknown_id is None else int((ids == tokenizer.unknown_id).sum())
    return HeldOutText(path.name, hashlib.sha256(content).hexdigest(), "text", tokenizer, ids, None,
                       len(content) - tokenizer.count_bytes(ids[:1]), count_words(text), unknown)
