"""The suites of probes by name, and running them.

A suite is a module with a TITLE and `run(probe) -> SuiteResult`; it raises `SkipSuite` where the
model has not what it looks at. Without FAMILIES, a tuple, it is for every family of models. The
suite "memory" takes a `StoryProbe` (hippocampus.probing.memory.opening), which has stories in place
of windows, and "buu" an `AdapterProbe` (hippocampus.probing.adapters.opening), which has queries
and controls beside them; hippocampus.probing.command tells them apart.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import time
from collections.abc import Callable, Sequence

from hippocampus.errors import ConfigError
from hippocampus.probing.probe import Probe
from hippocampus.probing.results import SuiteResult

SUITES = {name: f"hippocampus.probing.suites.{name}" for name in (
    "paths", "shuffle", "segments", "controller", "gates", "hopfield", "ssm", "energy", "tokens",
    "attention", "lens", "flow", "recall", "equilibrium", "energy_landscape",
    "associative_recall", "continual", "memory", "buu")}
"""Modules by name, in the order of running and showing."""


class SkipSuite(Exception):
    """A suite that does not fit the model; the message says why in one line."""


def choose_suites(names: str) -> tuple[str, ...]:
    """Names of suites, separated by commas, in the order of `SUITES`; "" = all.

    Raises:
      ConfigError: an unknown name, or no name between two commas.
    """
    if not names:
        return tuple(SUITES)
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in SUITES:
            close = difflib.get_close_matches(name, SUITES, n=1)
            raise ConfigError(f"there is no suite {name!r}", f"did you mean {close[0]}?" if close
                              else f"the suites are {', '.join(SUITES)}")
    return tuple(name for name in SUITES if name in asked)


def run_suites(probe: Probe, names: Sequence[str], say: Callable[[str], None],
               done: Callable[[SuiteResult], None] = lambda result: None) -> list[SuiteResult]:
    """Runs suites one after another.

    Args:
      probe: what they measure.
      names: from `choose_suites`.
      say: prints a line.
      done: gets every result as soon as it is there.

    Returns:
      The results of the suites that fit the model.
    """
    results = []
    for name in names:
        begun = time.monotonic()
        try:
            suite, family = importlib.import_module(SUITES[name]), probe.config.model.family
            if family not in getattr(suite, "FAMILIES", (family,)):
                raise SkipSuite(f"it looks into {' and '.join(suite.FAMILIES)} models, and this "
                                f"is of the {family} family")
            result = suite.run(probe)
        except SkipSuite as reason:
            say(f"{name}: left out, {reason}")
            continue
        result = dataclasses.replace(result, seconds=time.monotonic() - begun)
        say(f"{name}: {result.seconds:.1f} s")
        done(result)
        results.append(result)
    return results
