"""Stories with questions, as a run reads them: `StoryData`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.data.stories import Stories
from hippocampus.data.story_chunks import ChunkedStreams, StoryWindows
from hippocampus.data.story_rows import StoryStreams
from hippocampus.evaluation.evaluate import Evaluation
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.story_scores import (
    STORY_NOTE,
    StoryText,
    answer_lines,
    find_stories,
    score_stories,
    story_text,
)
from hippocampus.training.run_data import RunData


@dataclass(frozen=True)
class StoryData(RunData):
    """Stories, tokenized, with their questions.

    Attributes:
      config: of the run.
      stories: the source.
      tokenizer: of the pretrained decoder.
    """

    config: Config
    stories: Stories
    tokenizer: HubTokenizer

    def batches(self, config: Config) -> ChunkedStreams:
        """Training batches, a pure function of (seed, step)."""
        told, data = self._train, config.data
        assert told.stories is not None
        streams = StoryStreams(
            told.stories, told.questions, told.chunk, config.train.batch_size, config.train.seed,
            told.begin_id, data.stories.story_weight, data.stories.question_rows)
        return ChunkedStreams(streams, data.context // told.chunk)

    def windows(self, config: Config, max_windows: int) -> StoryWindows:
        """Every validation story, and the questions about it."""
        cut = Windows.of(config)
        return self._validation.windows(cut.context, cut.stride, cut.batch_size, max_windows)

    def score(self, model: Any, params: Any, windows: StoryWindows,
              place: Callable[[Batch], Batch]) -> Evaluation:
        """Scores the answers, see `hippocampus.evaluation.story_scores`."""
        return score_stories(model, params, windows, self._validation, place)

    def held_out(self, packed: bool) -> StoryText:
        """The answers of the validation split."""
        return self._validation

    def lines(self) -> dict[str, float]:
        """Nats per answer id of a guess, and of the frequencies in answers."""
        return answer_lines(self._train, self._validation)

    def line_notes(self) -> tuple[str, ...]:
        """What was counted for the lines."""
        return (STORY_NOTE,)

    def describe(self, config: Config) -> tuple[str, ...]:
        """What there is to read, in lines for a person."""
        told, held = self._train, self._validation
        return (f"{self.stories.name}: {len(told.questions)} stories of {len(told.ids):,} tokens "
                f"with {sum(map(len, told.questions)):,} questions to train on, "
                f"{len(held.questions)} with {sum(map(len, held.questions)):,} held out, sha256 "
                f"{self.stories.digest[:16]}",)

    def record(self) -> str:
        """What the run folder keeps to recognise the stories by."""
        held = self._validation
        return json.dumps({
            "corpus": self.stories.name, "sha256": self.stories.digest,
            "tokenizer": self.tokenizer.digest, "train_tokens": len(self._train.ids),
            "train_bytes": 0, "validation_tokens": held.predictions,
            "validation_bytes": held.n_bytes, "validation_words": held.n_words,
            "validation_unknown": 0}, indent=2) + "\n"

    @cached_property
    def _train(self) -> StoryText:
        return story_text(self.config, self.stories, self.tokenizer, "train")

    @cached_property
    def _validation(self) -> StoryText:
        return story_text(self.config, self.stories, self.tokenizer, "validation")


def read_stories(config: Config, tokenizer: HubTokenizer) -> StoryData:
    """Reads and tokenizes stories, or finds them tokenized in the cache.

    Args:
      config: with `data.form` = stories.
      tokenizer: of the pretrained decoder.

    Raises:
      DataError: there are none, or they are damaged.
      ConfigError: a question does not fit into a chunk.
    """
    return StoryData(config, find_stories(config), tokenizer)
