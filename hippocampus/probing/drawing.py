"""What the pictures of the view suites share: heat maps, bars, and the tokens of a passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hippocampus.data.tokenizers import Tokenizer
from hippocampus.generation.text_stream import TextStream
from hippocampus.probing.plots import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASSAGE = 256
"""Most tokens of a coloured text."""

_MOST_LETTERS = 8
"""Of a token below a heat map."""
_VISIBLE = str.maketrans({"\n": "⏎", " ": "·", "\t": "⇥", "\r": "␍"})


def pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    """The text of each token; a character that several share belongs to the last of them."""
    stream = TextStream(tokenizer, ())
    found = [stream.push([int(index)]) for index in ids]
    if found:
        found[-1] += stream.finish()
    return tuple(found)


def label(piece: str) -> str:
    """A token where there is little room: white space visible, long ones cut."""
    shown = "".join(c if c.isprintable() else "�" for c in piece.translate(_VISIBLE))
    return shown if len(shown) <= _MOST_LETTERS else shown[:_MOST_LETTERS - 1] + "…"


def fading(color: str) -> Any:
    """A colour map from nothing to a colour, so that it reads on a page of any colour."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    red, green, blue = to_rgb(color)
    return LinearSegmentedColormap.from_list(
        f"fading {color}", [(red, green, blue, 0.0), (red, green, blue, 1.0)])


def shades(color: str, n: int) -> list[str]:
    """n shades of a colour, the strongest last, for parts that have an order."""
    return [f"{color}{round(255 * alpha):02x}" for alpha in np.linspace(0.35 if n > 1 else 1, 1, n)]


def heat_map(axes: Axes, values: Float[np.ndarray, "rows columns"], colors: Any, *, low: float,
             high: float, rows: Sequence[str] = (), columns: Sequence[str] = (),
             numbers: str = "") -> Any:
    """Draws a heat map with the first row on top.

    Args:
      axes: empty.
      values: one cell each.
      colors: colour map.
      low, high: the ends of its scale.
      rows, columns: labels; none = no ticks.
      numbers: format of a number in every cell, such as ".2f"; "" = none.

    Returns:
      The mesh, for a colour bar.
    """
    n_rows, n_columns = values.shape
    # Without antialiasing, or a page shows hairlines between the cells.
    mesh = axes.pcolormesh(values, cmap=colors, vmin=low, vmax=high, antialiased=False, lw=0)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if numbers:
        for i, j in np.ndindex(n_rows, n_columns):
            axes.text(j + 0.5, i + 0.5, format(values[i, j], numbers), ha="center", va="center",
                      fontsize=8, color=INK)
    return mesh


def ngram_lines(axes: Axes, lines: dict[str, float]) -> None:
    """Dashed lines with their names, at the losses of models that count tokens."""
    for name, loss in lines.items():
        axes.axhline(loss, color=INK, ls="--", lw=0.8, alpha=0.5)
        axes.annotate(name, (1, loss), xycoords=("axes fraction", "data"), xytext=(-2, 2),
                      textcoords="offset points", fontsize=7.5, alpha=0.7, ha="right")


def token_ticks(axes: Axes, tokens: Sequence[str]) -> None:
    """Tokens below a heat map of them."""
    shown = [label(token) for token in tokens]
    upright = max((len(token) for token in shown), default=0) <= 1
    axes.set_xticks(np.arange(len(shown)) + 0.5, shown, rotation=0 if upright else 90,
                    fontsize=7, family="monospace")


def stacked_bars(axes: Axes, shares: Float[np.ndarray, "bars parts"], names: Sequence[str],
                 colors: Sequence[str], labels: Sequence[str]) -> None:
    """Draws horizontal bars, the first on top, cut into shares that sum to 1."""
    left = np.zeros(len(shares))
    for part, color, name in zip(shares.T, colors, labels, strict=False):
        axes.barh(np.arange(len(shares)), part, left=left, color=color, height=0.7, label=name)
        left = left + part
    axes.set_yticks(np.arange(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
