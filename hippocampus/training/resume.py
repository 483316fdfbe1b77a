"""What may differ when a run goes on: its config and its text against those asked for now.

Most fields make another experiment of a run, so a difference is refused with the flag that forces
it (`--allow_change`). What the saved state does not fit cannot be forced.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import jax

from hippocampus.config import Config
from hippocampus.config_files import fields, nearest_field, read_json
from hippocampus.errors import ConfigError, DataError
from hippocampus.models.build_model import build_model
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training.equilibrium import has_curriculum
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.sharding import path_name
from hippocampus.training.state import init_state

MAY_CHANGE = ("name", "train.steps", "train.epochs", "train.grad_accumulation",
              "train.deterministic", "eval.",
              "checkpoint.", "log.", "sample.", "mesh.", "guard.", "model.solver.on_expansion",
              "model.solver.least_converged", "model.backbone.path")
"""Fields, or groups of them, that may differ when a run goes on; a decoder's digest may not."""

MAY_NOT_CHANGE = ("guard.spike_",)
"""Beginnings of fields that are held although `MAY_CHANGE` has their group."""

TEXT, TOKENIZER = "data.text", "data.tokenizer"
"""What `--allow_change` calls the text and the tokenizer themselves, whatever they are named."""


def check_resumable(folder: RunFolder, config: Config, automatic: Collection[str],
                    allowed: Collection[str] = ()) -> list[str]:
    """Compares a run's saved config with the one asked for.

    Args:
      folder: of the run.
      config: the resolved config that it is to go on with.
      automatic: fields of it that the device decided.
      allowed: fields that may differ this time (`--allow_change`).

    Returns:
      What a person should know of allowed differences, a line each.

    Raises:
      ConfigError: the first field that must not differ, with both values and the flag that allows
        it; a name in `allowed` that is no field; or weights that the new model has no place for.
    """
    saved, _ = read_json(folder.config)
    before, now, notes = fields(saved), fields(config), []
    _check_names(allowed, now)
    changed = [name for name in sorted(before.keys() | now.keys())
               if before.get(name) != now.get(name) and not _may_change(name)]
    asked = [name for name in changed if name not in automatic or name in allowed]
    if asked:
        first = next((name for name in asked if name not in allowed), None)
        difference = _state_difference(saved, config)
        if difference or first:
            name = first or asked[0]
            raise ConfigError(
                f"{folder.path} was trained with {name} = {before.get(name)!r}, not "
                f"{now.get(name)!r}", f"the saved state does not fit: {difference}; choose another "
                "--workdir" if difference else _flag(asked, allowed))
    for name in changed:
        if name in asked:
            notes.append(f"note: {name} was {before.get(name)!r}, is {now.get(name)!r} from here "
                         "on (--allow_change)")
        else:
            notes.append(f"note: {name} is {now[name]} on this device (it was {before.get(name)}); "
                         "numbers will differ a little")
    if saved.train.steps != config.train.steps and config.optimizer.schedule != "constant":
        notes.append(f"note: train.steps was {saved.train.steps}, is {config.train.steps}: the "
                     "learning-rate schedule moves")
    if saved.train.steps != config.train.steps and has_curriculum(config.model):
        notes.append("note: so does the solver's curriculum, which goes by the share of train.steps"
                     " that is over")
    return notes


def check_record(folder: RunFolder, record: str, allowed: Collection[str] = ()) -> list[str]:
    """As `check_same_data`, with what the run folder keeps.

    Args:
      folder: of the run.
      record: what `RunData.record` says now.
      allowed: what may differ all the same.

    Raises:
      ConfigError: what differs.
      DataError: data.json is missing or damaged.
    """
    try:
        saved = json.loads(folder.data.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise DataError(f"cannot read {folder.data}, which says what the run was trained on",
                        "restore it from a copy, or choose another --workdir") from None
    return check_same_data(folder, saved, json.loads(record), allowed)


def check_same_data(folder: RunFolder, saved: Mapping[str, Any], now: Mapping[str, Any],
                    allowed: Collection[str] = ()) -> list[str]:
    """Compares the digests of a run's text and tokenizer with those it is to go on with.

    Args:
      folder: of the run, for the message.
      saved, now: what `RunData.record` said then, and says now.
      allowed: `--allow_change`; "data.text" and "data.tokenizer" stand for the two digests.

    Returns:
      A line for each difference that was allowed: data.json and tokenizer.json are then to be
      written anew.

    Raises:
      ConfigError: what differs, with the flag that allows it.
      DataError: what was saved is damaged.
    """
    if not isinstance(saved, Mapping):
        raise DataError(f"{folder.data} is damaged: it is not a JSON object",
                        "restore it from a copy, or choose another --workdir")
    notes = []
    for name, key, what in ((TEXT, "sha256", "text"), (TOKENIZER, "tokenizer", "tokenizer")):
        if saved.get(key) == now[key]:
            continue
        before, after = str(saved.get(key))[:12], str(now[key])[:12]
        if name not in allowed:
            raise ConfigError(
                f"{folder.path} was trained on another {what} ({before}… then, {after}… now)",
                f"{_flag([name], allowed)} (the pydoc corpus follows the version of Python)")
        notes.append(f"note: another {what} from here on ({before}… before, {after}… now; "
                     "--allow_change)")
    return notes


def _may_change(field: str) -> bool:
    return not field.startswith(MAY_NOT_CHANGE) and any(
        field.startswith(entry) if entry.endswith(".") else field == entry for entry in MAY_CHANGE)


def _check_names(allowed: Collection[str], known: Collection[str]) -> None:
    for name in allowed:
        if name not in known and name != TEXT:
            raise ConfigError(f"--allow_change names {name!r}, which is not a field",
                              nearest_field(name))


def _flag(names: Collection[str], allowed: Collection[str]) -> str:
    """The hint that forces a change, with what was allowed already: it is given once, whole."""
    flag = ",".join(sorted({*names, *allowed}))
    values = "value" if len(names) == 1 else "values"
    return f"--allow_change={flag} goes on with the new {values}; or choose another --workdir"


def _state_difference(saved: Config, config: Config) -> str:
    """The first array of the state that the saved one lacks or has in another shape; or ""."""
    before, now = _shapes(saved), _shapes(config)
    # Parameters first: their names say the most.
    for name in sorted(before.keys() | now.keys(), key=lambda n: (n.partition("/")[0] != "params",
                                                                  n)):
        if name not in now and name.startswith("ema/"):
            continue  # an average that is not wanted any more is left where it is
        if name.startswith("carried/") and (name not in now or name not in before):
            continue  # what a model carries may begin, or end, at any batch
        if before.get(name) != now.get(name):
            return (f"{name} is {before.get(name, 'missing')} there and "
                    f"{now.get(name, 'missing')} here")
    return ""


def _shapes(config: Config) -> dict[str, str]:
    """Such as float32[256,16], for every array of the state by its path; nothing is computed."""
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    trees = jax.eval_shape(lambda: init_state(model, optimizer, config)).trees()
    return {path_name(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
            for path, leaf in jax.tree.leaves_with_path(trees)}
