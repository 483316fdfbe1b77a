"""The slots of memories, as rows to read and as parts to put together; all of it in numpy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError
from hippocampus.ops.memory_state import NO_SOURCE, MemoryState


@dataclass(frozen=True)
class Slot:
    """A slot that is in use.

    Attributes:
      user: its row in the memory.
      slot: its number.
      usage: weight that reads have put on it.
      strength: weight that writes have put on it.
      age: writes since the last of them.
      position: of its last source among the user's tokens; -1 = unknown.
      ids: the tokens up to there.
      text: what they say; None without a tokenizer.
    """

    user: int
    slot: int
    usage: float
    strength: float
    age: int
    position: int
    ids: tuple[int, ...]
    text: str | None


def inspect_memory(state: MemoryState, tokenizer: Tokenizer | None = None, *,
                   user: int | None = None, top: int | None = None) -> list[Slot]:
    """The slots in use, the most read first, then the strongest, then the newest.

    Args:
      state: memories.
      tokenizer: of the sources; None = their ids alone. Ids that it has not are left out.
      user: one row; None = all, each in its turn.
      top: of a user at most; None = all.

    Raises:
      ConfigError: there is no such user.
    """
    arrays = jax.device_get(state.arrays())
    users = len(arrays["writes_B"])
    if user is not None and not 0 <= user < users:
        raise ConfigError(f"there is no user {user}", f"the memory has {users}, from 0")
    rows = []
    for b in range(users) if user is None else (user,):
        order = np.lexsort((arrays["age_BS"][b], -arrays["strength_BS"][b],
                            -arrays["usage_BS"][b]))
        used = [int(s) for s in order if arrays["valid_BS"][b, s]]
        for s in used[:top]:
            ids = tuple(int(i) for i in arrays["source_BSn"][b, s] if i != NO_SOURCE)
            text = None if tokenizer is None else tokenizer.decode(
                [i for i in ids if 0 <= i < tokenizer.vocab_size])
            rows.append(Slot(b, s, float(arrays["usage_BS"][b, s]),
                             float(arrays["strength_BS"][b, s]), int(arrays["age_BS"][b, s]),
                             int(arrays["position_BS"][b, s]), ids, text))
    return rows


def export_lines(state: MemoryState, tokenizer: Tokenizer | None = None, *,
                 user: int | None = None, vectors: bool = False) -> Iterator[str]:
    """A JSON object for every slot in use, in the order of `inspect_memory`.

    Args:
      state, tokenizer, user: as for `inspect_memory`.
      vectors: also "key" and "value", as lists per head.

    Raises:
      ConfigError: there is no such user.
    """
    keys, values = jax.device_get((state.keys_BSHd, state.values_BSHd))
    for row in inspect_memory(state, tokenizer, user=user):
        content = asdict(row)
        if vectors:
            content |= {"key": keys[row.user, row.slot].tolist(),
                        "value": values[row.user, row.slot].tolist()}
        yield json.dumps(content, ensure_ascii=False)


def merge_memories(states: Sequence[MemoryState]) -> MemoryState:
    """One memory out of several of the same users and sizes, in as many slots as each has.

    Of all slots in use, those of the largest strength + usage stay, the newer ones of equals. Slots
    with the same key are one slot, which two copies of a memory share: the newest stands for them,
    with the largest strength and usage of any.

    Args:
      states: at least one; row b of each is the same user.

    Returns:
      numpy arrays; the slots of a user in the order of age, the oldest first. Counts of writes and
      tokens are summed.

    Raises:
      ConfigError: none is given, or their sizes differ.
    """
    parts = [jax.device_get(state.arrays()) for state in states]
    if not parts:
        raise ConfigError("there is no memory to merge", "give at least one")
    for part in parts[1:]:
        for name, array in part.items():
            if array.shape != parts[0][name].shape:
                raise ConfigError(f"the memories have {name} of {list(parts[0][name].shape)} and "
                                  f"{list(array.shape)}", "merge memories of the same users and "
                                  "the same settings")
    pool = {name: np.concatenate([part[name] for part in parts], axis=1)
            for name in parts[0] if parts[0][name].ndim > 1}
    users, S = parts[0]["valid_BS"].shape
    chosen = [_choose({name: array[b] for name, array in pool.items()}, S) for b in range(users)]
    merged: dict[str, Any] = {name: np.stack([one[name] for one in chosen]) for name in pool}
    for name in ("writes_B", "tokens_B"):
        merged[name] = sum(part[name] for part in parts).astype(np.int32)
    return MemoryState(**merged)


def _choose(pool: dict[str, np.ndarray], S: int) -> dict[str, np.ndarray]:
    """The slots of one user that stay, and behind them what is left free."""
    same: dict[bytes, list[int]] = {}
    for i in np.flatnonzero(pool["valid_BS"]):
        same.setdefault(pool["keys_BSHd"][i].tobytes(), []).append(int(i))
    pool = {name: array.copy() for name, array in pool.items()}
    kept = []
    for copies in same.values():
        newest = min(copies, key=lambda i: pool["age_BS"][i])
        for name in ("strength_BS", "usage_BS"):
            pool[name][newest] = pool[name][copies].max()
        kept.append(newest)
    age, worth = pool["age_BS"], pool["strength_BS"] + pool["usage_BS"]
    kept = sorted(sorted(kept, key=lambda i: (-worth[i], age[i], i))[:S],
                  key=lambda i: (-age[i], i))
    chosen = {}
    for name, array in pool.items():
        blank = NO_SOURCE if name in ("position_BS", "source_BSn") else 0
        chosen[name] = np.full((S, *array.shape[1:]), blank, array.dtype)
        chosen[name][:len(kept)] = array[kept]
    return chosen
