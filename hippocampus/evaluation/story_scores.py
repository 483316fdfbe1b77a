"""Answers to questions about stories that only a memory has seen: what is scored, and how.

The model reads every story of a split chunk by chunk, its memory carried along, and then has to
predict the answers to questions about it, whose chunk has no word of the story.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.data.stories import Stories, open_stories
from hippocampus.data.story_chunks import StoryPass, StoryWindows
from hippocampus.data.story_tokens import (
    QuestionTokens,
    StorySplit,
    Template,
    story_split,
    tokenize_questions,
)
from hippocampus.errors import ConfigError
from hippocampus.evaluation.evaluate import Evaluation
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.ops.cross_entropy import token_hits, token_nll

STORY_NOTE = ("answers alone are predicted, from a memory of the story; the unigram line counts "
              "ids of training answers, with 1 added to each")


@dataclass(frozen=True, eq=False)
class StoryText(HeldOutText):
    """The answers to the questions of a split.

    Attributes:
      stories: of the split.
      questions: about them, with the ids of their answers.
      chunk: tokens of a chunk.
      begin_id: in front of every chunk and question; None: nothing is.
    """

    stories: StorySplit | None = None
    questions: Sequence[Sequence[QuestionTokens]] = ()
    chunk: int = 0
    begin_id: int | None = None

    @property
    def predictions(self) -> int:
        """Ids of the first answer to every question."""
        return sum(len(one.answers[0]) for asked in self.questions for one in asked)

    def windows(self, context: int, stride: int, batch_size: int,  # type: ignore[override]
                max_windows: int = 0) -> StoryWindows:
        """All stories and questions, in rows of `context` tokens.

        Raises:
          ConfigError: a stride, which chunks have no use for, or a context that is no whole number
            of chunks.
        """
        if stride not in (0, context):
            raise ConfigError(f"a stride of {stride} for stories that are read chunk by chunk",
                              "leave it at 0")
        if context % self.chunk:
            raise ConfigError(f"a context of {context} tokens for chunks of {self.chunk}",
                              "give a multiple")
        assert self.stories is not None
        stories = StoryPass(self.stories, self.questions, self.chunk, batch_size, 0, self.begin_id,
                            0.0)
        return StoryWindows(stories, context // self.chunk, -(-max_windows // batch_size))


def find_stories(config: Config) -> Stories:
    """The stories of a run.

    Args:
      config: with `data.form` = stories.

    Raises:
      DataError: there are none, or they are damaged.
    """
    data = config.data
    return open_stories(data.corpus, text=data.stories.text, streaming=data.streaming)


def story_text(config: Config, stories: Stories, tokenizer: HubTokenizer, split: str) -> StoryText:
    """A split of stories and the answers to the questions about them.

    Args:
      config: of the run.
      stories: from `find_stories`.
      tokenizer: of the pretrained decoder.
      split: "train", "validation" or "test".

    Raises:
      DataError: there is no such split, or it cannot be read.
    """
    template, model = Template(config.data.stories.template), config.model
    found = story_split(stories, tokenizer, split)
    questions = tokenize_questions(
        found.questions, tokenizer, template, begin_id=tokenizer.begin_id,
        end_id=next(iter(tokenizer.end_ids), None))
    replies = [template.reply(one.answers[0]) for asked in found.questions for one in asked]
    return StoryText(
        stories.name, stories.digest, split, tokenizer, found.ids, found.starts[:-1],
        sum(len(reply.encode()) for reply in replies), sum(len(reply.split()) for reply in replies),
        0, found, questions, getattr(model, "chunk", 0) or config.data.context,
        tokenizer.begin_id)


def answer_lines(train: StoryText, text: StoryText) -> dict[str, float]:
    """Nats per answer id of a guess among all ids, and of one by how often an id is in an answer.

    Args:
      train: whose answers are counted.
      text: what is predicted.
    """
    vocab_size = text.tokenizer.vocab_size
    counts = 1 + np.bincount(_answers(train.questions), minlength=vocab_size)
    cost = np.log(counts.sum()) - np.log(counts)
    return {"uniform": math.log(vocab_size),
            "unigram": float(cost[_answers(text.questions)].mean())}


def score_stories(model: Any, params: Any, windows: Iterable[Batch], text: StoryText,
                  place: Callable[[Batch], Batch] = lambda batch: batch) -> Evaluation:
    """Scores the answers of every question, with a memory of its story and nothing else of it.

    Args:
      model: with a persistent memory.
      params: its parameters.
      windows: batches of a `StoryWindows` of `text`.
      text: for the bytes and words per prediction.
      place: puts a batch onto devices.
    """
    state, rows = None, []
    for batch in windows:
        placed = place(batch)
        if state is None:
            state = _first(model, placed)
        sums, state = _sums(model, params, placed, state)
        rows.append(sums)
    total = {name: math.fsum(float(row[name]) for row in jax.device_get(rows)) for name in rows[0]}
    return Evaluation(
        total["nll"] / max(1.0, total["weight"]), round(total["weight"]), text.bytes_per_token,
        None, text.words_per_token, total["hits"] / max(1.0, total["weight"]))


@functools.partial(jax.jit, static_argnums=0)
def _first(model: Any, batch: Batch) -> Any:
    return model.init_state(batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _sums(model: Any, params: Any, batch: Batch, state: Any) -> tuple[dict[str, Array], Any]:
    hidden_BTD, _, state = model.apply({"params": params}, batch, state, method="forward")
    head, weight_BT = model.head(params), batch.loss_weight_BT
    return {"nll": (token_nll(hidden_BTD, head, batch.targets_BT) * weight_BT).sum(),
            "hits": (token_hits(hidden_BTD, head, batch.targets_BT) * weight_BT).sum(),
            "weight": jnp.sum(weight_BT)}, state


def _answers(questions: Sequence[Sequence[QuestionTokens]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *(
        one.answers[0] for asked in questions for one in asked)])
