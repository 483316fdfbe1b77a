"""The text of a run, as ids, with the n-gram lines that a model has to beat."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hippocampus.config import Config
from hippocampus.data.batches import ShuffledWindows, Streams
from hippocampus.data.corpora import Corpus, open_corpus
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.shards import TokenSplit, token_split
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.data.vocabularies import bpe_shortfall, build_tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.held_out import HeldOutText, take_split
from hippocampus.evaluation.ngrams import ngram_lines
from hippocampus.evaluation.report import Windows
from hippocampus.files import write_atomically
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training.resume import check_same_data


@dataclass(frozen=True)
class TrainingData:
    """One corpus, tokenized.

    Attributes:
      corpus: the texts.
      tokenizer: what the ids belong to.
      train, validation: the splits as ids.
      note: what a person should know of how the tokenizer came out; "" if nothing.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenSplit
    validation: TokenSplit
    note: str = ""

    @cached_property
    def test(self) -> TokenSplit | None:
        """The test split, tokenized when it is first asked for; None where there is none."""
        if "test" not in self.corpus.splits:
            return None
        return token_split(self.corpus, self.tokenizer, "test")

    @property
    def train_ids(self) -> np.ndarray:
        """Training ids, 1-D."""
        return self.train.ids

    @property
    def validation_ids(self) -> np.ndarray:
        """Validation ids, 1-D."""
        return self.validation.ids

    @property
    def bytes_per_token(self) -> float:
        """Of the predicted validation text, which is all but its first token."""
        return self.held_out(packed=False).bytes_per_token

    @property
    def words_per_token(self) -> float:
        """Of the predicted validation text, see `hippocampus.evaluation.metrics`."""
        return self.held_out(packed=False).words_per_token

    def held_out(self, packed: bool) -> HeldOutText:
        """The validation split as it is evaluated, its documents kept apart if `packed`."""
        return take_split(self.corpus.name, self.corpus.digest, "validation", self.validation,
                          self.tokenizer, packed)

    def batches(self, config: Config) -> ShuffledWindows | Streams:
        """Training batches, a pure function of (seed, step)."""
        kind = Streams if config.data.order == "streams" else ShuffledWindows
        packed = config.data.documents == "packed"
        return kind(self.train.ids, config.data.context, config.train.batch_size,
                    config.train.seed, self.train.document_starts if packed else None,
                    self.tokenizer.end_id is not None)

    def windows(self, config: Config, max_windows: int) -> EvaluationWindows:
        """Validation windows."""
        cut = Windows.of(config)
        text = self.held_out(config.data.documents == "packed")
        return text.windows(cut.context, cut.stride, cut.batch_size, max_windows)

    def lines(self) -> dict[str, float]:
        """Nats per token of the uniform, unigram, bigram and trigram models."""
        return ngram_lines(self.train.ids, self.validation.ids, self.tokenizer.vocab_size)

    def record(self) -> str:
        """What the run folder keeps to recognise the text by."""
        return json.dumps({
            "corpus": self.corpus.name, "sha256": self.corpus.digest,
            "tokenizer": self.tokenizer.digest, "train_tokens": len(self.train.ids),
            "train_bytes": self.train.n_bytes, "validation_tokens": len(self.validation.ids),
            "validation_bytes": self.validation.n_bytes,
            "validation_words": self.validation.n_words,
            "validation_unknown": self.validation.n_unknown}, indent=2) + "\n"

    def check_same_as(self, folder: RunFolder, allowed: Collection[str] = ()) -> list[str]:
        """Refuses to go on with a run on another text or tokenizer.

        Args:
          folder: of the run.
          allowed: what may differ all the same, see `hippocampus.training.resume`.

        Returns:
          A line for each difference that was allowed.

        Raises:
          ConfigError: what differs.
          DataError: data.json is missing or damaged.
        """
        try:
            saved = json.loads(folder.data.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            raise DataError(f"cannot read {folder.data}, which says what the run was trained on",
                            "restore it from a copy, or choose another --workdir") from None
        return check_same_data(folder, saved, json.loads(self.record()), allowed)

    def save(self, folder: RunFolder) -> None:
        """Writes what a run folder keeps of its text: the tokenizer, and what it is known by."""
        self.tokenizer.save(folder.tokenizer)
        write_atomically(folder.data, self.record())


def read_data(config: Config) -> TrainingData:
    """Reads and tokenizes the corpus, or finds it tokenized in the cache.

    Raises:
      DataError: missing, empty, binary, or shorter than a window; or it lacks a character of
        `sample.prompt`.
    """
    corpus = open_corpus(config.data)
    tokenizer = build_tokenizer(config.data, corpus)
    if not len(tokenizer.encode(config.sample.prompt)):
        raise ConfigError("sample.prompt is empty", "give at least one character")
    data = TrainingData(corpus, tokenizer, token_split(corpus, tokenizer, "train"),
                        token_split(corpus, tokenizer, "validation"),
                        bpe_shortfall(config.data, tokenizer))
    data.batches(config)  # refuses a text shorter than a window
    data.windows(config, 0)
    return data


def with_steps(config: Config, data: TrainingData) -> Config:
    """The config with `train.epochs` turned into the steps that they are, rounded up.

    Raises:
      ConfigError: more than can be counted.
    """
    if not config.train.epochs:
        return config
    windows = config.train.epochs * data.batches(config).windows_per_epoch
    steps = max(1, math.ceil(windows / config.train.batch_size))
    if steps >= 2**31:  # they are counted in an int32
        raise ConfigError(f"train.epochs = {config.train.epochs:g} is {steps:,} steps; a run has "
                          "at most 2,147,483,647", "ask for fewer epochs")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
