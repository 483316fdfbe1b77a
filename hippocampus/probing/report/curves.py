"""The curves of a run as pictures: `training_curves`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hippocampus.config import PATHS
from hippocampus.evaluation.curves import running_mean
from hippocampus.probing.plots import INK, PATH_COLORS, SERIES, themed_svg
from hippocampus.probing.report.blocks import visible
from hippocampus.probing.report.series import Series, after_warm_up, names, read_series, thin
from hippocampus.probing.results import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]

TRAIN, VALIDATION, OTHER = SERIES[0], SERIES[1], SERIES[2]
SIZE, WIDE_SIZE = (4.0, 2.7), (8.58, 2.7)
"""Inches of a small picture, and of the same over two columns: both have one height."""

_STEPS = [1, 2, 2.5, 5, 10]  # between ticks
_FAR = 2  # heights of the curves that a count-based line may lie above them
_TEXT_HEIGHT = 0.08  # of a line's name, as a share of the axis
_HALF_WINDOW = 24  # a running mean reaches one part in so many of the points to each side

_NOT_TERMS = ("train/loss", "train/grad_norm", "train/learning_rate", "train/skipped",
              "train/skipped_in_a_row", "train/tokens_per_second", "train/mfu",
              "train/peak_memory_gib")
_TERMS = {
    "train/total": ("Total", "what is minimised: the weighted sum of all terms"),
    "train/z": ("z-loss", "logsumexp of the logits, squared; unscaled"),
    "train/smoothing": ("Label smoothing", "cross-entropy against the uniform distribution"),
    "train/flow_segment": ("Segment flow", "rectified flow from the first pass to the last; "
                           "unscaled"),
    "train/flow_depth": ("Depth straightness", "of the residual stream over the layers; unscaled"),
    "train/energy": ("Energy of the memory", "at the fixed point; unscaled"),
    "train/convergence": ("Residual at the solution", "relative and squared; unscaled"),
    "train/jacobian": ("Size of the Jacobian", "squared norm / D; 0 in steps without it; unscaled"),
    "train/contraction": ("Contraction above its target", "squared; unscaled")}


@dataclass(frozen=True)
class Curves:
    """What a run's metrics look like.

    Attributes:
      first: the losses on both splits; the first one is `wide` on a narrow screen.
      wide: the first picture once more, for a wide screen; None without any loss.
      terms: of the loss.
      model: gates, their entropy, retrieval depth; or the solver and its energies.
      machine: learning rate, gradient norm, speed, memory, skipped steps.
      others: series that no picture above shows.
    """

    first: tuple[Plot, ...]
    wide: Plot | None
    terms: tuple[Plot, ...]
    model: tuple[Plot, ...]
    machine: tuple[Plot, ...]
    others: tuple[Plot, ...]


@dataclass(frozen=True)
class Line:
    """A curve of a picture.

    Attributes:
      series: the points.
      label: in the legend; "" = none.
      color: of the line.
      kind: "noisy" (faint, with a running mean over it), "marked" (few points), "dashed",
        "plain".
    """

    series: Series
    label: str = ""
    color: str = TRAIN
    kind: str = "plain"


def training_curves(rows: Rows, counted: Mapping[str, float],
                    bytes_per_token: float | None) -> Curves:
    """Draws everything that metrics.jsonl holds.

    Args:
      rows: of metrics.jsonl, finished or not.
      counted: nats per token of the count-based lines on the validation split, by name.
      bytes_per_token: of the validation split; None where it is not known.
    """
    series = {name: read_series(rows, name) for name in names(rows)}
    drawer = _Drawer({name: s for name, s in series.items() if len(s) or s.broken})
    wide, narrow = drawer.losses(counted)
    bits = drawer.bits(counted, bytes_per_token)
    first = (*narrow, *bits, *drawer.accuracy())
    terms = drawer.terms()
    model = (*drawer.gates(), *drawer.one(
        "mixer/entropy", "Gate entropy", "nats", "mean over tokens and layers of the entropy of "
        "the gates; ln(number of paths) = all alike, 0 = one path alone"), *drawer.one(
        "hopfield/depth", "Retrieval depth", "steps", "mean number of retrieval steps that the "
        "depth gates ask for, over tokens and layers"), *drawer.solver())
    machine = drawer.machine()
    return Curves(first, wide, terms, model, machine, drawer.rest())


class _Drawer:
    """Draws series and remembers which it has drawn."""

    def __init__(self, series: dict[str, Series]):
        self._series = series
        self._left = {name for name in series if not name.startswith("time/")}

    def _take(self, name: str) -> Series:
        self._left.discard(name)
        return self._series.get(name, Series(name, np.zeros(0), np.zeros(0)))

    def losses(self, counted: Mapping[str, float]) -> tuple[Plot | None, tuple[Plot, ...]]:
        """Training and validation loss, for a wide and a narrow screen."""
        raw, average = self._take("eval/loss_raw"), self._take("eval/loss")
        same = np.array_equal(raw.values, average.values)
        lines = [Line(self._take("train/loss"), "training", TRAIN, "noisy"),
                 Line(average, "validation" if same else "validation, average weights",
                      VALIDATION, "marked"),
                 Line(self._take("eval/loss_skip"), "validation, skip path", OTHER, "dashed")]
        if not same:
            lines.append(Line(raw, "validation, raw weights", VALIDATION, "dashed"))
        lines = [line for line in lines if len(line.series)]
        if not lines:
            return None, ()
        wanted = _limits([line.series for line in lines], counted)
        caption = _counted_text(counted, wanted, "nats")
        plots = [Plot(name, "Training and validation loss", caption, _draw(
            lines, "nats per token", size, wanted, counted))
            for name, size in (("loss_wide", WIDE_SIZE), ("loss", SIZE))]
        return plots[0], (plots[1],)

    def bits(self, counted: Mapping[str, float], ratio: float | None) -> tuple[Plot, ...]:
        """Validation in bits per byte, which compares between tokenizers."""
        average, raw = self._take("eval/bits_per_byte"), self._take("eval/bits_per_byte_raw")
        lines = [Line(average, "average weights", VALIDATION, "marked")]
        if not np.array_equal(raw.values, average.values):
            lines.append(Line(raw, "raw weights", VALIDATION, "dashed"))
        lines = [line for line in lines if len(line.series)]
        if not lines:
            return ()
        per_byte = {name: nats / math.log(2) / ratio for name, nats in counted.items()
                    } if ratio else {}
        wanted = _limits([line.series for line in lines], per_byte)
        caption = f"Compares between tokenizers. {_counted_text(per_byte, wanted, 'bits')}"
        return (Plot("bits_per_byte", "Validation, bits per byte", caption, _draw(
            lines, "bits per byte", SIZE, wanted, per_byte)),)

    def accuracy(self) -> tuple[Plot, ...]:
        """Share of right answers, of runs that are asked for some."""
        average, raw = self._take("eval/accuracy"), self._take("eval/accuracy_raw")
        lines = [line for line in (Line(average, "average weights", VALIDATION, "marked"),
                                   Line(raw, "raw weights", VALIDATION, "dashed"))
                 if len(line.series)]
        parts = [name for name in self._series if name.startswith("eval/accuracy_")
                 and len(self._series[name]) and name != raw.name]
        by_kind = [Line(self._take(name), name.removeprefix("eval/accuracy_"),
                        SERIES[i % len(SERIES)], "marked") for i, name in enumerate(parts)]
        return tuple(Plot(name, title, "Share of the answers whose most likely token is right.",
                          _draw(drawn, "accuracy", SIZE, (-0.02, 1.02)))
                     for name, title, drawn in (("accuracy", "Accuracy", lines),
                                                ("accuracy_kinds", "Accuracy by kind", by_kind))
                     if drawn)

    def terms(self) -> tuple[Plot, ...]:
        """One picture for each term of the loss; the passes share one."""
        passes = sorted(name for name in self._series if name.startswith("train/nll_segment_"))
        plots = []
        if passes:
            lines = [Line(self._take(name), f"pass {name.rpartition('_')[2]}", SERIES[i + 1],
                          "noisy") for i, name in enumerate(passes)]
            lines.append(Line(self._take("train/loss"), "last pass", TRAIN, "noisy"))
            plots.append(Plot("segments", "Loss of every pass", "Training loss, nats per token; a "
                              "useful controller keeps the last pass below the others.",
                              _draw(lines, "nats per token", SIZE,
                                    _limits([line.series for line in lines], {}))))
        for name in [n for n in self._series if n.startswith("train/") and n in self._left
                     and n not in _NOT_TERMS]:
            title, text = _TERMS.get(name, (name.removeprefix("train/"), ""))
            plots += self.one(name, title, "", text, noisy=True)
        return tuple(plots)

    def gates(self) -> tuple[Plot, ...]:
        """Mean gate of every path."""
        lines = [Line(series, path, PATH_COLORS[path]) for path in PATHS
                 if len(series := self._take(f"mixer/gate/{path}"))]
        if not lines:
            return ()
        return (Plot("gates", "Gates", "Mean gate of each path, over tokens and over the layers "
                     "that have the path.", _draw(lines, "gate", SIZE, (-0.02, 1.02))),)

    def solver(self) -> tuple[Plot, ...]:
        """How the fixed points of an equilibrium model were found, and their energies."""
        parts = [Line(series, part, color) for part, color in zip(
            ("total", "retrieval", "anchor"), SERIES, strict=False)
                 if len(series := self._take(f"energy/{part}"))]
        energies = (Plot("energy", "Energy of the memory", "At the fixed point, per token: that of "
                         "the retrieval and of the anchor to the state.",
                         _draw(parts, "energy", SIZE, _limits([p.series for p in parts], {}))),
                    ) if parts else ()
        return (
            *self.one("solver/converged", "Converged tokens", "share", "of the tokens whose state "
                      "reached its fixed point within the tolerances", from_zero=True),
            *self.one("solver/iterations", "Sweeps", "sweeps", "mean over tokens until their "
                      "state was found", from_zero=True),
            *self.one("solver/residual", "Residual", "", "relative, mean over tokens; logarithmic",
                      noisy=True, log=True),
            *self.one("solver/rate", "Rate of convergence", "", "factor by which residuals go with "
                      "every sweep; 1 or more: the cell does not contract", from_zero=True),
            *self.one("solver/contraction", "Contraction", "", "how much the Jacobian stretches "
                      "what it stretches most, after a few power iterations", from_zero=True),
            *energies)

    def machine(self) -> tuple[Plot, ...]:
        """How the optimizer and the machine did."""
        skipped = self._take("train/skipped")
        self._take("train/skipped_in_a_row")
        plots = [
            *self.one("train/learning_rate", "Learning rate", "", ""),
            *self.one("train/grad_norm", "Gradient norm", "", "before clipping; logarithmic",
                      noisy=True, log=True),
            *self.one("train/tokens_per_second", "Speed", "tokens/s", "without what is not "
                      "training", noisy=True, from_zero=True),
            *self.one("train/mfu", "Model FLOPs utilisation", "", "share of the device's peak",
                      from_zero=True),
            *self.one("train/peak_memory_gib", "Peak memory", "GiB", "of the first device",
                      from_zero=True)]
        if len(skipped) and skipped.values.max() > 0:
            plots += self.one("train/skipped", "Skipped steps", "steps", "so far: their loss or "
                              "gradient was not finite, or a spike", from_zero=True)
        return tuple(plots)

    def rest(self) -> tuple[Plot, ...]:
        """A picture for every series that has none yet."""
        self._left.discard("eval/word_perplexity")  # the loss in another unit
        return tuple(plot for name in [n for n in self._series if n in self._left]
                     for plot in self.one(name, name, "", ""))

    def one(self, name: str, title: str, unit: str, text: str, *, noisy: bool = False,
            log: bool = False, from_zero: bool = False) -> tuple[Plot, ...]:
        """A picture of one series; none if the run has it not."""
        series = self._take(name)
        if not len(series):
            return ()
        log = log and bool((series.values > 0).all())
        line = Line(series, "", TRAIN, "noisy" if noisy else "plain")
        limits = None if log else _limits([series], {}, from_zero)
        caption = f"{text[:1].upper()}{text[1:]}." if text else ""
        return (Plot(name.replace("/", "_"), title, caption,
                     _draw([line], unit, SIZE, limits, log=log)),)


# ---------------------------------------------------------------- drawing

def _draw(lines: Sequence[Line], label: str, size: tuple[float, float],
          limits: tuple[float, float] | None, counted: Mapping[str, float] | None = None, *,
          log: bool = False) -> str:
    def draw(figure: Figure) -> None:
        from matplotlib.ticker import (
            EngFormatter,
            LogLocator,
            MaxNLocator,
            NullFormatter,
            StrMethodFormatter,
        )

        axes = figure.subplots()
        for line in lines:
            _plot(axes, line)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif limits:
            axes.set_ylim(*limits)
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
            if abs(limits[1]) >= 1e4:
                axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(
            6 if size == SIZE else 11, integer=True, steps=_STEPS))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _rules(axes, counted or {}, limits)
        if sum(bool(line.label) for line in lines) > 1 or (lines[0].label and len(lines) > 1):
            figure.legend(loc="outside upper left", ncols=4 if size == WIDE_SIZE else 2 + (
                max(len(line.label) for line in lines) < 12), handlelength=1.6, borderpad=0.1,
                columnspacing=1.2)
    return themed_svg(draw, *size)


def _plot(axes: Axes, line: Line) -> None:
    curve = thin(line.series)
    if line.kind == "noisy":
        if curve.per_point > 1:
            axes.fill_between(curve.steps, curve.low, curve.high, color=line.color, alpha=0.15,
                              lw=0)
        axes.plot(curve.steps, curve.values, color=line.color, lw=0.9, alpha=0.4)
        half = max(2, len(curve.steps) // _HALF_WINDOW)
        axes.plot(curve.steps, running_mean(curve.values, half), color=line.color,
                  label=_plain(line.label))
    elif line.kind == "marked":
        axes.plot(curve.steps, curve.values, color=line.color, label=_plain(line.label), marker="o",
                  markersize=3.2 if len(curve.steps) <= 40 else 0)
    else:
        style: Any = (0, (3, 2)) if line.kind == "dashed" else "-"
        axes.plot(curve.steps, curve.values, color=line.color, label=_plain(line.label), ls=style,
                  lw=1.1 if line.kind == "dashed" else 1.6,
                  marker="o" if len(curve.steps) == 1 else None, markersize=3.2)


def _plain(text: str) -> str:
    """For matplotlib, which takes what stands between dollars for mathematics."""
    return visible(text).replace("$", r"\$")


def _rules(axes: Axes, counted: Mapping[str, float], limits: tuple[float, float] | None) -> None:
    """A horizontal line for every count-based model that lies inside the axis."""
    from matplotlib.transforms import blended_transform_factory

    if not limits:
        return
    where = blended_transform_factory(axes.transAxes, axes.transData)
    inside = {name: value for name, value in counted.items() if limits[0] <= value <= limits[1]}
    for name, value in inside.items():
        # Below its line where another one's text would lie on top of it.
        crowded = any(0 < other - value < _TEXT_HEIGHT * (limits[1] - limits[0])
                      for other in inside.values())
        axes.axhline(value, color=INK, lw=0.9, ls=(0, (1, 2)), alpha=0.7)
        axes.text(1.0, value, f"{_plain(name)} {value:.2f}", transform=where, ha="right",
                  va="top" if crowded else "bottom", fontsize=7.5, alpha=0.85)


def _limits(series: Sequence[Series], counted: Mapping[str, float],
            from_zero: bool = False) -> tuple[float, float]:
    """What the axis shows: all but the fall of the first steps, and the best count-based line.

    Not where that line is so far above that the curves would be flat, as of a pretrained decoder.
    """
    values = list(after_warm_up(series))
    if counted:
        best = min(counted.values())
        highest = max(values, default=best)
        reach = highest + _FAR * (highest - min(values, default=best))
        values += [value for value in counted.values() if value <= min(max(best, highest), reach)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if from_zero and low >= 0:
        return 0.0, 1.12 * high or 1.0
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + 1.4 * margin


def _counted_text(counted: Mapping[str, float], limits: tuple[float, float], unit: str) -> str:
    """A sentence on the count-based lines that lie outside the axis."""
    above = [f"{name} {value:.2f}" for name, value in counted.items() if value > limits[1]]
    return f"Above the picture: {', '.join(above)} {unit}." if above else ""
