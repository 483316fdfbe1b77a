"""Which models an ablation trains: subsets of the paths, and values of fields.

Every cell is a whole checked config before anything is trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hippocampus.config import PATHS, Config, HybridConfig, layer_paths
from hippocampus.config_checks import check_together
from hippocampus.config_files import fields, load_config
from hippocampus.errors import ConfigError
from hippocampus.probing.rows import SHORT

FULL = "full"
"""Name of the model that has all paths."""

_NOT_VARIED = {"train.seed": "--seeds=3 trains every cell with three seeds",
               "name": "cells have their own names"}
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Axis:
    """A field with the values that are tried.

    Attributes:
      field: its dotted name.
      values: as text, as on a command line.
    """

    field: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One model of an ablation, to be trained with every seed.

    Attributes:
      name: of its folder, and of its row.
      config: all of it; the seed is that of the first run.
      changes: field -> value of every axis.
      paths: that it has, where it is one of the subsets; () elsewhere.
      whole: name of the cell that has all paths and is otherwise the same; "" where there is none.
      match: "parameters" or "flops" for a baseline that is as large or as costly as the whole.
      note: what a reader has to know of it.
    """

    name: str
    config: Config
    changes: Mapping[str, Any]
    paths: tuple[str, ...] = ()
    whole: str = ""
    match: str = ""
    note: str = ""

    @property
    def title(self) -> str:
        """For a table, which breaks its lines at spaces."""
        what = {"parameters": "parameters", "flops": "FLOPs"}.get(self.match, "")
        name = self.name.replace(f"_same_{self.match}", f" (same {what})") if what else self.name
        return name.replace(",", ", ")


@dataclass(frozen=True)
class Grid:
    """All that an ablation trains.

    Attributes:
      name: of the config that the cells start from.
      cells: in the order of tables.
      baseline: name of the cell that the others are compared with.
      seeds: of every cell.
      axes: fields that are varied.
      notes: which cells there could not be.
    """

    name: str
    cells: tuple[Cell, ...]
    baseline: str
    seeds: tuple[int, ...]
    axes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

    def config(self, cell: Cell, seed: int) -> Config:
        """What one run trains."""
        train = dataclasses.replace(cell.config.train, seed=seed)
        return dataclasses.replace(cell.config, train=train, name=f"{cell.name}-seed{seed}")


def make_grid(source: str | Path | ConfigDict, overrides: Mapping[str, Any], over: Sequence[str],
              seeds: int, paths: bool = False, baseline: str = "") -> Grid:
    """The cells of an ablation.

    Args:
      source: the config, see `load_config`.
      overrides: of it.
      over: axes such as "loss.z_weight=0,1e-4"; several give all combinations.
      seeds: how many; the first is the config's.
      paths: also every subset of the paths; without `over` always.
      baseline: a cell; default: the one that changes nothing, else the first.

    Raises:
      ConfigError: a field or value that cannot be, cells that are the same, or only one.
    """
    base = load_config(source, overrides)
    axes = [parse_axis(text) for text in over]
    twice = _first_double(axis.field for axis in axes)
    if twice is not None:
        raise ConfigError(f"--over names {twice} twice", "give all its values at once")
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}", "it must be at least 1; three say how sure it is")
    load_config(source, {**overrides, "train.seed": base.train.seed + seeds - 1})
    subsets, notes = _subsets(base) if paths or not axes else ([()], ())
    varied = _combinations(source, overrides, base, axes)
    cells = [_cell(config, changes, subset, len(subsets[0]))
             for changes, config in varied for subset in subsets]
    cells = [_with_whole(cell, cells) for cell in cells]
    _check_cells(cells)
    unchanged = [cell.name for cell in cells if cell.config == base]
    grid = Grid(base.name, tuple(cells), baseline or (unchanged or [cells[0].name])[0],
                tuple(range(base.train.seed, base.train.seed + seeds)),
                tuple(axis.field for axis in axes), notes)
    names = [cell.name for cell in cells]
    if grid.baseline not in names:
        raise ConfigError(f"there is no cell {grid.baseline!r} to compare with",
                          f"the cells are {', '.join(names)}")
    return grid


def parse_axis(text: str) -> Axis:
    """Reads "field=v1,v2"; a value with commas stands in brackets.

    Raises:
      ConfigError: no field, or no values.
    """
    field, equals, values = text.partition("=")
    field = field.strip().removeprefix("config.")
    found = tuple(part.strip() for part in re.findall(_VALUE, values)) if values.strip() else ()
    if not field or not equals or not found:
        raise ConfigError(f"--over={text} names no values", "--over=FIELD=VALUE,VALUE")
    if field in _NOT_VARIED:
        raise ConfigError(f"{field} is not varied", _NOT_VARIED[field])
    twice = _first_double(found)
    if twice is not None:
        raise ConfigError(f"--over={text} has {twice!r} twice", "give each value once")
    return Axis(field, found)


_VALUE = re.compile(r"""(?:^|,)((?:\[[^\]]*\]|\([^)]*\)|[^,])*)""")
"""A value of a list: up to a comma that is in no brackets."""


def short_names(paths: Sequence[str]) -> str:
    """Such as "ssm+attn"."""
    return "+".join(SHORT[path] for path in paths)


def _subsets(base: Config) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Subsets of the paths, the largest first, and a note on those that no model can be of."""
    if not isinstance(base.model, HybridConfig):
        raise ConfigError(f"a model of the {base.model.family} family has no paths to leave out",
                          "--over=FIELD=VALUE,VALUE varies something else")
    per_layer = layer_paths(base.model)
    used = tuple(path for path in PATHS if any(path in paths for paths in per_layer))
    if len(used) < 2:
        raise ConfigError(f"the model has only the path {short_names(used)}",
                          "--over=FIELD=VALUE,VALUE varies something else")
    possible, notes = [], []
    for size in range(len(used), 0, -1):
        for subset in itertools.combinations(used, size):
            bare = [i for i, paths in enumerate(per_layer) if not set(paths) & set(subset)]
            if bare:
                notes.append(f"no cell {short_names(subset)}: layer {bare[0]} would have no path")
            else:
                possible.append(subset)
    return possible, tuple(notes)


def _combinations(source: str | Path | ConfigDict, overrides: Mapping[str, Any], base: Config,
                  axes: Sequence[Axis]) -> list[tuple[dict[str, Any], Config]]:
    """Every combination of the values, as typed changes and the config with them."""
    known, found = fields(base), []
    for values in itertools.product(*(axis.values for axis in axes)):
        chosen = {axis.field: _without_brackets(value) if isinstance(known.get(axis.field), tuple)
                  else value for axis, value in zip(axes, values, strict=True)}
        config = load_config(source, {**overrides, **chosen})
        read = fields(config)
        found.append(({field: read[field] for field in chosen}, config))
    return found


def _without_brackets(text: str) -> str:
    """(3,2,1) and [ssm,attention] as a command line takes them; what is quoted stays."""
    inner = text[1:-1]
    bracketed = text[:1] + text[-1:] in ("()", "[]") and not set(inner) & set("\"'()[]")
    return inner if bracketed else text


def _cell(config: Config, changes: dict[str, Any], subset: tuple[str, ...], most: int) -> Cell:
    """A combination of values with a subset of the paths, or () for the paths that it has."""
    parts = [] if not subset else [FULL if len(subset) == most else short_names(subset)]
    parts += [f"{_leaf(field, changes)}={value_text(value)}" for field, value in changes.items()]
    name = ",".join(parts)
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME - 20]}~{_digest(name)}"
    if subset and len(subset) < most:
        config = with_paths(config, subset)
    return Cell(name, config, changes, subset)


def with_paths(config: Config, subset: Sequence[str]) -> Config:
    """The same model with some of its paths only."""
    model, kept = config.model, set(subset)
    per_layer = tuple("+".join(path for path in entry.split("+") if path in kept)
                      for entry in model.layer_paths)
    return check_together(dataclasses.replace(config, model=dataclasses.replace(
        model, paths=tuple(path for path in model.paths if path in kept) or tuple(subset),
        layer_paths=per_layer)))


def _with_whole(cell: Cell, cells: Sequence[Cell]) -> Cell:
    whole = [other.name for other in cells
             if other.changes == cell.changes and len(other.paths) > len(cell.paths)]
    return dataclasses.replace(cell, whole=whole[0]) if whole else cell  # the largest comes first


def _check_cells(cells: Sequence[Cell]) -> None:
    if len(cells) < 2:
        raise ConfigError("one cell has nothing to be compared with",
                          "give --over at least two values")
    for a, b in itertools.combinations(cells, 2):
        if a.config == b.config:
            raise ConfigError(f"the cells {a.name} and {b.name} are the same",
                              "give each value once")
        if a.name == b.name:
            raise ConfigError(f"two cells would have the name {a.name}", "vary fewer fields")


def _leaf(field: str, all_fields: Mapping[str, Any]) -> str:
    """The last parts of a field's name, as many as tell it from the others."""
    parts = field.split(".")
    for n in range(1, len(parts)):
        leaf = ".".join(parts[-n:])
        if sum(other == leaf or other.endswith("." + leaf) for other in all_fields) == 1:
            return leaf
    return field


def value_text(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, tuple):
        return "+".join(map(value_text, value)) or "none"
    text = repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
    plain = re.sub(r"[^\w.+-]+", "_", text).strip("_") or "empty"
    return plain if plain in (text, "empty") else f"{plain[-40:]}~{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _first_double(values: Iterable[str]) -> str | None:
    values = list(values)
    return next((value for i, value in enumerate(values) if value in values[:i]), None)
