"""Pictures as SVG that read on a light and on a dark page: `themed_svg`."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's own text colour: `themed_svg` writes it as `currentColor`."""

PATH_COLORS = {"ssm": "#2f7fd1", "hopfield": "#d9641e", "attention": "#159a72"}
"""Of the paths, everywhere; they read on white and on black, and to colour-blind readers."""

SERIES = ("#2f7fd1", "#d9641e", "#159a72", "#b5629b", "#b58900", "#4aa5c9", "#7f7f7f")
"""Of everything else, in this order."""

HEAT = "viridis"
"""Colour map of heat maps."""

_STYLE: Any = {
    # One salt for all: `_theme` makes ids the picture's own.
    "svg.hashsalt": "hippocampus",
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.0,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12,
    "grid.linewidth": 0.6, "axes.titlesize": 10.0, "legend.fontsize": 8.5, "lines.linewidth": 1.6,
    "axes.axisbelow": True}


def themed_svg(draw: Callable[[Figure], None], width: float = 6.4, height: float = 3.6) -> str:
    """Draws a figure as SVG text for a page of any colour.

    The background is transparent, everything in `INK` takes the page's text colour, text stays
    text, and ids are the picture's own, so that many can stand in one page. The same drawing
    gives the same bytes.

    Args:
      draw: puts axes on an empty figure.
      width, height: in inches; a page scales the picture to its own width.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the page has fonts of its own
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _theme(buffer.getvalue())


def _theme(svg: str) -> str:
    """Without a prologue; sizes from the page; INK as the text colour; ids and style its own."""
    svg = svg[svg.index("<svg"):]
    own = "p" + hashlib.sha256(svg.encode()).hexdigest()[:10]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    svg = f'{head} class="{own}">{rest}'.replace(INK, "currentColor")
    svg = svg.replace('<style type="text/css">*{', f"<style>.{own} *{{", 1)
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{own}-", svg)
    return svg
