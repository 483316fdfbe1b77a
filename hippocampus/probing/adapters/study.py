"""Measures a model with adapters, its controls and its layers: `study_adapters`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float64, Int

from hippocampus.data.batches import Batch
from hippocampus.data.queries import Query
from hippocampus.evaluation.answers import score_answer
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.adapter_statistics import merge
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.probing.adapters.controls import enabled
from hippocampus.probing.adapters.findings import Answer, Findings, Losses, Stage, scored
from hippocampus.probing.adapters.health import health_report
from hippocampus.probing.adapters.monitors import Observed, observe, observed
from hippocampus.probing.adapters.opening import AdapterProbe, System
from hippocampus.probing.adapters.text_rows import row_length, text_batches

HELD_OUT = "held-out text"
"""What the windows are called beside the categories of queries."""

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Forced:
    """Queries with their first answers as rows.

    Attributes:
      ids: of a prompt and its answer.
      asked: place of the answer's first token in them.
    """

    ids: tuple[Int[np.ndarray, " n"], ...]
    asked: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each answer."""
        return tuple(len(one) - first for one, first in zip(self.ids, self.asked, strict=True))


def study_adapters(probe: AdapterProbe, say: Say = lambda line: None) -> Findings:
    """Measures everything.

    Args:
      probe: the model, its controls, a text and queries.
      say: is told what is being done.
    """
    forced = force(probe.lm, probe.queries)
    losses, answers = {}, []
    for system in probe.systems.values():
        say(f"{system.name}: {len(probe.queries):,} queries, "
            f"{probe.protocol.tokens:,} tokens of held-out text")
        losses[system.name] = window_losses(probe, system)
        answers += _answers(probe, system, forced)
    stages = _stages(probe, forced, say)
    say("gates, memories and health")
    seen = _seen(probe)
    health = health_report(probe.lm, probe.base_text, seen)
    return Findings(
        losses, {system.name: system.trained for system in probe.systems.values()},
        tuple(answers), stages, seen.gates, {i: seen.memory(probe.lm, i) for i in probe.layers},
        health, f"{len(probe.queries):,} queries ({probe.source})", probe.seed, probe.notes)


def force(lm: LanguageModel, queries: Sequence[Query]) -> Forced:
    """Prompts with their first answers behind them.

    Prompt and answer are tokenized together, as they would be in a text; the answer begins where
    the ids are no longer the prompt's.
    """
    ids, asked = [], []
    for query in queries:
        prompt = lm.tokenizer.encode(query.prompt)
        both = lm.tokenizer.encode(f"{query.prompt} {query.answers[0]}")
        n = min(len(prompt), len(both) - 1)
        differs = np.flatnonzero(prompt[:n] != both[:n])
        ids.append(both)
        asked.append(int(differs[0]) if len(differs) else n)
    return Forced(tuple(ids), tuple(asked))


def log_probabilities(lm: LanguageModel, forced: Forced, given: Any,
                      rows: int) -> Float64[np.ndarray, " n"]:
    """log p of every answer behind its prompt, nats.

    Args:
      lm: reads.
      forced: what.
      given: interventions, or None.
      rows: queries at once.
    """
    # Rows are as long as the longest, beyond the context too: no prompt may lose its answer.
    batches = text_batches(forced.ids, rows=rows, length=row_length(forced.ids),
                           asked=forced.asked)
    found = [-np.asarray(_losses(lm.model, lm.params, batch, given), np.float64)
             for batch in batches]
    return np.concatenate(found)[: len(forced.ids)]


def window_losses(probe: AdapterProbe, system: System, given: Any = None) -> Losses:
    """What the windows of the text cost a system.

    Args:
      probe: with the windows.
      system: that reads them.
      given: interventions in place of the system's own; None = its own.
    """
    own, lm = system.given if given is None else given, system.reader
    nll = [np.asarray(_losses(lm.model, lm.params, batch, own), np.float64)
           for batch in probe.probe.batches]
    weight = [np.asarray(batch.loss_weight_BT, np.float64).sum(1)
              for batch in probe.probe.host_batches]
    return Losses(np.concatenate(nll), np.concatenate(weight))


def _answers(probe: AdapterProbe, system: System, forced: Forced) -> list[Answer]:
    log_p = log_probabilities(system.reader, forced, system.given, probe.settings.rows)
    written = [n for n, query in enumerate(probe.queries) if scored(query.category)]
    texts = dict(zip(written, system.writer.generate(
        [probe.queries[n].prompt for n in written], temperature=0.0,
        max_new_tokens=probe.settings.answer_tokens, stop="\n"), strict=True)) if written else {}
    found = []
    for n, query in enumerate(probe.queries):
        text = texts.get(n)
        text = None if text is None else text.strip()
        found.append(Answer(
            system.name, n, query.category, query.kind, query.prompt, query.answers,
            float(log_p[n]), forced.tokens[n], text,
            None if text is None else score_answer(text, query.answers)))
    return found


def _stages(probe: AdapterProbe, forced: Forced, say: Say) -> tuple[Stage, ...]:
    """Layers enabled one by one from the first, and each alone."""
    layers = probe.layers
    wanted: list[tuple[str, str, int | None, tuple[int, ...]]] = [("none", "up to", None, ())]
    wanted += [(f"up to layer {i}", "up to", i, layers[: n + 1]) for n, i in enumerate(layers)]
    if len(layers) > 1:
        wanted += [(f"layer {i} alone", "only", i, (i,)) for i in layers]
    system = next(one for one in probe.systems.values() if one.reader is probe.lm)
    stages = []
    for name, kind, layer, on in wanted:
        say(f"adapters enabled: {name}")
        given = enabled(probe.lm, on)
        log_p = log_probabilities(probe.lm, forced, given, probe.settings.rows)
        grouped: dict[str, list[float]] = {}
        for query, value, tokens in zip(probe.queries, log_p, forced.tokens, strict=True):
            grouped.setdefault(query.category, []).append(float(value) / tokens)
        stages.append(Stage(name, kind, layer, window_losses(probe, system, given),
                            {name: statistics.fmean(own) for name, own in grouped.items()}))
    return tuple(stages)


def _seen(probe: AdapterProbe) -> Observed:
    """What adapters do on the queries, category by category, and on the windows."""
    texts: dict[str, list[str]] = {}
    for query in probe.queries:
        texts.setdefault(query.category, []).append(f"{query.prompt} {query.answers[0]}")
    queries = observe(probe.lm, texts, rows=probe.settings.rows)
    total: dict[int, Any] = {}
    for sums in observed(probe.lm, probe.probe.host_batches, dict(queries.hits)):
        total = {i: merge([total[i], sums[i]] if total else [sums[i]]) for i in queries.layers}
    return Observed(queries.layers, {**queries.sums, HELD_OUT: total}, queries.hits)


@functools.partial(jax.jit, static_argnums=0)
def _losses(model: Any, params: Any, batch: Batch, given: Any) -> Array:
    """Summed -log p of each row's targets."""
    hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward",
                                   interventions=given)
    nll_BT = token_nll(hidden_BTD, model.head(params), batch.targets_BT)
    return (nll_BT * batch.loss_weight_BT).sum(1)
