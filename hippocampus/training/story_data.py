"""Stories with questions, as a run reads them: `StoryData`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.config import CHopTConfig, Config
from hippocampus.data.batches import Batch
from hippocampus.data.stories import Stories, open_stories
from hippocampus.data.story_chunks import ChunkedStreams, StoryWindows
from hippocampus.data.story_rows import StoryStreams
from hippocampus.data.story_tokens import (
    QuestionTokens,
    StorySplit,
    Template,
    story_split,
    tokenize_questions,
)
from hippocampus.evaluation.evaluate import Evaluation
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.story_scores import (
    STORY_NOTE,
    StoryText,
    answer_lines,
    score_stories,
    story_text,
)
from hippocampus.training.run_data import RunData


@dataclass(frozen=True)
class StoryData(RunData):
    """Stories, tokenized, with their questions.

    Attributes:
      stories: the source.
      tokenizer: of the pretrained decoder.
      template: how a question is put.
      chunk: tokens of a chunk.
      train: the training stories.
    """

    stories: Stories
    tokenizer: HubTokenizer
    template: Template
    chunk: int
    train: StorySplit

    def batches(self, config: Config) -> ChunkedStreams:
        """Training batches, a pure function of (seed, step)."""
        data = config.data
        streams = StoryStreams(
            self.train, self._train_questions, self.chunk, config.train.batch_size,
            config.train.seed, self.tokenizer.begin_id, data.stories.story_weight,
            data.stories.question_rows)
        return ChunkedStreams(streams, data.context // self.chunk)

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
        return answer_lines(self._train_questions, self._validation, self.tokenizer.vocab_size)

    def line_notes(self) -> tuple[str, ...]:
        """What was counted for the lines."""
        return (STORY_NOTE,)

    def describe(self, config: Config) -> tuple[str, ...]:
        """What there is to read, in lines for a person."""
        held = self._validation
        assert held.stories is not None
        return (f"{self.stories.name}: {len(self.train)} stories of {len(self.train.ids):,} tokens "
                f"with {sum(map(len, self.train.questions)):,} questions to train on, "
                f"{len(held.stories)} with {sum(map(len, held.questions)):,} held out, sha256 "
                f"{self.stories.digest[:16]}",)

    def record(self) -> str:
        """What the run folder keeps to recognise the stories by."""
        held = self._validation
        return json.dumps({
            "corpus": self.stories.name, "sha256": self.stories.digest,
            "tokenizer": self.tokenizer.digest, "train_tokens": len(self.train.ids),
            "train_bytes": 0, "validation_tokens": held.predictions,
            "validation_bytes": held.n_bytes, "validation_words": held.n_words,
            "validation_unknown": 0}, indent=2) + "\n"

    @cached_property
    def _validation(self) -> StoryText:
        split = story_split(self.stories, self.tokenizer, "validation")
        return story_text(self.stories.name, self.stories.digest, "validation", self.tokenizer,
                          split, self._questions(split), self.template, self.chunk)

    @cached_property
    def _train_questions(self) -> Sequence[Sequence[QuestionTokens]]:
        return self._questions(self.train)

    def _questions(self, split: StorySplit) -> Sequence[Sequence[QuestionTokens]]:
        return tokenize_questions(
            split.questions, self.tokenizer, self.template, begin_id=self.tokenizer.begin_id,
            end_id=next(iter(self.tokenizer.end_ids), None))


def read_stories(config: Config, tokenizer: HubTokenizer) -> StoryData:
    """Reads and tokenizes stories, or finds them tokenized in the cache.

    Args:
      config: with `data.form` = stories.
      tokenizer: of the pretrained decoder.

    Raises:
      DataError: there are none, or they are damaged.
      ConfigError: a question does not fit into a chunk.
    """
    data, model = config.data, config.model
    assert isinstance(model, CHopTConfig)
    stories = open_stories(data.corpus, text=data.stories.text, streaming=data.streaming)
    return StoryData(stories, tokenizer, Template(data.stories.template),
                     model.chunk or data.context, story_split(stories, tokenizer, "train"))
