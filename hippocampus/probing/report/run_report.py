"""The report of a run: `write_report` reads what lies in its folder and measures nothing again."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus import __version__
from hippocampus.config import FAMILIES, Config
from hippocampus.config_files import fields, read_json
from hippocampus.errors import DataError, HippocampusError
from hippocampus.evaluation.tables import DIGEST_SHOWN
from hippocampus.exports.folder import is_export, open_export
from hippocampus.exports.model_facts import facts_of
from hippocampus.exports.run_records import RunRecords
from hippocampus.files import write_atomically
from hippocampus.probing.report.blocks import (
    Block,
    Facts,
    Figures,
    Folded,
    Grid,
    Listing,
    Note,
    Section,
    Shares,
    Tile,
    command_line,
    device_names,
    suite_section,
)
from hippocampus.probing.report.curves import training_curves
from hippocampus.probing.report.page import Top, render_page
from hippocampus.probing.report.run_records import (
    counted_lines,
    evaluation_blocks,
    number,
    sample_blocks,
    trouble,
)
from hippocampus.probing.report.series import MOST_POINTS, has_step, read_series
from hippocampus.probing.results import read_suite, suite_files
from hippocampus.probing.suites import SUITES
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training.clock import KINDS, clock_face

REPORT, PROBES = "report.html", "probes"
"""Of a run folder: the page, and the folder of the probes' results."""


def write_report(run: str | Path, out: str | Path | None = None,
                 probes: str | Path | None = None) -> Path:
    """Writes the page of a run, finished or not, or of an exported model, atomically.

    Args:
      run: the folder.
      out: the file; default: report.html in the folder.
      probes: folder of the probes' results; default: probes/ in the folder. It may be missing.

    Returns:
      The file.

    Raises:
      DataError: no run folder there, or its config.json is damaged.
      ConfigError: its config.json is of another version.
    """
    folder = RunFolder.at(run)
    if not folder.is_run():
        raise DataError(f"no run folder at {folder.path}", "give a folder that training wrote")
    told = _Told.of(folder)
    sections = [*_curve_sections(told), *_text_sections(told),
                *_suite_sections(Path(probes) if probes else folder.path / PROBES)]
    if not sections:
        sections = [Section("empty", "Nothing measured yet", (Note(
            "the folder holds no metrics, evaluations or probes"),))]
    path = Path(out) if out else folder.path / REPORT
    write_atomically(path, render_page(_top(told), sections))
    return path


@dataclass(frozen=True, eq=False)
class _Told:
    """All that the folder says."""

    folder: RunFolder
    config: Config
    automatic: tuple[str, ...]
    exported: bool
    records: RunRecords
    counted: Mapping[str, float]
    bytes_per_token: float | None
    step: int

    @classmethod
    def of(cls, folder: RunFolder) -> _Told:
        exported = is_export(folder.path)
        config, automatic = (open_export(folder.path)[:2] if exported
                             else read_json(folder.config))
        records = RunRecords.of(folder)
        counted, ratio = counted_lines(folder, records)
        step = max((row["step"] for row in records.metrics if has_step(row)), default=0)
        return cls(folder, config, automatic, exported, records, counted, ratio, step)

    def best(self, name: str, lowest: bool = True) -> float | None:
        """Of the final evaluation if there is one, else of those while training."""
        if (found := number(self.records.results, f"final/{name}")) is not None:
            return found
        values = read_series(self.records.metrics, f"eval/{name}").values
        return float(values.min() if lowest else values.max()) if len(values) else None


# ---------------------------------------------------------------- above the sections

def _top(told: _Told) -> Top:
    config, steps = told.config, told.config.train.steps
    if told.exported:
        status = ("exported model", "good")
    elif told.records.results:
        status = ("finished", "good")
    else:
        status = (f"step {told.step:,} of {steps:,}", "open")
    subtitle = (f"{facts_of(config.model).outline}, on {Path(config.data.corpus).name} "
                f"({Path(config.data.tokenizer).name}, vocabulary {config.model.vocab_size:,})")
    blocks: list[Block] = [*trouble(told.folder, told.records.metrics), _facts(told),
                           _settings(told)]
    made = command_line(["report.py", f"--workdir={told.folder.path}"])
    return Top(config.name, "Hippocampus run", status, subtitle, tuple(_tiles(told)),
               tuple(blocks), f"This page: {made} (hippocampus {__version__})")


def _tiles(told: _Told) -> list[Tile]:
    tiles = []
    loss, bits, accuracy = told.best("loss"), told.best("bits_per_byte"), told.best(
        "accuracy", lowest=False)
    if accuracy is not None:
        tiles.append(Tile("validation accuracy", f"{accuracy:.1%}"))
    if bits is not None:
        more = f"{loss:.3f} nats/token" if loss is not None else ""
        tiles.append(Tile("validation", f"{bits:.3f}", "bits/byte", more))
    elif loss is not None:
        tiles.append(Tile("validation", f"{loss:.4f}", "nats/token"))
    if told.counted and loss is not None:
        name, line = min(told.counted.items(), key=lambda item: item[1])
        change = loss / line - 1 if line else 0.0
        tiles.append(Tile(f"against the {name} line", f"{change:+.1%}", "loss",
                          f"{name}: {line:.3f} nats/token"))
    if parameters := _parameters(told):
        tiles.append(Tile("parameters", _short(parameters), "", f"{parameters:,}"))
    if told.step:
        tokens = told.step * told.config.train.batch_size * told.config.data.context
        tiles.append(Tile("steps", f"{told.step:,}", "", f"{_short(tokens)} tokens"))
    speed = read_series(told.records.metrics, "train/tokens_per_second").values
    if len(speed):
        account = _account(told)
        total = f"{clock_face(sum(account.values()))} in all" if account else ""
        tiles.append(Tile("speed, median", f"{statistics.median(speed):,.0f}", "tokens/s", total))
    return tiles


def _parameters(told: _Told) -> int | None:
    from hippocampus.devices import resolve
    from hippocampus.models.build_model import build_model, count_parameters

    try:
        return count_parameters(build_model(resolve(told.config, automatic=told.automatic)[0]))
    except HippocampusError:  # of a machine with other devices
        return None


def _facts(told: _Told) -> Facts:
    here, data = told.records.environment, told.records.data
    cores = f", {here['cpu_count']} cores" if here.get("cpu_count") else ""
    found = here.get("packages")
    versions = found if isinstance(found, dict) else {}
    software = [f"Python {here['python']}"] if here.get("python") else []
    software += [f"{name} {versions[name]}" for name in ("hippocampus", "jax", "flax")
                 if name in versions]
    tokens = number(data, "train_tokens")
    text = [Path(told.config.data.corpus).name,
            f"{tokens:,} training tokens" if tokens else "",
            f"sha256 {str(data['sha256'])[:DIGEST_SHOWN]}" if data.get("sha256") else ""]
    items = [("commit", str(here.get("commit") or "not recorded")),
             ("seed", str(told.config.train.seed)),
             ("hardware", (device_names(here) or "not recorded") + cores),
             ("software", ", ".join(software) or "not recorded"),
             ("text", ", ".join(filter(None, text))),
             ("command", command_line(here.get("command")))]
    return Facts(tuple((name, value) for name, value in items if value))


def _settings(told: _Told) -> Folded:
    config = told.config
    usual = fields(Config(model=FAMILIES[config.model.family]()))
    rows = tuple((name, _value(value), _value(usual[name]) if name in usual else "")
                 for name, value in fields(config).items()
                 if name != "name" and value != usual.get(name))
    inside: list[Block] = [Grid(("field", "value", "default"), rows)] if rows else []
    inside.append(Folded("The whole config", (Listing(told.folder.config.read_text(
        "utf-8", "replace")),)))
    here = told.records.environment
    versions = here.get("packages")
    if isinstance(versions, dict) and versions:
        grid = [("platform", str(here.get("platform", ""))), *(
            (str(name), str(version)) for name, version in versions.items())]
        inside.append(Folded("Versions", (Grid(("package", "version"), tuple(grid)),)))
    return Folded(f"Settings: {len(rows) or 'none'} differ from the defaults", tuple(inside))


# ---------------------------------------------------------------- sections

def _curve_sections(told: _Told) -> list[Section]:
    rows = told.records.metrics
    curves = training_curves(rows, told.counted, told.bytes_per_token)
    config = told.config
    per_step = config.train.batch_size * config.data.context
    size = -(-len(rows) // MOST_POINTS)
    faint = "every logged step" if size <= 1 else "means over logged steps with their range"
    lead = (f"One step is {per_step:,} tokens ({config.train.batch_size} x "
            f"{config.data.context}). Faint: {faint}; strong: running mean.")
    sections = []
    if shown := (*curves.first, *curves.model, *curves.terms):
        sections.append(Section("training", "Training and validation",
                                (Figures(shown, curves.wide),), lead, short="training"))
    account = _account(told)
    machine: list[Block] = [Figures(curves.machine)] if curves.machine else []
    if total := sum(account.values()):
        parts = tuple((kind, seconds / total, f"{seconds / total:.1%}")
                      for kind, seconds in account.items() if seconds >= 0.0005 * total)
        machine.append(Shares(f"Where {clock_face(total)} went", parts))
    if curves.others:
        machine.append(Folded(f"Other series: {len(curves.others)}", (Figures(curves.others),)))
    if machine:
        sections.append(Section("machine", "Optimizer and machine", tuple(machine),
                                short="machine"))
    return sections


def _account(told: _Told) -> dict[str, float]:
    """Seconds of every kind over all starts of the run; empty where they are not written down."""
    timed = [row for row in told.records.metrics if number(row, "time/training") is not None]
    if not timed:
        return {}
    return {kind: max(0.0, number(timed[-1], f"time/{kind}") or 0.0) for kind in KINDS}


def _text_sections(told: _Told) -> list[Section]:
    sections = []
    if blocks := evaluation_blocks(told.folder, told.records):
        sections.append(Section("evaluations", "Evaluations", tuple(blocks),
                                short="evaluations"))
    sample = told.config.sample
    if texts := sample_blocks(told.folder, sample.prompt):
        sections.append(Section(
            "samples", "What it writes", tuple(texts),
            f"Temperature {sample.temperature:g}, top_k {sample.top_k}, seed "
            f"{told.config.train.seed}; the prompt is set apart.", short="samples"))
    return sections


def _suite_sections(probes: Path) -> list[Section]:
    return [_suite(path) for path in suite_files(probes, tuple(SUITES))]


def _suite(path: Path) -> Section:
    """The section of a suite's file, or one that says what is wrong with it."""
    from jinja2 import TemplateError

    try:
        section = suite_section(*read_suite(path))
        render_page(Top(""), [section])  # nothing has looked at its values before
        return section
    except DataError as error:
        wrong = str(error)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError,
            TemplateError) as error:
        wrong = (f"{path} is damaged: {str(error)[:200]} (run python -m hippocampus.probe "
                 f"--suite={path.stem} again)")
    return Section(path.stem, path.stem, (Note(wrong, "warning"),))


# ---------------------------------------------------------------- words

def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_value, value)) or "(none)"
    return str(value) if str(value).strip() else repr(value)


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"
