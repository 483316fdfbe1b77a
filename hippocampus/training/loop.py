"""The training loop: what `python -m hippocampus.train` and `hippocampus.fit` run.

Where parameters come from, in this order: the run folder's newest good checkpoint, else the seed.
Those of a pretrained decoder come from its files: before the first step, or always if it is frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from hippocampus import __version__, distributed
from hippocampus.config import Config
from hippocampus.config_files import fields
from hippocampus.data.batches import Batch
from hippocampus.data.prefetch import prefetch
from hippocampus.devices import resolve
from hippocampus.errors import Diverged, HippocampusError, Stopped
from hippocampus.files import write_atomically
from hippocampus.models.build_model import build_model
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import (
    RunFolder,
    RunLock,
    cut_metrics,
    read_metrics,
)
from hippocampus.training import rollback, sharding
from hippocampus.training.clock import Clock, summary
from hippocampus.training.console import RunConsole
from hippocampus.training.data import read_data, with_steps
from hippocampus.training.guard import released, statistics_of, zeros_like
from hippocampus.training.head_start import HeadStart, run_folder, settle
from hippocampus.training.kept_step import KeptStep, kept_step, waits_for
from hippocampus.training.opening import from_files, open_folder, with_architecture
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.report import conclude, greet
from hippocampus.training.rollback import Rollbacks
from hippocampus.training.run import Interrupted, Run, StepWatcher, due, look, look_is_due
from hippocampus.training.run_data import RunData
from hippocampus.training.signals import AGAIN, StopSignal
from hippocampus.training.state import TrainState
from hippocampus.training.step import TrainStep, jit_train_step, sharded_init, train_step
from hippocampus.training.trackers import (
    JsonLines,
    TensorBoard,
    Tracker,
    Trackers,
    WeightsAndBiases,
)
from hippocampus.training.watchdog import Watchdog


def fit(config: Config, workdir: str | Path | None = None, *,
        allow_changes: Collection[str] = (), stop: StopSignal | None = None,
        watcher: StepWatcher | None = None, head_start: HeadStart | None = None) -> Path:
    """Trains, or goes on training, until `train.steps`.

    Args:
      config: from `load_config`.
      workdir: the run folder; default: checkpoints/<config.name>.
      allow_changes: fields that may differ from those that the run began with, besides the ones
        that may anyway (`hippocampus.training.resume.MAY_CHANGE`).
      stop: entered already, by a process that belongs to this run; default: one of this call, that
        raises `Stopped`.
      watcher: looks at the steps (`hippocampus.profiling.profiler.Profiler`).
      head_start: of this config, begun before this module was imported.

    Returns:
      The run folder.

    Raises:
      ConfigError: settings, run folder or devices that do not fit; nothing is written.
      DataError: nothing usable to read; nothing is written.
      CheckpointError: there are checkpoints, but none that can be restored; all are kept.
      Stopped: by SIGTERM or SIGINT, with everything saved.
      HippocampusError: the numbers do not recover, or the disk takes no checkpoint.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as context:
        stop = stop or context.enter_context(StopSignal())
        return _fit(config, workdir, allow_changes, stop, started, watcher, head_start)


@dataclass(frozen=True)
class _Job:
    """What stays the same when a run goes back to an earlier checkpoint."""

    config: Config
    folder: RunFolder
    data: RunData
    model: Any
    mesh: Mesh
    console: RunConsole
    checkpoints: Checkpoints
    stop: StopSignal
    watcher: StepWatcher | None
    kept: KeptStep | None


def _fit(config: Config, workdir: str | Path | None, allow_changes: Collection[str],
         stop: StopSignal, started: float, watcher: StepWatcher | None,
         head_start: HeadStart | None) -> Path:
    folder = run_folder(config, workdir)
    first = distributed.is_first()  # the one process that writes and prints
    if first:
        folder.check_usable()
    config = with_architecture(config)
    _, mesh = settle(config)  # refuses what this device lacks before anything is read
    distributed.check_same({
        "hippocampus": __version__, "jax": jax.__version__, "workdir": str(folder.path),
        "local devices": len(jax.local_devices()), **fields(config)})
    data = read_data(config)
    distributed.check_same(json.loads(data.record()))
    config = with_steps(dataclasses.replace(config, model=dataclasses.replace(
        config.model, vocab_size=data.tokenizer.vocab_size)), data)
    config, automatic = resolve(config)
    kept = None
    if not watcher:  # it reads while the rest is made
        kept = head_start.kept_step(config, mesh) if head_start else kept_step(config, mesh)
    model = build_model(config)

    console = RunConsole(config.train.steps, quiet=not first)
    lock = RunLock(folder) if first else None
    try:
        if first:
            open_folder(folder, config, automatic, allow_changes, data, console)
        distributed.barrier()
        greet(console, config, folder, data, model)
        with Checkpoints(folder.steps, config.checkpoint, console.say,
                         run_file=folder.config) as checkpoints:
            trained = _train(_Job(config, folder, data, model, mesh, console, checkpoints, stop,
                                  watcher, kept), started)
            stop.all_saved()
            if trained or not distributed.from_first(folder.results.exists()):
                conclude(console, config, folder, data, model, mesh, checkpoints, stop)
    finally:
        console.stop()
        if lock is not None:
            lock.release()
    return folder.path


class _GoBack(Exception):
    """Training does not recover: to the newest checkpoint before some step."""

    def __init__(self, at: int, before: int):
        super().__init__(f"from step {at} to one before {before}")
        self.at, self.before = at, before


def _train(job: _Job, started: float) -> bool:
    """From the newest checkpoint, or the seed, to the last step; False if that was reached."""
    config, console = job.config, job.console
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    first_state, like, shardings = sharded_init(job.model, optimizer, config, job.mesh)
    step = train_step(job.model, optimizer, config)
    step_function = jit_train_step(step, job.mesh, shardings)
    if job.kept is not None:
        step_function = job.kept.around(step_function,
                                        jit_train_step(step, job.mesh, shardings, True))
    rollbacks = Rollbacks.read(job.folder.rollbacks)

    def restore(before: int | None = None) -> tuple[int, Callable[[], TrainState]]:
        found = job.checkpoints.restore_newest(
            like.trees(), before=before, optional=("guard", "carried"))
        if found is None:
            return 0, partial(from_files, config, job.model, like, first_state, True)
        step, trees = found
        return step, partial(from_files, config, job.model, like,
                             lambda: TrainState.from_trees(trees, like), False)

    done, make_state = restore()
    state = None
    while True:
        unseen = _stopped_before_looking(job.folder, done)
        if done >= config.train.steps and not unseen:
            console.say(f"this run is finished ({done} steps); raise train.steps to go on")
            return False
        if done:
            console.say(f"going on from step {done}")
        try:
            _attempt(job, step_function, state or make_state(), done, unseen, rollbacks, started)
            return True
        except _GoBack as trouble:
            at, before = trouble.at, trouble.before
        # Where it went back to last time was too late, if nothing newer has been saved since.
        candidates = [step for step in job.checkpoints.steps if step < before]
        if rollbacks.records and candidates[1:] and candidates[-1] == rollbacks.records[-1].to:
            before = candidates[-1]
        done, make_state = restore(before)
        state = make_state()
        # What it carried belongs to the batches that are left out now.
        state = dataclasses.replace(state, guard=released(state.guard),
                                    carried=zeros_like(state.carried))
        rollbacks = rollbacks.add(at, done)
        job.checkpoints.set_aside(done, "rolled_back")
        console.say(f"warning: going back from step {at} to {done or 'the beginning'} and past the "
                    f"batches in between (roll-back {len(rollbacks.records)} of "
                    f"{config.guard.max_rollbacks})")
        started = time.perf_counter()


def _attempt(job: _Job, step_function: TrainStep, state: TrainState, done: int, unseen: bool,
             rollbacks: Rollbacks, started: float) -> None:
    """From a state after `done` steps to the last step; raises what ends it before that."""
    config, folder = job.config, job.folder
    trackers: list[Tracker] = []
    clock = Clock(config, len(jax.devices()), started)
    if distributed.is_first():
        clock.carry_on(read_metrics(folder.metrics), done)
        cut_metrics(folder.metrics, done, evaluated=not unseen)
        folder.results.unlink(missing_ok=True)  # of an earlier, shorter run
        trackers = [JsonLines(folder.metrics), TensorBoard(folder.path, done + 1)]
        if config.log.wandb_project:
            trackers.append(WeightsAndBiases(config.log.wandb_project, folder, fields(config)))
    watchdog = Watchdog(folder.path, config.guard.slow_step_factor,
                        config.guard.slow_step_seconds, job.console.say, jax.process_index())
    run = Run(config, folder, job.data, rollbacks.source(job.data.batches(config)), job.model,
              job.mesh, step_function, job.console, Trackers(trackers, job.console.say),
              job.checkpoints, clock, watchdog, job.stop)
    if job.watcher is not None:
        run.step_function = job.watcher.watch(step_function, config, done, folder.profile,
                                              job.console, partial(run.during, "profile"))
    run.best_loss = distributed.from_first(min(
        (loss for loss in job.checkpoints.losses().values() if loss is not None),
        default=float("inf")))
    run.skipped = int(state.guard["skipped"])
    with contextlib.closing(run.trackers), watchdog:
        clock.begins()
        if unseen:
            _look_again(run, state, done)
        _loop(run, state, done, rollbacks)
        job.console.stop()
        job.console.say(summary(clock.account()))


def _loop(run: Run, state: TrainState, done: int, rollbacks: Rollbacks) -> None:
    """Steps `done` to the end. The device always has the next step before numbers are fetched."""
    rows = sharding.process_rows(run.mesh, run.config.train.batch_size)
    steps = run.config.train.steps
    if done < steps:
        run.console.say(waits_for(run.step_function))
    with contextlib.closing(prefetch(run.source, done, steps, rows)) as batches:
        for step in range(done, steps):
            with run.clock.during("data"):
                batch = run.place(next(batches), rows)
            state = _step(run, state, step, batch, compiles=step == done)
            if run.in_a_row >= run.config.guard.patience:
                _go_back(run, state, step + 1, rollbacks)
    run.checkpoints.wait()
    _check_saved(run, steps, "the last step")


def _step(run: Run, state: TrainState, step: int, batch: Batch, compiles: bool) -> TrainState:
    """One step, and all that is due after it."""
    with run.during("compile") if compiles else contextlib.nullcontext():
        state, metrics = run.step_function(state, batch)
    run.stop.unsaved()
    if compiles:
        run.console.start(step)
    config, n, last = run.config, step + 1, step + 1 == run.config.train.steps
    run.watchdog.beat(n)
    run.write_pending()
    logged = due(n, config.log.every_steps) or last or step == 0
    saves = due(n, config.checkpoint.every_steps) or last
    looks = look_is_due(config, n)
    if logged or saves or looks or due(n, config.guard.patience):
        run.pending = (n, metrics, logged)
    eval_loss, unseen = None, looks
    if run.stop.here() is None and looks:
        run.write_pending()
        with contextlib.suppress(Interrupted):
            eval_loss, unseen = look(run, state, n, batch), False
    better = eval_loss is not None and eval_loss < run.best_loss
    if run.stop.wanted:
        _remember_unseen(run, n, unseen)  # before the save: a second signal may end it after
    if saves or better or run.stop.wanted:
        run.write_pending()  # a run killed after the save goes on behind this row
        # A state that only skips is that of an earlier step.
        if better or last or run.stop.wanted or not run.in_a_row:
            _save(run, state, n, eval_loss)
            if run.stop.wanted or run.stop.here():
                _stop(run, n)
    return state


def _save(run: Run, state: TrainState, n: int, eval_loss: float | None) -> None:
    if distributed.is_first() and not run.folder.config.is_file():
        raise HippocampusError(f"the run folder {run.folder.path} is gone or cannot be read",
                               "mount it again, or move it back, and start the same command")
    loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None
    with run.during("checkpoint"):
        run.trackers.flush()
        saved = run.checkpoints.save(n, state.trees(), loss)
    if saved and loss is not None:
        run.best_loss = min(run.best_loss, loss)


def _remember_unseen(run: Run, n: int, unseen: bool) -> None:
    """What a run that stops has not looked at yet, it will when it goes on."""
    if distributed.is_first():
        try:
            run.folder.stopped.unlink(missing_ok=True)
            if unseen:
                write_atomically(run.folder.stopped, _json({"step": n}))
        except OSError as error:  # the state matters more
            run.console.say(f"warning: the evaluation of step {n} will be missing: "
                            f"{error.strerror}")


def _stop(run: Run, n: int) -> NoReturn:
    """Ends a run that a signal has asked to end."""
    number = run.stop.wanted
    assert number is not None
    run.checkpoints.wait()
    _check_saved(run, n, f"{number.name} at step {n}")
    raise Stopped(f"{number.name} at step {n}: everything is saved", AGAIN)


def _check_saved(run: Run, n: int, what: str) -> None:
    newest = distributed.from_first(run.checkpoints.latest)
    if newest != n:
        raise HippocampusError(
            f"{what} could not be saved; the newest checkpoint is "
            f"{'none' if newest is None else f'step {newest}'}",
            "make room on the disk, then start the same command again")


def _go_back(run: Run, state: TrainState, n: int, rollbacks: Rollbacks) -> NoReturn:
    """Keeps what a person needs to see, then goes back, or gives up."""
    statistics = {**run.values, "parameters": statistics_of(state.params)}
    path = run.folder.bad_batches / f"step_{run.seen}.json"
    if distributed.is_first():
        try:
            rollback.dump(path, run.source.batch(run.seen - 1), statistics)
        except OSError as error:
            run.console.say(f"warning: {path} could not be written: {error.strerror}")
    if len(rollbacks.records) >= run.config.guard.max_rollbacks:
        raise Diverged(
            f"training does not recover: {run.in_a_row} steps in a row up to step {run.seen} had "
            f"to be skipped, after {len(rollbacks.records)} roll-backs; {path} has the numbers",
            "lower optimizer.learning_rate, or raise guard.max_rollbacks to go on")
    run.checkpoints.wait()
    raise _GoBack(at=n, before=run.seen - run.in_a_row + 1)


def _look_again(run: Run, state: TrainState, done: int) -> None:
    """What a signal kept the run from seeing of the step that it goes on from."""
    rows = sharding.process_rows(run.mesh, run.config.train.batch_size)
    batch = run.place(run.source.batch(done - 1, rows), rows)
    try:
        loss = look(run, state, done, batch)
    except Interrupted:
        assert run.stop.wanted is not None
        raise Stopped(f"{run.stop.wanted.name}: nothing was left to save", AGAIN) from None
    if loss is not None and math.isfinite(loss):  # as where a step is evaluated and then saved
        run.checkpoints.score(done, loss)
        run.best_loss = min(run.best_loss, loss)
    if distributed.is_first():
        run.folder.stopped.unlink(missing_ok=True)


def _stopped_before_looking(folder: RunFolder, done: int) -> bool:
    """Whether a signal came between this step and the evaluation that was due after it."""
    step = None
    if distributed.is_first():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            step = json.loads(folder.stopped.read_text("utf-8"))["step"]
    return bool(done) and distributed.from_first(step) == done


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
