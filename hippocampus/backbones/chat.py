"""Chat templates: messages to the text that a model was trained to answer.

A template is a program that came with somebody's weights. It runs in Jinja's immutable sandbox:
it sees the messages and nothing of Python, the machine or its files, and no single product or power
fills the memory. It can still take long by looping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hippocampus.errors import DataError

_LARGEST = 2**20
"""Characters of a template, and length of what a template may build in one step."""


class ChatTemplate:
    """A template and the special tokens that it writes.

    Attributes:
      source: the template.
      tokens: `bos_token`, `eos_token`: their text.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        """Reads the template.

        Raises:
          DataError: it is no Jinja template, or a very long one.
        """
        self.source, self.tokens = source, dict(tokens)
        if len(source) > _LARGEST:
            raise DataError(f"the chat template has {len(source):,} characters",
                            f"at most {_LARGEST:,} are read")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"the chat template is not one: {_first_line(error)}",
                            "copy or download the folder again") from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True,
               **variables: Any) -> str:
        """The text of a conversation.

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": text}`, in order.
          add_generation_prompt: let it end where the model's answer begins.
          variables: further ones that a template knows, such as `tools`.

        Raises:
          DataError: the template refuses the messages, or asks for what the sandbox forbids.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt, **{**self.tokens, **variables})
        except Exception as error:  # a stranger's program can raise anything
            raise DataError(f"the chat template does not take these messages: "
                            f"{_first_line(error)}",
                            "see the model's page for the roles that it knows") from None


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, in which one product or power cannot fill the memory either."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [value for value in (left, right) if isinstance(value, int | float)]
        lengths = [len(value) for value in (left, right) if hasattr(value, "__len__")]
        huge = any(abs(value) > _LARGEST for value in numbers) or (
            operator == "**" and abs(right) > 16) or (
            lengths and max(numbers, default=1) * max(lengths) > _LARGEST)
        if huge:
            raise SecurityError(f"{operator} with a large number")
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    """Not Jinja's own, which writes for HTML pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
