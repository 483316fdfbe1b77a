"""LanguageModel: a trained model with its tokenizer, as a user holds it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.data.documents import count_words
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.generation.sampling import SamplerSettings, sample_without_cache
from hippocampus.generation.text_stream import TextStream
from hippocampus.models import taps
from hippocampus.ops.cross_entropy import token_nll


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
      nats: summed -log p of every token but the first, which has nothing before it.
      tokens: how many were predicted.
      words: of the whole text, as WikiText counts: between white space, and one a line end.
      bytes: UTF-8 bytes of what was predicted.
    """

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        """Cross-entropy per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy per byte in bits: comparable between tokenizers."""
        return self.nats / (math.log(2) * self.bytes)

    @property
    def word_ppl(self) -> float:
        """exp(nats / words): perplexity per word, comparable between tokenizers."""
        return math.exp(self.nats / max(1, self.words))


class LanguageModel:
    """Generates, scores, and opens up a trained model."""

    def __init__(self, model: Any, params: Any, tokenizer: Tokenizer, config: Config,
                 step: int | None = None):
        """Puts together what `load` reads from a run folder."""
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.config, self.step = config, step

    @overload
    def generate(self, prompt: str, *, max_new_tokens: int = ..., temperature: float = ...,
                 top_k: int = ..., top_p: float = ..., seed: int = ...,
                 stream: Literal[False] = ...) -> str: ...
    @overload
    def generate(self, prompt: str, *, max_new_tokens: int = ..., temperature: float = ...,
                 top_k: int = ..., top_p: float = ..., seed: int = ...,
                 stream: Literal[True]) -> Iterator[str]: ...
    def generate(self, prompt: str, *, max_new_tokens: int = 200, temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, seed: int = 0,
                 stream: bool = False) -> str | Iterator[str]:
        """Continues a text.

        Args:
          prompt: the text to continue; at least one token.
          max_new_tokens: tokens to add.
          temperature: 0 = always the most likely token.
          top_k: draw among the k most likely; 0 = all.
          top_p: draw among the most likely that reach this probability; 1 = all.
          seed: the same seed gives the same text.
          stream: yield pieces of text as they come.

        Returns:
          The continuation without the prompt, or an iterator over its pieces.

        Raises:
          ConfigError: a setting out of range, or an empty prompt.
          DataError: a character that the tokenizer does not know.
        """
        checks = (("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
                  ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
                  ("top_k", top_k, top_k >= 0, "at least 0"),
                  ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
                  ("seed", seed, 0 <= seed < 2**32, "between 0 and 2**32 - 1"))
        for name, value, good, allowed in checks:
            if not good:
                raise ConfigError(f"{name} is {value}", f"it must be {allowed}")
        ids = self.tokenizer.encode(prompt)
        if not len(ids):
            raise ConfigError("the prompt is empty", "give at least one character")
        tokens = sample_without_cache(
            self.model, self.params, ids, context=self.config.data.context,
            max_new_tokens=max_new_tokens, seed=seed,
            settings=SamplerSettings(float(temperature), int(top_k), float(top_p)))
        pieces = _pieces(TextStream(self.tokenizer, ids), tokens)
        return pieces if stream else "".join(pieces)

    def score(self, text: str) -> Score:
        """How well the model predicts a text, read in windows of the training context.

        Raises:
          DataError: fewer than two tokens, or a character that the tokenizer does not know.
        """
        ids = self.tokenizer.encode(text)
        if len(ids) < 2:
            raise DataError("the text is shorter than two tokens", "there is nothing to predict")
        windows = EvaluationWindows(ids, min(self.config.data.context, len(ids) - 1), 1)
        nats = sum(float(_nll_sum(self.model, self.params, batch)) for batch in windows)
        return Score(nats, windows.n_targets, count_words(text, ends=False),
                     self.tokenizer.count_bytes(ids[1:]))

    def run_with_cache(self, text: str | Array, names: str | Iterable[str] = "*",
                       ) -> tuple[Array, dict[str, Array]]:
        """Logits (B,T,V) and the named intermediates; see `hippocampus.models.taps`."""
        return taps.run_with_cache(self.model, self.params, self._tokens(text), names)

    def run_with_edits(self, text: str | Array, edits: Mapping[str, taps.EditFunction],
                       names: str | Iterable[str] = ()) -> tuple[Array, dict[str, Array]]:
        """The same with some intermediates changed; see `hippocampus.models.taps`."""
        return taps.run_with_edits(self.model, self.params, self._tokens(text), edits, names)

    def _tokens(self, text: str | Array) -> Array:
        tokens = self.tokenizer.encode(text)[None] if isinstance(text, str) else text
        if tokens.ndim != 2 or not tokens.size:
            raise ConfigError(f"tokens have the shape {tokens.shape}", "give text, or ids (B, T)")
        return jnp.asarray(tokens)


@functools.partial(jax.jit, static_argnums=0)
def _nll_sum(model: Any, params: Any, batch: Batch) -> Array:
    hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward")
    nll_BT = token_nll(hidden_BTD, model.head(params), batch.targets_BT)
    return (nll_BT * batch.loss_weight_BT).sum()


def _pieces(stream: TextStream, tokens: Iterator[int]) -> Iterator[str]:
    for token in tokens:
        if piece := stream.push([token]):
            yield piece
    if piece := stream.finish():
        yield piece
