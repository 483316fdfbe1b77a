"""Curves of runs as a picture: `draw_curves`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hippocampus.errors import ConfigError
from hippocampus.evaluation.comparison import Comparison, RunSummary
from hippocampus.files import write_atomically

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers tell apart; it repeats after seven runs."""

_SMOOTHING = 40  # the training line is a running mean over this part of the logged rows
_WARM_UP = 0.1  # share of a run whose training losses the axis need not show: they start at ln V


def draw_curves(comparison: Comparison, folder: Path) -> list[Path]:
    """Draws training and validation loss against steps and tokens.

    Nats per token where all runs have one tokenizer, else bits per byte: two tokenizers never
    share an axis per token.

    Args:
      comparison: the runs.
      folder: where curves.png and curves.svg are written.

    Returns:
      The two files; none for runs that have no rows yet.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed", "pip install matplotlib pillow") from None
    if not any(len(steps) for run in comparison.runs for steps, _ in _both(run, comparison)):
        return []
    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for run, color in zip(comparison.runs, _cycle(len(comparison.runs)), strict=True):
        per_step = run.config.train.batch_size * run.config.data.context
        (train_steps, train), (steps, validation) = _both(run, comparison)
        for ax, scale in zip(axes, (1, per_step), strict=True):
            if len(train):
                ax.plot(train_steps * scale, running_mean(train), color=color, lw=1.0, alpha=0.45)
            if len(validation):
                ax.plot(steps * scale, validation, color=color, lw=1.8, marker="o",
                        markersize=3.5 if len(steps) <= 40 else 0)
    _label(figure, axes, comparison)
    written = []
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        # No date in the file: the same runs give the same picture.
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
        written.append(folder / f"curves.{kind}")
        write_atomically(written[-1], buffer.getvalue())
    return written


def _label(figure: Any, axes: Any, comparison: Comparison) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    unit = "nats per token" if comparison.per_token else "bits per byte"
    axes[0].set_ylabel(f"loss ({unit})")
    axes[0].set_xlabel("training steps")
    axes[1].set_xlabel("training tokens seen")
    low, high = _limits(comparison)
    for ax in axes:
        ax.grid(True, color="#dddddd", lw=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_xlim(left=0)
        ax.set_ylim(low, high)
    handles = [Line2D([], [], color=color, lw=2.5, label=run.label + _unknown(run))
               for run, color in zip(comparison.runs, _cycle(len(comparison.runs)), strict=True)]
    handles += [Line2D([], [], color="#444444", lw=1.8, marker="o", markersize=3.5,
                       label="validation"),
                Line2D([], [], color="#444444", lw=1.0, alpha=0.45, label="training, smoothed")]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)),
                  frameon=False)
    texts = {run.best.text for run in comparison.runs if run.best}
    title = "Training and validation loss"
    if len(texts) > 1:
        title += f" (of {len(texts)} different texts: heights do not compare)"
    figure.suptitle(title)


def _unknown(run: RunSummary) -> str:
    """What makes a curve too low to compare with the others."""
    rate = run.best.unknown_rate if run.best else 0
    return f" ({rate:.1%} of the tokens <unk>)" if rate else ""


def _both(run: RunSummary, comparison: Comparison) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(steps, loss) of training and of validation, in the unit of the picture."""
    bits = not comparison.per_token
    validation = _series(run, "eval/bits_per_byte" if bits else "eval/loss")
    steps, train = _series(run, "train/loss")
    if bits:
        ratio = run.train_bytes_per_token
        steps, train = (steps, train / (math.log(2) * ratio)) if ratio else (steps[:0], train[:0])
    return (steps, train), validation


def _series(run: RunSummary, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[name]) for row in run.rows if row.get(name) is not None]
    return np.array([s for s, _ in found], float), np.array([v for _, v in found], float)


def running_mean(values: np.ndarray, half: int | None = None) -> np.ndarray:
    """Mean over a window that shrinks at both ends, so that nothing is invented there.

    Args:
      values: finite numbers.
      half: of the window, without its middle; default: a small part of the values.
    """
    half = len(values) // _SMOOTHING // 2 if half is None else half
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _limits(comparison: Comparison) -> tuple[float, float]:
    """Everything but the fall of the first steps."""
    shown = []
    for run in comparison.runs:
        (steps, train), (_, validation) = _both(run, comparison)
        shown += [train[steps >= _WARM_UP * steps[-1]] if len(steps) else train, validation]
    values = np.concatenate(shown)
    margin = 0.04 * max(float(np.ptp(values)), 1e-3)
    return float(values.min()) - margin, float(values.max()) + margin


def _cycle(n: int) -> Sequence[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]
