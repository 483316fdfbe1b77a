"""What a turn does to memories: they are read while texts are drawn, then the turn goes in.

    answer            = f(prompt, seed, memory)
    memory, after it  = forward(chunks of the prompt and the answer; memory, mode)

The second line is that of training: every chunk begins as the rows of a story do, is read with
what the memory holds by then, and is written after that. It alone changes a memory, and counts the
reads, so that the file is the same however the drawing was cut into calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from hippocampus.data.batches import Batch
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError
from hippocampus.generation.memory_file import Fingerprint
from hippocampus.generation.user_memory import UserMemory, check_apart
from hippocampus.layers.memory_bank import MODES
from hippocampus.ops.memory_state import MemoryState, join_users, take_users

USERS_PER_BATCH = 64
"""Most memories that are written side by side."""
_SHORTEST_CHUNK = 32
Memory = str | Path | UserMemory
"""A memory of one user: its file, or what `LanguageModel.open_memory` gives."""


@dataclass(frozen=True)
class Remembered:
    """What went into a memory.

    Attributes:
      tokens: of the text, without what stands in front of a chunk.
      chunks: that they were read in.
      writes: how many of them made an entry.
      used_slots: slots that are in use now.
    """

    tokens: int
    chunks: int
    writes: int
    used_slots: int


class Turn:
    """One turn of several users, each with a memory of his own.

    Attributes:
      states: the memories before it, one user each.
    """

    def __init__(self, memories: Sequence[UserMemory], mode: str):
        """Reads the memories.

        Args:
          memories: of the users, in their order.
          mode: one of `memory_bank.MODES`: what the turn does to them.

        Raises:
          ConfigError: two are the same, or one cannot be saved.
          CheckpointError: one is damaged, another model's, or not there and only to be read.
        """
        check_apart(memories)
        for memory in memories:
            memory.check(mode)
        self._memories, self._mode = memories, mode
        self._versions = [memory.version() for memory in memories]
        self.states = [memory.load() for memory in memories]

    def finish(self, model: Any, params: Any, texts: Sequence[Integer[np.ndarray, " n"]], *,
               begin_id: int | None, context: int) -> list[Remembered]:
        """Puts what was said into the memories and saves them, when all are computed.

        Args:
          model: with a memory.
          params: its parameters.
          texts: what each user's memory takes; `begin_id` in front of one is left out.
          begin_id: what every chunk begins with; None = nothing.
          context: tokens of a chunk, for a model that does not say.

        Returns:
          What went into each memory; nothing for the mode "frozen".

        Raises:
          CheckpointError: a memory cannot be saved; its file, and those behind it, are as before.
        """
        if self._mode == "frozen":
            return []
        chunk = model.chunk or context
        texts = [ids[1:] if len(ids) and ids[0] == begin_id else ids for ids in texts]
        after: list[MemoryState] = []
        for first in range(0, len(texts), USERS_PER_BATCH):
            here = slice(first, first + USERS_PER_BATCH)
            after += write_texts(model, params, self.states[here], texts[here],
                                 begin_id=begin_id, chunk=chunk, mode=self._mode)
        for memory, state, version in zip(self._memories, after, self._versions, strict=True):
            memory.save(state, version)
        room = chunk - (begin_id is not None)
        return [Remembered(len(text), -(-len(text) // room),
                           int(new.writes_B[0]) - int(old.writes_B[0]), int(new.valid_BS.sum()))
                for text, old, new in zip(texts, self.states, after, strict=True)]


def write_texts(model: Any, params: Any, states: Sequence[MemoryState],
                texts: Sequence[Integer[np.ndarray, " n"]], *, begin_id: int | None, chunk: int,
                mode: str) -> list[MemoryState]:
    """The memories of some users after their texts, chunk by chunk.

    Args:
      model: with a memory.
      params: its parameters.
      states: one user each; numpy arrays, as what comes back.
      texts: ids of each user.
      begin_id: stands in front of every chunk; None = nothing does.
      chunk: tokens of a chunk, with that.
      mode: one of `memory_bank.MODES`.

    Raises:
      ConfigError: a chunk has no room for a text.
    """
    begin = np.array([] if begin_id is None else [begin_id], np.int32)
    room = chunk - len(begin)
    if room < 1:
        raise ConfigError(f"a chunk of {chunk} tokens has no room for a text",
                          "raise model.chunk or data.context")
    n = len(texts)
    B = 1 << (n - 1).bit_length()  # powers of two, so that few programs are compiled
    nobody = jax.tree.map(np.zeros_like, states[0])
    memory = join_users([*states, *[nobody] * (B - n)])
    one = model.clone(chunk=0)  # the row is the chunk, and may be shorter
    for first in range(0, max(map(len, texts)), room):
        parts = [text[first:first + room] for text in texts]
        longest = max(map(len, parts)) + len(begin)
        size = min(chunk, max(_SHORTEST_CHUNK, 1 << (longest - 1).bit_length()))
        tokens_BT, filled_BT = np.zeros((2, B, size), np.int32)
        for b, part in enumerate(parts):
            if len(part):
                row = np.concatenate((begin, part))
                tokens_BT[b, :len(row)], filled_BT[b, :len(row)] = row, 1
        memory = _take_in(one, params, tokens_BT, filled_BT, memory, np.int32(MODES.index(mode)))
    memory = jax.device_get(memory)
    return [take_users(memory, [b]) for b in range(n)]


def one_each(memories: Any, n: int, open_memory: Callable[[Any], UserMemory],
             fingerprint: Fingerprint) -> list[UserMemory]:
    """A memory for each of n users.

    Args:
      memories: what a caller gave: n files, or opened memories.
      n: users.
      open_memory: makes a memory of a file.
      fingerprint: of the model.

    Raises:
      ConfigError: another number of them, or one that another model opened.
      CheckpointError: as `open_memory`.
    """
    listed = isinstance(memories, Sequence) and not isinstance(memories, str)
    if not listed or len(memories) != n:
        raise ConfigError(f"there are {n} texts, and memories for another number of users",
                          "a memory is one user's: give a list of as many")
    for one in memories:
        if not isinstance(one, Memory):
            raise ConfigError(f"memory is {one!r}", "it must be a file, or of open_memory")
    opened = [one if isinstance(one, UserMemory) else open_memory(one) for one in memories]
    if any(one.fingerprint != fingerprint for one in opened):
        raise ConfigError("a memory was opened by another model",
                          "a memory is of use to the model that wrote it")
    return opened


def document_ids(text: str, tokenizer: Tokenizer, name: str) -> Int[np.ndarray, " n"]:
    """The ids of a text that is told, as training reads a story: special tokens in it are text.

    Args:
      text: of any length.
      tokenizer: of the model.
      name: of the text, for the message.

    Raises:
      ConfigError: it is no text, or empty.
      DataError: a character that the tokenizer does not know.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{name} is {text!r}", "it must be text")
    if not text:
        raise ConfigError(f"{name} is empty", "give at least one character")
    return tokenizer.encode_document(text)[tokenizer.end_id is not None:]


@functools.partial(jax.jit, static_argnums=0)
def _take_in(model: Any, params: Any, tokens_BT: Array, filled_BT: Array, memory: MemoryState,
             mode: Array) -> MemoryState:
    """One chunk of every row; `filled_BT` is 0 for padding."""
    places_BT = jax.lax.broadcasted_iota(np.int32, tokens_BT.shape, 1)
    batch = Batch(tokens_BT, tokens_BT, filled_BT.astype(jnp.float32), filled_BT,
                  places_BT * filled_BT, jnp.zeros(len(tokens_BT), bool))
    _, _, state = model.apply({"params": params}, batch, {"memory": memory}, interventions=mode,
                              method="forward")
    after: MemoryState = state["memory"]
    return after
