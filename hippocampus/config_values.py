"""One value of a config: read from text, and held to the type and the range of its field."""

from __future__ import annotations

import ast
import difflib
import math
import struct
import typing
from collections.abc import Mapping
from typing import Any

from hippocampus.config_refusals import check_text, pattern_error, shown
from hippocampus.errors import ConfigError

_PATTERNS = ("optimizer.no_decay", "optimizer.groups", "mesh.rules")
"""Fields whose texts are regular expressions."""


def check_value(field: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> Any:
    """The value as the field's type, or a ConfigError saying what the field may be."""
    if typing.get_origin(kind) is tuple:
        return _check_tuple(field, value, kind, limits)
    allowed = _allowed(kind, limits)
    # bool is an int to Python; a config that says True for 1 is a mistake.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float:
        good = is_number and _fits(value, limits)
    elif kind is int:
        good = is_number and isinstance(value, int)
    else:
        good = isinstance(value, kind)
    if good and kind is str and not limits.get("choices"):
        check_text(field, value)
    if not good or not _within(value, limits):
        hint = f"the field means: {limits['meaning']}"
        if kind is float and is_number and _within(value, limits):
            hint = "it is computed with as a float32, which has no such number: " + hint
        if limits.get("choices") and isinstance(value, str):
            hint = did_you_mean(value, limits["choices"])
        raise ConfigError(f"{field} is {shown(value)}; it must be {allowed}", hint)
    return float(value) if kind is float else value


def parse_value(field: str, text: str, kind: Any) -> Any:
    """Reads the text of an override as the field's type (checks of ranges come after)."""
    if kind is str:
        return text
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if typing.get_origin(kind) is tuple:
            return _parse_tuple(text, typing.get_args(kind)[0])
        return kind(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # not of the type: check_value refuses it with the right words


def _parse_tuple(text: str, item: Any) -> tuple:
    text = text.strip()
    if text.startswith(("(", "[")):
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if typing.get_origin(item) is tuple:
        raise ValueError("tuples of tuples need their brackets")
    items = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(part if item is str else item(part) for part in items)


def _fits(value: float, limits: Mapping[str, Any]) -> bool:
    """Whether the float32 that the number becomes is finite, within its bounds, and 0 only for 0.

    1 - 1e-9 is 1 as a float32: a moment that decays by it would divide by 0.
    """
    try:
        single, = struct.unpack("f", struct.pack("f", value))
    except (OverflowError, struct.error):
        return False
    # XLA takes numbers below the normal ones for 0 on some devices.
    exists = math.isfinite(single) and (not value or abs(single) >= 2.0**-126)
    return exists and _within(single, {k: limits.get(k) for k in ("above", "below")})


def _check_tuple(field: str, value: Any, kind: Any, limits: Mapping[str, Any]) -> tuple:
    items = typing.get_args(kind)
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{field} is {shown(value)}; it must be a tuple",
                          f"the field means: {limits['meaning']}")
    if items[-1] is not Ellipsis and len(value) != len(items):
        raise ConfigError(f"{field} has {len(value)} entries; it must have {len(items)}",
                          f"the field means: {limits['meaning']}")
    kinds = [items[0]] * len(value) if items[-1] is Ellipsis else items
    checked = tuple(check_value(f"{field}[{i}]", v, k, limits)
                    for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if field.startswith(_PATTERNS):
        for entry in checked:
            _check_pattern(field, entry)
    return checked


def _check_pattern(field: str, pattern: Any) -> None:
    if isinstance(pattern, str) and (error := pattern_error(pattern)):
        raise ConfigError(f"{field}: {shown(pattern)} is not a regular expression", error)


def _within(value: Any, limits: Mapping[str, Any]) -> bool:
    low, high, above, below = (limits.get(k) for k in ("low", "high", "above", "below"))
    if limits.get("choices"):
        return value in limits["choices"]
    return ((low is None or value >= low) and (high is None or value <= high)
            and (above is None or value > above) and (below is None or value < below))


def _allowed(kind: Any, limits: Mapping[str, Any]) -> str:
    if limits.get("choices"):
        return "one of " + ", ".join(limits["choices"])
    name = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string"}
    words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
    bounds = [f"{word} {limits[k]:g}" if abs(limits[k]) < 1e6 else f"{word} {limits[k]:,}"
              for k, word in words.items() if limits.get(k) is not None]
    return " ".join([name[kind], " and ".join(bounds)]).strip()


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """A hint for a word that is none of the known ones."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
