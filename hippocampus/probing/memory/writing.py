"""Feeds stories to memories and saves them: the first of two processes.

    write_stories(subject, stories, settings, folder)     # <folder>/<point>/<number>.memory

Every story is a user's. Many users are written at once; a row of one that has read all of his is
padding, and leaves his memory as it is.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from hippocampus.data.batches import Batch
from hippocampus.data.story_forms import Story
from hippocampus.errors import DataError
from hippocampus.generation.memory_file import load_memory, save_memory
from hippocampus.layers.memory_bank import MODES
from hippocampus.ops.memory_state import MemoryState, join_users, take_users
from hippocampus.probing.memory.subject import STORY, Point, Settings, Subject, points

Row = tuple[np.ndarray, np.ndarray]
"""Ids of one row, and which of them are no padding."""

_READS, _SLEEPS = MODES.index("read+write"), MODES.index("frozen")


def write_stories(subject: Subject, stories: Sequence[Story], settings: Settings, folder: Path, *,
                  seed: int = 0, step: int | None = None,
                  say: Callable[[str], None] = lambda line: None) -> None:
    """Feeds every story to a memory of its own, and saves it at every point of the curves.

    Args:
      subject: the model.
      stories: from 2 on.
      settings: how much.
      folder: of the files, one a story and point.
      seed: of the rows that are read as a delay.
      step: of the checkpoint, for the notes.
      say: is told what is being written.

    Raises:
      DataError: fewer than two stories, so that no other story's memory is there.
      CheckpointError: a file cannot be written, or a memory has numbers that are not finite.
    """
    if len(stories) < 2:
        raise DataError(f"there are {len(stories)} stories to be asked about",
                        "another story's memory is a control: it takes two or more")
    rows = [_rows_of(subject, story) for story in stories]
    asked, _ = points(subject, settings, len(stories))
    by_kind = {kind: [point for point in asked if point.kind == kind]
               for kind in ("delay", "interference", "slots")}
    for first in range(0, len(stories), settings.users):
        users = list(range(first, min(first + settings.users, len(stories))))
        say(f"writing the memories of {users[-1] + 1} of {len(stories)} stories")

        def save(point: Point, state: MemoryState, users: Sequence[int] = users) -> None:
            state = jax.device_get(state)
            for row, user in enumerate(users):
                save_memory(memory_path(folder, point, user), take_users(state, [row]),
                            subject.at(point).fingerprint(),
                            notes_of(stories[user], point, seed, step))

        own = [rows[user] for user in users]
        base = read_rows(subject, subject.new_memories(settings.users), own)
        save(STORY, base)
        between = [_delay(rows, user, max((p.amount for p in by_kind["delay"]), default=0), seed)
                   for user in users]
        for kind, streams in (("delay", [[[row] for row in own] for own in between]),
                              ("interference", [_others(rows, user) for user in users])):
            memory, done = base, 0
            for point in by_kind[kind]:
                parts = [[row for part in stream[done:point.amount] for row in part]
                         for stream in streams]
                memory, done = read_rows(subject, memory, parts), point.amount
                save(point, memory)
        for point in by_kind["slots"]:
            other = subject.at(point)
            save(point, read_rows(other, other.new_memories(settings.users), own))


def read_rows(subject: Subject, memory: MemoryState,
              streams: Sequence[Sequence[Row]]) -> MemoryState:
    """The memories after every user has read his rows.

    Args:
      subject: the model.
      memory: of so many users that one program serves every batch.
      streams: rows of each of the first users; the others read nothing.
    """
    width = len(memory.writes_B)
    memory = subject.place(memory)
    for step in range(max(map(len, streams), default=0)):
        tokens = np.zeros((width, subject.context), np.int32)
        valid = np.zeros(tokens.shape, bool)
        mode_B = np.full(width, _SLEEPS, np.int32)
        for user, stream in enumerate(streams):
            if step < len(stream):
                tokens[user], valid[user] = stream[step]
                mode_B[user] = _READS
        memory = _write_rows(subject.model, subject.params, *subject.place((
            rows_as_batch(tokens, tokens, valid.astype(np.float32), valid), memory, mode_B)))
    return memory


def rows_as_batch(tokens_BT: np.ndarray, targets_BT: np.ndarray, weight_BT: np.ndarray,
                  valid_BT: np.ndarray) -> Batch:
    """Rows that begin at position 0 and go on with the memories they are given.

    Args:
      tokens_BT, targets_BT: ids.
      weight_BT: of the targets.
      valid_BT: what is no padding.
    """
    arrays: dict[str, Any] = {
        "tokens_BT": tokens_BT, "targets_BT": targets_BT, "loss_weight_BT": weight_BT,
        "document_ids_BT": valid_BT.astype(np.int32), "positions_BT": np.broadcast_to(
            np.arange(tokens_BT.shape[1], dtype=np.int32), tokens_BT.shape),
        "reset_B": np.zeros(len(tokens_BT), bool)}
    return Batch(**arrays)


def load_memories(subject: Subject, stories: Sequence[Story], point: Point, folder: Path, *,
                  seed: int = 0) -> tuple[MemoryState, tuple[int, ...]]:
    """The memories of a point, one user a story, as numpy arrays; and the bytes of their files.

    Args:
      subject: the model that wrote them.
      stories, seed: as they were for `write_stories`.
      point: of the curves.
      folder: of the files.

    Raises:
      CheckpointError: a file is missing, damaged or another model's.
      DataError: a memory of another story, or after something else.
    """
    fingerprint, states, sizes = subject.at(point).fingerprint(), [], []
    for user, story in enumerate(stories):
        path = memory_path(folder, point, user)
        saved = load_memory(path, fingerprint)
        for name, value in notes_of(story, point, seed, None).items():
            if name != "step" and saved.notes.get(name) != value:
                raise DataError(f"{path} has the {name} {saved.notes.get(name, '')[:40]!r}, and "
                                f"{value[:40]!r} is asked about", "write the memories again with "
                                "the same stories, seed and settings")
        states.append(saved.state)
        sizes.append(path.stat().st_size)
    return jax.device_get(join_users(states)), tuple(sizes)


def memory_path(folder: Path, point: Point, user: int) -> Path:
    """The file of a story's memory."""
    return folder / point.name / f"{user:04d}.memory"


def notes_of(story: Story, point: Point, seed: int, step: int | None) -> Mapping[str, str]:
    """What is written beside a memory, by which the asking process knows it."""
    return {"story": story.name, "text": hashlib.sha256(story.text.encode()).hexdigest(),
            "point": point.name, "seed": str(seed), "step": "" if step is None else str(step)}


def _rows_of(subject: Subject, story: Story) -> list[Row]:
    return list(zip(*subject.rows(story), strict=True))


def _others(rows: Sequence[Sequence[Row]], user: int) -> list[Sequence[Row]]:
    """The other stories, those that follow first."""
    return [rows[(user + i) % len(rows)] for i in range(1, len(rows))]


def _delay(rows: Sequence[Sequence[Row]], user: int, n: int, seed: int) -> list[Row]:
    """So many rows, each out of another story than the user's, drawn anew."""
    def drawn() -> Iterator[Row]:
        rng = np.random.default_rng([seed, user])
        for _ in range(n):
            other = rows[(user + int(rng.integers(1, len(rows)))) % len(rows)]
            full = max(1, len(other) - 1)  # the last row is short
            yield other[int(rng.integers(full))]

    return list(drawn())


@functools.partial(jax.jit, static_argnums=0)
def _write_rows(model: Any, params: Any, batch: Batch, memory: MemoryState,
                mode_B: Int[Array, " B"]) -> MemoryState:
    _, _, state = model.apply({"params": params}, batch, {"memory": memory},
                              interventions=mode_B, method="forward")
    new: MemoryState = state["memory"]
    return new
