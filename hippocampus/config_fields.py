"""How a field of the config says its default, its range and its meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

LARGEST = 2**31 - 1
"""The largest count."""


def setting(
    default: Any, meaning: str, *, low: float | None = None, high: float | None = None,
    above: float | None = None, below: float | None = None, choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with the range it is held to (low and high belong to the range)."""
    metadata = {"meaning": meaning, "low": low, "high": high, "above": above, "below": below,
                "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def count(default: int, meaning: str, *, low: int = 1, high: int = LARGEST) -> Any:
    """A whole number."""
    return setting(default, meaning, low=low, high=high)


def group(make: Callable[[], Any]) -> Any:
    """A group of fields, which is a dataclass of its own: the class, or what makes one of it."""
    return dataclasses.field(default_factory=make)
