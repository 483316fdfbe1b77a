"""The fields of a persistent memory (hippocampus.layers.memory_bank)."""

from __future__ import annotations

from dataclasses import dataclass

from hippocampus.config_fields import count, setting
from hippocampus.errors import ConfigError

WRITE_STRATEGIES = ("ring", "standard", "gated", "delta", "consolidate")
"""Rules of writing, see hippocampus.ops.memory_write; standard is another name of ring."""

VALUES = ("hidden", "next_token")
"""What a slot's value is made of, see hippocampus.layers.memory_bank."""


@dataclass(frozen=True)
class MemoryConfig:
    """Slots that a user keeps between calls, processes and days."""

    n_slots: int = count(512, "slots S of a user", high=1_000_000)
    width: int = count(0, "width of a key, and of a value; 0 = d_model", low=0, high=65_536)
    n_heads: int = count(4, "heads H that retrieve on their own; they divide the width")
    beta: float = setting(0.0, "first inverse temperature of retrieval, then learned per head; "
                          "0 = the root of a head's width", low=0, high=1000)
    steps: int = count(2, "retrieval steps K", high=64)
    step_size: float = setting(1.0, "step alpha of a retrieval; the energy never rises for "
                               "alpha <= 1", above=0, high=1)
    strategy: str = setting("ring", "ring (also: standard) replaces the oldest slot, gated erases "
                            "and adds, delta corrects what the key retrieves, consolidate joins "
                            "what is alike", choices=WRITE_STRATEGIES)
    n_writes: int = count(8, "writes m of a chunk at most", high=4096)
    select: str = setting("stride", "what of a chunk is written: every (n/m)-th token, the m most "
                          "surprising ones, or the means of m equal parts",
                          choices=("stride", "surprise", "mean"))
    values: str = setting("hidden", "what a slot's value is made of: the hidden state that its key "
                          "is made of, or the embedding of the token that came next",
                          choices=VALUES)
    initial: str = setting("empty", "a new user's memory: no valid slot, random keys without "
                           "values, or learned slots", choices=("empty", "random", "learned"))
    decay: float = setting(0.0, "share of strength, and of values (gated, delta), that each later "
                           "write takes away", low=0, below=1)
    similarity: float = setting(0.9, "cosine rho of keys above which they are the same thing "
                                "(consolidate; gated and delta while a slot is free)",
                                low=-1, high=1)
    eta: float = setting(1.0, "rate of a correction (delta)", above=0, high=1)
    source_tokens: int = count(8, "last token ids that a slot remembers of what wrote it",
                               high=1024)


def check_memory(memory: MemoryConfig, d_model: int) -> None:
    """Refuses fields of a memory that contradict each other or the model.

    Args:
      memory: the fields.
      d_model: width D of the hidden states.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    width = memory.width or d_model
    if width % memory.n_heads:
        raise ConfigError(f"model.memory.n_heads = {memory.n_heads} does not divide the width "
                          f"{width}", "change model.memory.n_heads or model.memory.width")
    if memory.n_writes > memory.n_slots:
        raise ConfigError(f"model.memory.n_writes = {memory.n_writes} is more than "
                          f"model.memory.n_slots = {memory.n_slots}",
                          "a chunk would overwrite what it has just written")
