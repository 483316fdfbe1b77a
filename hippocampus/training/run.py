"""What one run holds while it goes on, and what it does to look at itself between steps."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from hippocampus import distributed
from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.data.prefetch import BatchSource
from hippocampus.errors import Diverged
from hippocampus.files import write_atomically
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.halves import whole
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training import equilibrium, sharding
from hippocampus.training.clock import Clock
from hippocampus.training.console import RunConsole
from hippocampus.training.report import eval_values, generate_sample
from hippocampus.training.run_data import RunData
from hippocampus.training.signals import StopSignal
from hippocampus.training.state import TrainState
from hippocampus.training.step import Metrics, TrainStep
from hippocampus.training.trackers import Trackers
from hippocampus.training.watchdog import Watchdog


@dataclass
class Run:
    """Everything that one run holds while it goes on.

    Attributes:
      source: the batch of any step, without those that a roll-back leaves out.
      pending: a step, its metrics on the device, and whether they are to be logged.
      best_loss: lowest eval/loss that a checkpoint was saved with.
      skipped: steps that the guard has skipped so far, as far as this process has looked.
      in_a_row: how many of them are the newest ones.
      seen: the newest step whose metrics this process has looked at.
      values: those metrics.
      expands: whether a solver did not converge then, and it was said.
    """

    config: Config
    folder: RunFolder
    data: RunData
    source: BatchSource
    model: Any
    mesh: Mesh
    step_function: TrainStep
    console: RunConsole
    trackers: Trackers
    checkpoints: Checkpoints
    clock: Clock
    watchdog: Watchdog
    stop: StopSignal
    pending: tuple[int, Metrics, bool] | None = None
    best_loss: float = field(default=float("inf"))
    skipped: int = 0
    in_a_row: int = 0
    seen: int = 0
    values: dict[str, float] = field(default_factory=dict)
    expands: bool = False

    def place(self, batch: Any, rows: slice | None = None) -> Any:
        """A batch on the mesh; of a training batch this process may have read only its rows."""
        whole = None if rows is None else self.config.train.batch_size
        return sharding.to_devices(batch, self.mesh, rows, whole)

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """A context for what is not training, see `hippocampus.training.clock.KINDS`."""
        with self.clock.during(kind), self.watchdog.paused():
            yield

    def write_pending(self) -> None:
        """Fetches the metrics of an earlier step, and writes them if they are to be logged.

        Raises:
          Diverged: a solver does not converge, and `solver.on_expansion` says stop.
        """
        if self.pending is None:
            return
        (step, metrics, logged), self.pending = self.pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.seen, self.values = step, values
        self._count_skipped(step, values)
        if logged:
            row = {**values, **self.clock.lap(step)}
            self.trackers.scalars(step, row)
            self.console.step(step, row, self.clock.seconds_left(step))
        self.watch_solver(step, values)

    def watch_solver(self, step: int, values: dict[str, float]) -> None:
        """Says once that a solver does not converge, and again when it had in between.

        Args:
          step: that is done.
          values: its metrics.

        Raises:
          Diverged: where the rule is to stop.
        """
        model, progress = self.config.model, (step - 1) / self.config.train.steps
        trouble = equilibrium.expansion(model, step, values, progress)
        if trouble and equilibrium.stops_at_expansion(model):
            raise Diverged(trouble, equilibrium.HINT)
        if trouble and not self.expands:
            self.console.say(f"warning: {trouble} ({equilibrium.HINT})")
        self.expands = bool(trouble)

    def _count_skipped(self, step: int, values: dict[str, float]) -> None:
        new, self.skipped = round(values["train/skipped"]) - self.skipped, round(
            values["train/skipped"])
        self.in_a_row = round(values["train/skipped_in_a_row"])
        if new:
            self.console.say(f"warning: at step {step}, {new} step{'s' if new > 1 else ''} had to "
                             f"be skipped, {self.in_a_row} in a row until now: loss "
                             f"{values['train/loss']:.4g}, gradient norm "
                             f"{values['train/grad_norm']:.4g}")


class StepWatcher(Protocol):
    """Something that looks at the steps of a run while they go on (hippocampus.profiling)."""

    def watch(self, step: TrainStep, config: Config, done: int, folder: Path, console: RunConsole,
              pause: Callable[[], AbstractContextManager]) -> TrainStep:
        """The step function to run instead; `pause` is a context for time that is not training."""


class Interrupted(Exception):
    """A signal came while a run looked at itself: it has to save first."""


def due(step: int, every: int) -> bool:
    """Whether it is time for something that happens every so many steps; 0 = never."""
    return every > 0 and step % every == 0


def look_is_due(config: Config, step: int) -> bool:
    """Whether a run looks at itself after this step."""
    return (step == config.train.steps or due(step, config.eval.every_steps)
            or due(step, config.log.histogram_every_steps)
            or due(step, config.sample.every_steps))


def look(run: Run, state: TrainState, step: int, batch: Batch) -> float | None:
    """Evaluates, draws histograms and writes a sample, each where it is due.

    Args:
      run: the run.
      state: after `step`.
      step: the step.
      batch: of that step, on the mesh.

    Returns:
      eval/loss, where it was evaluated.

    Raises:
      Interrupted: by a signal; what was not done yet is to be done when the run goes on.
    """
    config, loss = run.config, None
    last = step == config.train.steps
    if due(step, config.eval.every_steps) or last:
        with run.during("evaluation"):
            loss = _evaluate(run, state, step)
    if due(step, config.log.histogram_every_steps):
        with _uninterrupted(run):
            _draw(run, state, step, batch)
    if due(step, config.sample.every_steps) and not last:  # the end has a sample of its own
        with _uninterrupted(run):
            _sample(run, state, step)
    return loss


@contextlib.contextmanager
def _uninterrupted(run: Run) -> Iterator[None]:
    if run.stop.here():
        raise Interrupted
    with run.during("samples"):
        yield


def _evaluate(run: Run, state: TrainState, step: int) -> float:
    """Scores the validation split with raw and averaged weights; returns eval/loss."""
    def place(batch: Batch) -> Batch:
        if run.stop.here():
            raise Interrupted
        return run.place(batch)

    windows = run.data.windows(run.config, run.config.eval.max_windows)
    with sharding.around(run.mesh):
        values = eval_values("eval", {
            name: run.data.score(run.model, whole(run.model, params, state.frozen), windows, place)
            for name, params in (("raw", state.params), ("ema", state.ema)) if params})
    run.trackers.scalars(step, values)
    raw = f" (raw weights {values['eval/loss_raw']:.4f})" if state.ema else ""
    unit = (f"{values['eval/bits_per_byte']:.4f} bits per byte" if "eval/bits_per_byte" in values
            else f"{values['eval/accuracy']:.2%} right")
    run.console.say(f"step {step}: validation loss {values['eval/loss']:.4f}{raw}, {unit}")
    return values["eval/loss"]


def _draw(run: Run, state: TrainState, step: int, batch: Batch) -> None:
    """Writes histograms of what the model did on a batch, which lies on the mesh."""
    with sharding.around(run.mesh):
        values = _distributions(run.model, whole(run.model, state.params, state.frozen), batch)
    for name, array in sharding.to_host(values, run.mesh).items():
        run.trackers.histogram(step, name, array.ravel())


@functools.partial(jax.jit, static_argnums=0)
def _distributions(model: Any, params: Any, batch: Batch) -> dict[str, jax.Array]:
    _, out, _ = model.apply({"params": params}, batch, method="forward")
    return model.distributions(out)


def _sample(run: Run, state: TrainState, step: int) -> None:
    """Writes a text with the averaged weights."""
    params = sharding.to_one_device(
        whole(run.model, state.ema or state.params, state.frozen), run.mesh)
    if not distributed.is_first():
        return
    lm = LanguageModel(run.model, params, run.data.tokenizer, run.config)
    text = generate_sample(lm, run.config)
    try:
        run.folder.samples.mkdir(exist_ok=True)
        write_atomically(run.folder.samples / f"{step}.txt", run.config.sample.prompt + text)
    except OSError as error:
        run.console.say(f"warning: the sample could not be written: {error.strerror}")
    run.trackers.text(step, "sample", run.config.sample.prompt + text)
    run.console.sample(step, run.config.sample.prompt, text)
