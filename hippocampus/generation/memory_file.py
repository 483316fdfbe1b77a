"""A memory as a file: one safetensors file with the arrays of a `MemoryState`.

Its metadata, one JSON object, say which form it has, whose layer and tokenizer it belongs to (the
fingerprint, which refuses it elsewhere), and a digest over the arrays and all of that, which finds
a flipped bit. A file is written whole or not at all, the same bytes for the same memory; reading
one can run no code.

    save_memory("ann.memory", state, fingerprint, {"user": "Ann"})
    state = load_memory("ann.memory", fingerprint).state
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jaxtyping import Shaped

from hippocampus.errors import CheckpointError
from hippocampus.exports.storage import TensorSpec
from hippocampus.exports.weights_file import open_tensors, read_header
from hippocampus.files import write_atomically
from hippocampus.ops.memory_state import MemoryState

FORMAT = "hippocampus.memory/1"

_RECORD = "memory"
_RESTORE = "restore it from a copy"
_TYPES = {"valid_BS": "bool", "age_BS": "int32", "position_BS": "int32", "source_BSn": "int32",
          "writes_B": "int32", "tokens_B": "int32"}


@dataclass(frozen=True)
class Fingerprint:
    """What a memory means something to: keys of one layer are noise to any other.

    Attributes:
      model: digest of the parameters that made it.
      layer: name of the layer that it belongs to.
      d_model: width of the hidden states.
      n_slots: S.
      n_heads: H.
      head_width: d.
      tokenizer: digest of the tokenizer of its sources; "" = none.
    """

    model: str
    layer: str
    d_model: int
    n_slots: int
    n_heads: int
    head_width: int
    tokenizer: str


@dataclass(frozen=True)
class SavedMemory:
    """What a file holds.

    Attributes:
      state: numpy arrays, in the users' order of the file.
      fingerprint: whose it is.
      notes: what was written beside it.
    """

    state: MemoryState
    fingerprint: Fingerprint
    notes: Mapping[str, str]


def save_memory(path: str | Path, state: MemoryState, fingerprint: Fingerprint,
                notes: Mapping[str, str] | None = None) -> None:
    """Writes a memory so that every reader, at any moment, finds the old file or the new one.

    Args:
      path: the file to make or to replace; its folder is made where missing.
      state: the memories of one user or more.
      fingerprint: whose they are.
      notes: free text, such as the user's name.

    Raises:
      CheckpointError: the memory has other sizes than its fingerprint, or numbers that are not
        finite, or the disk does not take it; the old file stays.
    """
    from safetensors.numpy import save

    path = Path(path)
    tensors = {name: np.ascontiguousarray(array)
               for name, array in jax.device_get(state.arrays()).items()}
    for name, spec in _specs(fingerprint, *_free_sizes(tensors)).items():
        if (str(tensors[name].dtype), tensors[name].shape) != spec:
            raise CheckpointError(f"cannot save {path}: {name} is {tensors[name].dtype} "
                                  f"{list(tensors[name].shape)}, not {spec.dtype} "
                                  f"{list(spec.shape)}", "give the fingerprint of its own layer")
        if not np.isfinite(tensors[name]).all():
            raise CheckpointError(f"cannot save {path}: {name} has numbers that are not finite",
                                  "go on from an earlier memory, or reset this one")
    record = {"format": FORMAT, "fingerprint": dataclasses.asdict(fingerprint),
              "notes": dict(notes or {}), "users": len(tensors["writes_B"]),
              "writes": int(tensors["writes_B"].sum(dtype=np.int64)),
              "tokens": int(tensors["tokens_B"].sum(dtype=np.int64))}
    record["digest"] = _digest(tensors, record)
    try:  # one entry, because the library writes several in any order
        content = save(tensors, metadata={_RECORD: json.dumps(record, sort_keys=True)})
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}",
                              "what was there is unchanged; make room, or save elsewhere") from None


def load_memory(path: str | Path, fingerprint: Fingerprint | None = None) -> SavedMemory:
    """Reads a memory, after everything about it was checked.

    Args:
      path: the file.
      fingerprint: whose it must be; None = anybody's, for looking at it.

    Raises:
      CheckpointError: missing, damaged, no memory, of a newer version, or of another model, layer
        or tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no memory at {path}", "check the path")
    try:
        header = read_header(path)
        record = _read_record(path, header.metadata)
        found = _read_fingerprint(path, record)
        _check_fingerprint(path, found, fingerprint)
        specs = _specs(found, *_free_sizes(header.tensors))
        if header.tensors != specs:
            odd = sorted(name for name in specs.keys() | header.tensors.keys()
                         if specs.get(name) != header.tensors.get(name))
            raise _damaged(path, f"{odd[0][:60]!a} is missing, or not as its fingerprint says")
        with open_tensors(path) as read:
            tensors: dict[str, Any] = {name: np.array(read(name)) for name in specs}
    except CheckpointError as error:  # of a file of weights; this one is restored otherwise
        hint = _RESTORE if "again" in error.hint else error.hint
        raise CheckpointError(error.message, hint) from None
    if _digest(tensors, record) != record.get("digest"):
        raise _damaged(path, "its digest differs")
    notes = record.get("notes")
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise _damaged(path, "its notes are not text")
    return SavedMemory(MemoryState(**tensors), found, notes)


def _read_record(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _RECORD not in metadata:
        raise CheckpointError(f"{path} is not a memory", "weights and memories are files apart")
    try:
        record = json.loads(metadata[_RECORD])
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("format"), str):
        raise _damaged(path, "its record is not a JSON object of a known form")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path} is of the form {_shown(record['format'])}, this version "
                              f"reads {FORMAT}", "update hippocampus, or restore it from a copy")
    return record


def _read_fingerprint(path: Path, record: Mapping[str, Any]) -> Fingerprint:
    try:
        found = Fingerprint(**record["fingerprint"])
    except (KeyError, TypeError):
        raise _damaged(path, "it has no fingerprint") from None
    for field in dataclasses.fields(Fingerprint):
        value = getattr(found, field.name)
        if type(value).__name__ != field.type or (field.type == "int" and not 0 < value < 2**31):
            raise _damaged(path, "it has no fingerprint")
    return found


def _check_fingerprint(path: Path, found: Fingerprint, wanted: Fingerprint | None) -> None:
    for field in dataclasses.fields(Fingerprint) if wanted else ():
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        if theirs != ours:
            raise CheckpointError(
                f"{path} is the memory of another {_MEANING.get(field.name, 'layer')}: "
                f"{field.name} {_shown(theirs)}, here {_shown(ours)}",
                "a memory is of use to the model that wrote it")


_MEANING = {"model": "model", "tokenizer": "tokenizer"}


def _free_sizes(tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Users and remembered ids, which a fingerprint leaves open."""
    source = tensors.get("source_BSn")
    shape: tuple[int, ...] = () if source is None else source.shape
    return (shape[0], shape[2]) if len(shape) == 3 else (0, 0)


def _specs(fingerprint: Fingerprint, users: int, source_tokens: int) -> dict[str, TensorSpec]:
    f = fingerprint
    behind = {"BS": (f.n_slots,), "B": (), "BSn": (f.n_slots, source_tokens),
              "BSHd": (f.n_slots, f.n_heads, f.head_width)}
    return {field.name: TensorSpec(_TYPES.get(field.name, "float32"),
                                   (users, *behind[field.name.rpartition("_")[2]]))
            for field in dataclasses.fields(MemoryState)}


def _digest(tensors: Mapping[str, Shaped[np.ndarray, "*sizes"]],
            record: Mapping[str, Any]) -> str:
    """Over the arrays and every word of the record but the digest itself."""
    digest = xxhash.xxh3_128(json.dumps(
        {name: value for name, value in record.items() if name != "digest"},
        sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _shown(value: str | int) -> str:
    text = ascii(str(value))
    return text if len(text) <= 42 else f"{text[:13]}…'"


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", _RESTORE)
