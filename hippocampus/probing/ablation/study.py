"""An ablation from its grid to its files: what `python -m hippocampus.ablate` runs."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.tables import number, render
from hippocampus.models.flops import training_flops_per_token
from hippocampus.probing.ablation import cells, knockout, tables
from hippocampus.probing.ablation.cells import Study, as_trained
from hippocampus.probing.ablation.grid import Grid
from hippocampus.probing.ablation.matching import parameters, with_matched
from hippocampus.probing.ablation.pictures import draw
from hippocampus.probing.ablation.rows import write_csv
from hippocampus.probing.ablation.runs import read_finished
from hippocampus.probing.ablation.summaries import Findings, find, scaling_fits
from hippocampus.probing.report import write_page
from hippocampus.probing.results import SuiteResult, write_suite
from hippocampus.runs.run_folder import environment
from hippocampus.training.data import read_data
from hippocampus.training.signals import StopSignal

SUITE = "ablation"
"""Name of its files."""


@dataclass(frozen=True)
class Outcome:
    """What an ablation leaves.

    Attributes:
      result: tables and pictures.
      written: the files.
    """

    result: SuiteResult
    written: tuple[Path, ...]


def prepare(grid: Grid, out: str | Path, match: Sequence[str] = ()) -> Study:
    """A grid with its matched baselines in a folder, all of it checked; nothing is written.

    Args:
      grid: from `make_grid`.
      out: folder of the ablation.
      match: of `hippocampus.probing.ablation.matching.KINDS`.

    Raises:
      ConfigError: a cell that could not be trained, or runs in the folder of another config.
    """
    study = Study(Path(out), grid)
    if match:
        study = Study(study.out, with_matched(grid, match, _vocabulary(study)))
    cells.check(study)
    return study


def carry_out(study: Study, say: Callable[[str], None], target: float | None = None,
              max_windows: int = 0, stop: StopSignal | None = None) -> Outcome:
    """Trains what is missing, measures the knock-outs and writes everything.

    Args:
      study: from `prepare`.
      say: prints a line.
      target: the loss that speed is measured to; default: one that all runs reach.
      max_windows: of the knock-outs, evenly spaced; 0 = the whole validation split.
      stop: see `hippocampus.training.loop.fit`.

    Raises:
      ConfigError: the folder is in use or not an ablation's, or a wrong argument.
      DataError: nothing usable to read, or nothing finished.
      Stopped: by a signal, with everything saved.
    """
    started = time.perf_counter()
    if max_windows < 0:
        raise ConfigError(f"--max_windows is {max_windows}", "it must be at least 0 (0 = all)")
    if target is not None and not math.isfinite(target):
        raise ConfigError(f"--target_loss is {target}", "give a finite number")
    lock = cells.lock(study)
    try:
        cells.read_texts(study)
        cells.begin(study)
        with cells.compiled_once(study.out / ".compiled"):
            failed = cells.train(study, say, stop)
            knockouts = knockout.measure(study, say, max_windows)
        runs = read_finished(study)
        if not runs:
            raise DataError("no run of this ablation came to its end",
                            "lower optimizer.learning_rate")
        findings = find(study.grid, runs, knockouts, target)
        result = conclude(study, findings, knockouts, failed, time.perf_counter() - started)
        about = made_by(study)
        written = [*write_csv(study.out, findings, knockouts, about),
                   write_suite(study.out, result, about), _page(study, result, about)]
    finally:
        lock.release()
    return Outcome(result, tuple(written))


def conclude(study: Study, findings: Findings, knockouts: tuple[knockout.Knockout, ...],
             failed: dict[tuple[str, int], str], seconds: float) -> SuiteResult:
    """The tables and pictures of an ablation.

    Args:
      study: of it.
      findings: its numbers.
      knockouts: of whole models, one per seed.
      failed: (cell, seed) -> why there is no result.
      seconds: that it took this time.
    """
    fits = scaling_fits(findings, parameters)
    found = [tables.loss_table(findings), tables.difference_table(findings),
             *tables.knockout_tables(findings, knockouts), tables.speed_table(findings),
             tables.size_table(findings), tables.scaling_table(findings, fits)]
    notes = [f"{cell}, seed {seed}: {why}; it is in no number" for (cell, seed), why in
             failed.items()]
    if strangers := study.strangers():
        notes.append(f"in this folder, of other grids and in no table: {', '.join(strangers)}")
    return SuiteResult(SUITE, f"Ablation of {study.grid.name}", tuple(filter(None, found)),
                       draw(findings, fits), (), seconds, tuple(notes))


def overview(study: Study) -> Any:
    """What would be trained, for `--check`; a rich renderable."""
    grid = study.grid
    rows, tokens, flops = [], 0.0, 0.0
    for cell in grid.cells:
        config = as_trained(cell.config, cell.config.model.vocab_size, cell.config.train.steps)
        per_run = config.train.steps * config.train.batch_size * config.data.context
        left = sum(not study.finished(cell, seed) for seed in grid.seeds)
        per_token = training_flops_per_token(config)
        tokens, flops = tokens + left * per_run, flops + left * per_run * per_token
        rows.append([cell.title, f"{parameters(config):,}", number(per_token, 0), f"{per_run:,}",
                     f"{len(grid.seeds) - left} of {len(grid.seeds)}"])
    notes = [*grid.notes, *(cell.note for cell in grid.cells if cell.note),
             f"compared with {grid.baseline}; seeds {', '.join(map(str, grid.seeds))}; "
             f"still to train: {tokens:,.0f} tokens, {flops:.3g} FLOPs",
             "parameters and FLOPs with the vocabulary of the config; training takes the "
             "tokenizer's (and the epochs, if any, are counted then)"]
    return render(f"{grid.name}: {len(grid.cells)} cells x {len(grid.seeds)} seeds in {study.out}",
                  ["cell", "parameters", "FLOPs/token", "tokens a run", "finished"], rows, notes)


def made_by(study: Study) -> dict[str, Any]:
    """What a reader needs to repeat it."""
    here = environment()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"version": here["packages"].get("hippocampus"), "commit": here["commit"],
            "command": here["command"], "devices": here["devices"], "run": str(study.out),
            "config": study.grid.name, "step": None, "weights": "ema",
            "seed": study.grid.seeds[0], "seeds": list(study.grid.seeds), "date": now}


def _page(study: Study, result: SuiteResult, about: dict[str, Any]) -> Path:
    header = {name: about[name] for name in ("config", "commit", "version", "devices", "date",
                                             "command")}
    header |= {"cells": len(study.grid.cells), "seeds": about["seeds"],
               "baseline": study.grid.baseline}
    return write_page(study.out / "report.html", result.title, header, [(result, about)],
                      kicker="Ablation")


def _vocabulary(study: Study) -> int:
    """Of the tokenizer: as a run of the folder has it, else as the text gives it."""
    from hippocampus.config_files import read_json

    for cell, seed in study.runs():
        folder = study.folder(cell, seed)
        if folder.is_run():
            return read_json(folder.config)[0].model.vocab_size
    return read_data(study.grid.cells[0].config).tokenizer.vocab_size
