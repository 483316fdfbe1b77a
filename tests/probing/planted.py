"""Probes of models whose parameters are set by hand, so that what a view must find is known."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.result_table import Protocol, ResultTable
from hippocampus.generation.language_model import LanguageModel
from hippocampus.probing.probe import Probe, whole_windows
from hippocampus.probing.results import SuiteResult
from hippocampus.probing.suites import gates, hopfield

CONTEXT, WINDOWS, HEADS = 24, 6, 2
MEASURE = (gates, hopfield)
"""Suites that measure losses under interventions too."""

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "the", "big", "house"]


def text(documents: bool = False) -> HeldOutText:
    """A few hundred bytes, with a document that begins in the middle of a window."""
    draw = random.Random(0)
    ids = np.frombuffer(" ".join(draw.choice(WORDS) for _ in range(150)).encode(), np.uint8)
    starts = np.asarray([0, 3 * CONTEXT + 10]) if documents else None
    return HeldOutText("words", "0" * 64, "text", byte_tokenizer(), ids.astype(np.int32), starts,
                       len(ids) - 1, 150, 0)


def as_drawn(params: dict) -> None:
    """Leaves the random parameters as they are."""


def probe_of(built: Any, tiny_config: Any, overrides: Mapping[str, Any] | None = None,
             plant: Callable[[dict], None] = as_drawn, *,
             documents: bool = False) -> Probe:
    """A probe of a tiny model of bytes.

    Args:
      built, tiny_config: the fixtures.
      overrides: of the tiny config.
      plant: changes a copy of random parameters in place.
      documents: the text has two, kept apart.
    """
    overrides = {"model.vocab_size": 256, "data.context": CONTEXT, **(overrides or {})}
    model, params = built(overrides)
    params = jax.tree.map(np.array, params)  # writable copies
    plant(params)
    held = text(documents)
    windows = whole_windows(held, Windows(CONTEXT, 0, WINDOWS // 2), WINDOWS)
    lm = LanguageModel(model, params, held.tokenizer, tiny_config(overrides), step=7)
    protocol = Protocol.of(held, Windows(CONTEXT, 0, WINDOWS // 2), weights="raw", step=7,
                           tokens=windows.n_targets)
    lines = {"uniform": float(np.log(256)), "unigram": 2.9}
    return Probe(Path("nowhere"), lm, held, windows, lines, protocol)


def runner(built: Any, tiny_config: Any) -> Callable[..., SuiteResult]:
    """(suite, overrides, plant, documents) -> its result; the same arguments run once.

    It asserts that a suite compiles one program, besides the one of all measurements. The probe
    of a result is `runner.probe` of the same arguments.
    """
    @functools.cache
    def probe(items: tuple, plant: Callable[[dict], None], documents: bool) -> Probe:
        return probe_of(built, tiny_config, dict(items), plant, documents=documents)

    @functools.cache
    def result(suite: Any, items: tuple, plant: Callable[[dict], None],
               documents: bool) -> SuiteResult:
        of = probe(items, plant, documents)
        if suite in MEASURE:
            of.baseline  # noqa: B018  # compiles what every measurement runs
        with compilations() as compiled:
            found = suite.run(of)
        assert len(compiled) <= 1, f"{suite.__name__} compiled {len(compiled)} programs"
        return found

    def run(suite: Any, overrides: Mapping[str, Any] | None = None,
            plant: Callable[[dict], None] = as_drawn, *, documents: bool = False) -> SuiteResult:
        return result(suite, tuple((overrides or {}).items()), plant, documents)

    run.probe = lambda overrides=None, plant=as_drawn, *, documents=False: probe(
        tuple((overrides or {}).items()), plant, documents)
    return run


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects an entry for every program that is compiled inside."""
    seen: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def table(result: SuiteResult, name: str) -> ResultTable:
    """One of its tables."""
    return next(found for found in result.tables if found.name == name)


def column(found: ResultTable, key: str, **of: Any) -> list[Any]:
    """Values of a column, of the rows that have the given values."""
    return [row[key] for row in found.rows if all(row[k] == v for k, v in of.items())]
