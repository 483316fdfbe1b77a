"""What a page is made of, without saying how it looks: sections of blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hippocampus.evaluation.result_table import Protocol, ResultTable
from hippocampus.probing.results import Plot, SuiteResult, TokenText


@dataclass(frozen=True)
class Tile:
    """A number that is read first.

    Attributes:
      title: what it is.
      value: the number.
      unit: of the number; "" where there is none.
      more: one short line below it.
    """

    title: str
    value: str
    unit: str = ""
    more: str = ""


@dataclass(frozen=True)
class Facts:
    """Names with a value each; "command" is set as code.

    Attributes:
      items: (name, value) in the order of showing.
    """

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Note:
    """A line that a reader has to know.

    Attributes:
      text: the line.
      kind: "note", or "warning" for what went wrong.
    """

    text: str
    kind: str = "note"


@dataclass(frozen=True)
class Listing:
    """A text as it stands, spaces and line ends kept.

    Attributes:
      text: all of it.
      title: above it; "" = none.
      strong: characters at its beginning that are set apart, such as a sample's prompt.
    """

    text: str
    title: str = ""
    strong: int = 0


@dataclass(frozen=True)
class Command:
    """A command to type.

    Attributes:
      text: one line.
    """

    text: str


@dataclass(frozen=True)
class Grid:
    """A table of words, which has no protocol.

    Attributes:
      header: names of the columns.
      rows: as wide as the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Shares:
    """Parts of a whole, as one bar.

    Attributes:
      title: what the whole is.
      parts: (name, share in 0..1, what it is in words).
    """

    title: str
    parts: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class Figures:
    """Small pictures side by side.

    Attributes:
      plots: in the order of showing.
      wide: the first picture once more for a wide screen, where it takes two columns; the first of
        `plots` is what a narrow one shows. None = no such.
    """

    plots: tuple[Plot, ...]
    wide: Plot | None = None


@dataclass(frozen=True)
class Cards:
    """Tables, pictures and texts, two in a row of a wide screen where they are narrow enough.

    A protocol that all tables share is shown once, above them.

    Attributes:
      blocks: in the order of reading.
    """

    blocks: tuple[ResultTable | Plot | TokenText, ...]

    @property
    def shared(self) -> tuple[Protocol, ...]:
        """The protocols of all tables; empty where they differ."""
        found = {block.protocols for block in self.blocks if isinstance(block, ResultTable)}
        return found.pop() if len(found) == 1 else ()


@dataclass(frozen=True)
class Folded:
    """Blocks that show when their title is opened.

    Attributes:
      title: of them.
      blocks: in the order of showing.
    """

    title: str
    blocks: tuple[Block, ...]


Block = (Cards | Command | Facts | Figures | Folded | Grid | Listing | Note | Plot | ResultTable
         | Shares | TokenText)


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading of its own.

    Attributes:
      name: in links; letters, digits and "_".
      title: the heading.
      blocks: in the order of showing.
      lead: what it is, in a line or two; "" = none.
      command: that makes it again; "" = none.
      short: the title in the list of contents; "" = the title.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]
    lead: str = ""
    command: str = ""
    short: str = ""


def suite_section(result: SuiteResult, about: Mapping[str, Any] | None = None) -> Section:
    """The section of a suite of probes: tables, pictures, texts, and the command.

    Args:
      result: what the suite found.
      about: what made it, as `hippocampus.probing.results.write_suite` keeps it.
    """
    about = about or {}
    blocks: list[Block] = [Note(note) for note in result.notes]
    cards: list[ResultTable | Plot | TokenText] = [*result.tables, *result.plots, *result.texts]
    if cards:
        blocks.append(Cards(tuple(cards)))
    made = [f"seed {about['seed']}" if about.get("seed") is not None else "",
            f"commit {about['commit']}" if about.get("commit") else "",
            f"{result.seconds:.1f} s" if result.seconds else "", device_names(about)]
    return Section(result.suite, result.title, tuple(blocks), ", ".join(filter(None, made)),
                   command_line(about.get("command")), result.suite)


def device_names(about: Mapping[str, Any]) -> str:
    """The devices of a record, such as "2 x NVIDIA H100"; "" where none are written down."""
    devices = about.get("devices")
    if not isinstance(devices, Sequence) or isinstance(devices, str):
        return str(devices or "")
    kinds = dict.fromkeys(map(str, devices))
    return ", ".join(f"{list(map(str, devices)).count(kind)} x {kind}" for kind in kinds)


def command_line(words: Any) -> str:
    """A recorded command as one types it: `train.py …` is `python -m hippocampus.train …`."""
    if not words:
        return ""
    if isinstance(words, str) or not isinstance(words, Sequence):
        return str(words)
    first, *rest = map(str, words)
    verb = first.removesuffix(".py")
    start = ["python", "-m", f"hippocampus.{verb}"] if verb in VERBS else ["python", first]
    return shlex.join([*start, *rest])


VERBS = ("train", "sample", "evaluate", "compare", "plan", "harness", "export", "probe", "ablate",
         "report")
"""Modules of hippocampus that are started as `python -m hippocampus.<verb>`."""


def visible(text: object) -> str:
    """A text that every browser shows as it is: control characters as their pictures (␀ …)."""
    shown = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", _control_picture, shown)


def _control_picture(match: re.Match[str]) -> str:
    return "␡" if match[0] == "\x7f" else chr(0x2400 + ord(match[0]))
