"""Asks about stories under every condition: the second of two processes, `ask_stories`.

    memory    the memory that has read the story, out of its file
    empty     a new user's memory
    other     the memory of a story half of the list further on
    story     an empty memory, and as much of the story as fits in front of the question
    snippet   an empty memory, and the passages that BM25 finds, as many bytes as the memory's file

In front of a question of the first three there is nothing but what every prompt begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int32

from hippocampus.data.documents import Piece
from hippocampus.data.story_forms import Question, Story
from hippocampus.data.story_tokens import QuestionTokens, tokenize_questions
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.answers import score_answer
from hippocampus.evaluation.bm25 import BM25, split_passages
from hippocampus.generation import decode
from hippocampus.ops.memory_state import MemoryState, join_users
from hippocampus.probing.memory.asking import (
    Prompt,
    log_probabilities,
    row_length,
    written_answers,
)
from hippocampus.probing.memory.findings import Answer, CurvePoint, Findings
from hippocampus.probing.memory.subject import STORY, Settings, Subject, points
from hippocampus.probing.memory.writing import load_memories

WITH_TEXT = ("story", "snippet")
"""Conditions in which a text stands in front of the question."""

CONDITIONS = ("memory", "empty", "other", *WITH_TEXT)

_BETWEEN = "\n\n"
_BYTES_PER_TOKEN = 32
"""More than a token has on average: what lies further back cannot fit."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question as it is put.

    Attributes:
      story: its number.
      question: with the answers that people gave.
      ids: of the prompt and of the first answer, without an id that ends it.
    """

    story: int
    question: Question
    ids: QuestionTokens


@dataclass(frozen=True, eq=False)
class Front:
    """A text in front of a question.

    Attributes:
      ids: of it; () = none.
      n_bytes: that it has.
      cut: not all of it fits.
    """

    ids: Int32[np.ndarray, " n"]
    n_bytes: int = 0
    cut: bool = False


NOTHING = Front(np.zeros(0, np.int32))


def choose_stories(found: Sequence[Story], most: int) -> tuple[Story, ...]:
    """Stories with questions, evenly spaced.

    Args:
      found: all of a split.
      most: at most so many; 0 = all.

    Raises:
      DataError: there are fewer than two.
    """
    asked = [story for story in found if story.questions]
    if len(asked) < 2:
        raise DataError(f"{len(asked)} stories have questions",
                        "another story's memory is a control: it takes two or more")
    return tuple(asked[i] for i in _evenly(len(asked), most))


def choose_questions(subject: Subject, stories: Sequence[Story], most: int) -> list[Asked]:
    """The questions about every story, evenly spaced, with their ids."""
    chosen = [[story.questions[i] for i in _evenly(len(story.questions), most)]
              for story in stories]
    ids = tokenize_questions(chosen, subject.tokenizer, subject.template,
                             begin_id=subject.begin_id, end_id=None)
    return [Asked(i, question, tokens) for i, (asked, own) in enumerate(
        zip(chosen, ids, strict=True)) for question, tokens in zip(asked, own, strict=True)]


def ask_stories(subject: Subject, stories: Sequence[Story], settings: Settings, folder: Path, *,
                seed: int = 0, say: Callable[[str], None] = lambda line: None) -> Findings:
    """Asks with the memories of a folder, which `write_stories` made, and under all controls.

    Args:
      subject: the model that wrote them.
      stories, settings, folder, seed: as they were for `write_stories`.
      say: is told what is being asked.

    Raises:
      CheckpointError: a memory is missing, damaged or another model's.
      DataError: a memory is another story's.
      ConfigError: no room for a text in front of a question.
    """
    asked = choose_questions(subject, stories, settings.questions)
    memories, sizes = load_memories(subject, stories, STORY, folder, seed=seed)
    with_new = jax.device_get(join_users([memories, subject.new_memories(1)]))
    fronts = _Fronts(subject, stories, settings, sizes)
    answers: list[Answer] = []
    for condition in CONDITIONS:
        say(f"asking {len(asked)} questions about {len(stories)} stories: {condition}")
        answers += _ask(subject, condition, stories, asked, with_new, settings,
                        [fronts.of(condition, one) for one in asked])
    where, notes = points(subject, settings, len(stories))
    curves = [CurvePoint(STORY.kind, 0, {a.key: a.log_p for a in answers
                                         if a.condition == "memory"})]
    for point in where[1:]:
        say(f"asking again: {point.name}")
        own, _ = load_memories(subject, stories, point, folder, seed=seed)
        prompts = [Prompt(one.ids.prompt, one.ids.answers[0], one.story) for one in asked]
        log_p = log_probabilities(subject.at(point), own, prompts, rows=settings.rows,
                                  length=row_length(prompts))
        curves.append(CurvePoint(point.kind, point.amount, {
            (stories[one.story].name, i): float(x)
            for i, (one, x) in enumerate(zip(asked, log_p, strict=True))}))
    return Findings(tuple(answers), tuple(curves), sizes, subject.gate,
                    subject.model.memory.n_slots, subject.context - len(subject.begin), seed, notes)


def user_of(condition: str, story: int, n: int) -> int:
    """Whose memory is open: of n stories, behind which a new user stands."""
    if condition == "memory":
        return story
    # Half of the list away, because neighbours may be parts of one tale.
    return (story + n // 2) % n if condition == "other" else n


def _ask(subject: Subject, condition: str, stories: Sequence[Story], asked: Sequence[Asked],
         memories: MemoryState, settings: Settings, fronts: Sequence[Front]) -> list[Answer]:
    n_begin = len(subject.begin)
    prompts = [Prompt(np.concatenate((one.ids.prompt[:n_begin], front.ids,
                                      one.ids.prompt[n_begin:])), one.ids.answers[0],
                      user_of(condition, one.story, len(stories)))
               for one, front in zip(asked, fronts, strict=True)]
    length = row_length(prompts)
    log_p = log_probabilities(subject, memories, prompts, rows=settings.rows, length=length)
    longest = max(length, max(len(one.ids) for one in prompts) + settings.answer_tokens)
    texts = written_answers(subject, memories, prompts, rows=settings.rows,
                            most=settings.answer_tokens,
                            capacity=decode.capacity(longest, subject.model.config.max_length))
    return [Answer(condition, stories[one.story].name, i, one.question.text, one.question.answers,
                   text, float(x), len(one.ids.answers[0]),
                   score_answer(text, one.question.answers), front.n_bytes, front.cut)
            for i, (one, text, x, front) in enumerate(zip(asked, texts, log_p, fronts,
                                                          strict=True))]


class _Fronts:
    """Texts in front of questions, as much of them as fits."""

    def __init__(self, subject: Subject, stories: Sequence[Story], settings: Settings,
                 sizes: Sequence[int]):
        self._subject, self._stories, self._sizes = subject, stories, sizes
        self._answer_tokens = settings.answer_tokens
        self._most = min(settings.context_tokens, subject.model.config.max_length)
        self._between = self._encode(_BETWEEN)
        self._wholes = {i: self._encode(story.text) for i, story in enumerate(stories)}
        self._found = {i: BM25(split_passages(story.text, settings.passage_words))
                       for i, story in enumerate(stories)}

    def of(self, condition: str, one: Asked) -> Front:
        """The text in front of a question under a condition."""
        if condition not in WITH_TEXT:
            return NOTHING
        room = (self._most - len(one.ids.prompt) - len(self._between)
                - max(len(one.ids.answers[0]), self._answer_tokens))
        if room < 1:
            raise ConfigError(f"no text fits into {self._most} tokens in front of the question "
                              f"{one.question.text[:60]!r}", "raise context_tokens")
        if condition == "story":
            ids = self._wholes[one.story]
        else:
            budget = min(self._sizes[one.story], _BYTES_PER_TOKEN * room)
            ids = self._encode(self._found[one.story].snippets(one.question.text, budget))
        kept = ids[:room]
        return Front(np.concatenate((kept, self._between)),
                     self._subject.tokenizer.count_bytes(kept), len(kept) < len(ids))

    def _encode(self, text: str) -> np.ndarray:
        return self._subject.tokenizer.encode_pieces([Piece(text, False, False)])[0]


def _evenly(n: int, most: int) -> list[int]:
    k = min(n, most or n)
    return [int(i) for i in np.linspace(0, n - 1, k).round()]
