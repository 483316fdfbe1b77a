"""Named intermediates of a model: read them, or change them and see what follows.

Names are dotted and stable: "layers.3.hopfield.step1", "layers.3.mixer.gates",
"segments.0.hidden", "controller.bias". Names without "segments.<r>." in front belong to the last
pass when read, and to every pass when edited.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from hippocampus.errors import ConfigError

EditFunction = Callable[[Array], Array]


def run_with_cache(
    model: Any, params: Any, tokens_BT: Int[Array, "B T"], names: str | Iterable[str] = "*",
) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
    """Logits, and the intermediates whose names match; what is not asked for is not computed.

    Args:
      model: an unbound model.
      params: its parameters.
      tokens_BT: token ids.
      names: a glob such as "layers.*.mixer.gates", or several.

    Raises:
      ConfigError: a glob that matches nothing.
    """
    globs = [names] if isinstance(names, str) else list(names)
    known = list(_shapes(model, params, tokens_BT)[1])
    for glob in globs:
        if not fnmatch.filter(known, glob):
            raise ConfigError(f"no intermediate is named {glob!r}", _nearest(glob, known))
    wanted = [name for name in known if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]

    @jax.jit
    def run(params: Any, tokens_BT: Array) -> tuple[Array, dict[str, Array]]:
        logits, out = model.apply({"params": params}, tokens_BT)
        return logits, {name: out[name] for name in wanted}

    return run(params, tokens_BT)


def run_with_edits(
    model: Any, params: Any, tokens_BT: Int[Array, "B T"], edits: Mapping[str, EditFunction],
    names: str | Iterable[str] = (),
) -> tuple[Float[Array, "B T V"], dict[str, Array]]:
    """Logits (and intermediates) when some intermediates are replaced by a function of themselves.

    Args:
      model: an unbound model.
      params: its parameters.
      tokens_BT: token ids.
      edits: exact name -> function of the value, traceable by JAX. Without any, the result is
        the plain run's, bit for bit.
      names: intermediates to return, as for `run_with_cache`.

    Raises:
      ConfigError: a name that cannot be edited.
    """
    if not edits:
        return run_with_cache(model, params, tokens_BT, names)
    known = editable_names(model, params, tokens_BT)
    for name in edits:
        if name not in known:
            raise ConfigError(f"no editable intermediate is named {name!r}", _nearest(name, known))
    functions = dict(edits)

    def edit(name: str, value: Array) -> Array:
        return functions[name](value) if name in functions else value

    return run_with_cache(model.clone(edit=edit), params, tokens_BT, names)


def editable_names(model: Any, params: Any, tokens_BT: Int[Array, "B T"]) -> list[str]:
    """Every name that `run_with_edits` takes."""
    seen: dict[str, None] = {}

    def record(name: str, value: Array) -> Array:
        seen[name] = None
        return value

    _shapes(model.clone(edit=record), params, tokens_BT)
    return list(seen)


def _shapes(model: Any, params: Any, tokens_BT: Array) -> tuple[Any, dict[str, Any]]:
    return jax.eval_shape(lambda p, t: model.apply({"params": p}, t), params, tokens_BT)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else "run_with_cache(…, '*') lists them all"
