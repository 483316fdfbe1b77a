"""What `python -m hippocampus.probe` runs: suites on a run folder, their files, and the report."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from hippocampus.errors import ConfigError
from hippocampus.evaluation.stand_alone import open_folder
from hippocampus.files import check_writable, write_atomically
from hippocampus.probing.adapters.findings import Findings as AdapterFindings
from hippocampus.probing.adapters.opening import Request as AdapterRequest
from hippocampus.probing.adapters.opening import open_adapter_probe
from hippocampus.probing.memory.findings import Findings
from hippocampus.probing.memory.opening import (
    Request,
    StoryProbe,
    open_story_probe,
    write_in_another_process,
)
from hippocampus.probing.memory.writing import write_stories
from hippocampus.probing.probe import Probe, about, open_probe
from hippocampus.probing.report import write_report
from hippocampus.probing.results import SuiteResult, write_suite
from hippocampus.probing.rows import write_results
from hippocampus.probing.suites import SUITES, buu, choose_suites, memory, run_suites

FOLDER = "probes"

ANSWERS = "memory_answers.jsonl"
"""Every answer of the memory suite, an object each."""

ADAPTER_ANSWERS = "adapter_answers.jsonl"
"""Every answer of the suite buu, an object each."""

_MEMORY, _ADAPTERS = "memory", "buu"


def probe_run(workdir: str | Path, suites: str = "", out: str | Path | None = None,
              console: Console | None = None, stories: Request | None = None,
              adapters: AdapterRequest | None = None, **settings: Any) -> tuple[Path, Path]:
    """Runs suites and writes what they find; each is on disk before the next one begins.

    Args:
      workdir: a run folder, or an exported one.
      suites: names, separated by commas; "" = all that fit the model.
      out: folder of the files, and then of the report too; None = `probes/` in the run folder.
      console: prints tables and progress.
      stories: what the memory suite reads and asks; what it shares with `settings` is taken from
        them. None = the defaults.
      adapters: what the suite buu asks besides. None = the defaults.
      settings: of `open_probe`.

    Returns:
      results.csv, which has the rows of all suites whose files lie in the folder, and the report.

    Raises:
      ConfigError: an unknown suite, one that is not for this family, a setting that does not go
        with the run, or a folder that cannot be written.
      DataError: no run folder, or a text or stories that cannot be used.
    """
    console = console or Console(highlight=False)
    names = _fitting(workdir, choose_suites(suites), bool(suites), settings.get("text", ""))
    run = open_folder(workdir)[0].path
    folder = run / FOLDER if out is None else Path(out)
    check_writable(folder)
    with contextlib.ExitStack() as stack:
        told = _told(workdir, stories or Request(), settings, stack, console) if (
            _MEMORY in names) else None
        windows = tuple(name for name in names if name != _MEMORY)
        if windows:
            _window_suites(open_probe(workdir, **settings), windows, folder, console,
                           adapters or AdapterRequest())
        if told is not None:
            _memory_suite(open_story_probe(workdir, *told), folder, console)
    results = write_results(folder, tuple(SUITES))
    report = write_report(run, None if out is None else folder / "report.html", folder)
    console.print(f"\n{results}\n{report}", soft_wrap=True, markup=False)
    return results, report


def write_memories(workdir: str | Path, stories: Request, console: Console | None = None,
                   **settings: Any) -> Path:
    """The first half of the memory suite: feeds the stories, saves the memories, and is done.

    Args:
      workdir: a run folder, or an exported one.
      stories: with the folder of the memories.
      console: prints progress.
      settings: of `open_probe`.

    Returns:
      The folder.

    Raises:
      ConfigError: a model without a memory of its own.
    """
    console, request = console or Console(highlight=False), story_request(stories, settings)
    _fitting(workdir, (_MEMORY,), True, "")
    folder = Path(request.memories)
    check_writable(folder)
    probe = open_story_probe(workdir, request, folder)
    write_stories(probe.subject, probe.stories, probe.settings, folder, seed=request.seed,
                  step=probe.lm.step, say=_printer(console))
    return folder


def story_request(stories: Request, settings: dict[str, Any]) -> Request:
    """The request with the settings of `open_probe` that it shares.

    Raises:
      ConfigError: a text, where stories are asked about.
    """
    if settings.get("text"):
        raise ConfigError(f"--text={settings['text']} is for windows of a text",
                          "the memory suite asks about --stories=PATH")
    shared = {field.name for field in dataclasses.fields(Request)} & settings.keys()
    return dataclasses.replace(stories, **{name: settings[name] for name in shared})


def _fitting(workdir: str | Path, names: tuple[str, ...], asked: bool,
             text: str) -> tuple[str, ...]:
    """The suites without that of a memory, where the model has none or a text is to be read.

    The others say for themselves what they do not fit.
    """
    family = open_folder(workdir)[1].model.family
    if family in memory.FAMILIES and (asked or not text):
        return names
    if asked and _MEMORY in names:
        raise ConfigError(
            f"the suite {_MEMORY} is not for {workdir}, a model of the {family} family",
            f"it is for {' and '.join(memory.FAMILIES)} models, which keep a memory")
    return tuple(name for name in names if name != _MEMORY)


def _told(workdir: str | Path, stories: Request, settings: dict[str, Any],
          stack: contextlib.ExitStack, console: Console) -> tuple[Request, Path]:
    """The request, and the folder of the memories, which another process has written.

    That process must have ended before this one touches a device.
    """
    request = story_request(stories, settings)
    folder = Path(request.memories or stack.enter_context(
        tempfile.TemporaryDirectory(prefix="hippocampus-memories-")))
    if request.stage == "all":
        check_writable(folder)
        console.print("another process writes the memories", markup=False)
        request = write_in_another_process(workdir, request, folder)
    return request, folder


def _window_suites(probe: Probe, names: tuple[str, ...], folder: Path, console: Console,
                   adapters: AdapterRequest) -> None:
    made_by = about(probe)
    for line in (*probe.protocol.lines(), *probe.notes):
        console.print(line, soft_wrap=True, markup=False)

    def done(result: SuiteResult) -> None:
        _show(result, console)
        write_suite(folder, result, made_by)

    own = _ADAPTERS in names and probe.config.model.family in buu.FAMILIES
    run_suites(probe, [name for name in names if not own or name != _ADAPTERS], _printer(console),
               done)
    if own:
        _adapter_suite(probe, adapters, folder, console)


def _adapter_suite(probe: Probe, asked: AdapterRequest, folder: Path, console: Console) -> None:
    def keep(findings: AdapterFindings) -> None:
        write_atomically(folder / ADAPTER_ANSWERS, findings.lines())

    begun = time.monotonic()
    result = buu.run(open_adapter_probe(probe, asked), _printer(console), keep)
    result = dataclasses.replace(result, seconds=time.monotonic() - begun)
    _show(result, console)
    write_suite(folder, result, about(probe))


def _memory_suite(probe: StoryProbe, folder: Path, console: Console) -> None:
    def keep(findings: Findings) -> None:
        write_atomically(folder / ANSWERS, findings.lines())

    begun = time.monotonic()
    result = memory.run(probe, _printer(console), keep)
    result = dataclasses.replace(result, seconds=time.monotonic() - begun)
    _show(result, console)
    write_suite(folder, result, about(probe))


def _show(result: SuiteResult, console: Console) -> None:
    for table in result.tables:
        console.print()
        console.print(table.render())
    for note in result.notes:
        console.print(note, soft_wrap=True, markup=False)


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(f"\n{line}", soft_wrap=True, markup=False)
