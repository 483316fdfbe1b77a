"""What every check of a config refuses alike: texts, patterns, and numbers that do not divide."""

from __future__ import annotations

import re
from typing import Any

from hippocampus.errors import ConfigError


def shown(value: Any) -> str:
    """`repr(value)` for a message: on one line, and cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # an integer of more digits than Python prints, or anybody's own __repr__
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 100 else f"{text[:60]}… ({len(text):,} characters)"


def pattern_error(pattern: str) -> str:
    """What is wrong with a regular expression; "" for a good one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""


def check_text(field: str, value: str) -> None:
    """Refuses what no file of text can hold, and what none should.

    Raises:
      ConfigError: naming the field; a password is not shown.
    """
    try:
        value.encode("utf-8")
        what = "the character NUL" if "\0" in value else ""
    except UnicodeEncodeError:
        what = "half a surrogate pair"
    if re.search(r"\w://[^/\s@]+@", value):  # config.json is made to be shared
        raise ConfigError(f"{field} is an address with a user name or password in it",
                          "leave them out; a token belongs into the environment")
    if what:
        raise ConfigError(f"{field} is {shown(value)}; it holds {what}", "give it as plain text")


def check_divides(name: str, size: int, by_name: str, by: int) -> None:
    """Refuses a size that is no multiple of another.

    Raises:
      ConfigError: with both fields, their numbers, and the nearest multiple.
    """
    if size % by:
        near = max(by, size - size % by)
        raise ConfigError(f"{name} = {size} is not a multiple of {by_name} = {by}",
                          f"the nearest multiple is {near}")
