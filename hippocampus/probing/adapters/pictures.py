"""The pictures of the suite that looks into adapters."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from hippocampus.probing.adapters.findings import EXACT, F1, LOG_P, Findings
from hippocampus.probing.adapters.opening import (
    ADAPTERS,
    BASE,
    LORA,
    SHUFFLED,
    ZEROED,
    AdapterProbe,
)
from hippocampus.probing.drawing import fading, heat_map
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {BASE: SERIES[6], LORA: SERIES[3], ADAPTERS: SERIES[0], ZEROED: SERIES[1],
          SHUFFLED: SERIES[2]}
"""Of the systems, everywhere."""

_CELLS = 2000
"""Most cells of a heat map: each is a shape in the SVG."""


def pictures(found: Findings, probe: AdapterProbe) -> tuple[Plot, ...]:
    """All pictures, in the order of showing."""
    return (_gains(found), _scores(found), _differences(found), _layers(found, probe),
            _gates(found), _slots(found))


def _gains(found: Findings) -> Plot:
    names = [name for name in found.systems if name != BASE]
    gains = {name: found.loss_against(found.losses[BASE], found.losses[name]).paired
             for name in names}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, (name, p) in enumerate(gains.items()):
            _bar(axes, i, p.difference, p.low, p.high, COLORS[name])
        _names(axes, names)
        axes.set_xlabel(f"nats per token less than {BASE}")

    return Plot("controls", "Held-out text: gain over the decoder alone",
                f"Mean over {len(found.losses[BASE].nll_W)} windows with the 95 % interval of the "
                "paired difference; right of the line is better than the decoder alone.",
                themed_svg(draw, width=5.4, height=0.9 + 0.42 * len(names)))


def _scores(found: Findings) -> Plot:
    panels = [(measure, [c for c in found.categories if found.interval(BASE, measure, c)])
              for measure in (EXACT, F1, LOG_P)]
    panels = [(measure, own) for measure, own in panels if own]

    def draw(figure: Figure) -> None:
        widths = [len(own) for _, own in panels]
        grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
        for axes, (measure, own) in zip(grid, panels, strict=True):
            _grouped(axes, found, measure, own)
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names),
                      columnspacing=1.0, handlelength=1.2)

    return Plot("scores", "Answers by category",
                f"Means with 95 % intervals, {found.queries}. Exact match and F1 of greedy "
                "answers; log p of the right answer per token (nearer to 0 is better).",
                themed_svg(draw, width=9.0, height=3.4))


def _grouped(axes: Axes, found: Findings, measure: str, categories: list[str]) -> None:
    width = 0.8 / len(found.systems)
    for i, name in enumerate(found.systems):
        at = np.arange(len(categories)) + (i - (len(found.systems) - 1) / 2) * width
        mean, low, high = np.array([found.interval(name, measure, c) for c in categories]).T
        axes.bar(at, mean, width=0.9 * width, color=COLORS[name], label=name)
        axes.errorbar(at, mean, yerr=[mean - low, high - mean], color=INK, lw=0.9,
                      linestyle="none", capsize=1.5)
    axes.set_xticks(range(len(categories)), categories, rotation=30, ha="right",
                    rotation_mode="anchor")
    axes.set_title(f"{measure}, nats/token" if measure == LOG_P else measure, loc="left")
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    if measure != LOG_P:
        axes.set_ylim(0, None)


def _differences(found: Findings) -> Plot:
    names = [name for name in found.systems if name != BASE]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        step = 0.8 / len(names)
        for i, name in enumerate(names):
            at = np.arange(len(found.categories)) + (i - (len(names) - 1) / 2) * step
            own = [found.against_base(name, BASE, LOG_P, c) for c in found.categories]
            mean, low, high = np.array([
                [one.paired.difference, one.paired.low, one.paired.high] for one in own if one]).T
            axes.errorbar(mean, at, xerr=[mean - low, high - mean], color=COLORS[name], lw=1.4,
                          linestyle="none", marker="o", ms=4, capsize=2, label=name)
        _names(axes, found.categories)
        axes.set_xlabel(f"log p of the answer, nats per token more than {BASE}")
        figure.legend(loc="outside upper center", ncols=len(names), columnspacing=1.0,
                      handlelength=1.2)

    return Plot("effects", "What adapters change, by category",
                f"Paired difference to the decoder alone with its 95 % interval, {found.queries}; "
                "right of the line the answer has become more likely.",
                themed_svg(draw, width=6.4, height=1.2 + 0.5 * len(found.categories)))


def _layers(found: Findings, probe: AdapterProbe) -> Plot:
    rising = [stage for stage in found.stages if stage.kind == "up to"]
    alone = [stage for stage in found.stages if stage.kind == "only"]
    base = found.losses[BASE]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        at = np.arange(len(rising))
        own = [found.loss_against(base, stage.losses).paired for stage in rising]
        axes.fill_between(at, [p.low for p in own], [p.high for p in own], color=COLORS[ADAPTERS],
                          alpha=0.2, lw=0)
        axes.plot(at, [p.difference for p in own], color=COLORS[ADAPTERS], marker="o", ms=4.5,
                  label="this and all before it")
        if alone:
            single = [found.loss_against(base, stage.losses).paired.difference for stage in alone]
            axes.plot(at[1:], single, color=SERIES[1], marker="s", ms=4, linestyle="none",
                      label="this alone")
        axes.axhline(0, color=INK, lw=0.8, alpha=0.6)
        axes.set_xticks(at, ["none", *(f"layer {stage.layer}" for stage in rising[1:])])
        axes.set_xlim(-0.3, len(rising) - 0.7)
        axes.set_ylabel(f"nats per token less than {BASE}")
        figure.legend(loc="outside upper center", ncols=2)

    return Plot("layers", "Adapters enabled one by one",
                "Gain on held-out text over the decoder alone as adapters are switched on from the "
                f"first layer up, with the 95 % interval over {len(base.nll_W)} windows; squares: "
                "one adapter alone.",
                themed_svg(draw, width=max(4.6, 1.6 + 0.8 * len(rising)), height=3.2))


def _gates(found: Findings) -> Plot:
    texts, layers = list(found.gates.categories), list(found.gates.layers)
    mean = np.array([[found.gates.categories[name][i].mean for name in texts] for i in layers])
    spread = max(float(np.nanmax(mean)), 1e-9)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = heat_map(axes, mean, fading(SERIES[0]), low=0, high=spread,
                        rows=[f"layer {i}" for i in layers], columns=texts, numbers=".3f")
        axes.set_xticklabels(texts, rotation=20, ha="right", rotation_mode="anchor")
        bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.01, ticks=(0, spread))
        bar.ax.set_yticklabels(["0", f"{spread:.2g}"])
        bar.outline.set_visible(False)

    return Plot("gates", "Mean gate by layer and category",
                f"Over {found.queries} and the windows of held-out text; clear = 0, full colour = "
                "the largest in sight.",
                themed_svg(draw, width=1.8 + 0.95 * len(texts), height=1.1 + 0.34 * len(layers)))


def _slots(found: Findings) -> Plot:
    """A row per layer, its slots from the most to the least read."""
    layers = list(found.memories)
    slots = max(own.slots.slots for own in found.memories.values())
    columns = min(slots, max(32, _CELLS // len(layers)))
    use = np.array([_binned(np.sort(own.slots.usage_S)[::-1] * own.slots.slots, columns)
                    for own in found.memories.values()])
    # A hundredth of even use and less looks like nothing, and a hundred times like all.
    shown = np.clip(np.log10(np.maximum(use, 1e-2)), -2, 2)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mesh = heat_map(axes, shown, "viridis", low=-2, high=2,
                        rows=[f"layer {i}" for i in layers])
        axes.set_xticks([0, columns / 2, columns], ["most read", "", "least read"])
        for place, own in enumerate(found.memories.values()):
            axes.axvline(own.slots.effective / own.slots.slots * columns,
                         1 - (place + 1) / len(layers), 1 - place / len(layers), color="white",
                         lw=1.6)
        bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.01, ticks=(-2, -1, 0, 1, 2))
        bar.ax.set_yticklabels(["≤ 0.01", "0.1", "1", "10", "≥ 100"])
        bar.set_label("of even use")
        bar.outline.set_visible(False)

    return Plot("slots", "Use of the slots",
                f"The {slots} slots of each layer from the most to the least read, by how much "
                "they are read (1 = as much as if all were read alike; below 0.1 a slot counts as "
                "dead). White line: the number of effective slots.",
                themed_svg(draw, width=7.0, height=1.2 + 0.36 * len(layers)))


def _binned(values: np.ndarray, columns: int) -> np.ndarray:
    """Means of neighbours, so that there are no more than so many."""
    edges = np.linspace(0, len(values), columns + 1).round().astype(int)
    return np.array([values[a : max(b, a + 1)].mean()
                     for a, b in itertools.pairwise(edges)])


def _bar(axes: Axes, at: float, mean: float, low: float, high: float, color: str) -> None:
    axes.barh(at, mean, color=color, height=0.62)
    axes.errorbar(mean, at, xerr=[[mean - low], [high - mean]], color=INK, lw=1.2, capsize=3)


def _names(axes: Axes, names: list[str] | tuple[str, ...]) -> None:
    """Rows with names, the first on top, and a line at 0."""
    axes.axvline(0, color=INK, lw=0.8, alpha=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
