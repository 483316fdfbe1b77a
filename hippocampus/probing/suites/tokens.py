"""Tokens: where the loss is: word by word in a passage, by place in the context, by frequency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.probing import views
from hippocampus.probing.drawing import PASSAGE, ngram_lines, pieces
from hippocampus.probing.plots import SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult, TokenText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "Where the loss is, token by token"

_PLACES = (Column("place", "tokens before"), Column("tokens", "tokens"),
           Column("loss", "loss", "nats/token"), Column("loss_stderr", "± s.e."))
_FREQUENCIES = (
    Column("share", "share of the tokens"), Column("kinds", "different tokens"),
    Column("tokens", "tokens"), Column("loss", "loss", "nats/token"),
    Column("loss_stderr", "± s.e."), Column("unigram", "by frequency alone", "nats/token"))
_SHARES = (0.1, 0.01, 1e-3, 1e-4, 0.0)
"""Lower ends of the classes of frequency."""


def run(probe: Probe) -> SuiteResult:
    """Measures the loss of every token."""
    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward")
        return {"nll": token_nll(hidden_BTD, model.head(params), batch.targets_BT),
                "weight": batch.loss_weight_BT, "target": batch.targets_BT,
                "place": views.positions(batch)}

    found = views.over_windows(probe, view)
    places = _by_place(found)
    frequencies = _by_frequency(found, probe.protocol.vocabulary)
    tables = (
        ResultTable("places", "Loss by place in the context", _PLACES, views.known(places),
                    (probe.protocol,), ("tokens before: what the prediction could read, besides "
                                        "the token it follows",)),
        ResultTable("frequencies", "Loss by frequency of the token", _FREQUENCIES,
                    views.known(frequencies), (probe.protocol,),
                    ("shares are of the tokens that are predicted; by frequency alone: their -log, "
                     "the lowest mean loss that a model without context can have",)))
    plot = Plot(
        "places", "Loss by place in the context",
        "Mean loss against how much the model could read before. Bars: one standard error over "
        f"{len(found['nll'])} windows; {probe.protocol.tokens:,} tokens. Dashed: models that "
        "count tokens.",
        themed_svg(lambda figure: _draw(figure, places, probe.lines)))
    return SuiteResult("tokens", TITLE, tables, (plot,), (_passage(probe, found),))


def _by_place(found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Mean loss of the places 0, 1, 2-3, 4-7, …"""
    rows, low = [], 0
    while low <= found["place"].max():
        high = max(low + 1, 2 * low)
        weight = np.where((found["place"] >= low) & (found["place"] < high), found["weight"], 0)
        if weight.any():
            last = min(high - 1, int(found["place"].max()))
            rows.append({"place": f"{low:,}" if last == low else f"{low:,}-{last:,}",
                         "low": low, "high": last, **_loss(found["nll"], weight)})
        low = high
    return rows


def _by_frequency(found: dict[str, np.ndarray], vocabulary: int) -> list[dict[str, Any]]:
    """Mean loss of the tokens whose share of the predictions lies in a class."""
    share_V = np.bincount(found["target"].ravel(), found["weight"].ravel(), vocabulary)
    share_V = share_V / share_V.sum()
    share = share_V[found["target"]]
    rows, above = [], np.inf
    for least in _SHARES:
        inside_V = (share_V >= least) & (share_V < above) & (share_V > 0)
        weight = np.where(inside_V[found["target"]], found["weight"], 0)
        if weight.any():
            low, high = f"{100 * least:g} %", f"{100 * above:g} %"
            name = (f"{low} or more" if above == np.inf else
                    f"{low} to {high}" if least else f"below {high}")
            own = np.log(np.where(share > 0, share, 1.0))
            rows.append({"share": name, "kinds": int(inside_V.sum()),
                         **_loss(found["nll"], weight),
                         "unigram": float(-(own * weight).sum() / weight.sum())})
        above = least
    return rows


def _loss(nll_WT: np.ndarray, weight_WT: np.ndarray) -> dict[str, Any]:
    kept = np.where(weight_WT > 0, nll_WT.astype(np.float64), 0.0)
    read = weight_WT.any(1)
    mean, error = views.window_mean((kept * weight_WT).sum(1)[read], weight_WT.sum(1)[read])
    return {"tokens": int((weight_WT > 0).sum()), "loss": float(mean),
            "loss_stderr": float(error)}


def _passage(probe: Probe, found: dict[str, np.ndarray]) -> TokenText:
    """The beginning of the text, every token coloured by its loss."""
    counted = np.flatnonzero(found["weight"][0] > 0)[:PASSAGE]
    nll, ids = found["nll"][0, counted], found["target"][0, counted]
    uniform = float(np.log(probe.protocol.vocabulary))
    mean = float((found["nll"] * found["weight"]).sum() / found["weight"].sum())
    above = nll > mean
    strength = np.where(above, np.minimum(1, nll / uniform), 0.6 * (1 - nll / max(mean, 1e-9)))
    return TokenText(
        "loss", "Loss of every token",
        f"The first window's predictions. Above the mean of {mean:.2f} nats: the darker the "
        f"harder, full at log V = {uniform:.2f} nats, a guess. Below it: the darker the surer.",
        pieces(probe.lm.tokenizer, ids), tuple(int(hard) for hard in above),
        tuple(round(float(s), 3) for s in strength), ("easier than the mean", "harder"))


def _draw(figure: Figure, rows: list[dict[str, Any]], lines: dict[str, float]) -> None:
    axes = figure.subplots()
    x = np.arange(len(rows))
    axes.errorbar(x, [row["loss"] for row in rows], [row["loss_stderr"] for row in rows],
                  color=SERIES[0], marker="o", ms=4, capsize=2)
    ngram_lines(axes, lines)
    axes.set_xticks(x, [row["place"] for row in rows])
    axes.set_xlabel("tokens before")
    axes.set_ylabel("loss (nats/token)")
    axes.set_ylim(bottom=0)
