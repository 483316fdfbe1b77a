"""Asks a model with given memories: how likely an answer is, and what it writes itself.

Nothing here writes to a memory. A prompt is a row of its own, so that attention sees it alone; what
it knows besides came out of the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float64, Int32

from hippocampus.data.batches import Batch
from hippocampus.generation import decode
from hippocampus.generation.sampling import SamplerSettings
from hippocampus.layers.memory_bank import MODES
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.ops.memory_state import MemoryState, take_users
from hippocampus.probing.memory.subject import Subject
from hippocampus.probing.memory.writing import rows_as_batch

_ROUND = 32
"""Lengths of rows are multiples of it, so that few programs serve all."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked, and whose memory is open.

    Attributes:
      ids: all that is in front of the answer.
      answer: ids whose probability is asked for.
      user: whose memory.
    """

    ids: Int32[np.ndarray, " P"]
    answer: Int32[np.ndarray, " A"]
    user: int


def row_length(prompts: Sequence[Prompt]) -> int:
    """Tokens of a row that holds any of the prompts with its answer."""
    longest = max(len(one.ids) + len(one.answer) - 1 for one in prompts)
    return -(-longest // _ROUND) * _ROUND


def log_probabilities(subject: Subject, memories: MemoryState, prompts: Sequence[Prompt], *,
                      rows: int, length: int) -> Float64[np.ndarray, " n"]:
    """log p of every answer behind its prompt, in nats, summed over its tokens.

    Args:
      subject: the model.
      memories: of the users that prompts name, as numpy arrays.
      prompts: what is asked.
      rows: at once; the last ones may be padding.
      length: of every row, at least `row_length`.
    """
    found = []
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        batch, mode_B = _batch(part, rows, length), np.int32(MODES.index("frozen"))
        own = _memories_of(memories, part, rows)
        log_p_B = _log_p(subject.reader, subject.params, *subject.place((batch, own)), mode_B)
        found.append(np.asarray(log_p_B, np.float64)[: len(part)])
    return np.concatenate(found)


def written_answers(subject: Subject, memories: MemoryState, prompts: Sequence[Prompt], *,
                    rows: int, most: int, capacity: int) -> list[str]:
    """What the model writes behind every prompt, always the most likely token.

    Args:
      subject, memories, prompts, rows: as for `log_probabilities`.
      most: tokens of an answer at most.
      capacity: tokens of the longest prompt with its answer.

    Returns:
      The answers up to the id that ends a text, or to the end of their first line.
    """
    variables = subject.reader.decode_variables(subject.params, capacity)
    ends = tuple(dict.fromkeys((*subject.tokenizer.end_ids, *(
        () if subject.end_id is None else (subject.end_id,)))))
    texts = []
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        ids = [one.ids for one in part] + [np.zeros(0, np.int32)] * (rows - len(part))
        state = decode.start(subject.reader, variables, ids, max_length=capacity,
                             memory=subject.place(_memories_of(memories, part, rows)))
        drawn: list[np.ndarray] = []
        while sum(map(len, drawn)) < most:
            state, got = decode.write(subject.reader, variables, state, np.zeros(rows, np.uint32),
                                      SamplerSettings(temperature=0.0),
                                      most - sum(map(len, drawn)), ends)
            if not int(got.n):
                break
            drawn.append(np.asarray(got.tokens_BM)[:, : int(got.n)].T)
        tokens_BM = np.concatenate(drawn).T
        texts += [_text(subject, tokens_M, ends) for tokens_M in tokens_BM[: len(part)]]
    return texts


def _text(subject: Subject, tokens_M: np.ndarray, ends: Sequence[int]) -> str:
    ended = np.isin(tokens_M, (-1, *ends))
    kept = tokens_M[: int(ended.argmax())] if ended.any() else tokens_M
    kept = kept[kept < subject.tokenizer.vocab_size]
    return (subject.tokenizer.decode(kept).strip().splitlines() or [""])[0].strip()


def _batch(prompts: Sequence[Prompt], rows: int, length: int) -> Batch:
    tokens, targets = (np.zeros((rows, length), np.int32) for _ in range(2))
    weight, valid = np.zeros((rows, length), np.float32), np.zeros((rows, length), bool)
    for row, one in enumerate(prompts):
        ids = np.concatenate((one.ids, one.answer))
        n = len(ids) - 1
        tokens[row, :n], targets[row, :n], valid[row, :n] = ids[:-1], ids[1:], True
        weight[row, len(one.ids) - 1 : n] = 1
    return rows_as_batch(tokens, targets, weight, valid)


def _memories_of(memories: MemoryState, prompts: Sequence[Prompt], rows: int) -> MemoryState:
    users = [one.user for one in prompts]
    return take_users(memories, users + users[-1:] * (rows - len(users)))


@functools.partial(jax.jit, static_argnums=0)
def _log_p(model: Any, params: Any, batch: Batch, memory: MemoryState,
           mode_B: Array) -> Float[Array, " B"]:
    hidden_BTD, _, _ = model.apply({"params": params}, batch, {"memory": memory},
                                   interventions=mode_B, method="forward")
    nll_BT = token_nll(hidden_BTD, model.head(params), batch.targets_BT)
    return -(nll_BT * batch.loss_weight_BT).sum(1)
