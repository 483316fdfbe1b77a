"""The tables of the suite that looks into adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hippocampus.evaluation.metrics import perplexity
from hippocampus.evaluation.paired import POWER
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.models.adapter_statistics import PERCENTILES
from hippocampus.probing.adapters.findings import LOG_P, MEASURES, Findings, Losses
from hippocampus.probing.adapters.opening import (
    ADAPTERS,
    BASE,
    LORA,
    SHUFFLED,
    ZEROED,
    AdapterProbe,
)
from hippocampus.probing.rows import CATEGORY

PAIRS = ((ADAPTERS, BASE), (ADAPTERS, LORA), (ADAPTERS, ZEROED), (ADAPTERS, SHUFFLED),
         (LORA, BASE))
"""Comparisons that are printed; the first one for every category too."""

CONTROLS = (
    "base: every adapter switched off, which is the decoder alone; memory zeroed: the memory "
    "branch of every adapter says nothing; memory shuffled: every slot gives the value of another "
    "one; none of these was trained without, so that a damage says how much this model leans on "
    "its memory, not what a memory is worth")
_SHOWN = 4
"""Tokens of a slot that are printed."""


def control_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """The model and its controls on held-out text."""
    columns = (
        Column("name", "system"), Column(CATEGORY, "kind"), Column("trained", "trained"), *_LOSS,
        Column("p_flip", "p", "", 4), Column("effect", "d", "", 2))
    rows = tuple({"name": name, CATEGORY: "control", "trained": found.trained[name],
                  **_against(found, probe, losses)} for name, losses in found.losses.items())
    notes = (CONTROLS, f"{LORA}: low-rank adapters of the same decoder, a run of its own",
             f"trained: parameters; gain: less than {BASE}, mean over windows with its 95 % "
             "interval; p: of flipped signs; d: mean over standard deviation of the windows' "
             f"differences; seed {found.seed}", *found.notes)
    return ResultTable("controls", "Adapters against their controls", columns, rows,
                       (probe.protocol,), notes)


def layer_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """Layers enabled one by one."""
    columns = (Column("name", "adapters on"), Column(CATEGORY, "kind"), *_LOSS,
               Column("share", "of the whole", "share", 3))
    none = found.losses[BASE]
    whole = none.loss - found.losses[ADAPTERS].loss
    rows: list[Mapping[str, Any]] = []
    for stage in found.stages:
        gain = none.loss - stage.losses.loss
        rows.append({
            "name": stage.name, CATEGORY: "layers", "layer": stage.layer,
            **_against(found, probe, stage.losses), "share": gain / whole if whole else None})
    notes = ("the other adapters are switched off, in a model that was trained with all of them: "
             "later ones read what earlier ones wrote, so that gains of single layers need not "
             "add up",)
    return ResultTable("layers", "Layers enabled one by one", columns, tuple(rows),
                       (probe.protocol,), notes)


def layer_query_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """The queries' answers as layers are enabled one by one."""
    columns = (Column("name", "adapters on"),
               *(Column(name, name, "nats/token", 3) for name in found.categories))
    rows = tuple({"name": stage.name, "layer": stage.layer, **stage.log_p}
                 for stage in found.stages)
    return ResultTable("layer_queries", "Layers enabled one by one: log p of answers", columns,
                       rows, (probe.protocol,), (found.queries,))


def score_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """Every system in every category, and over all."""
    columns = [Column("name", "queries and system"), Column("n", "queries")]
    for measure in MEASURES:
        unit = "nats/token" if measure == LOG_P else ""
        columns.append(Column(f"{measure} shown", f"{measure}, 95 %", unit))
    rows: list[Mapping[str, Any]] = []
    for category in (*found.categories, ""):
        for system in found.systems:
            row: dict[str, Any] = {
                "name": f"{category or 'all'}: {system}", "queries": category or "all",
                "system": system, "n": len(found.values(system, LOG_P, category))}
            for measure in MEASURES:
                if (known := found.interval(system, measure, category)) is None:
                    row |= dict.fromkeys((measure, f"{measure} shown"))
                    continue
                mean, low, high = known
                row |= {measure: mean, f"{measure} low": low, f"{measure} high": high,
                        f"{measure} shown": f"{mean:.3f} ({_span(low, high, '.3f')})"}
            rows.append(row)
    return ResultTable("scores", "Answers by category", tuple(columns), tuple(rows),
                       (probe.protocol,), _query_notes(found))


def effect_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """Paired differences by category."""
    columns = (
        Column("name", "difference of"), Column("difference", "mean", "", 4),
        Column("span", "95 %"), Column("effect", "d", "", 2),
        Column("above", "above, below"), Column("p_flip", "p", "", 4),
        Column("smallest", f"found with {POWER:.0%}", "", 4))
    rows: list[Mapping[str, Any]] = []
    for category in (*found.categories, ""):
        # All pairs in every category would be a hundred rows.
        for ours, theirs in PAIRS[:1] if category else PAIRS:
            if not {ours, theirs} <= set(found.systems):
                continue
            for measure in MEASURES:
                one = found.against_base(ours, theirs, measure, category)
                if one is None:
                    continue
                p = one.paired
                rows.append({
                    "name": f"{category or 'all'}: {ours} - {theirs}, {measure}",
                    "queries": category or "all", "ours": ours, "theirs": theirs,
                    "measure": measure, "difference": p.difference, "low": p.low, "high": p.high,
                    "span": _span(p.low, p.high), "effect": one.effect, "better": p.better,
                    "worse": p.worse, "above": f"{p.better}, {p.worse}", "p_flip": p.p_flip,
                    "smallest": p.smallest_effect})
    notes = (*_query_notes(found),
             "paired over queries; above, below: in how many of them; d: mean over standard "
             "deviation of the differences; p is of flipped signs, two-sided, and of each row "
             "alone: of twenty rows in which nothing is, one is below 0.05",
             f"found with {POWER:.0%}: the mean difference that so many such queries show with "
             "that chance at p < 0.05; queries of one kind are alike, so that these intervals are "
             "of more queries of these kinds, not of other kinds")
    return ResultTable("effects", "What the adapters change, by category", columns, tuple(rows),
                       (probe.protocol,), notes)


def gate_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """The gates of every layer, in all and by category."""
    columns = (
        Column("name", "layer and texts"), Column("tokens", "tokens"),
        Column("mean", "gate", "", 4), Column("sd", "sd", "", 4),
        Column("percentiles", f"{', '.join(map(str, PERCENTILES))} %"),
        Column("saturated", "saturated", "share", 4), Column("scale", "tanh(a)", "", 4))
    rows = []
    for i, gate in found.gates.layers.items():
        by = {"all": gate, **{name: own[i] for name, own in found.gates.categories.items()}}
        rows += [{"name": f"layer {i}, {name}", "layer": i, "texts": name, "tokens": one.tokens,
                  "mean": one.mean, "sd": one.sd, "closed": one.closed, "opened": one.opened,
                  "saturated": one.saturated, "scale": one.scale,
                  "percentiles": " ".join(f"{x:.3f}" for x in one.percentiles),
                  **{f"p{p}": x for p, x in zip(PERCENTILES, one.percentiles, strict=True)}}
                 for name, one in by.items()]
    notes = ("over tokens, and channels where each has a gate; saturated: within 0.0001 of 0 "
             "or 1; percentiles to 0.001",
             "tanh(a): what the adapter is multiplied by besides; empty for mix = interpolate",
             f"texts: {found.queries}, each with its answer, and the windows of the text")
    return ResultTable("gates", "How far the gates are open", columns, tuple(rows),
                       (probe.protocol,), notes)


def slot_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """How the slots of every layer are read."""
    columns = (
        Column("name", "layer"), Column("slots", "slots"),
        Column("effective", "effective", "", 1), Column("share", "share", "", 3),
        Column("dead", "dead"), Column("duplicates", "duplicates"),
        Column("same", "like keys, values"),
        Column("read_entropy", "entropy of a read", "nats", 3))
    rows = tuple({
        "name": f"layer {i}", "layer": i, "slots": own.slots.slots,
        "effective": own.slots.effective, "share": own.slots.effective_share,
        "dead": own.slots.dead, "duplicates": own.duplicates, "same_keys": own.same_keys,
        "same_values": own.same_values, "same": f"{own.same_keys}, {own.same_values}",
        "read_entropy": own.slots.read_entropy}
        for i, own in found.memories.items())
    notes = ("effective: exp(entropy of the mean weights); dead: read less than a tenth of even "
             "use; like: the cosine to an earlier slot's is above 0.95; duplicates: key and value",
             "entropy of a read: log S = a token reads all slots alike, which makes them useless; "
             "0 = it reads one")
    return ResultTable("slots", "How the slots are used", columns, rows, (probe.protocol,), notes)


def hottest_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """The slots that are read most, with the tokens that read them most."""
    columns = (Column("name", "layer and slot"), Column("usage", "use", "of even", 2),
               Column("hits", "first choice of", "tokens"),
               Column("tokens", "tokens, and how often"))
    rows = []
    for i, own in found.memories.items():
        for hot in own.hottest:
            shown = ", ".join(f"{token!r} {n:,}" for token, n in hot.tokens[:_SHOWN])
            rows.append({"name": f"layer {i} slot {hot.slot}", "layer": i, "slot": hot.slot,
                         "usage": hot.usage * own.slots.slots, "hits": hot.hits, "tokens": shown})
    return ResultTable("hottest", "The slots that are read most", columns, tuple(rows),
                       (probe.protocol,), ("first choice of: tokens that read no other slot more; "
                                           "frequent tokens are there because they are frequent",))


def health_table(found: Findings, probe: AdapterProbe) -> ResultTable:
    """Checks and score."""
    columns = (Column("name", "check"), Column("passed", "passed"), Column("told", "found"))
    rows = tuple({"name": check.name, "passed": "yes" if check.passed else "NO",
                  "told": check.told, "value": check.value, "limit": check.limit}
                 for check in found.health.checks)
    verdict, *parts = str(found.health).splitlines()
    weighted = [line.strip() for line in parts if "(weight" in line]
    return ResultTable("health", "Health", columns, rows, (probe.protocol,),
                       (verdict, "score: " + ", ".join(weighted)))


_LOSS = (Column("bits_per_byte", "bits/byte"), Column("gain", "gain", "nats/token"),
         Column("span", "95 %"))


def _against(found: Findings, probe: AdapterProbe, losses: Losses) -> dict[str, Any]:
    """A row of losses beside the base's; `gain` is below 0 where the base is better.

    `delta` is the damage of results.csv: the other way round, and over tokens.
    """
    one = found.loss_against(found.losses[BASE], losses)
    p = one.paired
    damage = losses.loss - found.losses[BASE].loss
    return {"loss": losses.loss, "bits_per_byte": probe.probe.bits_per_byte(losses.loss),
            "perplexity": perplexity(losses.loss), "delta": damage, "gain": p.difference,
            "low": p.low, "high": p.high, "span": _span(p.low, p.high), "better": p.better,
            "worse": p.worse, "p_flip": p.p_flip, "effect": one.effect}


def _span(low: float, high: float, form: str = "+.4f") -> str:
    return f"{low:{form}} to {high:{form}}"


def _query_notes(found: Findings) -> tuple[str, ...]:
    return (
        f"{found.queries}; exact match and F1: of what is written greedily, up to the end of its "
        "first line; log p: of the right answer behind the prompt, forced, per token of it; "
        "creative: the next sentence of a tale, which has no right answer",)
