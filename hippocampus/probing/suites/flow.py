"""Flow: how straight the way of the states is, through the layers and from pass to pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from hippocampus.evaluation.result_table import Column, ResultTable
from hippocampus.layers.norms import rms_normalize
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.probing import views
from hippocampus.probing.plots import INK, SERIES, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.training.rectified_flow import depth_straightness, segment_flow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "How straight the states travel"

FAMILIES = ("hybrid",)
"""What it looks into."""

TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the velocity network is compared with the straight way."""

_WAYS = (
    Column("way", "way"), Column("ratio", "distance / length", "", 3),
    Column("ratio_stderr", "± s.e.", "", 3), Column("off", "straightness loss", "", 3),
    Column("move", "distance / start", "", 3))
_PASSES = (
    Column("result", "result of"), Column("loss", "loss", "nats/token"),
    Column("loss_stderr", "± s.e."), Column("bits_per_byte", "loss", "bits/byte"),
    Column("move", "move from the pass before", "", 4))
_VELOCITY = (Column("time", "time"), Column("miss", "|v - (x1 - x0)|² / |x1 - x0|²"),
             Column("miss_stderr", "± s.e."))


def run(probe: Probe) -> SuiteResult:
    """Measures the ways of the states and, where it was trained, the velocity network."""
    n_layers, passes = probe.n_layers, probe.config.model.passes
    has_flow = bool(probe.model.flow_width)
    found = views.over_windows(probe, _view(n_layers, passes, has_flow))
    weight_W = found["weight"]
    tables = [
        ResultTable("ways", "The way through the layers", _WAYS,
                    views.known(_way(found, weight_W, r, passes) for r in range(passes)),
                    (probe.protocol,),
                    ("distance / length: |h_L - h_0| over the sum of the layers' steps; 1 = "
                     "straight", "straightness loss: sum over the layers of the squared distance "
                     "from the line between the ends, over |h_L - h_0|² (loss.rectified_flow."
                     "depth_weight trains it)")),
        ResultTable("passes", "Loss after every pass", _PASSES,
                    views.known(_results(probe, found, weight_W, passes, has_flow)),
                    (probe.protocol,),
                    ("move: |x_r - x_(r-1)| / |x_(r-1)| of the normalised states",
                     "no velocity network: loss.rectified_flow.segment_weight is 0"
                     if not has_flow else "skip: pass 1 and one Euler step of the velocity "
                     "network in place of all further passes"))]
    if has_flow:
        miss, error = views.window_mean(found["miss"], weight_W)
        tables.append(ResultTable(
            "velocity", "Velocity network against the straight way", _VELOCITY,
            views.known({"time": f"{time:.2f}", "miss": float(miss[i]),
                         "miss_stderr": float(error[i])} for i, time in enumerate(TIMES)),
            (probe.protocol,),
            ("x_t = (1 - t) x0 + t x1 from the first pass's state to the last's; 1 = as bad as "
             "standing still, 0 = the way is straight and known",)))
    plot = Plot(
        "steps", "Steps through the layers",
        "Left: the cosine of every layer's step with the whole way (1 = straight ahead). Right: "
        f"its length, over that of the whole way. Means over {probe.protocol.tokens:,} tokens; "
        "bars: one standard error over windows.",
        themed_svg(lambda figure: _draw(figure, found, weight_W, passes, n_layers), height=3.0))
    return SuiteResult("flow", TITLE, tuple(tables), (plot,))


def _view(n_layers: int, passes: int, has_flow: bool) -> Any:
    """The function that runs on the device."""
    def view(model: Any, params: Any, batch: Any) -> dict[str, Any]:
        _, out, _ = model.apply({"params": params}, batch, method="forward")
        weight_BT, head = batch.loss_weight_BT, model.head(params)

        def loss(hidden_BTD: Any) -> Any:
            return views.token_sum(token_nll(hidden_BTD, head, batch.targets_BT), weight_BT)

        found = {"weight": weight_BT.sum(1)}
        before = None
        for r in range(passes):
            prefix = "" if r == passes - 1 else f"segments.{r}."
            states = views.residual_states(out, n_layers, prefix)
            found |= {f"{r}.{name}": value
                      for name, value in views.straightness_view(states, weight_BT).items()}
            found[f"{r}.off"] = views.token_sum(depth_straightness(states), weight_BT)
            found[f"{r}.loss"] = loss(out["segments.hidden"][r])
            after = rms_normalize(out[f"segments.{r}.hidden"])
            if before is not None:
                move_BT = jnp.linalg.norm(after - before, axis=-1)
                found[f"{r}.move"] = views.token_sum(
                    move_BT / jnp.linalg.norm(before, axis=-1), weight_BT)
            before = after
        if has_flow:
            def velocity(x: Any, tau: Any) -> Any:
                return model.apply({"params": params}, x, tau, method="velocity")

            ends = out["segments.0.hidden"], out[f"segments.{passes - 1}.hidden"]
            found["miss"] = jnp.stack([views.token_sum(
                segment_flow(velocity, *ends, jnp.full(weight_BT.shape, time)), weight_BT)
                for time in TIMES], axis=1)
            found["skip"] = loss(out["flow.skip_hidden"])
        return found

    return view


def _way(found: dict[str, np.ndarray], weight_W: np.ndarray, r: int,
         passes: int) -> dict[str, Any]:
    ratio, error = views.window_mean(found[f"{r}.ratio"], weight_W)
    off, _ = views.window_mean(found[f"{r}.off"], weight_W)
    move, _ = views.window_mean(found[f"{r}.growth"], weight_W)
    return {"way": "all layers" if passes == 1 else f"pass {r + 1}", "ratio": float(ratio),
            "ratio_stderr": float(error), "off": float(off), "move": float(move)}


def _results(probe: Probe, found: dict[str, np.ndarray], weight_W: np.ndarray, passes: int,
             has_flow: bool) -> list[dict[str, Any]]:
    """Loss after each pass, and of the shortcut."""
    names = {f"pass {r + 1}": (f"{r}.loss", f"{r}.move") for r in range(passes)}
    if has_flow:
        names["skip"] = ("skip", "")
    rows = []
    for name, (key, key_move) in names.items():
        loss, error = views.window_mean(found[key], weight_W)
        move = found.get(key_move)
        rows.append({"result": name, "loss": float(loss), "loss_stderr": float(error),
                     "bits_per_byte": probe.bits_per_byte(float(loss)),
                     "move": None if move is None else float(views.window_mean(move, weight_W)[0])})
    return rows


def _draw(figure: Figure, found: dict[str, np.ndarray], weight_W: np.ndarray, passes: int,
          n_layers: int) -> None:
    left, right = figure.subplots(1, 2)
    for axes, key in ((left, "cosine"), (right, "length")):
        for r, color in zip(range(passes), np.resize(SERIES, passes), strict=True):
            mean, error = views.window_mean(found[f"{r}.{key}"], weight_W)
            axes.errorbar(np.arange(n_layers), mean, error, color=color, marker="o", ms=4,
                          capsize=2, label=f"pass {r + 1}")
        axes.set_xticks(range(n_layers))
        axes.set_xlabel("layer")
    left.axhline(0, color=INK, lw=0.8, alpha=0.5)
    left.set_ylabel("cosine with the whole way")
    left.set_ylim(min(-0.05, left.get_ylim()[0]), 1.02)
    right.set_ylabel("length / whole way")
    right.set_ylim(bottom=0)
    if passes > 1:
        right.legend()
