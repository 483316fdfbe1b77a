"""What a run folder has written down about itself, for its model card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.runs.run_folder import RunFolder, read_metrics


@dataclass(frozen=True)
class RunRecords:
    """The files of a run; what is missing or damaged is empty.

    Attributes:
      environment: env.json, of the last start.
      data: data.json.
      results: results.json.
      metrics: rows of metrics.jsonl.
      evaluations: the JSON files of evaluations/, oldest name first.
    """

    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    results: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, folder: RunFolder) -> RunRecords:
        """Reads them."""
        rows = [row for row in read_metrics(folder.metrics) if isinstance(row, dict)]
        evaluations = [_object(path) for path in sorted(folder.evaluations.glob("*.json"))]
        return cls(_object(folder.environment), _object(folder.data), _object(folder.results),
                   tuple(rows), tuple(found for found in evaluations if found))

    def last_row(self, step: int, name: str) -> Mapping[str, Any]:
        """The last row of the metrics at a step that has a series; empty where there is none."""
        rows = [row for row in self.metrics if row.get("step") == step and name in row]
        return rows[-1] if rows else {}


def _object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict):
            return content
    return {}
