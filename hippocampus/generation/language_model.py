"""LanguageModel: a trained model with its tokenizer, as a user holds it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.data.documents import count_words
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError, DataError
from hippocampus.generation.generate import (
    Continuation,
    Request,
    Row,
    check_seeds,
    in_batches,
    write_rows,
)
from hippocampus.generation.memory_file import Fingerprint
from hippocampus.generation.monitored import Monitored
from hippocampus.generation.remembering import Memory, Remembered, Turn, document_ids, one_each
from hippocampus.generation.user_memory import UserMemory, fingerprint_of
from hippocampus.models import taps
from hippocampus.ops.cross_entropy import token_nll

_SHORTEST_WINDOW = 32
_ANSWERING = ("read+write", "read_only", "frozen")


class Settings(TypedDict, total=False):
    """Settings of `LanguageModel.generate` and `LanguageModel.stream`; see there."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | Sequence[int]
    stop: str | Sequence[str]
    segments: int | None
    skip: bool
    memory: Memory | Sequence[Memory] | None
    memory_mode: str


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


Found = tuple[Array, dict[str, Array]]
"""Logits (B,T,V), and intermediates by name."""


class LanguageModel(Monitored):
    """Generates, scores, and opens up a trained model."""

    def __init__(self, model: Any, params: Any, tokenizer: Tokenizer, config: Config,
                 step: int | None = None):
        """Puts together what `load` reads from a run folder."""
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.config, self.step = config, step

    @overload
    def generate(  # type: ignore[overload-overlap]
            self, prompt: str, *, log_probabilities: Literal[False] = ...,
            stream: Literal[False] = ..., **settings: Unpack[Settings]) -> str: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
            self, prompt: str, *, log_probabilities: Literal[True],
            stream: Literal[False] = ..., **settings: Unpack[Settings]) -> Continuation: ...
    @overload
    def generate(self, prompt: str, *, log_probabilities: Literal[False] = ...,
                 stream: Literal[True], **settings: Unpack[Settings]) -> Iterator[str]: ...
    @overload
    def generate(self, prompt: Sequence[str], *, log_probabilities: Literal[False] = ...,
                 stream: Literal[False] = ..., **settings: Unpack[Settings]) -> list[str]: ...
    @overload
    def generate(self, prompt: Sequence[str], *, log_probabilities: Literal[True],
                 stream: Literal[False] = ..., **settings: Unpack[Settings],
                 ) -> list[Continuation]: ...
    def generate(self, prompt: str | Sequence[str], *, max_new_tokens: int = 200,
                 temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
                 repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0,
                 stop: str | Sequence[str] = (), segments: int | None = None, skip: bool = False,
                 memory: Memory | Sequence[Memory] | None = None, memory_mode: str = "read+write",
                 log_probabilities: bool = False, stream: bool = False) -> Any:
        """Continues a text, or each of several.

        A text depends on its own prompt, seed and memory alone. It ends after `max_new_tokens`, in
        front of a stop string, or where the model ends it (`<|endoftext|>`, not part of it).

        Args:
          prompt: the text to continue, at least one token; or a list of them.
          max_new_tokens: most tokens to add.
          temperature: 0 = always the most likely token.
          top_k: draw among the k most likely; 0 = all.
          top_p: draw among the most likely that reach this probability; 1 = all.
          min_p: draw among those with at least this share of the most likely one's probability.
          repetition_penalty: above 1 makes tokens that the row has had less likely.
          seed: the same seed gives the same text; one for all prompts alike, or one for each.
          stop: strings that end a text.
          segments: reasoning passes; None = as in training.
          skip: one pass and one step of the segment flow instead of all passes.
          memory: of the user who asks, for a model that has one; for a list of prompts as many. It
            is read while the text is drawn; then prompt and text are written, and it is saved,
            which a stream does at its end. None = a new one, which is forgotten.
          memory_mode: "read+write"; "read_only" saves only how much was read of what; "frozen"
            saves nothing.
          log_probabilities: give tokens and their log-probabilities too.
          stream: as `stream`.

        Returns:
          The continuation without the prompt; for a list of prompts a list. With
          `log_probabilities` a `Continuation` in place of each text, with `stream` an iterator.

        Raises:
          ConfigError: a setting out of range or not for this model, an empty prompt, one memory for
            two, or, with learned positions, more tokens than the model has positions.
          DataError: a character that the tokenizer does not know.
          CheckpointError: a memory that is damaged or another model's, is only to be read and not
            there, or cannot be saved; the old one stays.
        """
        request = Request.check(
            self.model, max_new_tokens=max_new_tokens, stop=stop, segments=segments, skip=skip,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty)
        one = isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if stream and (not one or log_probabilities):
            raise ConfigError("stream gives the text of one prompt",
                              "leave out log_probabilities" if one else "give one prompt")
        ids = [self._encode(text, "the prompt" if one else f"prompt {n} of {len(prompts)}",
                            request) for n, text in enumerate(prompts, 1)]
        seeds = check_seeds(seed, len(prompts))
        if memory_mode not in _ANSWERING or (memory is None and memory_mode != _ANSWERING[0]):
            raise ConfigError(f"memory_mode is {memory_mode!r}", "it must be one of "
                              f"{', '.join(_ANSWERING)}, with a memory")
        turn = None if memory is None else self._turn(memory, memory_mode, prompts, one)
        states = turn.states if turn else [None] * len(prompts)
        rows = [Row(row, int(own), self.tokenizer, request.stop, state)
                for row, own, state in zip(ids, seeds, states, strict=True)]
        if stream:
            return self._stream(rows, request, turn)
        for batch in in_batches(rows):
            for _ in self._write(batch, request):
                pass
        if turn:
            self._finish(turn, [row.said for row in rows])
        found = [row.continuation if log_probabilities else row.continuation.text for row in rows]
        return found[0] if one else found

    def stream(self, prompt: str, **settings: Unpack[Settings]) -> Iterator[str]:
        """Continues a text; yields its pieces as they become certain.

        Args:
          prompt: the text to continue; at least one token.
          settings: as for `generate`; the pieces together are what it gives. A memory is saved when
            no piece is left; a stream that is dropped before leaves it as it was.

        Raises:
          ConfigError, DataError: as `generate`, before the first piece is asked for.
        """
        return self.generate(prompt, stream=True, **settings)

    def generate_with_tools(self, prompt: str | Sequence[str], *, tools: Any,
                            **settings: Any) -> Any:
        """Continues a text, and may call tools on the way.

        Args, Returns, Raises: see `hippocampus.serving.tool_loop.generate_with_tools`.
        """
        from hippocampus.serving.tool_loop import generate_with_tools

        return generate_with_tools(self, prompt, tools=tools, **settings)

    @overload
    def remember(self, text: str, *, memory: Memory) -> Remembered: ...  # type: ignore[overload-overlap]
    @overload
    def remember(self, text: Sequence[str], *,
                 memory: Sequence[Memory]) -> list[Remembered]: ...
    def remember(self, text: str | Sequence[str], *,
                 memory: Memory | Sequence[Memory]) -> Remembered | list[Remembered]:
        """Writes a text into a memory, as a story is in training, and saves it; nothing is read.

        Args:
          text: of any length; or a list, each for a user of its own.
          memory: of the user; for a list of texts as many.

        Returns:
          What went in.

        Raises:
          ConfigError, DataError, CheckpointError: as `generate`; nothing is saved.
        """
        one = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        ids = [document_ids(each, self.tokenizer, "the text" if one else
                            f"text {n} of {len(texts)}") for n, each in enumerate(texts, 1)]
        found = self._finish(self._turn(memory, "write_only", texts, one), ids)
        return found[0] if one else found

    def open_memory(self, path: str | Path | None = None, *, new: bool = False) -> UserMemory:
        """The memory of a user of this model.

        Args:
          path: its file, which need not be there yet; None = a memory that is not kept.
          new: begin with a new one in place of what the file holds until the first save.

        Raises:
          ConfigError: the model has no memory, or no file can be there.
          CheckpointError: what is there is damaged, no memory, another model's (unless `new`), or
            of several users.
        """
        return UserMemory(path, self.fingerprint, self._new_memory, new=new)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What tells memories of this model from all others.

        Raises:
          ConfigError: it has no memory.
        """
        if not hasattr(self.model, "new_memory"):
            raise ConfigError("the model has no memory", "models of the family chopt have one")
        return fingerprint_of(self.model, self.params, self.tokenizer)

    @cached_property
    def decode_variables(self) -> dict[str, Any]:
        """The parameters as the decoder reads them."""
        return self.model.decode_variables(self.params, self.context)

    @property
    def context(self) -> int:
        """Tokens that the model looks back to."""
        context = self.config.data.context
        return self.model.config.longest_row(context) or context

    def room(self, prompt: str) -> float:
        """Tokens that can be written behind a prompt; infinite but for learned positions."""
        longest = self.model.config.longest_row(self.config.data.context)
        return math.inf if longest is None else max(
            0, longest - len(self.tokenizer.encode(prompt)))

    @overload
    def score(self, text: str) -> Score: ...  # type: ignore[overload-overlap]
    @overload
    def score(self, text: Sequence[str]) -> list[Score]: ...
    def score(self, text: str | Sequence[str]) -> Score | list[Score]:
        """How well the model predicts a text, or each of several.

        A text is read in windows of the training context.

        Raises:
          DataError: fewer than two tokens, or a character that the tokenizer does not know.
        """
        return self._score(text) if isinstance(text, str) else [self._score(t) for t in text]

    @overload
    def run_with_cache(self, text: str | Array, names: str | Iterable[str] = ...) -> Found: ...
    @overload
    def run_with_cache(self, text: list[str], names: str | Iterable[str] = ...) -> list[Found]: ...
    def run_with_cache(self, text: str | Array | list[str],
                       names: str | Iterable[str] = "*") -> Found | list[Found]:
        """Logits (B,T,V) and the named intermediates; see `hippocampus.models.taps`.

        A list of texts gives a list.
        """
        if isinstance(text, list):
            return [self.run_with_cache(one, names) for one in text]
        return taps.run_with_cache(self.model, self.params, self._tokens(text), names)

    @overload
    def run_with_edits(self, text: str | Array, edits: Mapping[str, taps.EditFunction],
                       names: str | Iterable[str] = ...) -> Found: ...
    @overload
    def run_with_edits(self, text: list[str], edits: Mapping[str, taps.EditFunction],
                       names: str | Iterable[str] = ...) -> list[Found]: ...
    def run_with_edits(self, text: str | Array | list[str], edits: Mapping[str, taps.EditFunction],
                       names: str | Iterable[str] = ()) -> Found | list[Found]:
        """The same with some intermediates changed; see `hippocampus.models.taps`."""
        if isinstance(text, list):
            return [self.run_with_edits(one, edits, names) for one in text]
        return taps.run_with_edits(self.model, self.params, self._tokens(text), edits, names)

    def _encode(self, text: str, name: str, request: Request) -> Int[np.ndarray, " n"]:
        if not isinstance(text, str):
            raise ConfigError(f"{name} is {text!r}", "it must be text")
        ids = self.tokenizer.encode(text)
        if not len(ids):
            raise ConfigError(f"{name} is empty", "give at least one character")
        longest = self.model.config.longest_row(self.config.data.context)
        new = request.max_new_tokens
        if longest is not None and new and len(ids) + new > longest:
            raise ConfigError(
                f"{name} of {len(ids)} tokens and max_new_tokens of {new} are "
                f"more than the model's {longest} learned positions",
                "give less of one of them")
        return ids

    @cached_property
    def _new_memory(self) -> Any:
        return jax.device_get(jax.jit(self.model.new_memory, static_argnums=1)(self.params, 1))

    def _turn(self, memory: Any, mode: str, texts: Sequence[str], one: bool) -> Turn:
        given = [memory] if one else memory
        return Turn(one_each(given, len(texts), self.open_memory, self.fingerprint), mode)

    def _finish(self, turn: Turn, ids: Sequence[Int[np.ndarray, " n"]]) -> list[Remembered]:
        return turn.finish(self.model, self.params, ids, context=self.context,
                           begin_id=getattr(self.tokenizer, "begin_id", None))

    def _stream(self, rows: Sequence[Row], request: Request, turn: Turn | None) -> Iterator[str]:
        for (piece,) in self._write(rows, request, streamed=True):
            if piece:
                yield piece
        if turn:
            self._finish(turn, [row.said for row in rows])

    def _write(self, rows: Sequence[Row], request: Request, *,
               streamed: bool = False) -> Iterator[list[str]]:
        return write_rows(self.model, self.decode_variables, rows, request, context=self.context,
                          end_ids=self.tokenizer.end_ids, streamed=streamed)

    def _score(self, text: str) -> Score:
        ids = self.tokenizer.encode(text)
        if len(ids) < 2:
            raise DataError("the text is shorter than two tokens", "there is nothing to predict")
        # Few sizes, so that texts of all lengths compile a handful of programs.
        size = max(_SHORTEST_WINDOW, 1 << (len(ids) - 2).bit_length())
        context, chunk = self.config.data.context, getattr(self.model, "chunk", 0)
        if chunk and size > chunk:  # a row is whole chunks
            size = context
        windows = EvaluationWindows(ids, min(context, size), 1)
        nats = sum(float(_nll_sum(self.model, self.params, batch)) for batch in windows)
        return Score(nats, windows.n_targets, count_words(text, ends=False),
                     self.tokenizer.count_bytes(ids[1:]))

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
