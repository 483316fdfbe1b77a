"""The training loop: what `python -m hippocampus.train` and `hippocampus.fit` run.

Where parameters come from, in this order: the run folder's newest checkpoint, else the seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from hippocampus import __version__, distributed
from hippocampus.config import Config
from hippocampus.config_files import fields, read_json, to_json
from hippocampus.data.batches import Batch
from hippocampus.data.prefetch import prefetch
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError, Stopped
from hippocampus.evaluation.evaluate import evaluate
from hippocampus.files import write_atomically
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.build_model import build_model
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import RunFolder, RunLock, cut_metrics, environment
from hippocampus.training import sharding
from hippocampus.training.clock import Clock
from hippocampus.training.console import RunConsole
from hippocampus.training.data import TrainingData, read_data, with_steps
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.report import conclude, eval_values, generate_sample, greet
from hippocampus.training.signals import StopSignal
from hippocampus.training.state import TrainState
from hippocampus.training.step import TrainStep, jit_train_step, sharded_init, train_step
from hippocampus.training.trackers import (
    JsonLines,
    TensorBoard,
    Tracker,
    Trackers,
    WeightsAndBiases,
)

MAY_CHANGE = ("name", "train.steps", "train.epochs", "train.grad_accumulation", "eval.",
              "checkpoint.", "log.", "sample.", "mesh.")
"""Fields, or groups of them, that may differ when a run goes on."""


@dataclass
class Run:
    """Everything that one run holds while it goes on."""

    config: Config
    folder: RunFolder
    data: TrainingData
    model: Any
    mesh: Mesh
    step_function: TrainStep
    console: RunConsole
    trackers: Trackers
    checkpoints: Checkpoints
    clock: Clock
    pending: tuple[int, dict[str, jax.Array]] | None = None
    best_loss: float = field(default=float("inf"))

    def place(self, batch: Any, rows: slice | None = None) -> Any:
        """A batch on the mesh; of a training batch this process may have read only its rows."""
        whole = None if rows is None else self.config.train.batch_size
        return sharding.to_devices(batch, self.mesh, rows, whole)


def fit(config: Config, workdir: str | Path | None = None) -> Path:
    """Trains, or goes on training, until `train.steps`.

    Args:
      config: from `load_config`.
      workdir: the run folder; default: checkpoints/<config.name>.

    Returns:
      The run folder.

    Raises:
      ConfigError: settings, run folder or devices that do not fit; nothing is written.
      DataError: nothing usable to read; nothing is written.
      Stopped: by SIGTERM or SIGINT, with everything saved.
    """
    folder = RunFolder.at(workdir or Path("checkpoints") / config.name)
    first = distributed.is_first()  # the one process that writes and prints
    if first:
        folder.check_usable()
    resolve(config)  # refuses what this device lacks before anything is read
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.train.batch_size, "train.batch_size",
                         config.train.grad_accumulation)
    sharding.check_batch(mesh, config.eval.batch_size, "eval.batch_size")
    distributed.check_same({
        "hippocampus": __version__, "jax": jax.__version__, "workdir": str(folder.path),
        "local devices": len(jax.local_devices()), **fields(config)})
    data = read_data(config)
    distributed.check_same(json.loads(data.record()))
    config = with_steps(dataclasses.replace(config, model=dataclasses.replace(
        config.model, vocab_size=data.tokenizer.vocab_size)), data)
    config, automatic = resolve(config)
    model = build_model(config)

    console = RunConsole(config.train.steps, quiet=not first)
    lock = RunLock(folder) if first else None
    try:
        if first:
            _open_folder(folder, config, automatic, data, console)
        distributed.barrier()
        greet(console, config, folder, data, model)
        with Checkpoints(folder.steps, config.checkpoint) as checkpoints:
            trained = _train(config, folder, data, model, mesh, console, checkpoints)
            if trained or not distributed.from_first(folder.results.exists()):
                conclude(console, config, folder, data, model, mesh, checkpoints)
    finally:
        console.stop()
        if lock is not None:
            lock.release()
    return folder.path


def _open_folder(folder: RunFolder, config: Config, automatic: tuple[str, ...],
                 data: TrainingData, console: RunConsole) -> None:
    """Checks that a run can go on, or begins one; config.json marks it and is written last."""
    if folder.is_run():
        for line in check_resumable(folder, config, automatic):
            console.say(line)
        data.check_same_as(folder)
    else:
        data.tokenizer.save(folder.tokenizer)
        write_atomically(folder.data, data.record())
    write_atomically(folder.environment, _json(environment()))
    write_atomically(folder.config, to_json(config, automatic))


def check_resumable(folder: RunFolder, config: Config, automatic: tuple[str, ...]) -> list[str]:
    """Compares a run's saved config with the one asked for.

    Returns:
      What a person should know of allowed differences.

    Raises:
      ConfigError: the first field that must not differ, with both values.
    """
    saved, _ = read_json(folder.config)
    before, now, notes = fields(saved), fields(config), []
    for name in sorted(now):
        if before.get(name) == now[name] or name.startswith(MAY_CHANGE):
            continue
        if name in automatic:
            notes.append(f"note: {name} is {now[name]} on this device (it was {before.get(name)}); "
                         "numbers will differ a little")
            continue
        raise ConfigError(f"{folder.path} was trained with {name} = {before.get(name)!r}, not "
                          f"{now[name]!r}", "go on with the old value, or choose another --workdir")
    if saved.train.steps != config.train.steps and config.optimizer.schedule != "constant":
        notes.append(f"note: train.steps was {saved.train.steps}, is {config.train.steps}: the "
                     "learning-rate schedule moves")
    return notes


def _train(config: Config, folder: RunFolder, data: TrainingData, model: Any, mesh: Mesh,
           console: RunConsole, checkpoints: Checkpoints) -> bool:
    """From the newest checkpoint, or the seed, to the last step; False if that was reached."""
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    first_state, like, shardings = sharded_init(model, optimizer, config, mesh)
    done = distributed.from_first(checkpoints.latest or 0)
    if done >= config.train.steps:
        console.say(f"this run is finished ({done} steps); raise train.steps to go on")
        return False
    if done:
        state = TrainState.from_trees(checkpoints.restore(done, like.trees()))
        console.say(f"going on from step {done}")
    else:
        state = first_state()
    trackers: list[Tracker] = []
    if distributed.is_first():
        cut_metrics(folder.metrics, done)
        folder.results.unlink(missing_ok=True)  # of an earlier, shorter run
        trackers = [JsonLines(folder.metrics), TensorBoard(folder.path, done + 1)]
        if config.log.wandb_project:
            trackers.append(WeightsAndBiases(config.log.wandb_project, folder, fields(config)))
    run = Run(config, folder, data, model, mesh,
              jit_train_step(train_step(model, optimizer, config), mesh, shardings), console,
              Trackers(trackers), checkpoints, Clock(config, len(jax.devices())))
    run.best_loss = distributed.from_first(min(
        (loss for loss in checkpoints.losses().values() if loss is not None),
        default=float("inf")))
    console.say("compiling the training step (10 to 60 seconds, once) …")
    console.start(done)
    try:
        with StopSignal() as stop:
            _loop(run, state, done, stop)
    finally:
        run.trackers.close()
    return True


def _loop(run: Run, state: TrainState, done: int, stop: StopSignal) -> None:
    """Steps `done` to the end. The device always has the next step before numbers are fetched."""
    rows = sharding.process_rows(run.mesh, run.config.train.batch_size)
    with contextlib.closing(prefetch(run.data.batches(run.config), done,
                                     run.config.train.steps, rows)) as batches:
        _steps(run, state, done, stop, batches, rows)


def _steps(run: Run, state: TrainState, done: int, stop: StopSignal,
           batches: Iterator[Batch], rows: slice) -> None:
    config = run.config
    for step, batch in enumerate(batches, done):
        state, metrics = run.step_function(state, run.place(batch, rows))
        _write_pending(run)
        n, last = step + 1, step + 1 == config.train.steps
        if _due(n, config.log.every_steps) or last or step == 0:
            run.pending = (n, metrics)
        interrupted = stop.after(n)
        eval_loss = None
        if _due(n, config.eval.every_steps) or last:
            _write_pending(run)
            with run.clock.paused():
                eval_loss = _evaluate(run, state, n)
        if _due(n, config.log.histogram_every_steps):
            with run.clock.paused():
                _draw(run, state, n, run.place(batch, rows))
        if _due(n, config.sample.every_steps) and not last:  # the end has a sample of its own
            with run.clock.paused():
                _sample(run, state, n)
        better = eval_loss is not None and eval_loss < run.best_loss
        if _due(n, config.checkpoint.every_steps) or better or last or interrupted:
            _write_pending(run)  # a run killed after the save goes on behind this row
            with run.clock.paused():
                run.checkpoints.save(n, state.trees(), eval_loss)
            run.best_loss = eval_loss if better and eval_loss is not None else run.best_loss
        if interrupted:
            run.checkpoints.wait()
            raise Stopped(f"{interrupted.name} at step {n}: everything is saved",
                          "start the same command again to go on")
    _write_pending(run)


def _write_pending(run: Run) -> None:
    """Fetches and writes the metrics of an earlier step."""
    if run.pending is None:
        return
    (step, metrics), run.pending = run.pending, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    values.update(run.clock.lap(step))
    run.trackers.scalars(step, values)
    run.console.step(step, values, run.clock.seconds_left(step))


def _evaluate(run: Run, state: TrainState, step: int) -> float:
    """Scores the validation split with raw and averaged weights; returns eval/loss."""
    windows = run.data.windows(run.config, run.config.eval.max_windows)
    with sharding.around(run.mesh):
        values = eval_values("eval", {
            name: evaluate(run.model, params, windows, run.data.bytes_per_token, run.place,
                           run.data.words_per_token)
            for name, params in (("raw", state.params), ("ema", state.ema)) if params})
    run.trackers.scalars(step, values)
    raw = f" (raw weights {values['eval/loss_raw']:.4f})" if state.ema else ""
    run.console.say(f"step {step}: validation loss {values['eval/loss']:.4f}{raw}, "
                    f"{values['eval/bits_per_byte']:.4f} bits per byte")
    return values["eval/loss"]


def _draw(run: Run, state: TrainState, step: int, batch: Batch) -> None:
    """Writes histograms of what the model did on a batch, which lies on the mesh."""
    with sharding.around(run.mesh):
        values = _distributions(run.model, state.params, batch)
    for name, array in sharding.to_host(values, run.mesh).items():
        run.trackers.histogram(step, name, array.ravel())


@functools.partial(jax.jit, static_argnums=0)
def _distributions(model: Any, params: Any, batch: Batch) -> dict[str, jax.Array]:
    _, out, _ = model.apply({"params": params}, batch, method="forward")
    return model.distributions(out)


def _sample(run: Run, state: TrainState, step: int) -> None:
    """Writes a text with the averaged weights."""
    params = sharding.to_one_device(state.ema or state.params, run.mesh)
    if not distributed.is_first():
        return
    lm = LanguageModel(run.model, params, run.data.tokenizer, run.config)
    text = generate_sample(lm, run.config)
    run.folder.samples.mkdir(exist_ok=True)
    write_atomically(run.folder.samples / f"{step}.txt", run.config.sample.prompt + text)
    run.trackers.text(step, "sample", run.config.sample.prompt + text)
    run.console.sample(step, run.config.sample.prompt, text)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"
