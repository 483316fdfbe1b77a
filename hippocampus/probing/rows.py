"""Rows of probes as tables and as `results.csv`: name, category, loss, damage, contribution.

A suite's table whose columns include "category" is part of results.csv, which is made again from
the JSON files of a folder whenever a suite has run. docs/probing.md describes the columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from hippocampus.evaluation.metrics import perplexity
from hippocampus.evaluation.result_table import FLAG, Column, Protocol, ResultTable
from hippocampus.evaluation.tables import csv_text
from hippocampus.files import write_atomically
from hippocampus.probing.measured import Measured
from hippocampus.probing.probe import Probe
from hippocampus.probing.results import read_suites

CATEGORY = "category"
RESULTS = "results.csv"
SHORT = {"ssm": "ssm", "hopfield": "hop", "attention": "attn"}
"""Names of the paths in rows."""

COLUMNS = (
    Column("name", "probe"), Column(CATEGORY, CATEGORY), Column("loss", "loss", "nats/token"),
    Column("bits_per_byte", "bits/byte"), Column("delta", "damage", "nats/token"),
    Column("delta_stderr", "± s.e."), Column("contribution", "contribution"),
    Column("delta_per_contribution", "damage/contribution", "", 3))
"""Of the table of a suite."""

CSV_COLUMNS = (
    "name", CATEGORY, "path", "layer", "loss", "bits_per_byte", "perplexity", "delta",
    "delta_stderr", "contribution", "delta_per_contribution", "worse_than_unigram")
"""Of results.csv, before the protocol and what made the row."""

_SHARED = ("baseline", "line")
_MADE_BY = ("commit", "seed", "command")


def loss_row(probe: Probe, name: str, category: str, measured: Measured, *,
             changed: Bool[np.ndarray, "L P"] | None = None, path: str = "",
             layer: int | None = None) -> dict[str, Any]:
    """One measurement against the baseline.

    Args:
      probe: that it is of.
      name, category: of the row.
      measured: losses under the intervention.
      changed: which paths of which layers it touches, for what they contribute; None = it is not
        about paths.
      path: the one that it touches; "" = several, or none.
      layer: the one that it touches; None = all, or none.
    """
    loss, damage = measured.loss, measured.minus(probe.baseline)
    contribution = None if changed is None else float(
        (probe.baseline.share_LP * changed).sum() / probe.n_layers)
    return {
        "name": name, CATEGORY: category, "path": SHORT.get(path, path), "layer": layer,
        **_loss(probe, loss), "delta": damage.nats, "delta_stderr": _known(damage.standard_error),
        "contribution": contribution,
        "delta_per_contribution": damage.nats / contribution if contribution else None,
        **_judged(probe, loss)}


def baseline_row(probe: Probe) -> dict[str, Any]:
    """The model as it is."""
    row = loss_row(probe, "baseline", "baseline", probe.baseline)
    return {**row, "delta_stderr": None}


def line_rows(probe: Probe) -> list[dict[str, Any]]:
    """The count-based models on the same predictions."""
    return [{"name": name, CATEGORY: "line", "path": "", "layer": None, **_loss(probe, nats),
             "delta": nats - probe.baseline.loss} for name, nats in probe.lines.items()]


def loss_table(probe: Probe, name: str, title: str, rows: Sequence[Mapping[str, Any]],
               notes: Iterable[str] = ()) -> ResultTable:
    """A table of `loss_row`s; says what its flags and columns mean."""
    notes = list(notes)
    if any(row.get("contribution") for row in rows):
        notes.append("contribution: share of the paths that are changed in what all mixers add "
                     "(by norm), mean over tokens and layers")
    flags = {row.get(FLAG) for row in rows}
    if "!" in flags:
        notes.append(f"! worse than the unigram line ({probe.lines['unigram']:.4f}): the model no "
                     "longer works, and how bad it is says nothing of the path")
    if "!!" in flags:
        notes.append(f"!! worse than the uniform line ({probe.lines['uniform']:.4f})")
    return ResultTable(name, title, COLUMNS, tuple(rows), (probe.protocol,), tuple(notes))


def read_rows(folder: Path, order: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every row of results of the suites in a folder, with its protocol and what made it.

    Raises:
      DataError: a file that is damaged.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result, made in read_suites(folder, order):
        made_by = {key: made.get(key) for key in _MADE_BY}
        made_by["command"] = " ".join(made_by["command"] or ())
        for table in result.tables:
            if all(column.key != CATEGORY for column in table.columns):
                continue
            protocol = table.protocols[0].record()
            for row in table.rows:
                # Several suites measure the baseline; it is one row of each protocol.
                shared = row[CATEGORY] in _SHARED
                key = (row["name"], *protocol.values()) if shared else (len(rows),)
                rows.setdefault(key, {**protocol, **row, **made_by})
    return list(rows.values())


def write_results(folder: Path, order: Sequence[str] = ()) -> Path:
    """Writes results.csv from the JSON files of the folder.

    Returns:
      The file.
    """
    rows = read_rows(folder, order)
    protocol = [field.name for field in fields(Protocol)]
    path = folder / RESULTS
    write_atomically(path, csv_text([*CSV_COLUMNS, *protocol, *_MADE_BY], rows))
    return path


def _loss(probe: Probe, loss: float) -> dict[str, Any]:
    return {"loss": loss, "bits_per_byte": probe.bits_per_byte(loss),
            "perplexity": perplexity(loss)}


def _judged(probe: Probe, loss: float) -> dict[str, Any]:
    """Whether counting tokens, or knowing nothing, predicts better; a loss of NaN is worse too."""
    worse = {name: not loss <= probe.lines[name] for name in ("unigram", "uniform")
             if name in probe.lines}
    flag = "!!" if worse.get("uniform") else "!" if worse.get("unigram") else ""
    return {"worse_than_unigram": worse.get("unigram"), FLAG: flag}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
