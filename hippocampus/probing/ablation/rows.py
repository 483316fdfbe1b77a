"""The CSV files of an ablation, every row of which says all that is needed to use it alone."""

from __future__ import annotations

import json
import operator
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hippocampus.config_files import fields
from hippocampus.evaluation.tables import csv_text
from hippocampus.files import write_atomically
from hippocampus.probing.ablation.knockout import Knockout
from hippocampus.probing.ablation.progress import Reached
from hippocampus.probing.ablation.runs import BITS, NATS, CellRun
from hippocampus.probing.ablation.summaries import CellResult, Findings
from hippocampus.probing.ablation.tables import LINES, mean, sd

SHARED = ("text", "text_digest", "split", "tokens", "tokenizer", "tokenizer_digest", "vocabulary",
          "context", "stride", "documents", "weights", "unknown_rate")
"""Of the protocol, in both files."""


def write_csv(folder: Path, findings: Findings, knockouts: tuple[Knockout, ...],
              about: Mapping[str, Any]) -> list[Path]:
    """Writes ablation.csv, a row per cell, and runs.csv, a row per run; each atomically.

    Args:
      folder: of the ablation.
      findings: its numbers.
      knockouts: of whole models, one per seed.
      about: version, commit and command.

    Returns:
      The two files.
    """
    made = {"config": findings.grid.name, "version": about.get("version"),
            "commit": about.get("commit"), "command": shlex.join(about.get("command") or ())}
    cells = [{**_cell(findings, result), **made} for result in findings.results]
    runs = [{**_run(findings, result, run, knockouts), **made}
            for result in findings.results for run in result.runs]
    paths = [folder / "ablation.csv", folder / "runs.csv"]
    for path, rows in zip(paths, (cells, runs), strict=True):
        write_atomically(path, csv_text(dict.fromkeys(name for row in rows for name in row), rows))
    return paths


def _cell(findings: Findings, result: CellResult) -> dict[str, Any]:
    test = result.test
    row = {**_identity(findings, result), "seeds": len(result.runs), "unit": findings.unit,
           "loss_mean": mean(result.loss), "loss_sd": sd(result.loss),
           "loss_raw_mean": mean(result.raw), "loss_raw_sd": sd(result.raw),
           "bits_per_byte_mean": mean(result.bits_per_byte),
           "bits_per_byte_sd": sd(result.bits_per_byte), "accuracy_mean": mean(result.accuracy),
           "accuracy_sd": sd(result.accuracy), "baseline": findings.grid.baseline,
           "difference": test.difference if test else None, "low": test.low if test else None,
           "high": test.high if test else None, "p": test.p if test else None,
           "p_holm": result.p_holm, "worse_than_unigram": result.worse_than_unigram,
           "knockout_mean": mean(result.knockout), "knockout_sd": sd(result.knockout),
           "knockout_raw_mean": mean(result.knockout_raw),
           "knockout_raw_sd": sd(result.knockout_raw),
           "parameters": result.runs[0].parameters if result.runs else None,
           "flops_per_token": result.runs[0].flops if result.runs else None,
           "trained_tokens": result.runs[0].tokens if result.runs else None,
           "target_loss": findings.target, "seeds_that_reach_it": len(result.reached)}
    for name in ("step", "tokens", "seconds"):
        found = result.reaching(operator.attrgetter(name))
        row |= {f"{name}_to_target_mean": mean(found), f"{name}_to_target_sd": sd(found)}
    return {**row, **(_shared(findings, result.runs[0]) if result.runs else {})}


def _run(findings: Findings, result: CellResult, run: CellRun,
         knockouts: tuple[Knockout, ...]) -> dict[str, Any]:
    cut = next((found.losses.get(result.cell.paths) for found in knockouts
                if found.whole == (result.cell.whole or result.cell.name)
                and found.seed == run.seed and not result.cell.match), None)
    reached: Reached | None = result.reached.get(run.seed)
    averaged, raw = run.losses[NATS]
    bits, bits_raw = run.losses.get(BITS, (None, None))
    return {
        **_identity(findings, result), "seed": run.seed, "run": str(run.path),
        "best_step": run.step, "steps": run.config.train.steps,
        "nats_per_token": averaged, "nats_per_token_raw": raw, "bits_per_byte": bits,
        "bits_per_byte_raw": bits_raw, "accuracy": run.accuracy,
        "worse_than_unigram": run.worse_than_unigram,
        "knockout": cut[0] if cut else None, "knockout_raw": cut[1] if cut else None,
        "parameters": run.parameters, "flops_per_token": run.flops,
        "trained_tokens": run.tokens, "target_loss": findings.target,
        "step_to_target": reached.step if reached else None,
        "tokens_to_target": reached.tokens if reached else None,
        "seconds_to_target": reached.seconds if reached else None,
        "trained_by": run.environment.get("commit"),
        "devices": "+".join(map(str, run.environment.get("devices", ()))),
        **_shared(findings, run)}


def _identity(findings: Findings, result: CellResult) -> dict[str, Any]:
    cell = result.cell
    values = fields(cell.config)
    return {"cell": cell.name, "paths": "+".join(cell.paths), "match": cell.match,
            **{f"config.{name}": json.dumps(values[name]) if isinstance(values[name], tuple)
               else values[name] for name in findings.grid.axes},
            "mlp_width": cell.config.model.mlp.width if cell.match else None}


def _shared(findings: Findings, run: CellRun) -> dict[str, Any]:
    record = run.protocol.record()
    return {**{name: record[name] for name in SHARED},
            **{name: run.line(name, findings.unit) for name in LINES}}
