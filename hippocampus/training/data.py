"""The text of a run, as ids, with the n-gram lines that a model has to beat."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.backbones.loading import load_backbone
from hippocampus.config import Config
from hippocampus.config_recall import task_of
from hippocampus.data.batches import Batch, ShuffledWindows, Streams
from hippocampus.data.corpora import Corpus, open_corpus
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.shards import TokenSplit, token_split
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.data.vocabularies import bpe_shortfall, build_tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.evaluate import Evaluation, evaluate
from hippocampus.evaluation.held_out import HeldOutText, take_split
from hippocampus.evaluation.ngrams import ngram_lines, smoothing_note
from hippocampus.evaluation.report import Windows
from hippocampus.models.halves import backbone_path
from hippocampus.training.recall_data import make_recall_data
from hippocampus.training.run_data import RunData
from hippocampus.training.story_data import read_stories


@dataclass(frozen=True)
class TrainingData(RunData):
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
    def bytes_per_token(self) -> float | None:
        """Of the predicted validation text, which is all but its first token."""
        return self.held_out(packed=False).bytes_per_token

    @property
    def words_per_token(self) -> float | None:
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

    def score(self, model: Any, params: Any, windows: EvaluationWindows,
              place: Callable[[Batch], Batch]) -> Evaluation:
        """Evaluates a model on `windows`, see `hippocampus.evaluation.evaluate`."""
        return evaluate(model, params, windows, self.bytes_per_token, place, self.words_per_token)

    def lines(self) -> dict[str, float]:
        """Nats per token of the uniform, unigram, bigram and trigram models."""
        return ngram_lines(self.train.ids, self.validation.ids, self.tokenizer.vocab_size)

    def line_notes(self) -> tuple[str, ...]:
        """What was counted for the lines, and smoothed how."""
        return (smoothing_note(len(self.train.ids), self.tokenizer.vocab_size),)

    def describe(self, config: Config) -> tuple[str, ...]:
        """What there is to read, in lines for a person."""
        unknown = self.validation.n_unknown / len(self.validation_ids)
        found = (f"{self.corpus.name}: {len(self.train_ids):,} training and "
                 f"{len(self.validation_ids):,} validation tokens ({config.data.tokenizer}, "
                 f"vocabulary {self.tokenizer.vocab_size}"
                 + (f", {unknown:.2%} of validation unknown" if unknown else "")
                 + f"), sha256 {self.corpus.digest[:16]}")
        return (found, self.note) if self.note else (found,)

    def record(self) -> str:
        """What the run folder keeps to recognise the text by."""
        return json.dumps({
            "corpus": self.corpus.name, "sha256": self.corpus.digest,
            "tokenizer": self.tokenizer.digest, "train_tokens": len(self.train.ids),
            "train_bytes": self.train.n_bytes, "validation_tokens": len(self.validation.ids),
            "validation_bytes": self.validation.n_bytes,
            "validation_words": self.validation.n_words,
            "validation_unknown": self.validation.n_unknown}, indent=2) + "\n"


def read_data(config: Config) -> RunData:
    """Reads and tokenizes the corpus, or finds it tokenized in the cache; or makes the examples.

    Raises:
      DataError: missing, empty, binary, or shorter than a window; or it lacks a character of
        `sample.prompt`.
    """
    data: RunData
    own = _backbone_tokenizer(config)
    if task_of(config.data):
        data = make_recall_data(config)
        _check_prompt(config, data.tokenizer)
    elif own is not None and config.data.form == "stories":
        _check_prompt(config, own)
        data = read_stories(config, own)
    else:
        data = _read_text(config, own)
    data.batches(config)  # refuses a text shorter than a window
    data.windows(config, 0)
    return data


def _check_prompt(config: Config, tokenizer: Tokenizer) -> None:
    if not len(tokenizer.encode(config.sample.prompt)):
        raise ConfigError("sample.prompt is empty", "give at least one character")


def _backbone_tokenizer(config: Config) -> HubTokenizer | None:
    """That of a pretrained decoder, if there is one."""
    if not hasattr(config.model, "backbone"):
        return None
    path = backbone_path(config)
    tokenizer = load_backbone(path, weights=False).tokenizer
    if tokenizer is None:
        raise DataError(f"there is no tokenizer beside {path}",
                        "put the tokenizer.json of the model there")
    return tokenizer


def _read_text(config: Config, own: Tokenizer | None) -> TrainingData:
    corpus = open_corpus(config.data)
    tokenizer = own or build_tokenizer(config.data, corpus)
    _check_prompt(config, tokenizer)
    return TrainingData(corpus, tokenizer, token_split(corpus, tokenizer, "train"),
                        token_split(corpus, tokenizer, "validation"),
                        "" if own else bpe_shortfall(config.data, tokenizer))


def with_steps(config: Config, data: RunData) -> Config:
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
