"""Controller: what it says, what it says of another text, noise of the same moments, or nothing.

All rows run the passes that the model was trained with. `seg_1` without the pass is another thing
than `no_ctrl`, the pass with a bias of zero; between them lies what an extra pass is worth, and
between `ctrl_random` and `ctrl_normal` what the controller's content is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hippocampus.config import PATHS
from hippocampus.data.batches import Batch
from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.models.interventions import (
    CONTROLLER_MOVED,
    CONTROLLER_RANDOM,
    CONTROLLER_ZERO,
    Interventions,
)
from hippocampus.probing import shuffles
from hippocampus.probing.damage_plots import damage_bars
from hippocampus.probing.measured import Measured
from hippocampus.probing.probe import Probe
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.rows import baseline_row, loss_row, loss_table
from hippocampus.probing.suites import SkipSuite

TITLE = "What the controller's words are worth"

FAMILIES = ("hybrid",)
"""What it looks into."""

_STREAM = 100  # of random numbers; those of the shuffles are counted from 0


def run(probe: Probe) -> SuiteResult:
    """The four modes of the original probe, a shuffle within the past, and what the gain is of."""
    if probe.config.model.segments.train == 1:
        raise SkipSuite("the model was trained with one segment and has no controller")
    measured = dict(_measure(probe))
    rows = [loss_row(probe, name, "controller", one) for name, one in measured.items()]
    notes = [
        "ctrl_shuffle: the bias of another row at the same place; ctrl_shuffle_past: of an earlier "
        "token of the document; ctrl_random: normal noise with the mean and the covariance, over "
        "all gates together, that the bias has in the batch; no_ctrl: a bias of zero, all passes "
        "run"]
    if "ctrl_shuffle" not in measured:
        notes.append("no ctrl_shuffle: there is one window in a batch")
    if probe.config.model.segments.feedback:
        notes.append("the hidden states that are fed back to the next pass are left as they are")
    tables = (loss_table(probe, "controller", "The controller's bias, kept and replaced",
                         [baseline_row(probe), *rows], notes),
              _gain(probe, measured))
    plot = Plot("controller", "Damage of replacing the controller's bias", "Rise of the loss with "
                "another bias in every pass after the first; bars: one standard error, paired "
                "over windows.", damage_bars({"": rows}, [row["name"] for row in rows]))
    return SuiteResult("controller", TITLE, tables, (plot,))


def _measure(probe: Probe) -> Iterator[tuple[str, Measured]]:
    yield "ctrl_normal", probe.measure(Interventions(controller=0))
    if probe.windows.batch_size > 1:
        yield "ctrl_shuffle", _moved(probe, "batch")
    yield "ctrl_shuffle_past", _moved(probe, "past")
    C = probe.n_layers * len(PATHS)

    def random(i: int, batch: Batch) -> Interventions:
        noise = np.random.default_rng((probe.seed, _STREAM + 2, i))
        return Interventions(controller=CONTROLLER_RANDOM, controller_noise_BTC=(
            noise.standard_normal((*np.shape(batch.tokens_BT), C), np.float32)))

    yield "ctrl_random", probe.measure(random)
    yield "no_ctrl", probe.measure(Interventions(controller=CONTROLLER_ZERO))


def _moved(probe: Probe, kind: str) -> Measured:
    stream = _STREAM + list(shuffles.KINDS).index(kind)

    def change(i: int, batch: Batch) -> Interventions:
        source_BT = shuffles.KINDS[kind](np.random.default_rng((probe.seed, stream, i)), batch)
        return Interventions(controller=CONTROLLER_MOVED, controller_source_BT=source_BT)

    return probe.measure(change)


def _gain(probe: Probe, measured: dict[str, Measured]) -> ResultTable:
    """How much of what the passes after the first gain is kept with another bias."""
    first = probe.measure(Interventions(segments=1))
    total = first.minus(probe.baseline).nats
    rows: list[dict[str, Any]] = []
    for name in measured:
        kept = first.minus(measured[name])
        rows.append({"name": name, "gain": kept.nats, "gain_stderr": kept.standard_error,
                     "share": kept.nats / total if total else None})
    columns = (
        Column("name", "bias"), Column("gain", "gain over seg_1", "nats/token"),
        Column("gain_stderr", "± s.e."), Column("share", "share of the gain", "", 2))
    return ResultTable(
        "gain", "What the passes after the first gain over seg_1, by the bias they get", columns,
        tuple(rows), (probe.protocol,),
        (f"seg_1, one pass and no controller: {first.loss:.4f} nats/token",
         "what ctrl_shuffle and ctrl_random keep does not come from what the controller says of "
         "this text; what no_ctrl keeps comes from running the layers again"))
