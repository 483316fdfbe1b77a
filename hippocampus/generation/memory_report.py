"""What the memory verb does with files, and what it says about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError
from hippocampus.generation.memory_file import SavedMemory, save_memory
from hippocampus.generation.memory_slots import export_lines, inspect_memory, merge_memories
from hippocampus.ops.memory_state import choose_users, empty_state


def report(saved: SavedMemory, tokenizer: Tokenizer | None, user: int | None, top: int) -> str:
    """What a memory holds: whose it is, and the most used slots with what wrote them.

    Args:
      saved: the memory.
      tokenizer: of the sources; None = ids.
      user: a row; None = all.
      top: slots of each.

    Raises:
      ConfigError: there is no such user.
    """
    state, f = saved.state, saved.fingerprint
    valid_BS = np.asarray(state.valid_BS)
    lines = [f"layer {f.layer!r} of model {f.model[:12]!r}, tokenizer {f.tokenizer[:12]!r}",
             f"{f.n_slots} slots of {f.n_heads} heads of width {f.head_width}",
             *(f"{name!r}: {text!r}" for name, text in saved.notes.items())]
    rows = inspect_memory(state, tokenizer, user=user, top=top)
    for b in range(len(valid_BS)) if user is None else (user,):
        lines += ["", f"user {b}: {valid_BS[b].sum()} slots in use, {state.writes_B[b]:,} writes, "
                  f"{state.tokens_B[b]:,} tokens"]
        mine = [row for row in rows if row.user == b]
        if mine:
            lines.append(f"{'slot':>7}{'usage':>10}{'strength':>10}{'age':>8}{'token':>9}  source")
        for row in mine:
            # As Python writes it: a stranger's text must not steer the terminal.
            source = list(row.ids) if row.text is None else repr(row.text)
            lines.append(f"{row.slot:>7}{row.usage:>10.4g}{row.strength:>10.4g}{row.age:>8}"
                         f"{row.position:>9}  {source}")
    return "\n".join(lines) + "\n"


def merge(out: Path, saved: Sequence[SavedMemory]) -> str:
    """Writes the merged memory of several files; returns a line about it.

    Args:
      out: the file to make.
      saved: memories of one layer; what the notes of earlier ones say stays.

    Raises:
      ConfigError: their users or sizes differ.
    """
    state = merge_memories([one.state for one in saved])
    notes = {name: text for one in reversed(saved) for name, text in one.notes.items()}
    save_memory(out, state, saved[0].fingerprint, notes)
    before = sum(int(np.sum(one.state.valid_BS)) for one in saved)
    return f"{out}: {int(np.sum(state.valid_BS))} slots of {before} in {len(saved)} files\n"


def reset(path: Path, saved: SavedMemory, user: int | None) -> str:
    """Empties a file's memory, or one user's part of it; returns a line about it.

    Raises:
      ConfigError: there is no such user.
    """
    f, users = saved.fingerprint, len(saved.state.writes_B)
    if user is not None and not 0 <= user < users:
        raise ConfigError(f"there is no user {user}", f"the memory has {users}, from 0")
    empty = empty_state(users, f.n_slots, f.n_heads, f.head_width,
                        saved.state.source_BSn.shape[-1])
    rows_B = np.ones(users, bool) if user is None else np.arange(users) == user
    state = jax.device_get(choose_users(jnp.asarray(rows_B), empty, saved.state))
    save_memory(path, state, f, saved.notes)
    return f"{path}: {int(rows_B.sum())} of {users} users emptied\n"


def export(saved: SavedMemory, tokenizer: Tokenizer | None, user: int | None,
           vectors: bool) -> str:
    """JSON lines, a slot each.

    Args:
      saved, tokenizer, user, vectors: as for `export_lines`.
    """
    return "".join(f"{line}\n" for line in export_lines(saved.state, tokenizer, user=user,
                                                        vectors=vectors))
