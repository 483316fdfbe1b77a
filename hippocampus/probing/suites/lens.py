"""Lens: what the output layer would already say of the states between the layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.probing import views
from hippocampus.probing.drawing import ngram_lines
from hippocampus.probing.plots import SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "The prediction as it forms: logit lens"

_COLUMNS = (
    Column("state", "state"), Column("loss", "loss", "nats/token"),
    Column("loss_stderr", "± s.e."), Column("bits_per_byte", "loss", "bits/byte"),
    Column("agrees", "same first choice as the last", "share", 3),
    Column("divergence", "KL to the last", "nats", 4))


def run(probe: Probe) -> SuiteResult:
    """Reads the embeddings and every layer of every pass through the output layer."""
    n_layers, passes = probe.n_layers, probe.config.model.passes

    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        def of_rows(part: Any) -> dict[str, Any]:
            final_BTD, out, _ = model.apply({"params": params}, part, method="forward")
            states = []
            for r in range(passes):
                prefix = "" if r == passes - 1 else f"segments.{r}."
                states += views.residual_states(out, n_layers, prefix)[min(r, 1):]
            if "injection" in out:  # a cell stands behind the layers
                states.append(out["residual"])
            return views.lens_view(model, params, jnp.stack(states), final_BTD, part)

        return {**views.by_rows(of_rows, batch, model.config.vocab_size),
                "weight": batch.loss_weight_BT.sum(1)}

    found = views.over_windows(probe, view)
    loss, error = views.window_mean(found["nll"], found["weight"])
    agrees, _ = views.window_mean(found["agrees"], found["weight"])
    divergence, _ = views.window_mean(found["divergence"], found["weight"])
    states = [("embedding", 1, 0), *(
        (f"layer {i}" if passes == 1 else f"pass {r} layer {i}", r, i + 1)
        for r in range(1, passes + 1) for i in range(n_layers))]
    if len(loss) > len(states):
        states.append(("cell", 1, n_layers + 1))
    rows = tuple(
        {"state": name, "pass": r, "depth": depth, "loss": float(loss[j]),
         "loss_stderr": float(error[j]), "bits_per_byte": probe.bits_per_byte(float(loss[j])),
         "agrees": float(agrees[j]), "divergence": float(divergence[j])}
        for j, (name, r, depth) in enumerate(states))
    table = ResultTable(
        "lens", "Loss of every state, read by the output layer", _COLUMNS, views.known(rows),
        (probe.protocol,),
        ("every state goes through the final norm and the output layer, which were trained for "
         "the last one only: a high loss says that a state is written otherwise, not that it "
         "knows nothing",))
    plot = Plot(
        "lens", "The prediction as it forms",
        "Loss if the output layer reads the embeddings (0) or the state after each layer. Bars: "
        f"one standard error over windows; {probe.protocol.tokens:,} tokens. Dashed: models "
        "that count tokens.",
        themed_svg(lambda figure: _draw(figure, rows, passes, probe.lines)))
    return SuiteResult("lens", TITLE, (table,), (plot,))


def _draw(figure: Figure, rows: tuple[dict[str, Any], ...], passes: int,
          lines: dict[str, float]) -> None:
    axes = figure.subplots()
    deepest = max(row["depth"] for row in rows)
    ngram_lines(axes, lines)
    for r, color in zip(range(1, passes + 1), np.resize(SERIES, passes), strict=True):
        own = [row for row in rows if row["pass"] == r or row["depth"] == 0]
        axes.errorbar([row["depth"] for row in own], [row["loss"] for row in own],
                      [row["loss_stderr"] for row in own], color=color, marker="o", ms=4,
                      capsize=2, label=f"pass {r}")
    names = {row["depth"]: row["state"].rpartition("layer ")[2] for row in rows}
    axes.set_xticks(range(deepest + 1), [names[depth] for depth in range(deepest + 1)])
    axes.set_xlabel("after layer")
    axes.set_ylabel("loss (nats/token)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.2, deepest + 0.2)
    if passes > 1:
        axes.legend(loc="lower left")
