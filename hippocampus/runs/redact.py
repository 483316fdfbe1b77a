"""Commands and flags as a run folder may keep them: what looks like a secret is left out.

A run folder is made to be shared. Secrets belong into the environment, of which nothing is written
down; this is for those that came to a command line all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "***"
"""What stands in the place of a secret."""

_SHORTEST = 8
"""Characters; a shorter value of a variable would hide parts of words."""

# The last word of a name: tokenizer, token_noise and max_new_tokens are no secrets.
_WORDS = (r"(?:api|access|private|secret)[_.-]?keys?(?:[_.-]id)?|auth|authorization|bearer"
          r"|credentials?|passphrase|passwd|password|pwd|secret|sig|signature|token")
_NAME = rf"(?:[\w.-]*[_.-])?(?:{_WORDS})"
_NAMED = re.compile(rf"(?i)(?<![\w.-])(-{{0,2}}{_NAME})(=|:\s*)(?!\s)([^\s&;,'\"]+)")
_FLAG = re.compile(rf"(?i)-{{1,2}}{_NAME}")
_SECRET_NAME = re.compile(rf"(?i){_NAME}")
_USER = re.compile(r"(\w://)[^\s/@]+@")
_SHAPES = re.compile(
    r"\b(?:hf_\w{16,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)")


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without what looks like a secret.

    That is: the values of environment variables named like secrets, user and password of a URL,
    what stands behind `token=` and its like, and the known shapes of access tokens.

    Args:
      text: a flag, or several.
      environment: default: of this process.
    """
    environment = os.environ if environment is None else environment
    for name, value in environment.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.fullmatch(name) and not _is_place(value):
            text = text.replace(value, HIDDEN)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _NAMED.sub(rf"\1\2{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def redact_command(arguments: Sequence[str]) -> list[str]:
    """A command line without what looks like a secret, `--token VALUE` in two words included."""
    shown: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        follows = _FLAG.fullmatch(before) and not argument.startswith("-")
        shown.append(HIDDEN if follows else redact(argument))
    return shown


def _is_place(value: str) -> bool:
    """HF_TOKEN_PATH and SSH_AUTH_SOCK name files, which are no secrets."""
    return value.startswith(("/", "~", "./"))
