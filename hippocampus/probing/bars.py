"""Damage as horizontal bars, in the look of `hippocampus.probing.plots`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hippocampus.probing.plots import INK, SERIES, themed_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR = 0.22
"""Inches of height per bar."""


def damage_bars(groups: Mapping[str, Sequence[Mapping[str, Any] | None]],
                labels: Sequence[str], xlabel: str = "damage (nats/token)") -> str:
    """Rows of a suite as bars with one standard error to each side.

    Args:
      groups: legend -> one row of `loss_row` per label, None where there is none.
      labels: of the bars, from the top.
      xlabel: below.
    """
    bars = len(labels) * len(groups)
    return themed_svg(_draw(groups, labels, xlabel), height=1.0 + _BAR * bars + 0.1 * len(labels))


def _draw(groups: Mapping[str, Sequence[Mapping[str, Any] | None]], labels: Sequence[str],
          xlabel: str) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        width = 0.8 / len(groups)
        for g, (legend, rows) in enumerate(groups.items()):
            shown = [(i, row) for i, row in enumerate(rows) if row is not None]
            axes.barh([i + (g - (len(groups) - 1) / 2) * width for i, _ in shown],
                      [row["delta"] for _, row in shown], width * 0.92, label=legend,
                      xerr=[row["delta_stderr"] or 0.0 for _, row in shown],
                      color=SERIES[g % len(SERIES)], ecolor=INK, error_kw={"linewidth": 0.8})
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(xlabel)
        if len(groups) > 1:
            axes.legend()

    return draw
