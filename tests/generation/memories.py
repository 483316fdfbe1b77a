"""Small memories for tests, and a process that saves one again and again."""

import sys
from pathlib import Path

import numpy as np

from hippocampus.generation.memory_file import Fingerprint, save_memory
from hippocampus.ops.memory_state import MemoryState

S, H, d, n = 6, 2, 4, 5
FINGERPRINT = Fingerprint(model="ab" * 32, layer="memory", d_model=8, n_slots=S, n_heads=H,
                          head_width=d, tokenizer="cd" * 32)


def memory(seed: int = 0, users: int = 1, used: int = 4, text: bytes = b"the cat sat on it",
           slots: int = S) -> MemoryState:
    """Slots 0..used-1 are in use; the source of slot s is text[s:s + n]."""
    rng = np.random.default_rng(seed)
    valid = np.tile(np.arange(slots) < used, (users, 1))
    patterns = rng.normal(size=(2, users, slots, H, d)).astype(np.float32)
    source = [[text[s % len(text):][:n].rjust(n, b"\xff") for s in range(slots)]] * users
    ids = np.array([[list(one) for one in row] for row in source], np.int32)
    age = np.tile(np.arange(slots)[::-1], (users, 1)).astype(np.int32)
    return MemoryState(
        keys_BSHd=patterns[0], values_BSHd=patterns[1], age_BS=age,
        usage_BS=rng.uniform(size=(users, slots)).astype(np.float32) * valid,
        strength_BS=valid.astype(np.float32), valid_BS=valid,
        position_BS=np.where(valid, np.arange(slots), -1).astype(np.int32),
        source_BSn=np.where(ids == 255, -1, ids), writes_B=np.full(users, used, np.int32),
        tokens_B=np.full(users, 99, np.int32))


def save_for_ever(path: Path) -> None:
    """Memories of 2 MB, the numbers of the i-th all i; says when the first is there."""
    like, slots, i = memory(slots=32_768), 32_768, 0
    fingerprint = Fingerprint("m", "l", 8, slots, H, d, "")
    while True:
        i += 1
        state = like.replace(keys_BSHd=np.full_like(like.keys_BSHd, i),
                             values_BSHd=np.full_like(like.values_BSHd, i))
        save_memory(path, state, fingerprint, {"number": str(i)})
        sys.stdout.write(f"{i}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    save_for_ever(Path(sys.argv[1]))
