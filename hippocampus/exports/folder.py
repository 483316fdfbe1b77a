"""An exported folder: what is in it, how one is recognised, and how one appears, whole or not.

    model.safetensors  config.json  tokenizer.json  MODEL_CARD.md

config.json is the run's, with one key more, "export": the `ExportRecord`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.config import Config
from hippocampus.config_files import EXPORT, from_json, to_json
from hippocampus.errors import ConfigError, DataError
from hippocampus.exports.storage import STORAGES
from hippocampus.files import check_nameable, check_writable

WEIGHTS, CONFIG, TOKENIZER, CARD = FILES = (
    "model.safetensors", "config.json", "tokenizer.json", "MODEL_CARD.md")
"""Of an exported folder."""

FORMAT = 1
"""Version of the folder; a newer one is refused."""

KINDS = ("ema", "raw")
"""Of weights: the running average, or what the optimizer stepped."""

_MOST_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class ExportRecord:
    """What an exported folder says of itself.

    Attributes:
      step: of the run that the weights are of.
      weights: one of `KINDS`.
      storage: of the matrices, one of `hippocampus.exports.storage.STORAGES`.
      tokenizer: digest of the tokenizer that the run was trained with.
      text: digest of the text that it was trained on; None where the run had not recorded it.
      version: of hippocampus that exported.
      format: of the folder.
    """

    step: int
    weights: str
    storage: str
    tokenizer: str
    text: str | None
    version: str
    format: int = FORMAT

    def metadata(self) -> dict[str, str]:
        """For the header of the weights, which may travel alone."""
        return {"format": f"hippocampus {self.format}", "step": str(self.step),
                "weights": self.weights, "storage": self.storage, "version": self.version}


def is_export(folder: Path) -> bool:
    """Whether a folder is meant as an exported one; `open_export` says whether it is good."""
    has_weights = (folder / WEIGHTS).exists()
    try:
        content = _read_object(folder / CONFIG)
    except DataError:
        return has_weights
    return EXPORT in content or (has_weights and "format" not in content)


def open_export(folder: Path) -> tuple[Config, tuple[str, ...], ExportRecord]:
    """Reads config.json, which may come from people one does not know.

    Returns:
      The config, the names of its automatic fields, and the record.

    Raises:
      DataError: missing, damaged, not ours, or of a newer version.
    """
    path = folder / CONFIG
    content = _read_object(path)
    values = content.pop(EXPORT, None)
    if not isinstance(values, dict):
        raise DataError(f"{path} is not of an exported hippocampus model",
                        "python -m hippocampus.export makes such a folder from a run")
    try:
        return (*from_json(content, path), _record(path, values))
    except ConfigError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from None


def config_text(config: Config, automatic: tuple[str, ...], record: ExportRecord) -> str:
    """config.json of an exported folder."""
    content = {**json.loads(to_json(config, automatic)), EXPORT: dataclasses.asdict(record)}
    return json.dumps(content, indent=2) + "\n"


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses a place that an export must not take; writes nothing.

    Args:
      out: need not exist.
      overwrite: an earlier export may be replaced.

    Raises:
      ConfigError: a file, somebody else's folder, an earlier export, or no permission.
    """
    check_nameable(out)
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "choose another --out")
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if names and not _is_ours(out):
        raise ConfigError(f"{out} is not empty and not an export (it holds {sorted(names)[0]})",
                          "choose another --out")
    if others := sorted(names - set(FILES)):
        raise ConfigError(f"{out} holds {others[0]}, which no export wrote",
                          "move it away, or choose another --out")
    if names and not overwrite:
        raise ConfigError(f"{out} is an export already", "--overwrite replaces it")
    check_writable(out.parent)


@contextlib.contextmanager
def new_export(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes its place when the block ends, and not before.

    Whoever looks at `out` sees nothing or the old export, and then the whole new one. A process
    that is killed leaves a hidden folder beside it, which the next export to the place removes.

    Args:
      out: need not exist.
      overwrite: an earlier export may be replaced.

    Raises:
      ConfigError: see `check_free`; or another process is exporting to the same place.
    """
    check_free(out, overwrite)
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    lock = _claim(partial, out)
    try:
        yield partial
        _flush(partial)
        check_free(out, overwrite)
        if out.is_dir() and any(out.iterdir()):
            old = out.with_name(f".{out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _is_ours(folder: Path) -> bool:
    """Stricter than `is_export`: a model of other tools, with files of the same names, is not."""
    try:
        return EXPORT in _read_object(folder / CONFIG)
    except DataError:
        return False


def _claim(partial: Path, out: Path) -> int:
    """Makes the folder to write into, empty; returns what holds the right to it."""
    partial.mkdir(parents=True, exist_ok=True)
    try:  # what is in it will be deleted: it must not be somebody else's folder behind a link
        lock = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        raise ConfigError(f"{partial} is a link", "remove it, or choose another --out") from None
    try:
        # The kernel drops the lock with the process, so a killed export leaves none behind.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"another process is exporting to {out}",
                          "wait for it, or choose another --out") from None
    for left in partial.iterdir():
        left.unlink()
    return lock


def _flush(folder: Path) -> None:
    """Brings a folder to the disk, so that a rename never shows less than all of it."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_CONFIG_BYTES + 1)
        if len(raw) > _MOST_CONFIG_BYTES:
            raise ValueError(f"more than {_MOST_CONFIG_BYTES:,} bytes")
        content = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "is this an exported folder?"
                        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}", "copy or download it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: not a JSON object", "copy or download it again")
    return content


def _record(path: Path, values: dict[str, Any]) -> ExportRecord:
    version = values.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise DataError(f"{path} is of an export of format {version!a}; this version reads "
                        f"{FORMAT}", "install the version of hippocampus that wrote it")
    checks = {
        "step": lambda v: type(v) is int and 0 <= v < 2**63, "weights": lambda v: v in KINDS,
        "storage": lambda v: v in STORAGES, "tokenizer": lambda v: isinstance(v, str),
        "text": lambda v: v is None or isinstance(v, str), "version": lambda v: isinstance(v, str),
        "format": lambda v: True}
    if values.keys() != checks.keys():
        odd = sorted(values.keys() ^ checks.keys())[0]
        raise DataError(f"{path} is damaged: {EXPORT} has {'a' if odd in values else 'no'} field "
                        f"{odd!a}", "copy or download it again")
    for name, good in checks.items():
        if not good(values[name]):
            raise DataError(f"{path} is damaged: {EXPORT}.{name} is {ascii(values[name])[:80]}",
                            "copy or download it again")
    return ExportRecord(**values)
