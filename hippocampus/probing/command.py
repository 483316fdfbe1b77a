"""What `python -m hippocampus.probe` runs: suites on a run folder, their files, and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from hippocampus.files import check_writable
from hippocampus.probing.probe import about, open_probe
from hippocampus.probing.report import write_report
from hippocampus.probing.results import SuiteResult, write_suite
from hippocampus.probing.rows import write_results
from hippocampus.probing.suites import SUITES, choose_suites, run_suites

FOLDER = "probes"


def probe_run(workdir: str | Path, suites: str = "", out: str | Path | None = None,
              console: Console | None = None, **settings: Any) -> tuple[Path, Path]:
    """Runs suites and writes what they find; each is on disk before the next one begins.

    Args:
      workdir: a run folder, or an exported one.
      suites: names, separated by commas; "" = all that fit the model.
      out: folder of the files, and then of the report too; None = `probes/` in the run folder.
      console: prints tables and progress.
      settings: of `open_probe`.

    Returns:
      results.csv, which has the rows of all suites whose files lie in the folder, and the report.

    Raises:
      ConfigError: an unknown suite, a setting that does not go with the run, or a folder that
        cannot be written.
      DataError: no run folder, or a text that cannot be used.
    """
    console = console or Console(highlight=False)
    names = choose_suites(suites)
    probe = open_probe(workdir, **settings)
    folder = probe.run / FOLDER if out is None else Path(out)
    check_writable(folder)
    made_by = about(probe)
    for line in (*probe.protocol.lines(), *probe.notes):
        console.print(line, soft_wrap=True, markup=False)

    def done(result: SuiteResult) -> None:
        for table in result.tables:
            console.print()
            console.print(table.render())
        for note in result.notes:
            console.print(note, soft_wrap=True, markup=False)
        write_suite(folder, result, made_by)

    run_suites(probe, names, _printer(console), done)
    results = write_results(folder, tuple(SUITES))
    report = write_report(probe.run, None if out is None else folder / "report.html", folder)
    console.print(f"\n{results}\n{report}", soft_wrap=True, markup=False)
    return results, report


def _printer(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(f"\n{line}", soft_wrap=True, markup=False)
