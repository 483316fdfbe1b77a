"""A tiny decoder whose tokenizer has the marks of ChatML, and what it is made to write."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import AddedToken

from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.backbones.loading import load_backbone
from hippocampus.config import Config
from hippocampus.data.tokenizer_files import bpe_trainer, library_bpe
from hippocampus.generation import decode
from hippocampus.generation.language_model import LanguageModel

FIXTURE = Path(__file__).resolve().parents[1] / "backbones" / "fixtures" / "llama"


def tokenizer() -> HubTokenizer:
    """Bytes and a few merges; as in Qwen3, the marks of calls are no special tokens."""
    library = library_bpe()
    library.train_from_iterator(["name arguments calculate expression"] * 9,
                                bpe_trainer(290, False))
    library.add_special_tokens([AddedToken(name, special=True, normalized=False)
                                for name in ("<|im_start|>", "<|im_end|>")])
    library.add_tokens([AddedToken(name, special=False, normalized=False)
                        for name in ("<tool_call>", "</tool_call>")])
    return HubTokenizer(library.to_str(), (library.token_to_id("<|im_end|>"),))


@functools.cache
def language_model() -> LanguageModel:
    """With random parameters."""
    words = tokenizer()
    decoder = load_backbone(FIXTURE)
    model = decoder.model.clone(config=dataclasses.replace(
        decoder.model.config, vocab_size=words.vocab_size))
    params = model.init(jax.random.key(3), np.zeros((1, 8), np.int32))["params"]
    plain = Config()
    config: Any = dataclasses.replace(plain, name="tiny", model=model.config,
                                      data=dataclasses.replace(plain.data, context=4096))
    return LanguageModel(model, params, words, config)


class Script:
    """Makes a model write what a test wants, through the real caches, and counts what is read."""

    def __init__(self, monkeypatch, lm: LanguageModel, text: str):
        self.ids = lm.tokenizer.encode(text).tolist()
        self.read = 0
        self.drawn_after: list[int] = []
        self.last: Any = None
        read, empty = decode._read, decode._empty

        def counting(model, variables, state, tokens_Bn, valid_Bn, *, skip):
            self.read += int(valid_Bn.sum())
            self.last = read(model, variables, state, tokens_Bn, valid_Bn, skip=skip)
            return self.last

        def write(model, variables, state, seeds, settings, limit, end_ids=(), *, skip=False):
            tokens = []
            while self.ids and len(tokens) < min(limit, decode.TOKENS_PER_CALL):
                tokens.append(self.ids.pop(0))
                if tokens[-1] in end_ids:
                    break
            assert tokens, "the script is at its end"
            ended = tokens[-1] in end_ids
            inside = tokens[:-1] if ended else tokens
            if inside:
                state = decode.read(model, variables, state, [np.array(inside, np.int32)])
            return state, decode.Drawn(np.array([tokens]), np.zeros((1, len(tokens))),
                                       np.int32(len(tokens)))

        monkeypatch.setattr(decode, "_read", counting)
        monkeypatch.setattr(decode, "_empty", empty)
        monkeypatch.setattr(decode, "write", write)
