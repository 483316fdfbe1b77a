"""A tiny CHopT whose memory is known to help: what it reads is a mean of the letters it was told.

The decoder's layers add nothing, so that a hidden state is its token's embedding; a value is that
embedding too, and what is read raises the logits of the letters that the story is made of. Every
story is made of one letter, and asked about it.

    python planted_memory.py FOLDER        # writes the memories, as the first process does
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np

from hippocampus.backbones.loading import load_backbone
from hippocampus.config_memory import MemoryConfig
from hippocampus.data.story_forms import Question, Story
from hippocampus.data.story_tokens import Template
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.models.chopt import CHopT
from hippocampus.probing.memory.subject import Settings, Subject
from hippocampus.probing.memory.writing import write_stories

LLAMA = Path(__file__).resolve().parents[1] / "backbones" / "fixtures" / "llama"
CONTEXT, BEGIN, END = 16, 1, 2
TEMPLATE = Template("Q: {question}\nA:{answer}")
SETTINGS = Settings(stories=0, questions=1, answer_tokens=4, context_tokens=64, passage_words=4,
                    delays=(1, 4), interferers=(1, 2), slots=(4,), users=4, rows=8)
FEW = dataclasses.replace(SETTINGS, slots=(12,))
"""Without the curve over slots, which takes programs of its own."""
STORIES = 10


def stories(n: int = STORIES) -> tuple[Story, ...]:
    """Stories of one letter each, of different lengths."""
    return tuple(Story(f"tale {letter}", " ".join([4 * letter] * (5 + i % 3)), (
        Question(f"Which {i}?", (4 * letter, f"it is {4 * letter}")),
        Question("And then?", (4 * letter,))))
        for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz"[:n]))


@functools.cache
def subject(gate: float = 20.0, **fields) -> Subject:
    """The model; gate 0 = as it is before any training."""
    decoder = load_backbone(LLAMA)
    config = decoder.model.config
    config = dataclasses.replace(config, vocab_size=256, layers=config.layers[:1])
    D, rng = config.d_model, np.random.default_rng(0)
    memory = MemoryConfig(**{"n_slots": 12, "n_heads": 2, "n_writes": 4, "source_tokens": 2,
                             "beta": 1.0, "select": "stride", **fields})

    def silent(path, leaf):
        name = jax.tree_util.keystr(path)
        adds = "['out']" in name or "['down']" in name
        return np.zeros_like(leaf) if adds else np.ones_like(leaf) if "scale" in name else leaf

    backbone = jax.tree_util.tree_map_with_path(silent, {
        name: decoder.params[name] for name in ("layers_0", "norm_out")})
    backbone = {**backbone, "embedding": rng.normal(size=(256, D)).astype(np.float32) * D**-0.25}
    eye = {"kernel": np.eye(D, dtype=np.float32)}
    bank = {"norm": {"scale": np.ones(D, np.float32)}, "value": eye, "out": eye,
            "query": {"kernel": rng.normal(size=(D, D)).astype(np.float32)},
            "key": {"kernel": rng.normal(size=(D, D)).astype(np.float32)},
            "log_beta": np.zeros(2, np.float32), "read_gate": np.float32(gate)}
    if memory.initial == "learned":
        shape = (memory.n_slots, 2, D // 2)
        bank |= {"prior_keys": np.ones(shape, np.float32),
                 "prior_values": np.ones(shape, np.float32)}
    return Subject(CHopT(config, memory), {"backbone": backbone, "memory_bank": bank},
                   byte_tokenizer(), TEMPLATE, CONTEXT, BEGIN, END)


if __name__ == "__main__":
    write_stories(subject(), stories(), FEW, Path(sys.argv[1]), step=7)
