"""What a suite of probes found, in memory and in files: `SuiteResult`.

A suite writes `<suite>.json` (format 1), an SVG file per plot and a CSV file per table; whatever
shows results later (the report, a notebook) reads these files and measures nothing again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hippocampus.errors import DataError
from hippocampus.evaluation.result_table import ResultTable
from hippocampus.files import read_object, write_atomically

FORMAT = 1
"""Version of the JSON files."""


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
      name: in file names and links; letters, digits and "_".
      title: one line.
      caption: what is drawn, of how much data, and how to read it.
      svg: from `hippocampus.probing.plots.themed_svg`.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class TokenText:
    """A text whose tokens are coloured.

    Attributes:
      name, title, caption: as of a `Plot`.
      tokens: the text in pieces, line ends included.
      classes: index into `legend` per token.
      strengths: how strong the colour is, 0 to 1 per token.
      legend: name of every class.
    """

    name: str
    title: str
    caption: str
    tokens: tuple[str, ...]
    classes: tuple[int, ...]
    strengths: tuple[float, ...]
    legend: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.classes) == len(self.strengths):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.classes)} classes and "
                             f"{len(self.strengths)} strengths")


@dataclass(frozen=True)
class SuiteResult:
    """All that one suite found.

    Attributes:
      suite: its name.
      title: one line.
      tables, plots, texts: in the order of showing.
      seconds: that it took.
      notes: what holds for all of it, such as what the model has not.
    """

    suite: str
    title: str
    tables: tuple[ResultTable, ...] = ()
    plots: tuple[Plot, ...] = ()
    texts: tuple[TokenText, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def write_suite(folder: Path, result: SuiteResult, about: Mapping[str, Any]) -> Path:
    """Writes tables and pictures, and then the JSON file that names them, each atomically.

    Args:
      folder: made if it is not there.
      result: what was found; numbers that are not finite become null.
      about: what made it: version, commit, command, devices, run, step, seed, date.

    Returns:
      The JSON file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for plot in result.plots:
        file = f"{result.suite}_{plot.name}.svg"
        write_atomically(folder / file, plot.svg)
        plots.append({"name": plot.name, "title": plot.title, "caption": plot.caption,
                      "file": file})
    for table in result.tables:
        write_atomically(folder / f"{result.suite}_{table.name}.csv", table.to_csv())
    content = {"format": FORMAT, "suite": result.suite, "title": result.title,
               "about": dict(about), "seconds": round(result.seconds, 3),
               "notes": list(result.notes),
               "tables": [table.record() for table in result.tables], "plots": plots,
               "texts": [asdict(text) for text in result.texts]}
    path = folder / f"{result.suite}.json"
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")
    return path


def read_suite(path: Path) -> tuple[SuiteResult, dict[str, Any]]:
    """A suite's file with its pictures, and what made it.

    Raises:
      DataError: missing, damaged, or of another format.
    """
    hint = f"run python -m hippocampus.probe --suite={path.stem} again"
    content = read_object(path, hint)
    if content.get("format") != FORMAT:
        raise DataError(f"{path} has format {content.get('format')!r}, not {FORMAT}", hint)
    try:
        tables = tuple(ResultTable.from_record(table) for table in content["tables"])
        plots = tuple(
            Plot(str(plot["name"]), str(plot["title"]), str(plot["caption"]),
                 (path.parent / Path(plot["file"]).name).read_text("utf-8"))
            for plot in content["plots"])
        texts = tuple(_text(text) for text in content["texts"])
        result = SuiteResult(str(content["suite"]), str(content["title"]), tables, plots, texts,
                             float(content["seconds"]), tuple(map(str, content["notes"])))
        return result, dict(content["about"])
    except DataError as error:
        raise DataError(f"{path} is damaged: {error.message}", hint) from None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged: {error!r}", hint) from None


def read_suites(folder: Path, order: Sequence[str] = ()) -> list[tuple[SuiteResult,
                                                                       dict[str, Any]]]:
    """Every suite's file of a folder.

    Args:
      folder: may be missing.
      order: names of suites that come first; the others follow by name.

    Raises:
      DataError: as `read_suite`.
    """
    return [read_suite(path) for path in suite_files(folder, order)]


def suite_files(folder: Path, order: Sequence[str] = ()) -> list[Path]:
    """The files that `read_suites` reads, in its order."""
    place = {name: i for i, name in enumerate(order)}
    return sorted(folder.glob("*.json"), key=lambda p: (place.get(p.stem, len(place)), p.stem))


def _text(record: Mapping[str, Any]) -> TokenText:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                              for name, value in record.items()}
    return TokenText(**values)


def _plain(value: Any) -> Any:
    """Nothing but what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a NumPy or JAX scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
