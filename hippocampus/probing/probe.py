"""Probe: a trained model beside a text, ready to be changed and measured.

    probe = open_probe("checkpoints/quickstart")
    damage = probe.measure(Interventions(path_mask_LP=mask)).minus(probe.baseline)

All measurements of a probe run one compiled program, whatever is changed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from hippocampus.config import PATHS, Config, EquilibriumConfig, HybridConfig
from hippocampus.data.batches import Batch
from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.data.recall_rows import RecallWindows
from hippocampus.errors import ConfigError
from hippocampus.evaluation.held_out import HeldOutText
from hippocampus.evaluation.metrics import bits_per_byte
from hippocampus.evaluation.recall_text import RecallText
from hippocampus.evaluation.report import Windows
from hippocampus.evaluation.result_table import Protocol
from hippocampus.evaluation.stand_alone import (
    Request,
    choose_windows,
    load_weights,
    open_folder,
    read_held_out,
)
from hippocampus.exports.folder import is_export
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load_tokenizer
from hippocampus.models.hybrid_block import BlockSpec, block_specs
from hippocampus.models.interventions import NEUTRAL, Interventions
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.probing.measured import Measured
from hippocampus.runs.run_folder import environment

Change = Interventions | Callable[[int, Batch], Interventions] | None
"""What to change: the same for all batches, or a function of a batch's number and NumPy arrays."""

View = Callable[[Any, Any, Batch], Any]
"""(model, params, batch) -> pytree of arrays."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A model and the windows of a text that it is measured on.

    Attributes:
      run: the folder that the model is of.
      lm: the model with its parameters, tokenizer and config.
      text: that the windows are of.
      windows: whole ones in whole batches, so that no row and no token is padding.
      lines: nats per token of the count-based models on the same predictions.
      protocol: how everything here is measured.
      seed: of all that is drawn.
      notes: what is to be said of the lines.
    """

    run: Path
    lm: LanguageModel
    text: HeldOutText
    windows: EvaluationWindows | RecallWindows
    lines: dict[str, float]
    protocol: Protocol
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> Any:
        """The Flax module."""
        return self.lm.model

    @property
    def params(self) -> Any:
        """Its parameters."""
        return self.lm.params

    @property
    def config(self) -> Config:
        """Of the run."""
        return self.lm.config

    @property
    def specs(self) -> tuple[BlockSpec, ...]:
        """Of every layer; () for a family whose layers have no paths."""
        return specs_of(self.config.model)

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.lm.model.config.n_layers)

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that some layer has, in the order of `PATHS`."""
        return tuple(path for p, path in enumerate(PATHS) if self.present[:, p].any())

    @property
    def present(self) -> Bool[np.ndarray, "L P"]:
        """Which layer has which path."""
        rows = [[path in spec.paths for path in PATHS] for spec in self.specs]
        return np.asarray(rows, bool).reshape(-1, len(PATHS))

    @cached_property
    def host_batches(self) -> tuple[Batch, ...]:
        """The batches as NumPy arrays."""
        return tuple(self.windows)

    @cached_property
    def batches(self) -> tuple[Batch, ...]:
        """The batches on the device."""
        return tuple(jax.device_put(batch) for batch in self.host_batches)

    @cached_property
    def neutral(self) -> Interventions:
        """Every array that can be changed, changing nothing."""
        if not self.specs:
            return NEUTRAL
        B, T = self.windows.batch_size, self.windows.context
        return Interventions.neutral(self.n_layers, B, T, self.config.model.passes)

    @cached_property
    def baseline(self) -> Measured:
        """The model as it is."""
        return self.measure()

    def measure(self, change: Change = None) -> Measured:
        """Scores every window under interventions.

        Args:
          change: what to change; arrays that are None are the neutral ones.

        Raises:
          ConfigError: something that this family of models does not have.
        """
        sums = []
        for i, batch in enumerate(self.batches):
            given = change(i, self.host_batches[i]) if callable(change) else change
            sums.append(_sums(self.model, self.params, batch, self._complete(given)))
        rows = jax.device_get(sums)
        joined = {name: np.concatenate([np.asarray(row[name], np.float64) for row in rows])
                  for name in ("nll", "weight")}
        tokens = joined["weight"].sum()
        norm, share = (sum(np.asarray(row[name], np.float64) for row in rows) / tokens
                       for name in ("norm", "share"))
        return Measured(joined["nll"], joined["weight"], norm, share)

    @cached_property
    def contributions(self) -> dict[str, float]:
        """Share of each path in what all mixers add, by norm; the mean over layers and tokens.

        A layer without a path counts as 0, so that the shares sum to 1 over the paths.
        """
        return {path: float(self.baseline.share_LP[:, PATHS.index(path)].mean())
                for path in self.paths}

    @cached_property
    def contribution_norms(self) -> dict[str, float]:
        """Mean norm of what each path adds, over tokens and the layers that have it."""
        mean_P = self.baseline.norm_LP.sum(0) / np.maximum(self.present.sum(0), 1)
        return {path: float(mean_P[PATHS.index(path)]) for path in self.paths}

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """A loss per byte of the text; None where the tokens stand for no text."""
        bytes_per_token = self.text.bytes_per_token
        return bits_per_byte(nats_per_token, bytes_per_token) if bytes_per_token else None

    def map(self, view: View) -> Any:
        """What a function sees in every batch; it is compiled once.

        Args:
          view: (model, params, batch) -> pytree of arrays; reduce T^2 arrays inside.

        Returns:
          The pytree with NumPy leaves, stacked over batches along a new first axis.
        """
        run = jax.jit(lambda params, batch: view(self.model, params, batch))
        rows = [jax.device_get(run(self.params, batch)) for batch in self.batches]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def _complete(self, given: Interventions | None) -> Interventions:
        """All arrays, of the types that the program is compiled for."""
        if given is None:
            return self.neutral
        arrays: dict[str, Any] = {}
        for field in dataclasses.fields(Interventions):
            neutral, value = getattr(self.neutral, field.name), getattr(given, field.name)
            if neutral is None and value is not None:
                raise ConfigError(f"Interventions.{field.name} is of the blocks of a hybrid model",
                                  f"this is of the {self.config.model.family} family: measure it "
                                  "without")
            # By NumPy, because a conversion by JAX is one more program to compile.
            arrays[field.name] = neutral if value is None else np.asarray(value, neutral.dtype)
        return Interventions(**jax.device_put(arrays))


def specs_of(model: HybridConfig | EquilibriumConfig) -> tuple[BlockSpec, ...]:
    """What every block of a model has; () for a family that is not made of blocks with paths."""
    return block_specs(model) if isinstance(model, HybridConfig) else ()


def open_probe(
    workdir: str | Path, *, step: int | None = None, weights: str | None = None,
    split: str = "validation", text: str = "", context: int | None = None,
    batch_size: int | None = None, max_windows: int = 64, seed: int = 0,
) -> Probe:
    """Opens a run folder, or an exported one, beside a held-out text.

    Args:
      workdir: the folder.
      step: a saved step; None = the best one.
      weights: "ema" or "raw"; None = the average where the run keeps one.
      split: "validation" or "test".
      text: a UTF-8 file to use instead of a split; "" = the split.
      context: tokens in a window; None = the run's own.
      batch_size: windows at once; None = the run's own.
      max_windows: at most so many windows, evenly spaced over the text; 0 = all.
      seed: of all that is drawn.

    Raises:
      ConfigError: a setting that does not go with the run.
      DataError: no run folder, no such split or text, or a text other than the training's.
      CheckpointError: no such step, or a damaged one.
    """
    if max_windows < 0:
        raise ConfigError(f"--max_windows is {max_windows}", "it must be at least 0 (0 = all)")
    if seed < 0:
        raise ConfigError(f"--seed is {seed}", "it must be at least 0")
    folder, config = open_folder(workdir)
    # An export has one kind of weights, and "both" takes what there is.
    average = "both" if is_export(folder.path) else "ema" if config.ema.decay else "raw"
    request = Request(split, text, step, weights or average, context, 0, batch_size)
    asked = choose_windows(config, request)
    cut: list[Any] = []

    def scored(text: HeldOutText) -> Bool[np.ndarray, " m"]:
        cut.append(whole_windows(text, asked, max_windows))
        return _predicted(cut[0], len(text.ids))

    text_, lines, notes = read_held_out(
        folder, config, load_tokenizer(folder.tokenizer, config), request, scored)
    windows = cut[0] if cut else whole_windows(text_, asked, max_windows)
    (name, lm), = load_weights(folder, request.weights, step).items()
    protocol = Protocol.of(text_, Windows(windows.context, 0, windows.batch_size), weights=name,
                           step=lm.step, tokens=windows.n_targets)
    return Probe(folder.path, lm, text_, windows, lines, protocol, seed, notes)


def whole_windows(text: HeldOutText, asked: Windows, max_windows: int,
                  ) -> EvaluationWindows | RecallWindows:
    """Evenly spaced windows without any padding, in batches that are all full.

    Args:
      text: a text shorter than a window is one window of its own length.
      asked: context, and windows in a batch at most.
      max_windows: 0 = as many as the text has.
    """
    if isinstance(text, RecallText):
        return text.whole_windows(asked.context, asked.batch_size, max_windows)
    context = min(asked.context, text.predictions)
    available = text.predictions // context
    wanted = min(max_windows or available, available)
    batch_size = min(asked.batch_size, wanted)
    ids = text.ids[: available * context + 1]
    return EvaluationWindows(ids, context, batch_size, wanted // batch_size * batch_size, 0,
                             text.document_starts)


class Opened(typing.Protocol):
    """What `about` reads of a probe of any kind."""

    @property
    def run(self) -> Path:
        """The folder that the model is of."""
        ...

    @property
    def lm(self) -> LanguageModel:
        """The model."""
        ...

    @property
    def protocol(self) -> Protocol:
        """How it is measured."""
        ...

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        ...


def about(probe: Opened) -> dict[str, Any]:
    """What made a result: for the files of `write_suite`."""
    here = environment()
    return {
        "version": here["packages"].get("hippocampus"), "commit": here["commit"],
        "command": here["command"], "devices": here["devices"], "run": str(probe.run),
        "config": probe.lm.config.name, "step": probe.lm.step, "weights": probe.protocol.weights,
        "seed": probe.seed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _predicted(windows: EvaluationWindows, length: int) -> Bool[np.ndarray, " m"]:
    """Which ids of a text of this length the windows predict."""
    predicted = np.zeros(length, bool)
    predicted[windows.starts[:, None] + 1 + np.arange(windows.context)] = True
    return predicted


@functools.partial(jax.jit, static_argnums=0)
def _sums(model: Any, params: Any, batch: Batch,
          interventions: Interventions) -> dict[str, Array]:
    """What `Measured` holds, of one batch; probes of equal models and shapes share the program."""
    hidden_BTD, out, _ = model.apply({"params": params}, batch, method="forward",
                                     interventions=interventions)
    nll_BT = token_nll(hidden_BTD, model.head(params), batch.targets_BT)
    weight_BT = batch.loss_weight_BT
    specs = specs_of(model.config)
    norms_LBTP = (jnp.stack([_norms(out, i, spec) for i, spec in enumerate(specs)]) if specs
                  else jnp.zeros((0, *weight_BT.shape, len(PATHS))))
    shares_LBTP = norms_LBTP / jnp.maximum(norms_LBTP.sum(-1, keepdims=True), 1e-30)
    norm_LP, share_LP = (jnp.einsum("lbtp,bt->lp", x, weight_BT) for x in (norms_LBTP, shares_LBTP))
    return {"nll": (nll_BT * weight_BT).sum(1), "weight": jnp.sum(weight_BT, 1), "norm": norm_LP,
            "share": share_LP}


def _norms(out: dict[str, Array], layer: int, spec: BlockSpec) -> Array:
    """Norms of what each path of a layer adds: B,T,P over all of `PATHS`."""
    own = out[f"layers.{layer}.mixer.contribution"]
    zero = jnp.zeros_like(own[..., 0])
    return jnp.stack([own[..., spec.paths.index(path)] if path in spec.paths else zero
                      for path in PATHS], -1)
