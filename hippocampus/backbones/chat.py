"""Chat templates: messages to the text that a model was trained to answer.

A template is a program that came with somebody's weights. It runs in Jinja's immutable sandbox:
it sees the messages and nothing of Python, the machine or its files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from hippocampus.errors import DataError

_MOST_CHARACTERS = 2**20


class ChatTemplate:
    """A template and the special tokens that it writes.

    Attributes:
      source: the template.
      tokens: `bos_token`, `eos_token`: their text.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        """Reads the template.

        Raises:
          DataError: it is no Jinja template.
        """
        self.source, self.tokens = source, dict(tokens)
        _ = self._template

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
        from jinja2 import TemplateError

        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt, **{**self.tokens, **variables})
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError,
                RecursionError, MemoryError, ArithmeticError) as error:
            raise DataError(f"the chat template does not take these messages: "
                            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
                            "see the model's page for the roles that it knows") from None
        return str(text)

    @cached_property
    def _template(self) -> Any:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if len(self.source) > _MOST_CHARACTERS:
            raise DataError(f"the chat template has {len(self.source):,} characters",
                            f"at most {_MOST_CHARACTERS:,} are read")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"the chat template is not one: {str(error).splitlines()[0]}",
                            "copy or download the folder again") from None


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    """Not Jinja's own, which writes for HTML pages."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
