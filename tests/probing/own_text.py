"""A model beside a text that it wrote itself: no change can make it predict that text better.

The text is drawn from the model's own distribution, so that the model's loss on it is the entropy
and any other prediction costs more (Gibbs). What a probe must find is then known from how the
parameters were made: a path that carries nothing costs nothing, any other does damage.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hippocampus.config import PATHS
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.result_table import Protocol
from hippocampus.generation.language_model import LanguageModel
from hippocampus.probing.probe import Probe, whole_windows

CONTEXT, WINDOWS, BATCH = 16, 48, 16
OVERRIDES: dict[str, Any] = {"model.vocab_size": 256, "model.n_layers": 1,
                             "data.context": CONTEXT}
LOUDNESS, SHARPNESS = 6.0, 1.5
"""Of the paths beside the embedding, and of the predictions: what the paths say then matters."""


def speak_alone(params: Any, *speakers: str) -> Any:
    """The parameters with zero outputs of all paths but these."""
    layer = dict(params["layers_0"])
    for path in PATHS:
        if path in layer and path not in speakers:
            kernel = layer[path]["out"]["kernel"]
            layer[path] = {**layer[path], "out": {"kernel": jnp.zeros_like(kernel)}}
    return {**params, "layers_0": layer}


def gate_only(params: Any, path: str) -> Any:
    """The parameters with a gate of exactly 1 for one path and 0 for the others."""
    layer = dict(params["layers_0"])
    layer["mixer"] = {**layer["mixer"], "gate": {
        "kernel": jnp.zeros_like(layer["mixer"]["gate"]["kernel"]),
        "bias": jnp.where(jnp.arange(len(PATHS)) == PATHS.index(path), 0.0, -1e9)}}
    return {**params, "layers_0": layer}


def probe_of(model: Any, params: Any, config: Any, seed: int = 0) -> Probe:
    """A probe of the model on a text that it draws from itself."""
    params = _loud(params)
    ids = _written_by(model, params, np.random.default_rng(seed))
    text = HeldOutText("its own text", "0" * 64, "text", byte_tokenizer(), ids, None,
                       len(ids) - 1, 1, 0)
    asked = Windows(CONTEXT, 0, BATCH)
    counts = np.bincount(ids, minlength=256) + 1
    lines = {"uniform": float(np.log(256)),
             "unigram": float(-np.log(counts / counts.sum())[ids[1:]].mean())}
    return Probe(Path("nowhere"), LanguageModel(model, params, text.tokenizer, config, 1), text,
                 whole_windows(text, asked, 0), lines, Protocol.of(
                     text, asked, weights="raw", step=1))


@functools.partial(jax.jit, static_argnums=0)
def _predictions(model: Any, params: Any, tokens: Any) -> Any:
    return jax.nn.softmax(model.apply({"params": params}, tokens)[0][0])


def _loud(params: Any) -> Any:
    layer = dict(params["layers_0"])
    louder = {name: {"scale": LOUDNESS * tree["scale"]}
              for name, tree in layer["mixer"].items() if name.startswith("norm_")}
    layer["mixer"] = {**layer["mixer"], **louder}
    return {**params, "layers_0": layer,
            "norm_out": {"scale": SHARPNESS * params["norm_out"]["scale"]}}


def _written_by(model: Any, params: Any, draw: np.random.Generator) -> np.ndarray:
    """Window after window; each begins with the last token of the one before and knows no more."""
    ids = [1]
    for _ in range(WINDOWS):
        window = np.zeros((1, CONTEXT), np.int32)
        for t in range(CONTEXT):
            window[0, t] = ids[-1]
            p = np.asarray(_predictions(model, params, window)[t], np.float64)
            ids.append(int(draw.choice(256, p=p / p.sum())))
    return np.asarray(ids, np.int32)
