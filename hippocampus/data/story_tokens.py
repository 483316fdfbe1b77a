"""Stories as ids, cut into chunks once: `StorySplit`, `story_split`, `tokenize_story`.

The ids of a split are shards like those of any corpus (`hippocampus.data.shards`), every story a
document, so that a book is tokenized once whatever the chunk. Beside them, in
`$HIPPOCAMPUS_CACHE/stories/<digest>/<split>.json`, stand the names and questions.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from hippocampus.data.cache import cache_folder, cannot_write, locked
from hippocampus.data.documents import Piece
from hippocampus.data.shards import token_split
from hippocampus.data.stories import Stories
from hippocampus.data.story_forms import Question, Story
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.files import write_atomically

FORMAT = 1


@dataclass(frozen=True, eq=False)
class StoryTokens:
    """The ids of one story in chunks; every id is in exactly one of them.

    Attributes:
        name: of the story.
        ids_CT: the chunks; what lies behind the end of the last one is 0.
        valid_CT: which of them are ids of the story.
    """

    name: str
    ids_CT: Int32[np.ndarray, "C T"]
    valid_CT: Bool[np.ndarray, "C T"]


@dataclass(frozen=True, eq=False)
class StorySplit:
    """The stories of a split as ids, with their questions as text.

    Attributes:
        ids: of all stories, one after the other; may be a memory map.
        starts: where each begins in `ids`, and where the last one ends.
        marked: whether a story begins with the tokenizer's `<|endoftext|>`, which is none of its
            text.
        names: of the stories.
        questions: about each of them.
    """

    ids: Integer[np.ndarray, " n"]
    starts: Int64[np.ndarray, " stories+1"]
    marked: bool
    names: tuple[str, ...]
    questions: tuple[tuple[Question, ...], ...]

    def __len__(self) -> int:
        """Return the number of stories."""
        return len(self.names)

    @property
    def lengths(self) -> Int64[np.ndarray, " stories"]:
        """Ids of the text of each story."""
        return np.diff(self.starts) - self.marked

    def story_ids(self, story: int) -> Integer[np.ndarray, " n"]:
        """The ids of the text of a story, a view."""
        return self.ids[self.starts[story] + self.marked : self.starts[story + 1]]

    def chunks(self, story: int, chunk: int) -> StoryTokens:
        """A story in chunks of so many tokens."""
        return _cut(self.names[story], self.story_ids(story), chunk)


def story_split(stories: Stories, tokenizer: Tokenizer, split: str) -> StorySplit:
    """Tokenize the stories of a split, or take them from the cache.

    Args:
        stories: where they come from.
        tokenizer: what makes ids of them.
        split: one of `stories.splits`.

    Returns:
        The ids, mapped into memory, and the questions.

    Raises:
        DataError: a story is in two splits, the split is empty or unusable, or the cache cannot
            be written.
    """
    index = _index(stories, split)
    tokens = token_split(stories.corpus(), tokenizer, split)
    if tokens.n_documents != len(index):
        raise DataError(f"data.corpus: the stories of {stories.name} changed while they were read",
                        "start the same command again")
    starts = np.append(np.asarray(tokens.document_starts), len(tokens.ids))
    names, questions = zip(*index, strict=True)
    return StorySplit(tokens.ids, starts, tokenizer.end_id is not None, names, questions)


def tokenize_story(story: Story, tokenizer: Tokenizer, chunk: int) -> StoryTokens:
    """Cut one story into chunks, the same as `StorySplit.chunks`, without a cache.

    Args:
        story: the story.
        tokenizer: what makes ids of it.
        chunk: tokens in a chunk.

    Raises:
        DataError: the text has a character that the tokenizer lacks.
        ConfigError: a chunk without tokens.
    """
    ids = tokenizer.encode_document(story.text)
    return _cut(story.name, ids[tokenizer.end_id is not None:], chunk)


@dataclass(frozen=True)
class Template:
    """How a question is put to a model, and its answer.

    Attributes:
        text: with `{question}` and, behind it, `{answer}`, once each. White space in front of
            `{answer}` is read as part of the answer, as tokenizers join it to the next word.
    """

    text: str

    def __post_init__(self) -> None:
        places = [self.text.find(name) for name in ("{question}", "{answer}")]
        counts = [self.text.count(name) for name in ("{question}", "{answer}")]
        if counts != [1, 1] or places[0] > places[1]:
            raise ConfigError(f"the template {self.text[:60]!r} does not put a question and then "
                              "its answer", "it needs {question} and, behind it, {answer}, once "
                              "each")

    def prompt(self, question: str) -> str:
        """What a model reads before it answers."""
        return self.text.partition("{answer}")[0].rstrip().replace("{question}", question)

    def reply(self, answer: str) -> str:
        """What it should write then."""
        before, _, behind = self.text.partition("{answer}")
        return before[len(before.rstrip()):] + answer + behind


@dataclass(frozen=True, eq=False)
class QuestionTokens:
    """A question as ids.

    Attributes:
        prompt: what is read.
        answers: what should be written then; each ends with the id that ends a text, if any.
    """

    prompt: Int32[np.ndarray, " P"]
    answers: tuple[Int32[np.ndarray, " A"], ...]

    @property
    def length(self) -> int:
        """Ids of the prompt and its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def tokenize_questions(
    questions: Sequence[Sequence[Question]], tokenizer: Tokenizer, template: Template, *,
    begin_id: int | None, end_id: int | None,
) -> tuple[tuple[QuestionTokens, ...], ...]:
    """Turn the questions about every story into ids.

    Args:
        questions: of each story.
        tokenizer: the one of the stories.
        template: how they are put.
        begin_id: what every prompt begins with; None: nothing.
        end_id: what every answer ends with; None: nothing.

    Returns:
        As many as there are questions, in their order. An answer has the ids that it has behind
        its prompt. What looks like a special token in a question or an answer is text.

    Raises:
        DataError: a text has a character that the tokenizer lacks.
    """
    prompts = [template.prompt(one.text) for asked in questions for one in asked]
    replies = [[template.reply(answer) for answer in one.answers]
               for asked in questions for one in asked]
    prompt_ids = _encode(tokenizer, prompts)
    wholes = iter(_encode(tokenizer, [prompt + reply for prompt, texts in zip(
        prompts, replies, strict=True) for reply in texts]))
    begin, end = (np.array([] if one is None else [one], np.int32) for one in (begin_id, end_id))

    def answer(prompt: np.ndarray, reply: str) -> np.ndarray:
        # Alone, it may be encoded otherwise: some tokenizers put a space in front of every text.
        whole = next(wholes)
        joins = len(whole) < len(prompt) or (whole[: len(prompt)] != prompt).any()
        ids = _encode(tokenizer, [reply])[0] if joins else whole[len(prompt):]
        return np.concatenate((ids, end))

    flat = iter([QuestionTokens(np.concatenate((begin, ids)),
                                tuple(answer(ids, reply) for reply in texts))
                 for ids, texts in zip(prompt_ids, replies, strict=True)])
    return tuple(tuple(next(flat) for _ in asked) for asked in questions)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of texts that neither begin nor end a document: nothing is added."""
    return tokenizer.encode_pieces([Piece(text, False, False) for text in texts])


def _cut(name: str, ids: np.ndarray, chunk: int) -> StoryTokens:
    if chunk < 1:
        raise ConfigError(f"a chunk of {chunk} tokens", "it needs at least one")
    n_chunks = -(-len(ids) // chunk)
    padded = np.zeros(n_chunks * chunk, np.int32)
    padded[: len(ids)] = ids
    valid = np.arange(len(padded)) < len(ids)
    return StoryTokens(name, padded.reshape(n_chunks, chunk), valid.reshape(n_chunks, chunk))


def _index(stories: Stories, split: str) -> list[tuple[str, tuple[Question, ...]]]:
    """Names and questions, from the cache or read and kept there."""
    facts = json.dumps([FORMAT, stories.digest])
    folder = cache_folder() / "stories" / hashlib.sha256(facts.encode()).hexdigest()[:32]
    path = folder / f"{split}.json"
    with locked(path):
        if path.exists():
            if (kept := _read_index(path)) is not None:
                return kept
            warnings.warn(f"{path} is damaged: made again", stacklevel=3)
        stories.check_splits()
        found = [(story.name, story.questions) for story in stories.read(split)]
        if not found:
            raise DataError(f"data.corpus: the {split} split of {stories.name} has no stories",
                            "choose another split or file")
        content = [[name, [asdict(one) for one in asked]] for name, asked in found]
        try:
            write_atomically(path, json.dumps([_digest(content), content]))
        except OSError as error:
            raise cannot_write(path, error) from None
        return found


def _read_index(path: Path) -> list[tuple[str, tuple[Question, ...]]] | None:
    """None where it is not what was written."""
    try:
        digest, content = json.loads(path.read_text("utf-8"))
        if digest == _digest(content):
            return [(name, tuple(Question(one["text"], tuple(one["answers"]), one["kind"])
                                 for one in asked)) for name, asked in content]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
