"""The pictures of the memory suite: conditions side by side, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hippocampus.probing.memory.findings import CurvePoint, Findings, interval
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = dict(zip(("memory", "empty", "other", "story", "snippet"),
                  (SERIES[0], SERIES[6], SERIES[1], SERIES[2], SERIES[3]), strict=True))
"""Of the conditions, everywhere."""

_SCORES = ("F1", "ROUGE-L", "exact match")
_CURVES = {
    "delay": ("Forgetting with time", "rows of other stories between story and question"),
    "interference": ("Interference", "whole stories written after it"),
    "slots": ("Capacity", "slots of the memory")}
"""Title, and what is along the axis."""

_SMALL = (4.6, 3.2)


def pictures(findings: Findings) -> tuple[Plot, ...]:
    """All pictures; a curve with one point has none."""
    curves = {kind: findings.curve(kind) for kind in _CURVES}
    return (_gains(findings), _scores(findings),
            *(_curve(findings, kind, own) for kind, own in curves.items() if len(own) > 1))


def _gains(findings: Findings) -> Plot:
    names = [name for name in findings.conditions if name != "empty"]
    empty = findings.by_story("empty", "log p")
    found = {name: interval({story: log_p - empty[story] for story, log_p in
                             findings.by_story(name, "log p").items()}, findings.seed)
             for name in names}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, (mean, low, high)) in enumerate(found.items()):
            axes.barh(i, mean, color=COLORS[name], height=0.62)
            axes.errorbar(mean, i, xerr=[[mean - low], [high - mean]], color=INK, lw=1.2, capsize=3)
        axes.axvline(0, color=INK, lw=0.8, alpha=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("log p of the answer over that with an empty memory, nats")

    return Plot("conditions", "Log-probability of the answers",
                f"Over that with an empty memory, which is 0; means over {findings.stories} "
                "stories, with the 95 % interval of the paired difference. Memory and other have "
                "no text in front of the question, story and snippet have.",
                themed_svg(draw, *_SMALL))


def _scores(findings: Findings) -> Plot:
    found = {(name, score): interval(findings.by_story(name, score), findings.seed)
             for name in findings.conditions for score in _SCORES}

    def draw(figure: Figure) -> None:
        axes, names = figure.subplots(), findings.conditions
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = np.arange(len(_SCORES)) + (i - (len(names) - 1) / 2) * width
            mean, low, high = (np.array([found[name, score][k] for score in _SCORES])
                               for k in range(3))
            axes.bar(at, mean, width=0.9 * width, color=COLORS[name], label=name)
            axes.errorbar(at, mean, yerr=[mean - low, high - mean], color=INK, lw=1.0,
                          linestyle="none", capsize=2)
        axes.set_xticks(range(len(_SCORES)), _SCORES)
        axes.set_ylim(0, min(1.0, 1.1 * max(high for _, _, high in found.values()) + 0.02))
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="x", length=0)
        figure.legend(loc="outside upper center", ncols=len(names), columnspacing=1.0,
                      handlelength=1.2)

    return Plot("scores", "Written answers", f"Means over {findings.stories} stories with 95 % "
                "intervals; greedy answers, the best over the references.",
                themed_svg(draw, *_SMALL))


def _curve(findings: Findings, kind: str, points: Sequence[CurvePoint]) -> Plot:
    found = [interval(findings.gain(point), findings.seed) for point in points]
    other = findings.compare("other", "empty", "log p").paired.difference
    title, label = _CURVES[kind]
    mean, low, high = np.array(found).T

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at = np.arange(len(points))
        axes.fill_between(at, low, high, color=COLORS["memory"], alpha=0.2, lw=0)
        axes.plot(at, mean, color=COLORS["memory"], marker="o", ms=4.5)
        # Where the curve is high.
        left = kind != "slots"
        _level(axes, 0.0, "empty memory", COLORS["empty"], left)
        _level(axes, other, "another story's", COLORS["other"], left)
        axes.set_xticks(at, [f"{point.amount:,}" for point in points])
        axes.set_xlim(-0.3, len(points) - 0.7)
        axes.set(xlabel=label, ylabel="log p over empty, nats/answer")

    return Plot(kind, title, f"Log-probability of the answers by the memory alone, over that with "
                f"an empty one; mean and 95 % interval over {findings.stories} stories. Points are "
                "evenly spaced. Dashed: an empty memory and, at no delay, another story's.",
                themed_svg(draw, *_SMALL))


def _level(axes: Axes, value: float, name: str, color: str, left: bool) -> None:
    axes.axhline(value, color=color, ls="--", lw=1.2)
    axes.annotate(name, (0 if left else 1, value), xycoords=("axes fraction", "data"),
                  xytext=(3 if left else -2, 3), textcoords="offset points", fontsize=7.5,
                  ha="left" if left else "right", alpha=0.9)
