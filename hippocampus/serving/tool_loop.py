"""A text that is written with tools: write, stop behind a call, ask, read the answer, go on.

The caches stay: behind a call only the tool's answer is read. Drawing stops at every id that could
end a call, before it is read, so that nothing behind a call ever gets into a cache. They begin with
room for the prompt and grow when they are full: how long answers are is not known before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hippocampus.errors import ConfigError, DataError
from hippocampus.generation import decode
from hippocampus.generation.generate import Request, check_seeds
from hippocampus.serving.call_grammar import CallGrammar, is_installed
from hippocampus.serving.quoting import added_tokens, encode_segments
from hippocampus.serving.tool_config import ToolLimits, ToolServer
from hippocampus.serving.tool_formats import ToolFormat, format_of
from hippocampus.serving.tool_trace import Call, Step, ToolBatch, ToolText
from hippocampus.serving.tools import Toolbox, ToolResponse

_MODES = ("read+write", "read_only", "frozen")


def generate_with_tools(
        lm: Any, prompt: str | Sequence[str], *, tools: Toolbox | str | Path | ToolServer |
        Sequence[ToolServer], limits: ToolLimits | None = None, max_new_tokens: int = 512,
        temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
        repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (), format: str = "auto", require_call: bool = False,
        constrain: bool | Literal["auto"] = "auto", max_call_tokens: int = 512, memory: Any = None,
        memory_mode: str = "read+write", remember_tools: bool = False) -> ToolText | ToolBatch:
    """Continues a text, or each of several, and calls tools where the model asks for them.

    Args:
      lm: a `LanguageModel`.
      prompt: what the user asks; the tools are described in front of it.
      tools: an open `Toolbox`; or what one is made of, which is opened for this call.
      limits: for tools that are not open yet; see `Toolbox`.
      max_new_tokens: most tokens that the model draws for a text, calls included.
      temperature, top_k, top_p, min_p, repetition_penalty, seed, stop: as `generate`; a stop
        string does not end a call.
      format: one of `tool_formats.FORMATS`, or "auto".
      require_call: the text begins with a call.
      constrain: calls follow their schemas, by llguidance; "auto" = where that can be used. A call
        that is none, or wrong, is answered with what is wrong, and the model goes on.
      max_call_tokens: most tokens of a constrained call.
      memory, memory_mode: as `generate`; prompt and written text go in.
      remember_tools: what the tools answered goes into the memory too. A tool can so leave words
        there that later texts are written with.

    Returns:
      A `ToolText`; for a list of prompts a `ToolBatch`, which has a `summary`. Texts are written
      one after the other; each is what it is alone.

    Raises:
      ConfigError, DataError, CheckpointError: as `LanguageModel.generate` and `Toolbox`. Nothing
        that a model writes or a tool answers raises.
    """
    request = Request.check(
        lm.model, max_new_tokens=max_new_tokens, stop=stop, segments=None, skip=False,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty)
    one = isinstance(prompt, str)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    for n, text in enumerate(prompts, 1):
        if not isinstance(text, str) or not text:
            raise ConfigError(f"prompt {n} of {len(prompts)} is {text!r}", "give some text")
    seeds = check_seeds(seed, len(prompts))
    if memory_mode not in _MODES:
        raise ConfigError(f"memory_mode is {memory_mode!r}",
                          f"it must be one of {', '.join(_MODES)}")
    turn = None if memory is None else lm._turn(memory, memory_mode, prompts, one)
    states = turn.states if turn else [None] * len(prompts)
    found, said = [], []
    with _open(tools, limits) as box:
        style = format_of(format, lm.tokenizer)
        writer = _Writer(lm, box, style, request, _grammar(lm, box, style, constrain),
                         require_call, max_call_tokens)
        for text, own, state in zip(prompts, seeds, states, strict=True):
            result = writer.write(text, int(own), state)
            found.append(result)
            said.append(_said(lm, text, result, remember_tools))
    if turn:
        lm._finish(turn, said)
    return found[0] if one else ToolBatch(tuple(found))


@contextlib.contextmanager
def _open(tools: Any, limits: ToolLimits | None) -> Iterator[Toolbox]:
    if isinstance(tools, Toolbox):
        yield tools
        return
    with Toolbox(tools, limits) as box:
        yield box


def _grammar(lm: Any, box: Toolbox, style: ToolFormat,
             constrain: bool | Literal["auto"]) -> CallGrammar | None:
    if not constrain or not box.specs or (constrain == "auto" and not is_installed()):
        return None
    try:
        return CallGrammar(lm.tokenizer, style.schema(list(box.specs.values())))
    except ConfigError:
        if constrain is True:
            raise
        return None  # a wrong call is answered instead


def _said(lm: Any, prompt: str, result: ToolText, remember_tools: bool) -> np.ndarray:
    """What a memory takes of a text; never what a server says of its tools."""
    kinds = ("text", "call", "response") if remember_tools else ("text", "call")
    parts = [lm.tokenizer.encode(prompt), *(
        np.array(step.tokens, np.int32) for step in result.trace if step.kind in kinds)]
    whole = np.concatenate(parts)
    return whole[:-1] if len(whole) and whole[-1] in lm.tokenizer.end_ids else whole


class _Writer:
    """Writes texts with one set of tools and settings."""

    def __init__(self, lm: Any, box: Toolbox, style: ToolFormat, request: Request,
                 grammar: CallGrammar | None, require_call: bool, max_call_tokens: int):
        self.lm, self.box, self.style, self.request = lm, box, style, request
        self.grammar, self.require_call = grammar, require_call
        self.max_call_tokens = max_call_tokens
        self.tags = added_tokens(lm.tokenizer)
        self.end_ids = frozenset(lm.tokenizer.end_ids)
        self.pauses = tuple(sorted(self.end_ids.union(
            *map(lm.tokenizer.ids_with, set(style.pause)))))

    def write(self, prompt: str, seed: int, memory: Any) -> ToolText:
        """One text."""
        start = time.perf_counter()
        specs = list(self.box.specs.values())
        ids = encode_segments(self.lm.tokenizer, self.style.prompt(prompt, specs, self.tags),
                              first=True)
        text = _Text(self, ids, seed, memory)
        forced = self.require_call and bool(specs)
        while not text.finish:
            if forced or (self.grammar and self.style.begun(text.turn)):
                text.call(begins=forced)
                forced = False
            else:
                text.go_on()
            call = self.style.find(text.turn)
            if call is not None:
                self._answer(text, call)
        return text.result(time.perf_counter() - start)

    def _answer(self, text: _Text, call: tuple[str, str, str]) -> None:
        before, content, _ = call
        name, problem = "", ""
        arguments: dict[str, Any] = {}
        try:
            name, arguments = self.style.parse(content)
        except ValueError as error:
            problem = str(error)
        asked = len(text.calls)
        if asked >= self.box.limits.calls:
            response = ToolResponse(name[:64], arguments, False, f"all {self.box.limits.calls} "
                                    "calls are used up: answer without", "budget")
        elif problem:
            response = ToolResponse("", {}, False, problem, "arguments")
        else:
            response = self.box.call(name, arguments)
        text.answered(before, Call(name, arguments, content), response)
        if asked > self.box.limits.calls:  # it has been told
            text.finish = text.finish or "calls"


class _Text:
    """One text while it is written."""

    def __init__(self, writer: _Writer, ids: np.ndarray, seed: int, memory: Any):
        self.writer, self.lm = writer, writer.lm
        self.seeds = np.array([seed], np.uint32)
        self.left = writer.request.max_new_tokens
        self.finish: Literal["", "stop", "length", "calls"] = "" if self.left else "length"
        self.calls: list[Call] = []
        self.responses: list[ToolResponse] = []
        self.steps: list[Step] = [self._step("prompt", ids)]
        self.texts: list[str] = []
        self.written = 0
        self.turn = ""
        self._turn_ids: list[int] = []
        self._unread: list[int] = []
        longest = self.lm.model.config.longest_row(self.lm.config.data.context)
        self._room = np.inf if longest is None else longest - len(ids)
        if self._room < self.left:
            raise ConfigError(
                f"prompt and tools of {len(ids)} tokens and max_new_tokens of {self.left} are "
                f"more than the model's {longest} learned positions", "give less of one of them")
        self._held = len(ids)
        self._capacity = decode.capacity(self._held, self.lm.context)
        self._state = decode.start(self.lm.model, self.lm.decode_variables, [ids], memory=memory,
                                   max_length=self._capacity)

    def go_on(self) -> None:
        """Draws up to an id that could end a call, ends the text, or all that one call draws."""
        self._read(self._unread)
        most = int(min(self.left, self._room, decode.TOKENS_PER_CALL))
        tokens: list[int] = []
        while len(tokens) < most and not self._unread:
            tokens += self._write(most - len(tokens))
            self._unread = [index for index in tokens[-1:] if index in self.writer.pauses]
        self._take(tokens)

    def call(self, begins: bool) -> None:
        """Draws a call; what is not part of one cannot be drawn.

        Args:
          begins: its mark is still to be written.
        """
        style, grammar = self.writer.style, self.writer.grammar
        marks = self._encode(style.begin) if begins else []
        self._read([*self._unread, *marks])
        self._turn_ids += marks
        self.turn = self.lm.tokenizer.decode(self._turn_ids)
        if grammar is None:  # it is begun, and will be as good as the model makes it
            return
        matcher = grammar.start()
        most = int(min(self.left, self._room, self.writer.max_call_tokens))
        tokens: list[int] = []
        while len(tokens) < most and not matcher.whole and (allowed := matcher.allowed()).any():
            tokens.append(self._draw(allowed))
            matcher.take(tokens[-1])
        end = self._encode(style.end) if matcher.whole else []
        self._read(end)
        self._take([*tokens, *end], drawn=len(tokens))
        if not matcher.whole:
            self.finish = "length"

    def answered(self, before: str, call: Call, response: ToolResponse) -> None:
        """Puts a tool's answer behind its call, and begins the next turn."""
        self.texts.append(before)
        self.calls.append(call)
        self.responses.append(response)
        self.steps.append(self._step("call", self._turn_ids))
        self._turn_ids, self.turn = [], ""
        if self.finish == "length" or not self.left:
            self.finish = "length"
            return
        self.finish = ""  # the id behind the call may have been one that ends a turn
        ids = self._heard(response)
        if len(ids) >= self._room:
            self.finish = "length"
            return
        self.steps.append(self._step("response", ids))
        self._read([*self._unread, *ids.tolist()])
        self._room -= len(ids)

    def _heard(self, response: ToolResponse) -> np.ndarray:
        """The ids of an answer, without the characters that the tokenizer does not know."""
        tokenizer, style, tags = self.lm.tokenizer, self.writer.style, self.writer.tags
        try:
            return encode_segments(tokenizer, style.answer(response, tags), first=False)
        except DataError:
            unknown = {one for one in set(response.output) if not _is_known(one, tokenizer)}
            known = "".join(one for one in response.output if one not in unknown)
            return encode_segments(tokenizer, style.answer(
                dataclasses.replace(response, output=known), tags), first=False)

    def result(self, seconds: float) -> ToolText:
        """The whole, when it is finished."""
        if self._turn_ids:
            self.steps.append(self._step("text", self._turn_ids))
            ended = self._turn_ids[-1] in self.writer.end_ids
            rest = self.lm.tokenizer.decode(self._turn_ids[:-1] if ended else self._turn_ids)
            self.texts.append(self._cut(rest))
        assert self.finish
        return ToolText("".join(self.texts), tuple(self.calls), tuple(self.responses),
                        tuple(self.steps), self.finish, seconds, self.written)

    def _write(self, most: int) -> list[int]:
        """At least one id and what fits the cache, up to one that could end a call."""
        self._grow_for(1)
        if self._capacity < self.lm.context:  # else the oldest tokens make room
            most = min(most, self._capacity - self._held)
        self._state, drawn = decode.write(
            self.lm.model, self.lm.decode_variables, self._state, self.seeds,
            self.writer.request.sampler, most, self.writer.pauses)
        drawn = jax.device_get(drawn)
        tokens: list[int] = drawn.tokens_BM[0, :int(drawn.n)].tolist()
        self._held += len(tokens) - (tokens[-1] in self.writer.pauses)
        return tokens

    def _grow_for(self, n: int) -> None:
        """A cache with room for so many tokens more, at most the model's context."""
        capacity = decode.capacity(self._held + n, self.lm.context)
        if capacity > self._capacity:
            self._state = decode.grow(self.lm.model, self._state, capacity)
            self._capacity = capacity

    def _draw(self, allowed_V: np.ndarray) -> int:
        """One of the ids that are allowed; it is read."""
        self._grow_for(1)
        logits_BV = self._state.logits_BV
        mask = np.zeros(logits_BV.shape[1], bool)
        mask[:len(allowed_V)] = allowed_V
        state = dataclasses.replace(self._state,
                                    logits_BV=jnp.where(mask[None], logits_BV, -jnp.inf))
        self._state, drawn = decode.write(
            self.lm.model, self.lm.decode_variables, state, self.seeds,
            self.writer.request.sampler, 1, [-1] * len(self.writer.pauses))  # ids that are none
        self._held += 1
        return int(drawn.tokens_BM[0, 0])

    def _take(self, tokens: list[int], drawn: int | None = None) -> None:
        n = len(tokens) if drawn is None else drawn
        self.written, self.left, self._room = self.written + n, self.left - n, self._room - n
        self._turn_ids += tokens
        self.turn = self.lm.tokenizer.decode(self._turn_ids)
        ended = bool(tokens) and tokens[-1] in self.writer.end_ids
        begin = self.writer.style.begin
        if ended or (self._cut(self.turn) != self.turn and not (begin and begin in self.turn)):
            self.finish = "stop"
        elif self.left <= 0 or self._room <= 0:
            self.finish = "length"

    def _cut(self, text: str) -> str:
        """Up to the first stop string."""
        at = [text.find(stop) for stop in self.writer.request.stop if stop in text]
        return text[:min(at)] if at else text

    def _read(self, ids: Sequence[int]) -> None:
        if len(ids):
            self._grow_for(len(ids))
            self._held += len(ids)
            self._state = decode.read(self.lm.model, self.lm.decode_variables, self._state,
                                      [np.asarray(ids, np.int32)])
        self._unread = []

    def _encode(self, mark: str) -> list[int]:
        ids: list[int] = encode_segments(self.lm.tokenizer, [(mark, True)], first=False).tolist()
        return ids

    def _step(self, kind: Any, ids: Sequence[int] | np.ndarray) -> Step:
        ids = [int(index) for index in ids]
        return Step(kind, self.lm.tokenizer.decode(ids), tuple(ids))


def _is_known(character: str, tokenizer: Any) -> bool:
    try:
        encode_segments(tokenizer, [(character, False)], first=False)
    except DataError:
        return False
    return True
