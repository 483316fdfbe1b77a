"""Learning one task after another: a copy of the run's parameters, and what it forgets.

The tasks are the run's own text under permutations of its ids. Nothing of the run is changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from hippocampus.evaluation.result_table import Column, Protocol, ResultTable
from hippocampus.probing.drawing import heat_map
from hippocampus.probing.equilibrium.continual import (
    Summary,
    mixed,
    permuted_tasks,
    summary,
    teach,
)
from hippocampus.probing.equilibrium.system import config_of
from hippocampus.probing.plots import HEAT, themed_svg
from hippocampus.probing.results import Plot, SuiteResult
from hippocampus.probing.views import known

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hippocampus.probing.probe import Probe

TITLE = "Continual learning: one task after another"

FAMILIES = ("equilibrium",)
"""What it looks into."""

PATTERNS = ("slots", "key")
"""Parameters of a cell that what is stored is made of."""

JOINT = "all at once"


@dataclass(frozen=True)
class Settings:
    """How much is learned.

    Attributes:
      tasks: permutations, one lesson each.
      steps: of a lesson.
      rows: in a step.
      length: predictions in a row, at most; the run's context if that is shorter.
      measured: rows that a task is measured on.
      rate: learning rate of Adam.
    """

    tasks: int = 3
    steps: int = 24
    rows: int = 8
    length: int = 64
    measured: int = 16
    rate: float = 3e-3


class Course(NamedTuple):
    """What became of one copy.

    Attributes:
      name: of the variant.
      accuracy, loss: a row before all lessons, then one after each; a column a task.
      found: summed up.
    """

    name: str
    accuracy: Float[np.ndarray, "n+1 m"]
    loss: Float[np.ndarray, "n+1 m"]
    found: Summary


def run(probe: Probe, settings: Settings = Settings()) -> SuiteResult:
    """Trains and measures the copies.

    Raises:
      SkipSuite: a model of another family.
    """
    config_of(probe)
    length = min(settings.length, probe.protocol.context)
    tasks = permuted_tasks(np.asarray(probe.text.ids), settings.tasks,
                           settings.rows * settings.steps, settings.measured, length, probe.seed)
    lessons = list(range(1, len(tasks)))
    courses = []
    for name, mask in masks(probe).items():
        taught = (mixed(tasks[1:], settings.rows) if name == JOINT
                  else [tasks[i].learned for i in lessons])
        accuracy, loss = teach(probe.model, probe.params, mask, taught, tasks,
                               rows=settings.rows, rate=settings.rate)
        found = summary(accuracy, lessons)
        if name == JOINT:  # no order, so nothing before and after a lesson
            found = Summary(float("nan"), found.final, float("nan"), float("nan"))
        courses.append(Course(name, accuracy, loss, found))
    counted = tasks[0].measured[:, 1:].size
    protocol = dataclasses.replace(probe.protocol, tokens=counted, context=length, stride=length)
    names = [task.name for task in tasks]
    tables = (_summary_table(courses, settings, protocol),
              _matrix_table(courses, names, settings, protocol))
    return SuiteResult("continual", TITLE, tables, (_plot(courses, names, settings),))


def masks(probe: Probe) -> dict[str, Any]:
    """What each copy trains: name -> a tree of 1 and 0 like the parameters.

    A copy whose stored patterns stay as they are, and one in which nothing else moves, are there
    where the model has a memory.
    """
    cells = probe.model.cell_names

    def stored(path: tuple[Any, ...]) -> bool:
        return path[0].key in cells and path[1].key in PATTERNS

    def tree(value: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: np.float32(value(stored(path))), probe.params)

    everything = tree(lambda is_stored: 1)
    found = {"everything": everything}
    if any(jax.tree.leaves(tree(lambda is_stored: is_stored))):
        found["patterns frozen"] = tree(lambda is_stored: not is_stored)
        found["patterns only"] = tree(lambda is_stored: is_stored)
    return {**found, JOINT: everything}


def _summary_table(courses: Sequence[Course], settings: Settings,
                   protocol: Protocol) -> ResultTable:
    columns = (Column("name", "trained"), Column("learned", "learned"), Column("final", "final"),
               Column("forgetting", "forgetting"), Column("forward", "forward transfer"),
               Column("own_before", "own text before"), Column("own_after", "after"))
    rows = [{"name": course.name, **course.found._asdict(),
             "own_before": float(course.accuracy[0, 0]),
             "own_after": float(course.accuracy[-1, 0])} for course in courses]
    notes = (
        f"share of right next tokens; {settings.tasks} lessons of {settings.steps} steps of "
        f"{settings.rows} rows, Adam at {settings.rate:g}; the text itself has no lesson",
        "learned: gain of a task in its lesson; final: mean over all tasks at the end; forgetting: "
        "best before the end, less the end; forward transfer: gain of a task before its lesson",
        f"{JOINT}: as many steps, each of all tasks together; what it loses is not for the order",
        "patterns: the slots, or the keys' matrix, of the cell's memory")
    return ResultTable("summary", "What is learned, and what is forgotten", columns, known(rows),
                       (protocol,), notes)


def _matrix_table(courses: Sequence[Course], names: Sequence[str], settings: Settings,
                  protocol: Protocol) -> ResultTable:
    keys = [f"task_{j}" for j in range(len(names))]
    columns = (Column("name", "trained, after"), *(Column(key, name, "right", 3)
               for key, name in zip(keys, names, strict=True)),
               *(Column(f"{key}_loss", name, "nats/token", 2)
                 for key, name in zip(keys, names, strict=True)))
    rows: list[Mapping[str, Any]] = []
    for course in courses:
        for i, (accuracy_m, loss_m) in enumerate(zip(course.accuracy, course.loss, strict=True)):
            rows.append({
                "name": f"{course.name}, {_after(i)}", "trained": course.name, "after": i,
                **{key: float(a) for key, a in zip(keys, accuracy_m, strict=True)},
                **{f"{key}_loss": float(x) for key, x in zip(keys, loss_m, strict=True)}})
    return ResultTable("matrix", "Every task after every lesson", columns, tuple(rows),
                       (protocol,), ())


def _after(lessons: int) -> str:
    return f"lesson {lessons}" if lessons else "before"


def _plot(courses: Sequence[Course], names: Sequence[str], settings: Settings) -> Plot:
    most = max(float(course.accuracy.max()) for course in courses)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(courses), squeeze=False)[0]
        for i, (axes, course) in enumerate(zip(grid, courses, strict=True)):
            shown = [_after(j) for j in range(len(course.accuracy))] if not i else ()
            mesh = heat_map(axes, course.accuracy, HEAT, low=0, high=most, rows=shown)
            for (j, k), value in np.ndenumerate(course.accuracy):
                axes.text(k + 0.5, j + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7.5,
                          color="white" if value < 0.6 * most else "black")
            axes.set_xticks(np.arange(len(names)) + 0.5, ["text", *map(str, range(1, len(names)))])
            if i:
                axes.set_yticks([])
            axes.set_title(course.name)
            axes.set_xlabel("task")
        figure.colorbar(mesh, ax=grid, shrink=0.9, pad=0.02, label="right next tokens")

    return Plot("matrix", "Accuracy on every task after every lesson",
                f"Share of right next tokens on the run's own text and on {settings.tasks} "
                "permutations of its ids (columns), before and after each lesson (rows). Down a "
                "column one sees a task being learned, and then forgotten.",
                themed_svg(draw, width=8.4, height=2.6))
