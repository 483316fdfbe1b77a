"""Learning tasks one after another: what is kept, what is lost, and what earlier ones give later.

Source: Lopez-Paz & Ranzato 2017 (arXiv:1706.08840), section 2, for the matrix and the transfers;
Chaudhry et al. 2018 (arXiv:1801.10112), section 3.2, for forgetting.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int32

from hippocampus.data.batches import Batch
from hippocampus.ops.cross_entropy import token_hits, token_nll


class Task(NamedTuple):
    """Rows of ids to learn from, and others to measure on.

    Attributes:
      name: in tables.
      learned, measured: ids; a row's last one is predicted only.
    """

    name: str
    learned: Int32[np.ndarray, "n T1"]
    measured: Int32[np.ndarray, "m T1"]


class Summary(NamedTuple):
    """Of a matrix R: R[i, j] is the accuracy on task j after i lessons; R[0] is before any.

    Attributes:
      learned: accuracy on each task right after its lesson, less that before it; the mean.
      final: accuracy after the last lesson, the mean over all tasks.
      forgetting: the best accuracy on a task before the last lesson, less the final one; the mean
        over all tasks but the last.
      forward: accuracy on a task right before its lesson, less that before all; the mean over all
        tasks but the first.
    """

    learned: float
    final: float
    forgetting: float
    forward: float


def summary(R: Float[np.ndarray, "n+1 m"], lessons: Sequence[int]) -> Summary:
    """Sums up a matrix.

    Args:
      R: a row before all lessons, then one after each.
      lessons: the task that each lesson teaches. A task without a lesson, such as what the model
        could do before, counts for `final` and `forgetting`.

    Returns:
      NaN for a mean over nothing.
    """
    R, n = np.asarray(R, np.float64), len(lessons)
    taught = {task: i for i, task in enumerate(lessons)}
    gains = [R[i + 1, task] - R[i, task] for task, i in taught.items()]
    ahead = [R[i, task] - R[0, task] for task, i in taught.items() if i]
    lost = [R[taught.get(j, -1) + 1:n, j].max() - R[n, j] for j in range(R.shape[1])
            if taught.get(j, -1) + 1 < n]
    return Summary(_mean(gains), float(R[-1].mean()), _mean(lost), _mean(ahead))


def permuted_tasks(ids: np.ndarray, tasks: int, rows: int, measured: int, length: int,
                   seed: int) -> list[Task]:
    """A text, and the same text with its ids exchanged: one task for each permutation.

    What a permutation leaves is which ids are alike; what it changes is every id that is read and
    predicted. All tasks have the same passages.

    Args:
      ids: of a text.
      tasks: permutations; the text itself is one more, and comes first.
      rows: to learn from; where the text has fewer they come again.
      measured: rows to measure on, from the last part of the text.
      length: T, predictions in a row.
      seed: of the permutations, which are of the ids that occur in the text.
    """
    windows = (len(ids) - 1) // length
    kept = max(1, min(measured, windows // 2))
    whole = np.stack([ids[i * length: (i + 1) * length + 1] for i in range(windows)]).astype(
        np.int32)
    held = whole[-kept:]
    free = whole[:windows - kept] if windows > kept else whole
    at = (np.arange(rows) if rows > len(free)
          else np.linspace(0, len(free) - 1, rows).round().astype(int))
    learned = free[at % len(free)]
    draw, found = np.random.default_rng(seed), [Task("own text", learned, held)]
    present = np.unique(ids)
    for task in range(1, tasks + 1):
        table = np.arange(int(present.max()) + 1, dtype=np.int32)
        table[present] = draw.permutation(present)
        found.append(Task(f"permutation {task}", table[learned], table[held]))
    return found


def teach(model: Any, params: Any, mask: Any, lessons: Sequence[Int32[np.ndarray, "n T1"]],
          tasks: Sequence[Task], *, rows: int, rate: float,
          ) -> tuple[Float[np.ndarray, "n+1 m"], Float[np.ndarray, "n+1 m"]]:
    """Trains a copy of the parameters lesson by lesson, with Adam, and measures all tasks between.

    Args:
      model: unbound.
      params: to begin with; they stay as they are.
      mask: a tree like `params` of numbers, 1 where a parameter is trained and 0 elsewhere.
      lessons: rows of ids; every lesson goes through its rows once, and begins with a new Adam.
      tasks: to measure.
      rows: in a step.
      rate: learning rate.

    Returns:
      Accuracy and loss (nats a token): a row before all lessons, then one after each.
    """
    measured = np.stack([task.measured for task in tasks])
    found = [_measure(model, params, measured)]
    for lesson in lessons:
        state = _optimizer().init(params)
        for first in range(0, len(lesson) - rows + 1, rows):
            params, state = _step(model, params, state, mask, lesson[first:first + rows], rate)
        found.append(_measure(model, params, measured))
    accuracy, loss = zip(*jax.device_get(found), strict=True)
    return np.stack(accuracy), np.stack(loss)


def mixed(tasks: Sequence[Task], rows: int) -> list[Int32[np.ndarray, "n T1"]]:
    """As many lessons as there are tasks, with the same rows, each of them of all tasks.

    Args:
      tasks: with as many rows each.
      rows: in a step; each step takes from the tasks in turn.
    """
    turns = np.stack([task.learned for task in tasks], 1)
    every = turns.reshape(-1, turns.shape[-1])
    size = len(every) // len(tasks) // rows * rows
    return [every[i * size:(i + 1) * size] for i in range(len(tasks))]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _optimizer() -> optax.GradientTransformation:
    return optax.scale_by_adam()


def _batch(ids_nT1: Array) -> Batch:
    tokens, targets = ids_nT1[:, :-1], ids_nT1[:, 1:]
    return Batch(tokens, targets, jnp.ones(tokens.shape, jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def _step(model: Any, params: Any, state: Any, mask: Any, ids_nT1: Array,
          rate: float) -> tuple[Any, Any]:
    def loss(params: Any) -> Array:
        batch = _batch(ids_nT1)
        hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward")
        return token_nll(hidden_BTD, model.head(params), batch.targets_BT).mean()

    updates, state = _optimizer().update(jax.grad(loss)(params), state, params)
    return jax.tree.map(lambda p, u, m: p - rate * m * u, params, updates, mask), state


@functools.partial(jax.jit, static_argnums=0)
def _measure(model: Any, params: Any, ids_mnT1: Array) -> tuple[Array, Array]:
    def of_task(ids_nT1: Array) -> tuple[Array, Array]:
        batch, head = _batch(ids_nT1), model.head(params)
        hidden_BTD, _, _ = model.apply({"params": params}, batch, method="forward")
        return (token_hits(hidden_BTD, head, batch.targets_BT).mean(),
                token_nll(hidden_BTD, head, batch.targets_BT).mean())

    accuracy_m, loss_m = lax.map(of_task, ids_mnT1)
    return accuracy_m, loss_m
