"""The text of a run, as ids, with the n-gram lines that a model has to beat."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from hippocampus.config import Config
from hippocampus.data.batches import EvaluationWindows, ShuffledWindows
from hippocampus.data.corpora import Corpus, load_corpus
from hippocampus.data.tokenizers import Tokenizer, build_tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.ngrams import ngram_lines
from hippocampus.runs.run_folder import RunFolder


@dataclass(frozen=True)
class TrainingData:
    """One corpus, tokenized.

    Attributes:
      corpus: the texts.
      tokenizer: what the ids belong to.
      train_ids, validation_ids: 1-D.
      bytes_per_token: of the predicted validation text.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    train_ids: np.ndarray
    validation_ids: np.ndarray
    bytes_per_token: float

    def batches(self, config: Config) -> ShuffledWindows:
        """Training batches, a pure function of (seed, step)."""
        return ShuffledWindows(self.train_ids, config.data.context, config.train.batch_size,
                               config.train.seed)

    def windows(self, config: Config, max_windows: int) -> EvaluationWindows:
        """Validation windows."""
        return EvaluationWindows(self.validation_ids, config.data.context,
                                 config.eval.batch_size, max_windows)

    def lines(self) -> dict[str, float]:
        """Nats per token of the uniform, unigram, bigram and trigram models."""
        return ngram_lines(self.train_ids, self.validation_ids, self.tokenizer.vocab_size)

    def record(self) -> str:
        """What the run folder keeps to recognise the text by."""
        return json.dumps({
            "corpus": self.corpus.name, "sha256": self.corpus.sha256,
            "tokenizer": self.tokenizer.digest, "train_tokens": len(self.train_ids),
            "validation_tokens": len(self.validation_ids)}, indent=2) + "\n"

    def check_same_as(self, folder: RunFolder) -> None:
        """Refuses to go on with a run on another text or tokenizer.

        Raises:
          ConfigError: what differs.
      DataError: data.json is missing or damaged.
        """
        try:
            saved = json.loads(folder.data.read_text("utf-8"))
        except (OSError, ValueError):
            raise DataError(f"cannot read {folder.data}, which says what the run was trained on",
                            "restore it from a copy, or choose another --workdir") from None
        now = json.loads(self.record())
        for field, what in (("sha256", "text"), ("tokenizer", "tokenizer")):
            before, after = str(saved.get(field))[:12], now[field][:12]
            if saved.get(field) != now[field]:
                raise ConfigError(
                    f"{folder.path} was trained on another {what} ({before}… then, {after}… now)",
                    "choose another --workdir (the pydoc corpus follows the version of Python)")


def read_data(config: Config) -> TrainingData:
    """Reads and tokenizes the corpus.

    Raises:
      DataError: missing, empty, binary, or shorter than a window; or it lacks a character of
        `sample.prompt`.
    """
    corpus = load_corpus(config.data.corpus)
    tokenizer = build_tokenizer(config.data.tokenizer, corpus.train + corpus.validation)
    train_ids, validation_ids = map(tokenizer.encode, (corpus.train, corpus.validation))
    data = TrainingData(
        corpus, tokenizer, train_ids, validation_ids,
        tokenizer.count_bytes(validation_ids[1:]) / max(1, len(validation_ids) - 1))
    if not len(tokenizer.encode(config.sample.prompt)):
        raise ConfigError("sample.prompt is empty", "give at least one character")
    data.batches(config)  # refuses a text shorter than a window
    data.windows(config, 0)
    return data
