"""Calls that cannot be wrong: while a model writes one, only what its schema allows can be drawn.

With the package llguidance, which compiles the JSON schemas of the tools into a mask over the next
token. Source: guidance-ai, llguidance (JSON schema and Lark grammars over a tokenizer's bytes).
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
from jaxtyping import Bool

from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError


def is_installed() -> bool:
    """Whether llguidance can be used."""
    return importlib.util.find_spec("llguidance") is not None


class CallGrammar:
    """The grammar of the calls of one format, over one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, schema: dict[str, Any]):
        """Compiles the grammar.

        Args:
          tokenizer: of the model; its ids have to stand for bytes.
          schema: of a call.

        Raises:
          ConfigError: llguidance is not installed, or cannot read the tokenizer or the schema.
        """
        if not is_installed():
            raise ConfigError("constrained calls need the package llguidance",
                              "pip install '.[grammar]', or constrain=False")
        import llguidance

        self._size = tokenizer.vocab_size
        guided = {**schema, "x-guidance": {"whitespace_flexible": False}}
        try:
            # It wants an id that ends texts, which it keeps out of a call; the last one will do.
            end = next(iter(tokenizer.end_ids), self._size - 1)
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer.to_json(), n_vocab=self._size, eos_token=end)
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(guided))
            problem = llguidance.LLMatcher(self._tokenizer, self._grammar).get_error()
        except Exception as error:  # the library raises what it likes
            problem = str(error)
        if problem:
            raise ConfigError(f"calls cannot be constrained: {problem.splitlines()[0][:200]}",
                              "use constrain=False")

    def start(self) -> CallMatcher:
        """The state before the first token of a call."""
        import llguidance

        return CallMatcher(llguidance.LLMatcher(self._tokenizer, self._grammar), self._size)


class CallMatcher:
    """Where a call is in its grammar."""

    def __init__(self, matcher: Any, size: int):
        """From `CallGrammar.start`."""
        import llguidance.numpy

        self._matcher, self._size = matcher, size
        self._bits = llguidance.numpy.allocate_token_bitmask(1, size)

    def allowed(self) -> Bool[np.ndarray, " V"]:
        """The ids that may come next."""
        import llguidance.numpy

        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits, 0)
        bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
        return bits[:self._size].astype(bool)

    def take(self, token: int) -> None:
        """Goes on by a token.

        Raises:
          ConfigError: it is not allowed.
        """
        if not self._matcher.consume_token(int(token)):
            raise ConfigError(f"id {token} is not allowed in a call", "draw what is allowed")

    @property
    def whole(self) -> bool:
        """The call is complete."""
        return bool(self._matcher.is_accepting())
