"""One page in one file: `write_page`.

What is shown comes from run folders, which may be somebody else's: every text is escaped, pictures
are cleaned (`hippocampus.probing.report.svg`), and the page's own policy forbids scripts and
requests whatever is in it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from hippocampus.errors import DataError
from hippocampus.evaluation.result_table import FLAG, Column, ResultTable
from hippocampus.files import write_atomically
from hippocampus.probing.plots import PATH_COLORS, SERIES
from hippocampus.probing.report.blocks import (
    Block,
    Facts,
    Section,
    Tile,
    command_line,
    device_names,
    suite_section,
    visible,
)
from hippocampus.probing.report.svg import clean_svg, width_points
from hippocampus.probing.results import Plot, SuiteResult, TokenText

_LEVELS = 9  # strengths of a token's colour that are told apart
_WIDE_POINTS = 560.0  # a wider picture takes the whole row
_CARD_PIXELS = 560  # of text that half a row has room for
_NARROW_POINTS = 340.0  # a narrower one fits a phone
_FLAG_MEANING = "worse than counting words (the unigram line)"
_ALIASES = {"hop": "hopfield", "attn": "attention"}


@dataclass(frozen=True)
class Top:
    """What stands above the sections.

    Attributes:
      title: the heading.
      kicker: a word or two above it.
      status: (text, "good" | "open" | "bad") beside it; None = none.
      subtitle: a line below it.
      tiles: numbers that are read first.
      blocks: the facts, and what is folded below them.
      footer: a line below the sections.
    """

    title: str
    kicker: str = ""
    status: tuple[str, str] | None = None
    subtitle: str = ""
    tiles: tuple[Tile, ...] = ()
    blocks: tuple[Block, ...] = ()
    footer: str = ""


def write_page(path: Path, title: str, header: Mapping[str, Any],
               sections: Sequence[Section | SuiteResult | tuple[SuiteResult, Mapping[str, Any]]],
               *, kicker: str = "Hippocampus") -> Path:
    """Writes a page, atomically.

    Args:
      path: of the .html file.
      title: the page's heading.
      header: facts by name, such as commit, command (words or text), seed, devices; None is left
        out.
      sections: in the order of showing; a suite's result, alone or with what `read_suites` gives
        beside it, is a section too.
      kicker: a word or two above the heading.

    Returns:
      `path`.
    """
    items = tuple((name, shown) for name, value in header.items()
                  if (shown := _fact(name, value)))
    top = Top(title, kicker, blocks=(Facts(items),) if items else ())
    made = [_section(section) for section in sections]
    write_atomically(path, render_page(top, made))
    return path


def render_page(top: Top, sections: Sequence[Section]) -> str:
    """The HTML of a page."""
    return _template().render(top=top, sections=_with_ids(sections))


@functools.cache
def _template() -> Any:
    """page.html, compiled once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(
        loader=PackageLoader("hippocampus.probing.report", "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates.filters |= {"visible": visible, "breakable": _breakable, "level": _level,
                          "color": _color}
    style = resources.files("hippocampus.probing.report").joinpath("templates/page.css")
    templates.globals |= {
        "kind": lambda block: type(block).__name__, "table": _table, "picture": _picture,
        "flag_meaning": _FLAG_MEANING, "style": Markup(style.read_text("utf-8"))}
    return templates.get_template("page.html")


def _breakable(text: object) -> Any:
    """A long name, with places where a line may end."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"[._/]", r"\g<0><wbr>", str(escape(visible(text)))))


def _section(section: Section | SuiteResult | tuple[SuiteResult, Mapping[str, Any]]) -> Section:
    if isinstance(section, Section):
        return section
    return (suite_section(section) if isinstance(section, SuiteResult)
            else suite_section(*section))


def _fact(name: str, value: Any) -> str:
    if name == "command":
        return command_line(value)
    if name == "devices":
        return device_names({"devices": value})
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


# ---------------------------------------------------------------- what the template asks for

@dataclass(frozen=True)
class _Picture:
    svg: Any
    is_wide: bool
    least_width: int
    most_width: int


def _picture(plot: Plot) -> _Picture | None:
    """The cleaned picture; None for one that cannot be shown."""
    from markupsafe import Markup

    try:
        svg = clean_svg(plot)
    except DataError:
        return None
    width = width_points(svg)
    # Text of a picture grows and shrinks with it. On a narrow screen a picture scrolls inside its
    # frame before its text gets too small to read.
    least = 0 if width < _NARROW_POINTS else round(0.9 * width)
    return _Picture(Markup(svg), width > _WIDE_POINTS, least, round(1.45 * width))


@dataclass(frozen=True)
class _Row:
    cells: list[str]
    flag: str
    category: str


def _table(table: ResultTable) -> dict[str, Any]:
    """Columns with their alignment, and rows in groups of one category."""
    columns = [i for i, column in enumerate(table.columns) if column.key != "category" or not i]
    rows = [_Row([str(row.get(table.columns[0].key)), *(_no_minus_zero(texts[i])
                                                         for i in columns[1:])],
                 str(row.get(FLAG) or ""), str(row.get("category") or ""))
            for row, texts in zip(table.rows, table.cells, strict=True)]
    groups = [(name, list(group)) for name, group in itertools.groupby(
        rows, key=lambda row: row.category)]
    names = [name for name, _ in groups]
    if len(names) == 1 or len(set(names)) < len(names):  # one, or they take turns
        groups = [("", rows)]
    groups = [("" if [row.cells[0] for row in group] == [name] else name, group)
              for name, group in groups]
    shown = [table.columns[i] for i in columns]
    numeric = [bool(n) and _is_numeric(table, column) for n, column in enumerate(shown)]
    # The words of a header may stand below one another, a row is one line; names are bold.
    letters = [max(map(len, (*re.split(r"[\s/]", column.title), *column.unit.split(),
                             *(row.cells[n] for row in rows)))) for n, column in enumerate(shown)]
    width = 7 * (sum(letters) + 0.15 * letters[0]) + 14 * len(letters)
    return {"columns": shown, "groups": groups, "numeric": numeric,
            "is_wide": width > _CARD_PIXELS}


def _no_minus_zero(cell: str) -> str:
    return cell[1:] if re.fullmatch(r"-0\.?0*", cell) else cell


def _is_numeric(table: ResultTable, column: Column) -> bool:
    values = [row.get(column.key) for row in table.rows]
    return not any(isinstance(value, str) for value in values)


def _level(strength: float | None) -> int:
    """A colour's strength as one of `_LEVELS` + 1 steps; what was no number has none."""
    return 0 if strength is None else round(_LEVELS * min(1.0, max(0.0, strength)))


def _color(text: TokenText, index: int) -> str:
    """The colour of a class: a path's own, else the next of the series."""
    name = str(text.legend[index]).lower()
    color = PATH_COLORS.get(_ALIASES.get(name, name), SERIES[index % len(SERIES)])
    return " ".join(str(int(color[i:i + 2], 16)) for i in (1, 3, 5))


def _with_ids(sections: Sequence[Section]) -> list[tuple[str, Section]]:
    """Each section with a name that can be the id of an element, and that no other one has."""
    taken, named = {"content"}, []
    for section in sections:
        name = plain = re.sub(r"[^A-Za-z0-9_-]+", "-", section.name).strip("-") or "part"
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name)
        named.append((name, section))
    return named
