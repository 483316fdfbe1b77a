"""The pictures of an ablation: losses, curves, knock-outs, and loss against size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.probing.ablation import progress
from hippocampus.probing.ablation.grid import short_names
from hippocampus.probing.ablation.runs import NATS
from hippocampus.probing.ablation.statistics import summarize
from hippocampus.probing.ablation.summaries import (
    SERIES,
    CellResult,
    Findings,
    ScalingFit,
)
from hippocampus.probing.plots import INK, themed_svg
from hippocampus.probing.plots import SERIES as COLORS
from hippocampus.probing.results import Plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CURVES = 14  # more than these nobody can tell apart


def draw(findings: Findings, fits: Sequence[ScalingFit]) -> tuple[Plot, ...]:
    """All pictures that there is something for."""
    done = [result for result in findings.results if result.runs]
    plots = [_losses(findings, done)] if done else []
    if any(progress.evaluations(run.rows, SERIES[findings.unit]) for run in findings.runs):
        plots.append(_curves(findings, done))
    if any(result.knockout for result in done):
        plots.append(_knockouts(done))
    plots += [_scaling(findings, fit, i) for i, fit in enumerate(fits) if fit.law is not None]
    return tuple(plots)


def _losses(findings: Findings, done: Sequence[CellResult]) -> Plot:
    def picture(figure: Figure) -> None:
        axes = figure.subplots()
        for y, result in enumerate(done):
            values = [run.losses[findings.unit][0] for run in result.runs]
            axes.plot(values, [y] * len(values), "o", color=COLORS[0], alpha=0.55, markersize=4)
            assert result.loss is not None
            axes.plot([result.loss.mean] * 2, [y - 0.3, y + 0.3], color=COLORS[1], lw=2)
        if findings.baseline.loss:
            axes.axvline(findings.baseline.loss.mean, color=INK, lw=0.8, ls=":")
        _rows(axes, [result.cell.title for result in done])
        axes.set_xlabel(f"validation loss ({findings.unit})")

    return Plot("losses", "Validation loss of every cell",
                "Dots: runs of single seeds; bars: their mean; dotted: the mean of "
                f"{findings.baseline.cell.title}. Averaged weights, best checkpoint, whole split.",
                themed_svg(picture, height=1.2 + 0.28 * len(done)))


def _curves(findings: Findings, done: Sequence[CellResult]) -> Plot:
    shown = done[:_MOST_CURVES]

    def picture(figure: Figure) -> None:
        axes = figure.subplots()
        for i, result in enumerate(shown):
            style: Any = {"color": COLORS[i % len(COLORS)], "ls": "-" if i < len(COLORS) else "--"}
            for n, run in enumerate(result.runs):
                found = progress.evaluations(run.rows, SERIES[findings.unit])
                axes.plot([step * run.tokens_per_step for step, _ in found],
                          [loss for _, loss in found], lw=1.2, alpha=0.8, marker=".",
                          label=result.cell.title if n == 0 else None, **style)
        if findings.target is not None:
            axes.axhline(findings.target, color=INK, lw=0.8, ls=":")
        axes.set_xlabel("training tokens")
        axes.set_ylabel(f"validation loss ({findings.unit})")
        figure.legend(loc="outside upper left", ncols=4)

    left_out = f" The first {len(shown)} of {len(done)} cells." if len(done) > len(shown) else ""
    return Plot("curves", "Validation loss while training",
                "A line per run, averaged weights; dotted: the target that speed is measured "
                f"to.{left_out}", themed_svg(picture, height=3.8))


def _knockouts(done: Sequence[CellResult]) -> Plot:
    members = [result for result in done if result.knockout and not result.cell.match]

    def picture(figure: Figure) -> None:
        axes = figure.subplots()
        for y, result in enumerate(members):
            retrained = summarize([run.losses[NATS][0] for run in result.runs])
            points = ((retrained, "o", COLORS[2], "retrained"),
                      (result.knockout, "s", COLORS[1], "knockout"),
                      (result.knockout_raw, "D", COLORS[3], "knockout_raw"))
            for found, marker, color, label in points:
                assert found is not None
                axes.errorbar([found.mean], [y], xerr=[found.sd or 0.0], marker=marker,
                              color=color, markersize=5, ls="none", lw=1.2,
                              label=label if y == 0 else None)
        lines = members[0].runs[0].lines
        if "unigram" in lines:
            axes.axvline(lines["unigram"], color=INK, lw=0.8, ls=":")
        _rows(axes, [result.cell.title if len({m.cell.whole for m in members}) > 2
                     else short_names(result.cell.paths) for result in members])
        axes.set_xlabel(f"validation loss ({NATS})")
        figure.legend(loc="outside upper left", ncols=3)

    return Plot("knockouts", "Knock-out beside retrained",
                "Circles: these paths alone, trained; squares and diamonds: the model with all "
                "paths, the others masked at evaluation, with and without renormalised gates. "
                "Mean and standard deviation over seeds; dotted: unigram.",
                themed_svg(picture, height=1.4 + 0.3 * len(members)))


def _scaling(findings: Findings, fit: ScalingFit, i: int) -> Plot:
    law = fit.law
    assert law is not None

    def picture(figure: Figure) -> None:
        axes = figure.subplots()
        sizes = np.geomspace(law.sizes[0] / 1.15, law.sizes[-1] * 1.15, 100)
        low, high = law.band(sizes)
        axes.fill_between(sizes, low, high, color=COLORS[0], alpha=0.2, lw=0)
        axes.plot(sizes, law(sizes), color=COLORS[0])
        for result in fit.results:
            values = [run.losses[findings.unit][0] for run in result.runs]
            axes.plot([result.runs[0].parameters] * len(values), values, "o", color=COLORS[1],
                      markersize=4, alpha=0.75)
        axes.set_xscale("log")
        axes.set_xlabel("parameters")
        axes.set_ylabel(f"validation loss ({findings.unit})")

    low, high = law.interval("alpha")
    offset = f"{law.offset:.3f} + " if law.fits_offset else ""
    of = f": {fit.label}" if fit.label else ""
    return Plot(f"scaling_{i}" if i else "scaling", f"Loss and size{of}",
                f"L(N) = {offset}{law.factor:.3f} (N / {law.scale:,.0f})^-{law.alpha:.3f}, "
                f"exponent {low:.3f} to {high:.3f} (95 %, bootstrap); dots: runs; band: 95 % of "
                "the curve. It says nothing beyond these sizes.", themed_svg(picture))


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
