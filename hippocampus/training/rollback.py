"""Going back to an earlier checkpoint, past the batches that training did not survive."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hippocampus import distributed
from hippocampus.data.batches import Batch
from hippocampus.data.prefetch import BatchSource
from hippocampus.errors import DataError
from hippocampus.files import write_atomically


@dataclass(frozen=True)
class Rollback:
    """One way back.

    Attributes:
      at: the step after which it was decided.
      to: the step that was gone back to.
      offset: from there on, how many batches lie between a step and the one it would have had.
    """

    at: int
    to: int
    offset: int


@dataclass(frozen=True)
class Rollbacks:
    """All of a run, in their order, as rollbacks.json keeps them.

    The file is written before the run goes back, and a batch depends on it and on the step alone:
    a run that is killed in between, or falls back to an older checkpoint, reads the same batches.
    """

    path: Path
    records: tuple[Rollback, ...] = ()

    @staticmethod
    def read(path: Path) -> Rollbacks:
        """What a run has written; none without a file. All processes have to call it.

        Raises:
          DataError: the file is damaged.
        """
        text = distributed.from_first(path.read_text("utf-8") if path.exists() else "[]")
        try:
            records = tuple(Rollback(**record) for record in json.loads(text))
            if not all(type(number) is int for record in records
                       for number in dataclasses.astuple(record)):
                raise TypeError
        except (ValueError, TypeError):
            raise DataError(f"{path} is damaged: it says which batches the run leaves out",
                            "restore it from a copy, or remove it to leave out none") from None
        return Rollbacks(path, records)

    def add(self, at: int, to: int) -> Rollbacks:
        """One more, on disk when this returns: no batch before step `at` comes again."""
        record = Rollback(at, to, at - to + self.offset(at - 1))
        records = (*self.records, record)
        if distributed.is_first():
            content = [dataclasses.asdict(r) for r in records]
            write_atomically(self.path, json.dumps(content, indent=2) + "\n")
        return Rollbacks(self.path, records)

    def offset(self, step: int) -> int:
        """How many batches further the batch of a step is; the newest record that covers it."""
        return next((r.offset for r in reversed(self.records) if r.to <= step), 0)

    def source(self, batches: BatchSource) -> BatchSource:
        """The batches with those left out."""
        return _LeavingOut(batches, self) if self.records else batches


@dataclass(frozen=True)
class _LeavingOut:
    batches: BatchSource
    rollbacks: Rollbacks

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        return self.batches.batch(step + self.rollbacks.offset(step), rows)


def dump(path: Path, batch: Batch, statistics: Mapping[str, Any]) -> None:
    """Keeps what a person needs to see why a step was bad.

    Args:
      path: the .json to write; the arrays of the batch are put beside it, as .npz.
      batch: the bad one, whole, on the host.
      statistics: of the step and of the parameters: numbers, finite or not, also nested.
    """
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    kept: dict[str, Any] = {name: np.asarray(a) for name, a in arrays.items() if a is not None}
    content = io.BytesIO()
    np.savez(content, **kept)
    write_atomically(path.with_suffix(".npz"), content.getvalue())
    write_atomically(path, json.dumps(_finite(statistics), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes its name."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    number = float(value)
    return number if np.isfinite(number) else str(number)
