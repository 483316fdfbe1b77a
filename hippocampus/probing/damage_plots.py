"""Damage as bars, and layer by layer, in the look of `hippocampus.probing.plots`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hippocampus.probing.plots import INK, PATH_COLORS, SERIES, themed_svg
from hippocampus.probing.rows import SHORT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

_BAR = 0.22
"""Inches of height per bar."""

_LABEL = "damage (nats/token)"


def damage_bars(groups: Mapping[str, Sequence[Row]], labels: Sequence[str]) -> str:
    """Rows of a suite as bars with one standard error to each side.

    Args:
      groups: legend -> one row of `loss_row` per label.
      labels: of the bars, from the top.
    """
    width = 0.8 / len(groups)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for g, (legend, rows) in enumerate(groups.items()):
            at = [i + (g - (len(groups) - 1) / 2) * width for i in range(len(rows))]
            bars = axes.barh(at, [row["delta"] for row in rows], width * 0.92, label=legend,
                             xerr=_errors(rows), color=SERIES[g % len(SERIES)], ecolor=INK,
                             error_kw={"linewidth": 0.8})
            axes.bar_label(bars, [f"{row['delta']:+.4f}" for row in rows], padding=3, fontsize=7)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_LABEL)
        if len(groups) > 1:
            figure.legend(loc="outside upper right", ncols=len(groups))

    height = 0.9 + _BAR * len(labels) * len(groups) + 0.1 * len(labels)
    return themed_svg(draw, height=height)


def damage_by_layer(groups: Mapping[str, Iterable[Row]]) -> str:
    """Rows of single layers as lines over the layers, a colour for each path.

    Args:
      groups: legend -> rows of `loss_row` with their path and layer; the first group's lines are
        solid, the second's dashed.
    """
    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for (legend, rows), style in zip(groups.items(), ("-", "--"), strict=False):
            for path, color in PATH_COLORS.items():
                own = [row for row in rows if row["path"] == SHORT[path]]
                if own:
                    label = f"{SHORT[path]}, {legend}" if legend else SHORT[path]
                    axes.errorbar([row["layer"] for row in own], [row["delta"] for row in own],
                                  _errors(own), color=color, linestyle=style, marker="o",
                                  markersize=3.5, elinewidth=0.8, label=label)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(_LABEL)
        axes.legend()

    return themed_svg(draw)


def _errors(rows: Sequence[Row]) -> list[float]:
    return [row["delta_stderr"] or 0.0 for row in rows]
