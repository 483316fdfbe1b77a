"""How an intermediate value can be changed from outside: a function of its name and value."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

Edit = Callable[[str, Array], Array]
"""(name, value) -> value. Every layer passes its named intermediates through one."""


def no_edit(name: str, value: Array) -> Array:
    """Leaves every value as it is and adds no operation."""
    return value


def scoped(edit: Edit, prefix: str) -> Edit:
    """The same edit for a part of the model, whose names get `prefix` in front."""
    if edit is no_edit:
        return no_edit
    return lambda name, value: edit(prefix + name, value)
