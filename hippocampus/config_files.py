"""Config files, overrides and config.json: every way in and out of `hippocampus.config.Config`.

A config file is Python with `get_config(arg="")` returning an `ml_collections.ConfigDict` that
starts from `defaults(family)`; `configs/x.py:arg` passes the argument. It is code and is executed:
take it only from people you trust. A config.json is data and is only ever parsed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hippocampus.config import FAMILIES, Config
from hippocampus.config_checks import check_together
from hippocampus.config_refusals import shown
from hippocampus.config_values import check_value, did_you_mean, parse_value
from hippocampus.errors import ConfigError, DataError, HippocampusError

FORMAT = 1
"""Version of config.json; an older one is migrated, a newer one refused."""

EXPORT = "export"
"""Key of config.json that an exported folder has and a run folder has not."""


_kinds: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Field -> its type, read once: the annotations are text."""


def defaults(family: str = "hybrid") -> ConfigDict:
    """The default config of a model family, locked: every field is there, none can be invented."""
    values = dataclasses.asdict(Config(model=_family_class(family)()))
    if "backbone" in values["model"]:
        values["data"]["tokenizer"] = "backbone"  # a pretrained decoder has no other
    return ConfigDict(values).lock()


def start_from(sibling: str, file: str, argument: str = "") -> ConfigDict:
    """The config of another file, for an experiment that changes some of its fields.

    Args:
      sibling: name of the other config file, such as "wt103_bpe.py".
      file: `__file__` of the config that starts from it; both lie in one folder.
      argument: what the other file is called with.

    Returns:
      Its ConfigDict, locked, with the fields' defaults filled in by that file.

    Raises:
      ConfigError: there is no such file, or it fails.
    """
    return _config_of(Path(file).parent / sibling, argument).lock()


def load_config(source: str | Path | ConfigDict,
                overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a config file, applies overrides and checks the whole.

    Args:
      source: `"configs/x.py"`, `"configs/x.py:arg"`, or a ConfigDict.
      overrides: dotted field name -> value; a string is read as the field's type.

    Returns:
      The frozen config; "auto" fields are still to be resolved (hippocampus.devices.resolve).

    Raises:
      ConfigError: naming the field, what it may be, and the nearest field's name.
    """
    if isinstance(source, ConfigDict):
        values, name = _plain(source, "the config"), ""
    else:
        values, name = _run_config_file(str(source))
    if name and values.get("name") == Config.name:
        values["name"] = name
    for field, value in (overrides or {}).items():
        _override(values, field, value)
    return from_dict(values)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The checked config of a plain nested mapping (a ConfigDict's, or config.json's)."""
    model = values.get("model")
    family = model.get("family", "hybrid") if isinstance(model, Mapping) else "hybrid"
    _family_class(family)  # refuses one that there is not
    return check_together(_build(Config, values, "", family))


def fields(config: Config) -> dict[str, Any]:
    """Every leaf field by its dotted name, such as `{"train.steps": 1000, …}`."""
    return dict(_leaves(dataclasses.asdict(config)))


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values of some leaf fields, by their dotted names; nothing is checked.

    Fields that have the value already leave the config as it is.
    """
    for name, value in values.items():
        config = _with_field(config, name.split("."), value)
    return config


def _with_field(group: Any, path: Sequence[str], value: Any) -> Any:
    first, *rest = path
    old = getattr(group, first)
    new = _with_field(old, rest, value) if rest else value
    return group if new is old else dataclasses.replace(group, **{first: new})


def to_json(config: Config, automatic: Sequence[str] = ()) -> str:
    """config.json: the resolved values, and the names of the fields that were "auto"."""
    content = {"format": FORMAT, "automatic": sorted(automatic), **dataclasses.asdict(config)}
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path) -> tuple[Config, tuple[str, ...]]:
    """Reads what `to_json` wrote: the config, and the names of its automatic fields.

    Raises:
      DataError: missing, not JSON, or of a newer format.
      ConfigError: a field that this version does not know or allow.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}", "is this a run folder?") from None
    if isinstance(content, dict) and EXPORT in content:
        raise DataError(f"{path.parent} is an exported model, not a run folder",
                        "it can be loaded, sampled from and evaluated; for all else take the run")
    return from_json(content, path)


def from_json(content: Any, path: Path) -> tuple[Config, tuple[str, ...]]:
    """The config, and the names of its automatic fields, of the content of a config.json.

    Raises:
      DataError: not of this format.
      ConfigError: a field that this version does not know or allow.
    """
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(content, dict) or type(found) is not int or found != FORMAT:
        raise DataError(f"{path} has format {shown(found)}; this version reads {FORMAT}",
                        "install the version of hippocampus that wrote it")
    automatic = content.get("automatic", [])
    if not isinstance(automatic, list) or not all(isinstance(name, str) for name in automatic):
        raise DataError(f"{path} is damaged: automatic is not a list of fields",
                        "restore it from a copy")
    values = {name: value for name, value in content.items()
              if name not in ("format", "automatic")}
    return from_dict(values), tuple(automatic)


# ---------------------------------------------------------------- nested mappings

def _build(cls: type, values: Any, prefix: str, family: str) -> Any:
    """The dataclass `cls` of a mapping, every key known and every value checked."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {shown(values)}; it must be a group of fields",
                          _group_hint(prefix, cls))
    kinds = _kinds(cls)
    arguments = {}
    for key, value in values.items():
        if key not in kinds:
            raise _no_field(f"{prefix}{key}", family)
        kind = FAMILIES[family] if f"{prefix}{key}" == "model" else kinds[key]
        if dataclasses.is_dataclass(kind):
            arguments[key] = _build(typing.cast(type, kind), value, f"{prefix}{key}.", family)
        else:
            limits = cls.__dataclass_fields__[key].metadata  # type: ignore[attr-defined]
            arguments[key] = check_value(f"{prefix}{key}", value, kind, limits)
    return cls(**arguments)


def _family_class(family: Any) -> type:
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"model.family is {shown(family)}; it must be one of {', '.join(FAMILIES)}",
            did_you_mean(shown(family), FAMILIES))
    return FAMILIES[family]


def _group_hint(prefix: str, cls: Any) -> str:
    return f"set one of them, such as {prefix}{dataclasses.fields(cls)[0].name}"


def _override(values: dict, field: str, value: Any) -> None:
    """Sets `values["a"]["b"]` for the field "a.b"; the field must exist."""
    *groups, last = field.split(".")
    cls: Any = Config
    model = values.get("model")
    family = model.get("family", "hybrid") if isinstance(model, dict) else "hybrid"
    for group in groups:
        kind = _kinds(cls).get(group) if dataclasses.is_dataclass(cls) else None
        if kind is None:
            raise _no_field(field, family)
        values = values.setdefault(group, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{group} is {shown(values)}; it must be a group of fields",
                              "start the config from defaults()")
        cls = _family_class(family) if group == "model" else kind
    kind = _kinds(cls).get(last) if dataclasses.is_dataclass(cls) else None
    if kind is None:
        raise _no_field(field, family)
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"{field} is a group of fields", _group_hint(f"{field}.", kind))
    values[last] = parse_value(field, value, kind) if isinstance(value, str) else value


def _no_field(field: str, family: Any) -> ConfigError:
    """An error for a name that is no field, or none of the family's."""
    printable = field if re.fullmatch(r"[\w.-]{1,99}", field) else shown(field)
    others = [other for other, names in _fields_of_families().items()
              if any(name == field or name.startswith(f"{field}.") for name in names)]
    if others:
        return ConfigError(f"{printable} is not a field of the {family} family",
                           f"it belongs to model.family={others[0]}")
    return ConfigError(f"{printable} is not a field", nearest_field(field[:99]))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def _fields_of_families() -> dict[str, tuple[str, ...]]:
    """Every leaf field by its dotted name, for every family."""
    return {family: tuple(fields(Config(model=cls()))) for family, cls in FAMILIES.items()}


def nearest_field(field: str) -> str:
    """A hint for the name of a field that does not exist."""
    known = [name for names in _fields_of_families().values() for name in names]
    same_leaf = [name for name in known if name.split(".")[-1] == field.split(".")[-1]]
    close = difflib.get_close_matches(field, known, n=1, cutoff=0.6) or same_leaf[:1] or [
        name for name in known
        if difflib.get_close_matches(field.split(".")[-1], [name.split(".")[-1]], cutoff=0.75)][:1]
    return f"did you mean {close[0]}?" if close else "hippocampus/config.py lists every field"


# ---------------------------------------------------------------- config files

def _run_config_file(source: str) -> tuple[dict, str]:
    """Executes a config file; returns its values and the run name that goes with its argument."""
    path_text, _, argument = source.partition(".py:")
    path = Path(path_text + ".py" if argument else source)
    config = _config_of(path, argument)
    values = _plain(config, str(path))
    return values, f"{path.stem}-{argument}" if argument else path.stem


def _plain(config: ConfigDict, what: str) -> dict:
    try:
        return config.to_dict()
    except Exception as error:  # a placeholder, or a reference to one, that nobody filled
        raise ConfigError(f"{what} has a field without a value: {_first_line(error)}",
                          "give it one, or start the config from defaults()") from error


class _LeavesNothing(SourceFileLoader):
    """Makes no __pycache__ beside a user's file."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Writes nothing."""


def _config_of(path: Path, argument: str) -> ConfigDict:
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"no config file at {path}", _nearest_file(path))
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        spec = importlib.util.spec_from_file_location(
            path.stem, path, loader=_LeavesNothing(path.stem, str(path.absolute())))
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError(f"{path} has no get_config()", "see configs/quickstart.py")
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError(f"{path} takes no argument, got {argument!r}",
                              f"--config={path}")
        config = get_config(argument) if argument else get_config()
    except HippocampusError:
        raise
    except Exception as error:
        raise _config_file_error(path, error) from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}",
                          "it must return the ConfigDict of defaults()")
    return config


def _config_file_error(path: Path, error: Exception) -> ConfigError:
    """One line for whatever a config file raised: the line it stands on, and its first sentence."""
    # importlib compiles a file under its absolute path.
    own = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if frame.filename == str(path.absolute())]
    line = own[-1] if own else getattr(error, "lineno", None)
    text, hint = _first_line(error), "--debug shows the whole error"
    if unknown := re.search(r'Key "(\w+)" does not exist', text):
        text, hint = f"{unknown[1]} is not a field", nearest_field(unknown[1])
    return ConfigError(f"{path}:{line}: {type(error).__name__}: {text}", hint)


def _first_line(error: Exception) -> str:
    return (str(error.args[0] if error.args else error).strip().splitlines() or [""])[0]


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    there = sorted(p.name for p in folder.glob("*.py")) if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, there, n=1)
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"in {folder}: {', '.join(there)}" if there else "give the path of a .py file"
