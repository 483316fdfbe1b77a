"""A tiny decoder with a memory, as a user holds it, and a process that takes one turn with it."""

import dataclasses
import functools
import json
import string
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken, processors

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.backbones.loading import load_backbone
from hippocampus.config import Config
from hippocampus.config_memory import MemoryConfig
from hippocampus.data.tokenizer_files import library_characters
from hippocampus.data.tokenizers import Tokenizer, character_tokenizer
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.chopt import CHopT

FIXTURE = Path(__file__).resolve().parents[1] / "backbones" / "fixtures" / "llama"
CHUNK = 8
LETTERS = string.printable[:94].replace("~", "\n") + " "
STORY = "Ann left the old map at the mill. Then it rained for nine days.\nBert found it."
ASK = "Who has it?"
SETTINGS = {"max_new_tokens": 12, "seed": 3, "temperature": 0.9}


def beginning_tokenizer() -> HubTokenizer:
    """Characters, with <s> in front of every text; </s> ends one."""
    library = library_characters({c: i for i, c in enumerate(LETTERS)})
    library.add_special_tokens([AddedToken(name, special=True, normalized=False)
                                for name in ("<s>", "</s>")])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(LETTERS))])
    return HubTokenizer(library.to_str(), (len(LETTERS) + 1,))


def plain_tokenizer() -> Tokenizer:
    """The same characters, with nothing in front of a text."""
    return character_tokenizer(LETTERS + "~\t")


@functools.cache
def language_model(chunk: int = CHUNK, begins: bool = True, seed: int = 1, context: int = 64,
                   **fields: Any) -> LanguageModel:
    """The same arguments give the same object, and the same bits in every process."""
    decoder = load_backbone(FIXTURE)
    memory = MemoryConfig(**{"n_slots": 8, "n_heads": 2, "n_writes": 2, "source_tokens": 3,
                             "beta": 4.0, **fields})
    model = CHopT(decoder.model.config, memory, chunk)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, CHUNK), np.int32))
    rng = np.random.default_rng(seed)
    bank = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
                        shapes["params"]["memory_bank"])
    bank |= {"read_gate": np.float32(2), "log_beta": np.full(2, np.log(4), np.float32)}
    params = jax.tree.map(jax.numpy.asarray, {"backbone": decoder.params, "memory_bank": bank})
    plain = Config()
    config: Any = dataclasses.replace(
        plain, name="tiny", data=dataclasses.replace(plain.data, context=context))
    tokenizer = beginning_tokenizer() if begins else plain_tokenizer()
    return LanguageModel(model, params, tokenizer, config)


if __name__ == "__main__":
    path, prompt = sys.argv[1:]
    sys.stdout.write(json.dumps(language_model().generate(prompt, memory=path, **SETTINGS)))
