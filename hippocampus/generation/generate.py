"""The host's side of generation: what is asked for, rows in batches, and their texts."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int, UInt32

from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError
from hippocampus.generation import decode
from hippocampus.generation.sampling import SamplerSettings
from hippocampus.generation.text_stream import TextStream
from hippocampus.ops.memory_state import MemoryState, join_users

ROWS_PER_BATCH = 64
"""Most prompts that are decoded side by side."""
_STREAMED_CALLS = (1, 16)
_WATCHED_CALLS = (8, decode.TOKENS_PER_CALL)
"""Tokens of the first call and of the largest, each twice the one before: pieces shall come soon,
and little be drawn behind a stop string."""


@dataclass(frozen=True)
class Continuation:
    """What a model wrote.

    Attributes:
      text: the continuation, without a stop string and what follows it.
      tokens: the ids that were drawn, those that completed a stop string or ended the text
        included.
      log_probabilities: of each of them, as the model gave them: before temperature, repetition
        penalty and filters.
      finish: "stop" (a stop string, or the token that ends a text) or "length".
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: Literal["length", "stop"]


@dataclass(frozen=True)
class Request:
    """How to continue texts; `check` refuses what is out of range.

    Attributes:
      max_new_tokens: most tokens to draw.
      sampler: settings of the sampler.
      stop: strings that end a text.
      segments: reasoning passes; None = as in training.
      skip: one pass and one step of the segment flow.
    """

    max_new_tokens: int
    sampler: SamplerSettings
    stop: tuple[str, ...] = ()
    segments: int | None = None
    skip: bool = False

    @classmethod
    def check(cls, model: Any, *, max_new_tokens: int, stop: str | Sequence[str],
              segments: int | None, skip: bool, **sampler: Any) -> Request:
        """Checks every setting.

        Args:
          model: that shall write.
          max_new_tokens, stop, segments, skip: as for `LanguageModel.generate`.
          sampler: fields of `SamplerSettings`.

        Raises:
          ConfigError: one is out of range, or not for this model.
        """
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        checks = (
            ("max_new_tokens", max_new_tokens, _whole(max_new_tokens, 0),
             "a whole number, at least 0"),
            ("temperature", sampler["temperature"], 0 <= sampler["temperature"] < math.inf,
             "at least 0"),
            ("top_k", sampler["top_k"], _whole(sampler["top_k"], 0), "a whole number, at least 0"),
            ("top_p", sampler["top_p"], 0 < sampler["top_p"] <= 1, "above 0 and at most 1"),
            ("min_p", sampler["min_p"], 0 <= sampler["min_p"] <= 1, "between 0 and 1"),
            ("repetition_penalty", sampler["repetition_penalty"],
             0 < sampler["repetition_penalty"] < math.inf, "above 0"),
            ("stop", stop, all(isinstance(text, str) and text for text in stop),
             "text, or several, none of them empty"),
            ("segments", segments, segments is None or _whole(segments, 1),
             "a whole number, at least 1"))
        for name, value, good, allowed in checks:
            if not good:
                raise ConfigError(f"{name} is {value!r}", f"it must be {allowed}")
        if segments is not None and segments > model.config.passes == 1:
            raise ConfigError(f"segments is {segments}, and the model was trained with one pass",
                              "it must be 1; train with model.segments.train above 1 for more")
        if skip and not getattr(model, "flow_width", 0):  # families without a reasoner have none
            raise ConfigError("skip needs a segment flow, which the model does not have",
                              "train with loss.rectified_flow.segment_weight above 0")
        if skip and segments is not None:
            raise ConfigError(f"skip runs one pass, and segments is {segments}", "give one of them")
        return cls(max_new_tokens, SamplerSettings(**sampler), stop, segments, skip)

    @property
    def passes(self) -> int | None:
        """Passes of the reasoner that are run."""
        return 1 if self.skip else self.segments


class Row:
    """One prompt and what was written behind it."""

    def __init__(self, prompt: Int[np.ndarray, " n"], seed: int, tokenizer: Tokenizer,
                 stop: Sequence[str], memory: MemoryState | None = None):
        """Nothing is written yet; `memory` is of the row's user."""
        self.prompt, self.seed, self.memory = prompt, seed, memory
        self._stream, self._end_ids = TextStream(tokenizer, prompt, stop), tokenizer.end_ids
        self._tokens: list[int] = []
        self._log_p: list[float] = []
        self.done = False

    def take(self, tokens_M: Int[np.ndarray, " M"], log_p_M: np.ndarray) -> str:
        """Takes what was drawn, up to where the text ends, and gives the new certain text."""
        ends_M = np.isin(tokens_M, self._end_ids)
        ended = bool(ends_M.any())
        n = int(np.argmax(ends_M)) if ended else len(tokens_M)
        piece = self._stream.push(tokens_M[:n].tolist())
        self._tokens += tokens_M[:n + ended].tolist()
        self._log_p += log_p_M[:n + ended].tolist()
        self.done = ended or self._stream.stopped
        return piece

    def finish(self) -> str:
        """The text that was held back in case more came."""
        piece = self._stream.finish()
        self.done |= self._stream.stopped
        return piece

    @property
    def continuation(self) -> Continuation:
        """What is written, after `finish`."""
        kept = self._stream.n_tokens if self._stream.stopped else len(self._tokens)
        return Continuation(self._stream.text, tuple(self._tokens[:kept]),
                            tuple(self._log_p[:kept]), "stop" if self.done else "length")

    @property
    def said(self) -> Int[np.ndarray, " n"]:
        """The prompt and the ids that were drawn behind it, without the one that ended the text."""
        tokens = self.continuation.tokens
        ended = tokens[-1:] and tokens[-1] in self._end_ids
        return np.concatenate((self.prompt, np.array(tokens[:-1] if ended else tokens, np.int32)))


def write_rows(model: Any, variables: Any, rows: Sequence[Row], request: Request, *, context: int,
               end_ids: Sequence[int], streamed: bool = False) -> Iterator[list[str]]:
    """Writes behind every row, as one batch on the device.

    Args:
      model: an unbound model.
      variables: from `decode_variables` of the model.
      rows: at most `ROWS_PER_BATCH`; all with a memory, or none.
      request: what is asked for.
      context: tokens that a row looks back to at most.
      end_ids: the ids that end a row.
      streamed: pieces shall come soon.

    Yields:
      The new text of every row.
    """
    B = 1 << (len(rows) - 1).bit_length()  # powers of two, so that few programs are compiled
    nothing = [np.zeros(0, np.int32)] * (B - len(rows))
    longest = max(len(row.prompt) for row in rows) + request.max_new_tokens
    limit, largest = (_STREAMED_CALLS if streamed else _WATCHED_CALLS if request.stop else
                      (decode.TOKENS_PER_CALL,) * 2)
    seeds_B = np.array([*(row.seed for row in rows), *[0] * len(nothing)], np.uint32)
    left = request.max_new_tokens
    if left:
        state = decode.start(
            model, variables, [*(row.prompt for row in rows), *nothing],
            max_length=decode.capacity(longest, context), passes=request.passes, skip=request.skip,
            memory=_memories(rows, B))
    while left > 0 and not all(row.done for row in rows):
        state, drawn = decode.write(model, variables, state, seeds_B, request.sampler,
                                    min(limit, left), end_ids, skip=request.skip)
        drawn = jax.device_get(drawn)
        n = int(drawn.n)
        before = [row.done for row in rows]
        yield ["" if row.done else row.take(drawn.tokens_BM[b, :n], drawn.log_p_BM[b, :n])
               for b, row in enumerate(rows)]
        left, limit = left - n, min(2 * limit, largest)
        if request.stop and left and [row.done for row in rows] != before:
            state = decode.stop_rows(
                state, np.array([*(row.done for row in rows), *[True] * len(nothing)]))
    yield [row.finish() for row in rows]


def _memories(rows: Sequence[Row], B: int) -> MemoryState | None:
    """Of the rows' users, and memories without a slot for the rows that stand for nothing."""
    own = [row.memory for row in rows if row.memory is not None]
    if not own:
        return None
    return join_users([*own, *[jax.tree.map(np.zeros_like, own[0])] * (B - len(rows))])


def in_batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows that are decoded side by side: of like length, so that few wait for others."""
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    for first in range(0, len(ordered), ROWS_PER_BATCH):
        yield ordered[first:first + ROWS_PER_BATCH]


def check_seeds(seed: int | Sequence[int], n: int) -> UInt32[np.ndarray, " n"]:
    """A seed for each of n rows; one holds for every row alike.

    Raises:
      ConfigError: one out of range, or another number of them.
    """
    one = isinstance(seed, (int, float, np.number))
    seeds: list[Any] = [seed] * n if one else list(seed)  # type: ignore[arg-type]
    for value in seeds[:1] if one else seeds:
        if not (_whole(value, 0) and value < 2**32):
            raise ConfigError(f"seed is {value!r}", "it must be between 0 and 2**32 - 1")
    if len(seeds) != n:
        raise ConfigError(f"seed has {len(seeds)} values for {n} prompts",
                          "it must be one number, or one for every prompt")
    return np.array(seeds, np.uint32)


def _whole(value: Any, low: int) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) >= low
    except TypeError:
        return False
