"""Folders of the Hugging Face form: safetensors, in one file or several, by name.

    model.safetensors
or  model.safetensors.index.json: {"weight_map": {name: file}}, and the files that it names

Headers are read and checked when a folder is opened; tensors one at a time from a memory map.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from hippocampus.backbones.tensors import TensorSource
from hippocampus.errors import CheckpointError, ConfigError
from hippocampus.exports.storage import TensorSpec
from hippocampus.exports.weights_file import open_tensors, read_header, write_weights
from hippocampus.files import check_nameable, check_writable, read_object

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_SHARD = 5 * 10**9
"""Bytes of a file that is written, unless one tensor alone is larger."""

_HINT = "copy or download the folder again"


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[TensorSource]:
    """The tensors of a folder, under the names that they have there.

    Args:
      folder: with model.safetensors, or its index and the files that it names.

    Raises:
      CheckpointError: nothing of the kind there, a file that is missing or damaged, or one that
        has not what the index says.
    """
    files = _files(folder)
    specs: dict[str, TensorSpec] = {}
    for file, names in files.items():
        header = read_header(folder / file)
        for name in header.tensors if names is None else names:
            if name not in header.tensors:
                raise CheckpointError(f"{folder / file} lacks the tensor {name}, which "
                                      f"{INDEX} promises", _HINT)
            specs[name] = header.tensors[name]
    where = {name: file for file, names in files.items() for name in (names or specs)}
    with contextlib.ExitStack() as stack:
        readers = {file: stack.enter_context(open_tensors(folder / file)) for file in files}
        yield TensorSource(str(folder), specs, lambda name: readers[where[name]](name))


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when all of it is written.

    Args:
      folder: the name; nothing, or an empty folder, may be there.

    Raises:
      ConfigError: something is there, or it cannot be written.
    """
    check_nameable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty", "choose another place")
    check_writable(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}",
                          "choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Shaped[np.ndarray, "*sizes"]]], *,
                  largest: int = LARGEST_SHARD) -> None:
    """Writes model.safetensors, or several files and their index.

    Args:
      folder: where to.
      tensors: names and arrays; the host holds those of one file.
      largest: bytes of a file, unless one tensor alone is larger.

    Raises:
      OSError: a file cannot be written.
    """
    place: dict[str, int] = {}
    held: dict[str, np.ndarray] = {}
    total = size = n = 0

    def flush() -> None:
        write_weights(folder / _shard(n), held, {"format": "pt"})
        held.clear()

    for name, array in tensors:
        if held and size + array.nbytes > largest:
            flush()
            n, size = n + 1, 0
        held[name] = np.ascontiguousarray(array)
        place[name], size, total = n, size + array.nbytes, total + array.nbytes
    flush()
    if n == 0:
        (folder / _shard(0)).rename(folder / WEIGHTS)
        return
    for i in range(n + 1):
        (folder / _shard(i)).rename(folder / _shard(i, n + 1))
    index = {"metadata": {"total_size": total},
             "weight_map": {name: _shard(i, n + 1) for name, i in place.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shard(i: int, n: int | None = None) -> str:
    return f"model-{i + 1:05d}-of-{'unknown' if n is None else f'{n:05d}'}.safetensors"


def _files(folder: Path) -> Mapping[str, list[str] | None]:
    """File -> the tensors that it is to have; None = all that it has."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {WEIGHTS: None}
    index: Any = read_object(folder / INDEX, _HINT).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX} has no weight_map", _HINT)
    files: dict[str, list[str]] = {}
    for name, file in index.items():
        # A name from a file that somebody else wrote must stay inside the folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX} names the file {str(file)[:60]!r}", _HINT)
        files.setdefault(file, []).append(name)
    return files
