"""Segments: the same text with one, two, three, … reasoning passes.

A further pass costs what the first one does. Whether it is worth that is for a control with equal
FLOPs to say (python -m hippocampus.ablate --match=flops); here stands what it changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hippocampus.models.interventions import Interventions
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.probe import Probe
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.rows import baseline_row, loss_row, loss_table
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "What each reasoning pass is worth"

FAMILIES = ("hybrid",)
"""What it looks into."""


def run(probe: Probe) -> SuiteResult:
    """The loss after every pass r, from 1 to `segments.eval`."""
    segments = probe.config.model.segments
    if segments.train == 1:
        raise SkipSuite("the model was trained with one segment: a second pass would repeat it")
    last = max(segments.eval, segments.train)
    rows = [loss_row(probe, f"seg_{r}", "segments", probe.measure(Interventions(segments=r)))
            for r in range(1, last + 1)]
    notes = [f"trained with {segments.train} passes: that row is the baseline; each pass costs as "
             "much as the first"]
    if last < 3:
        notes.append("model.segments.eval = 3 in the run's config would give seg_3 too")
    table = loss_table(probe, "segments", "Loss after each reasoning pass",
                       [baseline_row(probe), *rows], notes)
    plot = Plot("segments", "Loss after each pass", "Loss of the same predictions after r passes; "
                "bars: one standard error of the difference to the baseline; dotted: the number "
                "of passes of the training.", _draw_losses(rows, segments.train))
    return SuiteResult("segments", TITLE, (table,), (plot,))


def _draw_losses(rows: Sequence[Mapping[str, Any]], trained: int) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        passes = range(1, len(rows) + 1)
        axes.errorbar(passes, [row["loss"] for row in rows],
                      [row["delta_stderr"] or 0.0 for row in rows], color=SERIES[0], marker="o",
                      ecolor=INK, capsize=3, elinewidth=0.8)
        axes.axvline(trained, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(passes)
        axes.set_xlabel("passes r")
        axes.set_ylabel("loss (nats/token)")

    return themed_svg(draw, height=3.0)
