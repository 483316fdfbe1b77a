"""The tables of an ablation for people, narrow enough for a terminal; rows.py has all columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from hippocampus.evaluation.result_table import FLAG, Column, Protocol, ResultTable, merged
from hippocampus.evaluation.tables import number
from hippocampus.probing.ablation.grid import short_names
from hippocampus.probing.ablation.knockout import Knockout
from hippocampus.probing.ablation.runs import NATS, CellRun
from hippocampus.probing.ablation.statistics import Summary, summarize
from hippocampus.probing.ablation.summaries import CellResult, Findings, ScalingFit

LINES = ("uniform", "unigram", "bigram", "trigram")
"""Count-based models below the cells."""


def loss_table(findings: Findings) -> ResultTable:
    """Mean and spread of every cell, above the count-based models."""
    columns = [Column("name", "cell"), Column("seeds", "seeds"),
               Column("loss", "loss", findings.unit), Column("loss_sd", "± sd"),
               Column("raw", "raw"), Column("raw_sd", "± sd")]
    if findings.unit == NATS and any(result.bits_per_byte for result in findings.results):
        columns.append(Column("bits", "loss", "bits/byte"))
    if any(result.accuracy for result in findings.results):
        columns += [Column("accuracy", "accuracy"), Column("accuracy_sd", "± sd")]
    rows = [_loss_row(result) for result in findings.results]
    return ResultTable("losses", f"retrained: validation loss of {findings.grid.name}",
                       tuple(columns), (*rows, *_lines(findings)), protocols(findings),
                       (*_loss_notes(findings), *_flags(rows)))


def difference_table(findings: Findings) -> ResultTable | None:
    """Whether what differs from the baseline does so beyond the seeds; None without a pair."""
    base = findings.baseline.cell.title
    columns = (Column("name", "cell"), Column("pairs", "pairs"),
               Column("difference", "difference", findings.unit),
               Column("interval", "95 % interval"), Column("p", "p"), Column("p_holm", "p (Holm)"))
    rows = [_difference_row(result) for result in findings.results if result.test]
    if not rows:
        return None
    tests = sum(result.p_holm is not None for result in findings.results)
    notes = [f"two-sided paired t-test against {base} over runs of equal seed; Holm: for "
             f"{tests} comparison{'s' if tests != 1 else ''}"]
    if len(findings.grid.seeds) < 3:
        notes.append("fewer than three seeds: no difference here is established")
    return ResultTable("differences", f"retrained: differences from {base}", columns, tuple(rows),
                       protocols(findings), tuple(notes))


def knockout_tables(findings: Findings, knockouts: Sequence[Knockout]) -> list[ResultTable]:
    """Every subset of the paths trained alone, beside the whole model without the other paths."""
    tables: list[ResultTable] = []
    for i, whole in enumerate(dict.fromkeys(found.whole for found in knockouts)):
        members = [result for result in findings.results
                   if whole in (result.cell.name, result.cell.whole) and not result.cell.match]
        ours = [found.protocol for found in knockouts if found.whole == whole]
        cut = [dataclasses.replace(protocol, step=None, seeds=len(ours)) for protocol in ours]
        both = merged([*_protocols(members), *cut])
        suffix = f"_{i}" if i else ""
        of = "" if whole == findings.grid.baseline else f" of {findings[whole].cell.title}"
        rows = _knockout_rows(members, findings[whole])
        tables.append(ResultTable(
            f"knockout{suffix}", f"knock-out beside retrained{of}",
            (Column("name", "paths"), Column("retrained", "retrained", NATS),
             Column("retrained_sd", "± sd"), Column("knockout", "knockout"),
             Column("knockout_sd", "± sd"), Column("knockout_raw", "knockout_raw"),
             Column("knockout_raw_sd", "± sd")),
            rows, both, (*_KNOCKOUT_NOTES, *_flags(rows, "knockout"))))
        tables.append(ResultTable(
            f"lost{suffix}", f"what is lost without the other paths{of}",
            (Column("name", "paths"), Column("lost_retrained", "retrained", NATS),
             Column("lost_knockout", "knockout"), Column("lost_knockout_raw", "knockout_raw")),
            tuple({**row, FLAG: ""} for row in rows if row["lost_knockout"] is not None), both,
            ("difference from the model with all paths, retrained from its final evaluation, "
             "knock-out on the same windows",)))
    return tables


_KNOCKOUT_NOTES = (
    "retrained: these paths alone, trained from the start; knockout: the model with all paths, the "
    "others masked at evaluation and the gates of these made to sum to 1 again; knockout_raw: "
    "masked, gates as they were",
    "a knock-out says how much a trained model relies on a path, not what the path is worth")


def size_table(findings: Findings) -> ResultTable:
    """What every cell costs."""
    columns = (Column("name", "cell"), Column("parameters", "parameters"),
               Column("flops", "FLOPs per token", digits=0), Column("tokens", "tokens"),
               Column("all_flops", "FLOPs", digits=0), Column("seconds", "seconds", digits=1),
               Column("speed", "tokens/s", digits=0))
    rows = []
    for result in findings.results:
        row: dict[str, Any] = {"name": result.cell.title}
        if result.runs:
            run = result.runs[0]
            spent = summarize([t for t in map(_seconds, result.runs) if t is not None])
            row |= {"parameters": run.parameters, "flops": run.flops, "tokens": run.tokens,
                    "all_flops": run.flops * run.tokens, "seconds": mean(spent),
                    "speed": run.tokens / spent.mean if spent and spent.mean > 0 else None}
        rows.append(row)
    notes = [cell.note for cell in findings.grid.cells if cell.note]
    return ResultTable("sizes", "what the cells cost", columns, tuple(rows), protocols(findings),
                       (*notes, "of training, the backward pass included; seconds and tokens/s: "
                        "mean over seeds, without starting, compiling, evaluating and saving"))


def speed_table(findings: Findings) -> ResultTable | None:
    """How soon every cell reaches the target; None where there is no target."""
    if findings.target is None:
        return None
    columns = (Column("name", "cell"), Column("steps", "steps", digits=0),
               Column("steps_sd", "± sd", digits=0), Column("tokens", "tokens", digits=0),
               Column("seconds", "seconds", digits=1), Column("seconds_sd", "± sd", digits=1),
               Column("reached", "seeds that do"))
    rows = []
    for result in findings.results:
        steps = result.reaching(lambda found: found.step)
        seconds = result.reaching(lambda found: found.seconds)
        rows.append({
            "name": result.cell.title, "steps": mean(steps), "steps_sd": sd(steps),
            "tokens": mean(result.reaching(lambda found: found.tokens)),
            "seconds": mean(seconds), "seconds_sd": sd(seconds),
            "reached": f"{len(result.reached)} of {len(result.runs)}"})
    origin = ("as asked" if findings.asked
              else "the best that the worst run came to while training, so that all reach it")
    every = sorted({run.config.eval.every_steps for run in findings.runs})
    notes = (f"target: {findings.target:.4f} {findings.unit}, {origin}; averaged weights",
             f"evaluated every {' or '.join(map(str, every))} steps (0: at the end only): "
             "no finer than that")
    return ResultTable("speed", f"to a loss of {findings.target:.4f} {findings.unit}", columns,
                       tuple(rows), protocols(findings), notes)


def scaling_table(findings: Findings, fits: Sequence[ScalingFit]) -> ResultTable | None:
    """The fitted curves; None where nothing was fitted."""
    rows = []
    for fit in fits:
        sizes = f"{len({r.runs[0].parameters for r in fit.results})} sizes"
        row: dict[str, Any] = {"name": fit.label or "all cells", "sizes": sizes}
        if fit.law is not None:
            row |= {"E": fit.law.offset, "A": fit.law.factor, "N0": round(fit.law.scale),
                    "alpha": fit.law.alpha, "alpha_interval": _interval(fit.law.interval("alpha")),
                    "E_interval": _interval(fit.law.interval("offset"))
                    if fit.law.fits_offset else "fixed"}
        rows.append(row)
    if not rows:
        return None
    columns = (Column("name", "cells"), Column("sizes", "sizes"), Column("E", "E"),
               Column("E_interval", "95 % interval"), Column("A", "A"), Column("N0", "N0"),
               Column("alpha", "alpha"), Column("alpha_interval", "95 % interval"))
    notes = [f"L(N) = E + A (N / N0)^-alpha in {findings.unit}; N: all parameters, tables of "
             "embeddings included; bootstrap over seeds and residuals, 1,000 replicates",
             "every size was trained on the tokens that its config says, with its learning rate: "
             "where that is the same for all, it is not the best for each"]
    if any(fit.law and not fit.law.fits_offset for fit in fits):
        notes.append("three sizes do not tell E from A: E is fixed at 0 there")
    notes += [f"{fit.label or 'all cells'}: the loss does not fall with size; the curve means "
              "nothing" for fit in fits if fit.law and not fit.law.falls]
    return ResultTable("scaling", "loss and size", columns, tuple(rows), protocols(findings),
                       tuple(notes))


def protocols(findings: Findings) -> tuple[Protocol, ...]:
    """How the retrained losses were measured."""
    return _protocols(findings.results)


def _protocols(results: Sequence[CellResult]) -> tuple[Protocol, ...]:
    """Each once, with the seeds of the cell that has most."""
    seeds: dict[Protocol, int] = {}
    for result in results:
        for run in result.runs:
            seeds[run.protocol] = max(seeds.get(run.protocol, 0), len(result.runs))
    return tuple(dataclasses.replace(protocol, seeds=n) for protocol, n in seeds.items())


def mean(summary: Summary | None) -> float | None:
    """Of a summary that may not be there."""
    return None if summary is None else summary.mean


def sd(summary: Summary | None) -> float | None:
    """Of a summary that may not be there."""
    return None if summary is None else summary.sd


def _loss_row(result: CellResult) -> dict[str, Any]:
    row = {"name": result.cell.title, "seeds": len(result.runs), "loss": mean(result.loss),
           "loss_sd": sd(result.loss), "raw": mean(result.raw), "raw_sd": sd(result.raw),
           "bits": mean(result.bits_per_byte), "accuracy": mean(result.accuracy),
           "accuracy_sd": sd(result.accuracy),
           "category": "matched" if result.cell.match else "retrained"}
    return {**row, FLAG: "!"} if result.worse_than_unigram else row


def _difference_row(result: CellResult) -> dict[str, Any]:
    test = result.test
    assert test is not None
    return {"name": result.cell.title, "pairs": test.n, "difference": test.difference,
            "interval": None if test.low is None else _interval((test.low, test.high)),
            "p": test.p, "p_holm": result.p_holm,
            "category": "matched" if result.cell.match else "retrained"}


def _lines(findings: Findings) -> list[dict[str, Any]]:
    """The count-based models, once for every text and tokenizer."""
    first: dict[tuple[str, str], tuple[str, CellRun]] = {}
    for result in findings.results:
        for run in result.runs:
            key = (run.protocol.text_digest, run.protocol.tokenizer_digest)
            first.setdefault(key, (result.cell.title, run))
    rows = []
    for title, run in first.values():
        for name in LINES:
            if run.line(name, findings.unit) is not None:
                of = f" (text of {title})" if len(first) > 1 else ""
                rows.append({"name": name + of, "loss": run.line(name, findings.unit),
                             "bits": run.line(name, "bits/byte"), "category": "line"})
    return rows


def _loss_notes(findings: Findings) -> list[str]:
    grid = findings.grid
    notes = ["loss: averaged weights of each run's best checkpoint (lowest loss while training), "
             "over the whole validation split; ± sd: over seeds"]
    rates = {run.protocol.unknown_rate for run in findings.runs}
    if findings.unit != NATS and max(rates, default=0.0) > 0:
        notes.append(f"up to {max(rates):.2%} of the tokens are <unk>, which is easier than the "
                     "word it stands for: such rows are too low")
    notes += grid.notes
    for what, values in (("devices", {_devices(run) for run in findings.runs}),
                         ("commits", {str(run.environment.get("commit")) for run in
                                       findings.runs})):
        if len(values) > 1:
            notes.append(f"the runs are of {len(values)} {what}: {', '.join(sorted(values))}")
    return notes


def _devices(run: CellRun) -> str:
    return "+".join(map(str, dict.fromkeys(run.environment.get("devices", ()))))


def _flags(rows: Sequence[dict[str, Any]], what: str = "model") -> list[str]:
    end = ("broken, or hardly trained" if what == "model"
           else "the inputs of what is left are none that it was trained on")
    return [f"! {row['name']}: this {what} is worse than the unigram line: {end}"
            for row in rows if row.get(FLAG)]


def _knockout_rows(members: Sequence[CellResult], whole: CellResult) -> tuple[dict[str, Any], ...]:
    unigram = whole.runs[0].lines.get("unigram") if whole.runs else None
    rows: list[dict[str, Any]] = []
    for result in members:
        row: dict[str, Any] = {"name": short_names(result.cell.paths), "category": "knockout"}
        for kind, ours, theirs in (
                ("retrained", _nats(result), _nats(whole)),
                ("knockout", result.knockout, whole.knockout),
                ("knockout_raw", result.knockout_raw, whole.knockout_raw)):
            lost = None if ours is None or theirs is None or result is whole else (
                ours.mean - theirs.mean)
            row |= {kind: mean(ours), f"{kind}_sd": sd(ours), f"lost_{kind}": lost}
        worse = unigram is not None and any(
            row[kind] is not None and not row[kind] <= unigram
            for kind in ("knockout", "knockout_raw"))
        rows.append({**row, FLAG: "!"} if worse else row)
    return tuple(rows)


def _nats(result: CellResult) -> Summary | None:
    return summarize([run.losses[NATS][0] for run in result.runs])


def _seconds(run: CellRun) -> float | None:
    timed = [row for row in run.rows if row.get("time/training") is not None]
    return timed[-1]["time/training"] + (timed[-1].get("time/data") or 0.0) if timed else None


def _interval(bounds: tuple[float | None, float | None]) -> str:
    return " to ".join(number(bound, 4) for bound in bounds)
