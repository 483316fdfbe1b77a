"""The tables of the memory suite."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from hippocampus.evaluation.paired import POWER
from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.probing.memory.findings import LEVEL, MEASURES, PAIRS, Findings, interval

SHOWN = 6
"""Questions whose answers are printed."""

_LONGEST = 48
_UNITS = {"log p": "nats/answer", "log p per token": "nats/token"}
CURVES = ("delay", "interference", "slots")
"""Kinds of points, see `hippocampus.probing.memory.subject.Point`."""


def condition_table(findings: Findings, protocol: Protocol) -> ResultTable:
    """All conditions with all measures."""
    columns = (
        Column("name", "condition"), Column("log p", "log p", "nats/answer", 3),
        Column("low", "95 % from", "", 3), Column("high", "to", "", 3),
        Column("log p per token", "log p", "nats/token", 3), Column("F1", "F1", "", 3),
        Column("exact match", "exact match", "", 3), Column("ROUGE-L", "ROUGE-L", "", 3),
        Column("text_kib", "text in front", "KiB", 2), Column("memory_kib", "memory", "KiB", 2),
        Column("cut", "texts cut", "share", 2))
    rows = []
    memory_kib = statistics.fmean(findings.memory_bytes) / 1024
    for name in findings.conditions:
        mean, low, high = interval(findings.by_story(name, "log p"), findings.seed)
        own = findings.of(name)
        scores = {m: statistics.fmean(findings.by_story(name, m).values()) for m in MEASURES}
        rows.append({
            "name": name, **scores, "log p": mean, "low": low, "high": high,
            "text_kib": statistics.fmean(answer.context_bytes for answer in own) / 1024,
            "memory_kib": memory_kib if name in ("memory", "other") else 0.0,
            "cut": statistics.fmean(float(answer.cut) for answer in own)})
    cut = sum(answer.cut for answer in findings.of("story"))
    notes = (
        f"means over {findings.stories} stories of means over their questions, "
        f"{len(findings.of(findings.conditions[0]))} in all; seed {findings.seed}",
        "memory: its own story's, out of a file, and no text in front of the question; empty: a "
        "new user's; other: another story's; story: the text itself in front of the question, as "
        f"much of its beginning as fits ({cut} questions had to do with less than all); snippet: "
        "passages that BM25 finds, at most as many bytes as the memory's file and as fit",
        "log p: of the first reference, forced, without an id that ends it; F1, exact match and "
        "ROUGE-L: of what is written greedily, up to the end of its first line, the largest over "
        "references")
    return ResultTable("conditions", "Asked with and without a memory", columns, tuple(rows),
                       (protocol,), notes)


def comparison_table(findings: Findings, protocol: Protocol) -> ResultTable:
    """Memory against its controls, and against the text."""
    columns = (
        Column("name", "difference of"), Column("difference", "mean", "", 4),
        Column("low", "95 % from", "", 4), Column("high", "to", "", 4),
        Column("better", "stories above"), Column("worse", "below"),
        Column("p_flip", "p, flipped signs", "", 5), Column("p_sign", "p, sign test", "", 5),
        Column("effect", f"found with {POWER:.0%}", "", 4))
    rows: list[Mapping[str, Any]] = []
    for measure in MEASURES:
        unit = _UNITS.get(measure, "")
        for ours, theirs in PAIRS:
            one = findings.compare(ours, theirs, measure)
            p = one.paired
            rows.append({
                "name": f"{ours} - {theirs}, {measure}" + (f" ({unit})" if unit else ""),
                "ours": ours, "theirs": theirs, "measure": measure, "difference": p.difference,
                "low": p.low, "high": p.high, "better": p.better, "worse": p.worse,
                "p_flip": p.p_flip, "p_sign": p.p_sign, "effect": one.effect})
    exact = findings.compare(*PAIRS[0], "log p").paired.exact
    notes = (
        f"paired over {findings.stories} stories; p is two-sided, of "
        + ("all choices of signs" if exact else "10,000 drawn choices of signs")
        + f" (seed {findings.seed})",
        f"found with {POWER:.0%}: the mean difference that so many such stories show with that "
        f"chance at p < {LEVEL:g}")
    return ResultTable("comparisons", "What the memory is worth", columns, tuple(rows),
                       (protocol,), notes)


def curve_table(findings: Findings, protocol: Protocol) -> ResultTable:
    """Every point of every curve."""
    columns = (
        Column("name", "after its story"), Column("log p", "log p", "nats/answer", 3),
        Column("log p per token", "log p", "nats/token", 3),
        Column("gain", "over empty", "nats/answer", 3), Column("low", "95 % from", "", 3),
        Column("high", "to", "", 3))
    tokens = {answer.key: answer.tokens for answer in findings.of("memory")}
    rows: list[Mapping[str, Any]] = []
    for kind in CURVES:
        for point in findings.curve(kind):
            mean, low, high = interval(findings.gain(point), findings.seed)
            rows.append({
                "name": f"{kind} {point.amount:,}", "kind": kind, "amount": point.amount,
                "log p": _mean_of(point.log_p),
                "log p per token": _mean_of({key: log_p / tokens[key]
                                             for key, log_p in point.log_p.items()}),
                "gain": mean, "low": low, "high": high})
    notes = (
        f"the memory alone; delay: rows of {findings.row_tokens} tokens, each of another story "
        "drawn at random, that are written between the story and its questions; interference: "
        "whole other stories that are",
        "slots: the same parameters with memories of another size; "
        f"the model's own has {findings.slots}", *findings.notes)
    return ResultTable("curves", "Forgetting and capacity", columns, tuple(rows), (protocol,),
                       notes)


def answer_table(findings: Findings, protocol: Protocol) -> ResultTable:
    """What was written to a few questions."""
    by_key = {(answer.condition, *answer.key): answer for answer in findings.answers}
    first = findings.of(findings.conditions[0])
    step = max(1, len(first) // SHOWN)
    rows = tuple({
        "name": _short(answer.question), "reference": _short(answer.references[0]),
        **{name: _short(by_key[name, *answer.key].text) for name in findings.conditions}}
        for answer in first[::step][:SHOWN])
    columns = (Column("name", "question"), Column("reference", "people"),
               *(Column(name, name) for name in findings.conditions))
    return ResultTable("answers", "What is written", columns, rows, (protocol,),
                       ("all of them are in memory_answers.jsonl",))


def _mean_of(values: Mapping[tuple[str, int], float]) -> float:
    by_story: dict[str, list[float]] = {}
    for (story, _), value in values.items():
        by_story.setdefault(story, []).append(value)
    return statistics.fmean(map(statistics.fmean, by_story.values()))


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST - 1]}…"
