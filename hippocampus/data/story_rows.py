"""Training rows of stories: first a story in chunks, then the questions about it.

Every row of a batch is a user who reads stories of his own, one after the other: `StoryStreams`.
A memory that is carried from batch to batch and forgets where `reset_B` says so has then seen the
whole story, and nothing else, when a question about it comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int32

from hippocampus.data.batches import Batch
from hippocampus.data.permutation import mix, permute
from hippocampus.data.story_tokens import QuestionTokens, StorySplit
from hippocampus.errors import ConfigError, DataError


class StoryBatch(Batch):
    """A batch that says what its rows are.

    Attributes:
        story_B: number of the story in its split.
        question_B: whether the row holds questions rather than a chunk of the story.
    """

    story_B: Int32[Array, " B"] | None = None
    question_B: Bool[Array, " B"] | None = None


class ChunkedBatch(Batch):
    """A batch of several chunks a row, which says what each of them is.

    Attributes:
        reset_Bn: whether a story begins with the chunk.
        question_Bn: whether it holds questions rather than a part of the story.
        story_Bn: number of the story in its split.
    """

    reset_Bn: Bool[Array, "B n"] | None = None
    question_Bn: Bool[Array, "B n"] | None = None
    story_Bn: Int32[Array, "B n"] | None = None


@dataclass(frozen=True, eq=False)
class StoryStreams:
    """An endless stream of rows for every user, cut into batches by step number.

    Users are dealt their stories once, so that all have about as many rows; each goes through his
    own again and again, in an order of its own every time. A story is its chunks in order, then
    its questions: as many whole ones in a row as fit, each a document of its own, the rows in an
    order of their own every time.

    A row of a chunk predicts the id behind each of its own, over the border of the chunk too; a
    row of questions predicts one of the answers, chosen anew every time. With `begin_id`, every
    story token is a target exactly once; without, the first one of a story is none.

    Attributes:
        stories: what is read.
        questions: about each story, with the ids that begin and end them.
        context: T, tokens in a row.
        batch_size: B, users.
        seed: who reads what, and in which order.
        begin_id: stands in front of every chunk, which is then T - 1 tokens long; None: nothing
            does.
        story_weight: of a prediction of the story; those of answers have 1.
        question_rows: at most so many rows of questions each time that a story is read, chosen
            anew; 0: all of them.
    """

    stories: StorySplit
    questions: Sequence[Sequence[QuestionTokens]]
    context: int
    batch_size: int
    seed: int
    begin_id: int | None
    story_weight: float
    question_rows: int = 0

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ConfigError(f"a chunk of {self.context} tokens has no room for a story",
                              "raise --config.model.chunk, or --config.data.context where it is 0"
                              )
        self._check_users()
        # The last id of an answer is only a target.
        longest, story = max(((one.length - 1, i) for i, asked in enumerate(self.questions)
                              for one in asked), default=(0, 0))
        if longest > self.context:
            raise ConfigError(
                f"a question about {self.stories.names[story][:60]!r} has {longest} tokens with "
                f"its answer, and a chunk has {self.context}",
                "raise --config.model.chunk, or --config.data.context where it is 0")

    def _check_users(self) -> None:
        if len(self.stories) < self.batch_size:
            raise DataError(
                f"there are {len(self.stories)} stories for {self.batch_size} users",
                "every row of a batch reads stories of its own: lower train.batch_size")

    @property
    def chunk(self) -> int:
        """Story tokens in a row."""
        return self.context - (self.begin_id is not None)

    @property
    def windows_per_epoch(self) -> int:
        """Rows until every story was read once, on average over users."""
        return int(self._rows.sum())

    def batch(self, step: int, rows: slice | None = None) -> StoryBatch:
        """Return the batch of one step; the same one whenever it is asked for.

        Args:
            step: number of the step, from 0.
            rows: which rows of it, for a host that feeds only some; None: all.

        Returns:
            A batch of numpy arrays, [rows, context], with document ids and positions. Padding has
            id, target, weight and document 0. `reset_B` is set where a story begins.
        """
        users = np.arange(self.batch_size)[rows or slice(None)]
        shape = (len(users), self.context)
        arrays: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in (
            "tokens_BT", "targets_BT", "document_ids_BT", "positions_BT")}
        arrays["loss_weight_BT"] = np.zeros(shape, np.float32)
        story_B, place_B = np.array([self._place(int(user), step) for user in users]).reshape(
            -1, 2).T
        question_B = place_B >= self._n_chunks[story_B]
        for row, (story, place) in enumerate(zip(story_B, place_B, strict=True)):
            into = {name: array[row] for name, array in arrays.items()}
            if question_B[row]:
                visit = self._key(int(users[row]), step // int(self._loads[users[row]]))
                self._ask(into, int(story), int(place - self._n_chunks[story]), visit)
            else:
                self._tell(into, int(story), int(place))
        arrays |= {"reset_B": place_B == 0, "story_B": story_B.astype(np.int32),
                   "question_B": question_B}
        return StoryBatch(**arrays)

    def _tell(self, into: dict[str, np.ndarray], story: int, chunk: int) -> None:
        """Fill a row with a chunk."""
        ids = self.stories.story_ids(story)
        first = chunk * self.chunk
        last = min(first + self.chunk, len(ids))
        begin = np.array([] if self.begin_id is None else [self.begin_id], np.int32)
        read = np.concatenate((begin, ids[first:last]))
        # One target more than tokens that were read, but at the story's end.
        targets = np.concatenate((ids[first : first + len(begin)], ids[first + 1 : last + 1]))
        into["tokens_BT"][: len(read)] = read
        into["targets_BT"][: len(targets)] = targets
        into["loss_weight_BT"][: len(targets)] = self.story_weight
        if len(begin) and chunk:
            into["loss_weight_BT"][0] = 0  # the end of the chunk before predicts it already
        into["document_ids_BT"][: len(read)] = 1
        into["positions_BT"][: len(read)] = np.arange(len(read))

    def _ask(self, into: dict[str, np.ndarray], story: int, place: int, visit: int) -> None:
        """Fill a row with questions."""
        key = mix(np.uint64(visit) ^ mix(np.uint64(story)))
        at = 0
        for document, number in enumerate(self._asked(story, place, key), start=1):
            asked = self.questions[story][number]
            choice = self._choice(len(asked.answers), key ^ np.uint64(number + 1))
            ids = np.concatenate((asked.prompt, asked.answers[choice]))
            n = len(ids) - 1
            into["tokens_BT"][at : at + n] = ids[:-1]
            into["targets_BT"][at : at + n] = ids[1:]
            into["loss_weight_BT"][at + len(asked.prompt) - 1 : at + n] = 1
            into["document_ids_BT"][at : at + n] = document
            into["positions_BT"][at : at + n] = np.arange(n)
            at += n

    def _asked(self, story: int, place: int, key: np.ndarray) -> Sequence[int]:
        """The questions of a row: a row of the story's, chosen anew every time."""
        layout = self._layouts[story]
        return layout[int(permute(np.array(place), len(layout), int(key)))]

    def _choice(self, n: int, key: np.ndarray) -> int:
        """Which of n answers."""
        return int(mix(key) % np.uint64(n))

    def _place(self, user: int, step: int) -> tuple[int, int]:
        """The story that a user is at, and the row of it."""
        epoch, index = divmod(step, int(self._loads[user]))
        order, starts = self._orders(user, epoch)
        at = int(np.searchsorted(starts, index, "right")) - 1
        return int(order[at]), int(index - starts[at])

    def _key(self, user: int, epoch: int) -> int:
        """64 bits of the seed for each time that a user reads its stories."""
        return int(mix(mix(mix(np.uint64(self.seed % 2**64)) ^ np.uint64(user)) ^ np.uint64(epoch)))

    @cached_property
    def _orders(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        """The stories of a user in the order of an epoch, and the row each begins at."""
        def orders(user: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
            own = self._dealt[user]
            order = own[permute(np.arange(len(own)), len(own), self._key(user, epoch))]
            return order, np.cumsum(self._rows[order]) - self._rows[order]

        return lru_cache(maxsize=4 * self.batch_size)(orders)

    @cached_property
    def _dealt(self) -> tuple[np.ndarray, ...]:
        """The stories of each user: in an order of the seed, always to who has least."""
        n = len(self.stories)
        dealt: list[list[int]] = [[] for _ in range(self.batch_size)]
        least = [(0, user) for user in range(self.batch_size)]
        for story in permute(np.arange(n), n, int(mix(np.uint64(self.seed % 2**64)))):
            load, user = heapq.heappop(least)
            dealt[user].append(int(story))
            heapq.heappush(least, (load + int(self._rows[story]), user))
        return tuple(np.array(own, np.int64) for own in dealt)

    @cached_property
    def _loads(self) -> np.ndarray:
        """Rows of all stories of each user."""
        return np.array([self._rows[own].sum() for own in self._dealt])

    @cached_property
    def _n_chunks(self) -> np.ndarray:
        """Rows of the text of each story."""
        return np.maximum(1, -(-self.stories.lengths // self.chunk))

    @cached_property
    def _rows(self) -> np.ndarray:
        """Rows of each story, with its questions."""
        asked = np.array([len(layout) for layout in self._layouts])
        return self._n_chunks + np.minimum(asked, self.question_rows or asked)

    @cached_property
    def _layouts(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Which questions about a story share a row, whatever answer is chosen."""
        return tuple(self._pack(asked) for asked in self.questions)

    def _pack(self, asked: Sequence[QuestionTokens]) -> tuple[tuple[int, ...], ...]:
        rows: list[list[int]] = []
        room = 0
        for number, one in enumerate(asked):
            if one.length - 1 > room:
                rows.append([])
                room = self.context
            rows[-1].append(number)
            room -= one.length - 1
        return tuple(map(tuple, rows))
