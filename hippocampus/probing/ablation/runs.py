"""What an ablation reads of its run folders; nothing is measured here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.config import Config
from hippocampus.config_files import read_json
from hippocampus.errors import DataError
from hippocampus.evaluation.result_table import Protocol
from hippocampus.files import read_object
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.models.flops import training_flops_per_token
from hippocampus.probing.ablation.cells import Study
from hippocampus.runs.run_folder import RunFolder, read_metrics

NATS, BITS = "nats/token", "bits/byte"
"""Units of a loss: the second where tokenizers differ."""


@dataclass(frozen=True)
class CellRun:
    """A finished run.

    Attributes:
      cell: name of its cell.
      seed: of the run.
      path: its folder.
      config: as trained.
      step: that the final evaluation is of: the one with the lowest eval/loss.
      losses: unit -> (averaged weights, raw weights) of the final evaluation, over all of the
        validation split.
      accuracy: share of the predictions that are right, of the averaged weights; None where it was
        not measured.
      lines: count-based models by name: nats per token on the same text.
      bytes_per_token: of that text; None where bytes mean nothing.
      worse_than_unigram: whether counting tokens beats it; None where nobody counted.
      protocol: of the final evaluation.
      rows: of metrics.jsonl.
      parameters: of the model.
      flops: of training, per token.
      environment: of its last start.
    """

    cell: str
    seed: int
    path: Path
    config: Config
    step: int
    losses: Mapping[str, tuple[float, float]]
    accuracy: float | None
    lines: Mapping[str, float]
    bytes_per_token: float | None
    worse_than_unigram: bool | None
    protocol: Protocol
    rows: Sequence[Mapping[str, Any]]
    parameters: int
    flops: float
    environment: Mapping[str, Any]

    @property
    def tokens_per_step(self) -> int:
        """Of training text."""
        return self.config.train.batch_size * self.config.data.context

    @property
    def tokens(self) -> int:
        """Of training text that the whole run read."""
        return self.config.train.steps * self.tokens_per_step

    def line(self, name: str, unit: str) -> float | None:
        """A count-based model in a unit; None where there is none."""
        nats = self.lines.get(name)
        if nats is None or unit == NATS:
            return nats
        return nats / (math.log(2) * self.bytes_per_token) if self.bytes_per_token else None


def read_finished(study: Study) -> tuple[CellRun, ...]:
    """All finished runs of a grid, cell by cell.

    Raises:
      DataError: a damaged run folder.
    """
    return tuple(_read(study.folder(cell, seed), cell.name, seed) for cell in study.grid.cells
                 for seed in study.grid.seeds if study.finished(cell, seed))


def unit_of(runs: Sequence[CellRun]) -> str:
    """The unit that the losses of runs compare in."""
    one = len({run.protocol.tokenizer_digest for run in runs}) <= 1
    return NATS if one or not all(BITS in run.losses for run in runs) else BITS


def _read(folder: RunFolder, cell: str, seed: int) -> CellRun:
    hint = f"remove {folder.path}: it is then trained again"
    results = read_object(folder.results, hint)
    config, _ = read_json(folder.config)
    try:
        report = read_object(folder.path / str(results["evaluation"]), hint)
        text, tokenizer, windows = report["text"], report["tokenizer"], report["windows"]
        models = [row for row in report["rows"] if row["kind"] == "model"]
        protocol = Protocol(
            text["corpus"], text["digest"], text["split"], text["tokens"], tokenizer["kind"],
            tokenizer["digest"], tokenizer["vocabulary"], windows["context"], windows["stride"],
            windows["documents"], "ema" if config.ema.decay else "raw", None,
            text["unknown_rate"])
        losses = {NATS: (_number(results["final/loss"]), _number(results["final/loss_raw"]))}
        if results.get("final/bits_per_byte") is not None:
            losses[BITS] = (_number(results["final/bits_per_byte"]),
                            _number(results["final/bits_per_byte_raw"]))
        lines = {row["model"]: _number(row["nats_per_token"]) for row in report["rows"]
                 if row["kind"] == "line"}
        counted = next(row["worse_than_unigram"] for row in reversed(models))
        model = build_model(config)
        return CellRun(
            cell, seed, folder.path, config, int(results["step"]), losses,
            results.get("final/accuracy"), lines,
            text["bytes"] / text["tokens"] if text.get("bytes") else None, counted, protocol,
            read_metrics(folder.metrics), count_parameters(model),
            training_flops_per_token(config), _environment(folder))
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise DataError(f"{folder.path} is damaged: {error!r}", hint) from None


def _environment(folder: RunFolder) -> dict[str, Any]:
    try:
        return dict(json.loads(folder.environment.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _number(value: Any) -> float:
    """null stands for what is not finite."""
    return math.nan if value is None else float(value)
