"""What the adapters of a Buu do while it reads: gates, and which slots are read by which tokens.

    report = lm.gate_statistics()
    report.layers[12].mean, report.categories["memory"][12].saturated
    print(lm.memory_usage(12).slots.effective, lm.memory_usage(12).hottest[0].tokens)

Everything is summed up batch by batch: nothing but sums is kept, and for every token the slot that
it reads most.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hippocampus.data.batches import Batch
from hippocampus.data.queries import make_queries
from hippocampus.errors import ConfigError, DataError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.adapter_statistics import (
    GateSummary,
    SlotSummary,
    duplicates,
    gate_summary,
    layer_sums,
    merge,
    slot_summary,
)
from hippocampus.probing.adapters.controls import adapters_of
from hippocampus.probing.adapters.text_rows import row_length, text_batches

QUERIES = 100
"""That are read where no text is given; see `hippocampus.data.queries`."""

ROWS = 8
HOTTEST = 8
TOKENS_SHOWN = 6

Texts = str | Sequence[str] | Mapping[str, Sequence[str]]
"""A text, several, or several of each category."""


@dataclass(frozen=True)
class GateReport:
    """The gates of a model.

    Attributes:
      layers: of the decoder -> its gate over all that was read.
      categories: name -> the same over the texts of a category; {} where they have none.
    """

    layers: Mapping[int, GateSummary]
    categories: Mapping[str, Mapping[int, GateSummary]]


@dataclass(frozen=True)
class HotSlot:
    """A slot that is read much.

    Attributes:
      slot: its number.
      usage: its share of all reads.
      hits: tokens that read it more than any other slot.
      tokens: the most frequent of those, and how often each came, the most frequent first.
    """

    slot: int
    usage: float
    hits: int
    tokens: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class MemoryUsage:
    """The memory of one layer.

    Attributes:
      layer: of the decoder.
      slots: how they are read.
      same_keys, same_values: slots whose key, or value, is like an earlier one's (cosine > 0.95).
      duplicates: slots of which both are like those of one earlier slot.
      hottest: the slots that are read most.
    """

    layer: int
    slots: SlotSummary
    same_keys: int
    same_values: int
    duplicates: int
    hottest: tuple[HotSlot, ...]


@dataclass(frozen=True)
class Observed:
    """All that was summed up while texts were read.

    Attributes:
      layers: with an adapter.
      sums: category -> layer -> what `merge` gives.
      hits: layer -> (slot, token id) -> how often the token read that slot most.
    """

    layers: tuple[int, ...]
    sums: Mapping[str, Mapping[int, Mapping[str, Any]]]
    hits: Mapping[int, Counter[tuple[int, int]]]

    def total(self, layer: int) -> Mapping[str, Any]:
        """The sums of a layer over all categories."""
        return merge(own[layer] for own in self.sums.values())

    @property
    def gates(self) -> GateReport:
        """Of every layer, in all and by category."""
        by_category = {category: {i: gate_summary(own[i]) for i in self.layers}
                       for category, own in self.sums.items() if category}
        return GateReport({i: gate_summary(self.total(i)) for i in self.layers}, by_category)

    def memory(self, lm: LanguageModel, layer: int) -> MemoryUsage:
        """The memory of a layer.

        Args:
          lm: the model that was observed.
          layer: one of `layers`.
        """
        slots, hits = slot_summary(self.total(layer)), self.hits[layer]
        own = lm.params["adapters"][f"layers_{layer}"]["memory"]
        keys, values = (_unit(np.asarray(own[name], np.float64))
                        for name in ("key_slots", "value_slots"))
        hottest = []
        for s in slots.hottest(HOTTEST):
            mine = Counter({token: n for (slot, token), n in hits.items() if slot == s})
            shown = sorted(mine.items(), key=lambda item: (-item[1], item[0]))[:TOKENS_SHOWN]
            hottest.append(HotSlot(s, slots.usage_S[s], mine.total(), tuple(
                (lm.tokenizer.decode([token]), n) for token, n in shown)))
        return MemoryUsage(layer, slots, duplicates(keys), duplicates(values),
                           duplicates(np.concatenate((keys, values), axis=1)), tuple(hottest))


def gate_statistics(lm: LanguageModel, texts: Texts | None = None) -> GateReport:
    """How far the gates of every layer are open, see `LanguageModel.gate_statistics`."""
    return observe(lm, texts).gates


def memory_usage(lm: LanguageModel, layer: int, texts: Texts | None = None) -> MemoryUsage:
    """How the memory of a layer is used, see `LanguageModel.memory_usage`."""
    _, layers = adapters_of(lm)
    if layer not in layers:
        raise ConfigError(f"layer {layer} has no adapter",
                          f"layers {', '.join(map(str, layers))} have one")
    return observe(lm, texts).memory(lm, layer)


def observe(lm: LanguageModel, texts: Texts | None = None, *, rows: int = ROWS) -> Observed:
    """Reads texts and sums up what the adapters do.

    Args:
      lm: a Buu.
      texts: what is read: a text, several, or several of each category; what is longer than the
        training context is cut into parts. None = generated queries of all categories with their
        answers.
      rows: texts at once.

    Raises:
      ConfigError: a model without adapters, or no texts.
      DataError: a text shorter than two tokens.
    """
    _, layers = adapters_of(lm)
    parts = {category: _parts(lm, own) for category, own in _by_category(texts).items()}
    length = row_length([ids for own in parts.values() for ids in own], lm.config.data.context)
    hits: dict[int, Counter[tuple[int, int]]] = {i: Counter() for i in layers}
    found: dict[str, dict[int, Any]] = {}
    for category, own in parts.items():
        total: dict[int, Any] = {}
        for sums in observed(lm, text_batches(own, rows=rows, length=length), hits):
            total = {i: merge([total[i], sums[i]] if total else [sums[i]]) for i in layers}
        found[category] = total
    return Observed(layers, found, hits)


def observed(lm: LanguageModel, batches: Iterable[Batch],
             hits: dict[int, Counter[tuple[int, int]]]) -> Iterator[dict[int, Any]]:
    """The sums of every batch, by layer.

    Args:
      lm: a Buu.
      batches: of one shape.
      hits: of each layer; what the batches add is counted there.
    """
    for batch in batches:
        sums, tops = jax.device_get(_sums(lm.model, lm.params, batch))
        real = np.asarray(batch.loss_weight_BT) > 0
        tokens = np.asarray(batch.tokens_BT)[real]
        for i, top_BT in tops.items():
            pairs = np.stack((np.asarray(top_BT)[real], tokens), 1)
            for pair, n in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
                hits[i][int(pair[0]), int(pair[1])] += int(n)
        yield sums


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: Any, batch: Batch) -> tuple[dict[int, Any], dict[int, Any]]:
    """Of every layer: its sums, and the slot that each token reads most."""
    _, out, _ = model.apply({"params": params}, batch, method="forward")
    weight_BT = jnp.asarray(batch.loss_weight_BT)
    return ({i: layer_sums(out, i, weight_BT) for i in model.layers},
            {i: out[f"layers.{i}.adapter.weights"].argmax(-1) for i in model.layers})


def _by_category(texts: Texts | None) -> dict[str, list[str]]:
    if texts is None:
        grouped: dict[str, list[str]] = {}
        for query in make_queries(QUERIES):
            grouped.setdefault(query.category, []).append(f"{query.prompt} {query.answers[0]}")
        return grouped
    if isinstance(texts, str):
        texts = [texts]
    by_category = {name: list(own) for name, own in (
        texts if isinstance(texts, Mapping) else {"": texts}).items()}
    if not by_category or not all(by_category.values()):
        raise ConfigError("there is no text to read", "give at least one, of every category")
    return by_category


def _parts(lm: LanguageModel, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids, in parts that fit the context; each but the first begins with the last id before it."""
    context, parts = lm.config.data.context, []
    for text in texts:
        ids = lm.tokenizer.encode(text)
        if len(ids) < 2:
            raise DataError("a text is shorter than two tokens", "there is nothing to read")
        parts += [ids[i : i + context + 1] for i in range(0, len(ids) - 1, context)]
    return parts


def _unit(slots_SHd: np.ndarray) -> np.ndarray:
    flat = slots_SHd.reshape(len(slots_SHd), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
