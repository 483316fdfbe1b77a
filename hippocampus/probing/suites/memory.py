"""The memory alone, asked about a story that another process has read: `run`.

It needs a `StoryProbe`, whose folder has the memories already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hippocampus.probing.memory.findings import Findings, judge
from hippocampus.probing.memory.pictures import pictures
from hippocampus.probing.memory.study import ask_stories
from hippocampus.probing.memory.tables import (
    answer_table,
    comparison_table,
    condition_table,
    curve_table,
)
from hippocampus.probing.results import SuiteResult
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from hippocampus.evaluation.result_table import Protocol
    from hippocampus.probing.memory.opening import StoryProbe

TITLE = "What the memory alone knows of a story"

FAMILIES = ("chopt",)
"""Of models that keep a memory between processes."""


def run(probe: StoryProbe, say: Callable[[str], None] = lambda line: None,
        keep: Callable[[Findings], None] = lambda findings: None) -> SuiteResult:
    """Asks all questions under all conditions.

    Args:
      probe: whose folder of memories `write_stories` has filled.
      say: is told what is being asked.
      keep: gets every answer.

    Raises:
      SkipSuite: a model of another family.
    """
    family = probe.config.model.family
    if family not in FAMILIES:
        raise SkipSuite(f"it looks into {' and '.join(FAMILIES)} models, and this is of the "
                        f"{family} family")
    findings = ask_stories(probe.subject, probe.stories, probe.settings, probe.memories,
                           seed=probe.seed, say=say)
    keep(findings)
    return result_of(findings, probe.protocol)


def result_of(findings: Findings, protocol: Protocol) -> SuiteResult:
    """Tables, pictures and the verdict of what was found."""
    tables = (condition_table(findings, protocol), comparison_table(findings, protocol),
              curve_table(findings, protocol), answer_table(findings, protocol))
    return SuiteResult("memory", TITLE, tables, pictures(findings), notes=judge(findings).lines)
