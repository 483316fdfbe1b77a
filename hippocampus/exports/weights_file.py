"""model.safetensors: written, and read from people one does not know.

    8 bytes: length of the header, little-endian
    header:  JSON, {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets"}, …}
    data:    the tensors, one behind the other, without a gap

Everything that the header says is checked before the first array is built. Tensors are read one at
a time from a memory map. Nothing in the format can run code.

Source: the format as its library describes it, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from hippocampus.errors import CheckpointError
from hippocampus.exports.storage import TensorSpec

# Names of types in the file -> numpy's name and bytes of a number. Others exist; none is ours.
_TYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1)}

_PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")

_MOST_HEADER_BYTES = 16 * 2**20
_MOST_DIMENSIONS = 8
_COPY_AGAIN = "copy or download it again, or export the run again"


@dataclass(frozen=True)
class Header:
    """What a file says it holds, checked against its own size.

    Attributes:
      metadata: free text.
      tensors: type and shape by name.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorSpec]


def write_weights(path: Path, tensors: Mapping[str, Shaped[np.ndarray, "*sizes"]],
                  metadata: Mapping[str, str]) -> None:
    """Writes a file.

    Args:
      path: the file to make.
      tensors: by name, contiguous.
      metadata: free text.

    Raises:
      OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
        path.chmod(mode)  # the library lets nobody else read its files
    except SafetensorError as error:  # the library's word for an OSError
        raise OSError(0, str(error)) from None


def read_header(path: Path) -> Header:
    """Reads and checks the header; no tensor is touched.

    Raises:
      CheckpointError: missing, cut short, or with a header that is not right.
    """
    if not path.is_file():
        raise CheckpointError(f"there are no weights at {path}", _no_weights_hint(path.parent))
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER_BYTES):
                raise _damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}",
                              "check the path and its permissions") from None
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ is not text")
    return Header(metadata, _check_layout(path, content, size - 8 - length))


def check_tensors(path: Path, header: Header, expected: Mapping[str, TensorSpec]) -> None:
    """Refuses a file that has not exactly the tensors that a model needs.

    Raises:
      CheckpointError: naming the first tensor that is missing, surplus or of another kind.
    """
    hint = "config.json and model.safetensors must come from the same export"
    for name, spec in expected.items():
        if name not in header.tensors:
            raise CheckpointError(f"{path} lacks the tensor {name}", hint)
        found = header.tensors[name]
        if found != spec:
            raise CheckpointError(f"{path}: {name} is {found.dtype} {list(found.shape)}; the model "
                                  f"needs {spec.dtype} {list(spec.shape)}", hint)
    surplus = sorted(header.tensors.keys() - expected.keys())
    if surplus:
        raise CheckpointError(f"{path} has a tensor that the model has not: {_shown(surplus[0])}",
                              hint)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Callable[[str], Shaped[np.ndarray, "*sizes"]]]:
    """A function that reads one tensor by its name, from a memory map.

    Raises:
      CheckpointError: the library refuses the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file.get_tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error).splitlines()[0]}", _COPY_AGAIN
                              ) from None


def _no_weights_hint(folder: Path) -> str:
    others = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLED)
    if others:
        return (f"{others[0]} is never read: such files can run code when they are opened; ask for "
                "safetensors")
    return _COPY_AGAIN


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            raise ValueError("the same name twice")
        return keys

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a header that is not JSON ({error})") from None
    if not raw.startswith(b"{") or not isinstance(content, dict):
        raise _damaged(path, "a header that is not a JSON object")
    return content


def _check_layout(path: Path, content: Mapping[str, Any], n_bytes: int) -> dict[str, TensorSpec]:
    """The tensors of a header: each of the size that it says, together the whole data."""
    specs, places = {}, []
    for name, entry in content.items():
        specs[name], (begin, end) = _check_entry(path, name, entry)
        places.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(places):
        if begin < position:
            raise _damaged(path, f"{_shown(name)} overlaps the tensor before it")
        if begin > position:
            raise _damaged(path, f"a hole of {begin - position:,} bytes before {_shown(name)}")
        position = end
    if position != n_bytes:
        raise _damaged(path, f"{position:,} bytes of tensors in its header, {n_bytes:,} behind it")
    return specs


def _check_entry(path: Path, name: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{_shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise _damaged(path, f"{_shown(name)} has the unknown type {_shown(dtype)}")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _damaged(path, f"{_shown(name)} has the shape {_shown(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{_shown(name)} has the offsets {_shown(offsets)}")
    begin, end = offsets
    kind, width = _TYPES[dtype]
    if end - begin != math.prod(shape) * width:
        raise _damaged(path, f"{_shown(name)} has {_shown(end - begin)} bytes for {dtype} "
                       f"{_shown(shape)}")
    return TensorSpec(kind, tuple(shape)), (begin, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _shown(value: Any) -> str:
    """What a stranger wrote, on one line and not too long."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", _COPY_AGAIN)
