"""Adapters on a pretrained decoder against their controls, and what is inside them: `run`.

It needs an `AdapterProbe`, which has a text, queries and the controls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hippocampus.probing.adapters import tables
from hippocampus.probing.adapters.findings import Findings
from hippocampus.probing.adapters.pictures import pictures
from hippocampus.probing.adapters.study import study_adapters
from hippocampus.probing.results import SuiteResult
from hippocampus.probing.suites import SkipSuite

if TYPE_CHECKING:
    from hippocampus.probing.adapters.opening import AdapterProbe

TITLE = "What the adapters on a frozen decoder do"

FAMILIES = ("buu",)
"""Of models that have adapters."""


def run(probe: AdapterProbe, say: Callable[[str], None] = lambda line: None,
        keep: Callable[[Findings], None] = lambda findings: None) -> SuiteResult:
    """Measures the model, its controls and its layers.

    Args:
      probe: the model beside a text, queries and controls.
      say: is told what is being done.
      keep: gets every answer.

    Raises:
      SkipSuite: a model of another family.
    """
    if (family := probe.config.model.family) not in FAMILIES:
        raise SkipSuite(f"it looks into {' and '.join(FAMILIES)} models, and this is of the "
                        f"{family} family")
    found = study_adapters(probe, say)
    keep(found)
    return result_of(found, probe)


def result_of(found: Findings, probe: AdapterProbe) -> SuiteResult:
    """Tables, pictures and the verdict of what was found."""
    made = (tables.control_table, tables.layer_table, tables.layer_query_table,
            tables.score_table, tables.effect_table, tables.gate_table,
            tables.slot_table, tables.hottest_table, tables.health_table)
    return SuiteResult("buu", TITLE, tuple(make(found, probe) for make in made),
                       pictures(found, probe), notes=(str(found.health).splitlines()[0],
                                                      *verdict(found)))


def verdict(found: Findings) -> tuple[str, ...]:
    """What the controls say, in a line each, a null result as such."""
    lines = []
    ours = found.losses["adapters"]
    for name in found.systems:
        if name == "adapters":
            continue
        p = found.loss_against(found.losses[name], ours).paired
        better = "better than" if p.low > 0 else "worse than" if p.high < 0 else (
            "no different, as far as can be told, from")
        lines.append(f"held-out text: adapters are {better} {name}: {p.difference:+.4f} nats per "
                     f"token [{p.low:+.4f}, {p.high:+.4f}]")
    return tuple(lines)
