"""A tiny Buu of bytes beside a text, queries, and a control with low-rank adapters."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import numpy as np

from hippocampus.data.queries import Query
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.result_table import Protocol
from hippocampus.generation.language_model import LanguageModel
from hippocampus.layers.lora import LoRA, init_adapters, with_adapters
from hippocampus.probing.adapters.opening import AdapterProbe, Request, systems
from hippocampus.probing.probe import Probe, whole_windows

sys.path.append(str(Path(__file__).resolve().parents[1] / "generation"))

import adapted
import planted

QUERIES = (
    Query("mathematical", "sum", "1 + 1 =", ("2", "two")),
    Query("mathematical", "sum", "2 + 1 =", ("3",)),
    Query("factual", "", "The sky is", ("blue",)),
    Query("creative", "cloze", "It rained.", ("All day long.",)),
    Query("memory", "", "a b c. After b:", ("c",)),
    Query("sequential", "", "1, 2, 3,", ("4",)))
SETTINGS = Request(answer_tokens=3, rows=4)


def lora() -> LanguageModel:
    """The decoder of `adapted` with low-rank adapters that do something."""
    own = adapted.adapted()
    kind = LoRA(rank=2, targets=("layers_*.attention.query",))
    model = own.model.clone(
        adapters=dataclasses.replace(own.model.adapters, count=0), train_backbone="lora",
        lora=kind)
    drawn = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32),
                         init_adapters(jax.random.key(0), own.params["backbone"], kind))
    backbone = with_adapters(own.params["backbone"], drawn, kind)
    return LanguageModel(model, {"backbone": backbone}, own.tokenizer, own.config, 7)


@functools.cache
def probe() -> AdapterProbe:
    """Eight windows of a few hundred bytes, six queries, all controls.

    Windows and queries have the same shapes, so that one program reads both.
    """
    lm, text, cut = adapted.adapted(), planted.text(documents=True), Windows(32, 0, SETTINGS.rows)
    windows = whole_windows(text, cut, 8)
    protocol = Protocol.of(text, cut, weights="raw", step=7, tokens=windows.n_targets)
    own = Probe(Path("nowhere"), lm, text, windows, {"uniform": float(np.log(256))}, protocol)
    found, notes = systems(lm, lora(), seed=0)
    return AdapterProbe(own, found, QUERIES, "planted", SETTINGS, "A general text. " * 20, notes)
