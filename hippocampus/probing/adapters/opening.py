"""From run folders to a model with adapters beside its controls and queries: `AdapterProbe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hippocampus.data.queries import Query, make_queries, read_queries
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.result_table import Protocol
from hippocampus.files import expand
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load
from hippocampus.models.buu import BuuInterventions
from hippocampus.models.halves import trained_shapes
from hippocampus.probing.adapters.controls import (
    adapters_of,
    bare,
    controls,
    shuffled,
    zeroed,
)
from hippocampus.probing.probe import Probe

BASE, LORA, ADAPTERS = "base", "base + LoRA", "adapters"
ZEROED, SHUFFLED = "memory zeroed", "memory shuffled"


@dataclass(frozen=True)
class Request:
    """What the suite reads besides the windows of a probe.

    Attributes:
      lora: a run folder of the same decoder with low-rank adapters; "" = none.
      queries: a file of one's own (`hippocampus.data.queries.read_queries`); "" = generated.
      n_queries: how many are generated.
      answer_tokens: that are written at most.
      base_text: a UTF-8 file of general text; "" = documentation that comes with Python.
      rows: queries at once.
    """

    lora: str = ""
    queries: str = ""
    n_queries: int = 1000
    answer_tokens: int = 16
    base_text: str = ""
    rows: int = 16

    def __post_init__(self) -> None:
        for name, flag in (("answer_tokens", "--max_written"), ("rows", "rows"),
                           ("n_queries", "--n_queries")):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag} is {getattr(self, name)}", "it must be at least 1")


@dataclass(frozen=True, eq=False)
class System:
    """A row of the tables.

    Attributes:
      name: of the row.
      writer: the model as it generates.
      reader: the model as it reads whole rows, under `given`: rows of one reader share a program.
      given: what is changed in it; None = nothing can be.
      trained: parameters that were trained for it.
    """

    name: str
    writer: LanguageModel
    reader: LanguageModel
    given: BuuInterventions | None
    trained: int


@dataclass(frozen=True, eq=False)
class AdapterProbe:
    """A Buu beside a held-out text, queries and its controls.

    Attributes:
      probe: the model and the windows of the text.
      systems: name -> the model, and each of its controls.
      queries: that are asked.
      source: of the queries: "generated, seed 0", or a file.
      settings: how much is asked.
      base_text: general text; None = the default.
      notes: what is to be said of the controls.
    """

    probe: Probe
    systems: Mapping[str, System]
    queries: tuple[Query, ...]
    source: str
    settings: Request
    base_text: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        """The folder that the model is of."""
        return self.probe.run

    @property
    def lm(self) -> LanguageModel:
        """The model with its adapters."""
        return self.probe.lm

    @property
    def config(self) -> Any:
        """Of the run."""
        return self.probe.config

    @property
    def protocol(self) -> Protocol:
        """How the windows are measured."""
        return self.probe.protocol

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.probe.seed

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the decoder, those that have an adapter."""
        return adapters_of(self.lm)[1]


def open_adapter_probe(probe: Probe, request: Request) -> AdapterProbe:
    """Puts a model beside its controls and queries.

    Args:
      probe: of a Buu.
      request: what is asked.

    Raises:
      ConfigError: a model without adapters, or a second run that is not of the same decoder.
      DataError: no such run, or queries or a text that cannot be used.
      CheckpointError: the second run has no checkpoint.
    """
    adapters_of(probe.lm)
    lora = load(request.lora, weights=probe.protocol.weights) if request.lora else None
    queries = (read_queries(request.queries) if request.queries else
               make_queries(request.n_queries, probe.seed))
    source = request.queries or f"generated, seed {probe.seed}"
    text = None
    if request.base_text:
        try:
            text = expand(request.base_text).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {request.base_text}: {error}",
                            "--base_text=FILE names a UTF-8 text") from None
    found, notes = systems(probe.lm, lora, probe.seed)
    return AdapterProbe(probe, found, queries, source, request, text, notes)


def systems(lm: LanguageModel, lora: LanguageModel | None,
            seed: int) -> tuple[dict[str, System], tuple[str, ...]]:
    """A model and its controls, in the order of the tables; and what is to be said of them.

    Args:
      lm: a Buu.
      lora: its decoder with low-rank adapters.
      seed: of the order of the slots.

    Raises:
      ConfigError: a model without adapters, or another tokenizer or decoder.
    """
    given, own = controls(lm, seed), trained_parameters(lm)
    writers = {BASE: bare(lm), ADAPTERS: lm, ZEROED: zeroed(lm), SHUFFLED: shuffled(lm, seed)}
    found = {name: System(name, writer, lm, given[name], 0 if name == BASE else own)
             for name, writer in writers.items()}
    notes = []
    if lm.model.train_backbone != "none":
        notes.append(f"the run trained its decoder too ({lm.model.train_backbone}): base is the "
                     "decoder as it is in the run")
    if lora is None:
        notes.append("no run with low-rank adapters was given (--lora=RUN): that control is "
                     "missing")
        return found, tuple(notes)
    if (lora.tokenizer.digest != lm.tokenizer.digest
            or getattr(lora.model, "config", None) != lm.model.config):
        raise ConfigError("--lora is a run of another decoder", "train it with the same "
                          "model.backbone.path, model.adapters.count=0 and "
                          "model.backbone.train=lora")
    theirs = trained_parameters(lora)
    if not 0.95 < theirs / own < 1.05:
        notes.append(f"{LORA} has {theirs:,} trained parameters and the adapters {own:,}: that is "
                     "no control of equal size")
    control = System(LORA, lora, lora, None, theirs)
    return {BASE: found.pop(BASE), LORA: control, **found}, tuple(notes)


def trained_parameters(lm: LanguageModel) -> int:
    """How many parameters an optimizer saw."""
    return sum(leaf.size for leaf in jax.tree.leaves(trained_shapes(lm.model)))
