"""Trains the cells of a grid, each with every seed in a run folder of its own.

    <out>/grid.json   <out>/<cell>/seed_<s>/   <out>/ablation.json  ablation.csv  runs.csv  *.svg

A finished run is read and not trained again; one that was stopped or killed goes on. A larger grid
adds runs. What stands in a folder is always of one config: another one is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.config import Config
from hippocampus.config_files import fields, read_json
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError, Diverged
from hippocampus.files import check_writable, read_object, write_atomically
from hippocampus.probing.ablation.grid import Cell, Grid
from hippocampus.runs.run_folder import RunFolder, RunLock, environment
from hippocampus.training.check import describe
from hippocampus.training.data import read_data
from hippocampus.training.loop import fit
from hippocampus.training.signals import StopSignal

FORMAT = 1
"""Version of grid.json."""

_MAKES_NO_DIFFERENCE = ("name", "log.", "sample.", "checkpoint.", "mesh.")
"""Fields, or groups of them, that change no result; what a run trains on, all others do."""


@dataclass(frozen=True)
class Study:
    """A grid in its folder.

    Attributes:
      out: the folder.
      grid: the cells.
    """

    out: Path
    grid: Grid

    def folder(self, cell: Cell, seed: int) -> RunFolder:
        """Of one run."""
        return RunFolder(self.out / cell.name / f"seed_{seed}")

    def runs(self) -> Iterator[tuple[Cell, int]]:
        """All of them; a seed of every cell before the next seed, so that the first say early."""
        for seed in self.grid.seeds:
            for cell in self.grid.cells:
                yield cell, seed

    def finished(self, cell: Cell, seed: int) -> bool:
        """Whether a run has its final evaluation."""
        return self.folder(cell, seed).results.is_file()

    @property
    def record(self) -> Path:
        """What marks the folder as an ablation's."""
        return self.out / "grid.json"

    def strangers(self) -> list[str]:
        """Cells in the folder that are not of this grid."""
        ours = {cell.name for cell in self.grid.cells}
        return sorted(path.name for path in self.out.glob("*/")
                      if path.name not in ours and any(path.glob("seed_*/config.json")))


def lock(study: Study) -> RunLock:
    """Takes the folder for this process, after a look at what it holds.

    Raises:
      ConfigError: it is a file, a run, something else's, in use, or cannot be written.
    """
    out = RunFolder.at(study.out)
    others = [p.name for p in out.path.iterdir()] if out.path.is_dir() else []
    if out.path.exists() and not out.path.is_dir():
        raise ConfigError(f"{out.path} is a file", "choose another --out")
    if out.is_run():
        raise ConfigError(f"{out.path} is a run folder", "choose another --out")
    if not study.record.is_file() and set(others) - {".lock"}:
        raise ConfigError(f"{out.path} is not empty and not an ablation's folder (it holds "
                          f"{min(set(others) - {'.lock'})})", "choose another --out")
    check_writable(out.path)
    try:
        return RunLock(out)
    except ConfigError as error:
        raise ConfigError(error.message, error.hint.replace("--workdir", "--out")) from None


def check(study: Study) -> None:
    """Refuses what could not be trained, or would mix configs, before anything is trained.

    Raises:
      ConfigError: naming the run, with what differs.
    """
    for cell in study.grid.cells:
        describe(cell.config)
    for cell, seed in study.runs():
        folder = study.folder(cell, seed)
        if folder.is_run():
            _check_same(folder, study.grid.config(cell, seed))


def read_texts(study: Study) -> None:
    """Reads what every cell with runs to train is trained on; cells of one text share it.

    Raises:
      ConfigError: finished runs of the same corpus read another text.
      DataError: nothing usable to read.
    """
    texts: dict[Any, dict[str, Any]] = {}
    found = {}
    for cell in study.grid.cells:
        if all(study.finished(cell, seed) for seed in study.grid.seeds):
            continue
        config = cell.config
        key = (config.data, config.eval, config.train.batch_size, config.sample.prompt)
        if key not in texts:
            texts[key] = json.loads(read_data(config).record())
        found[cell.name] = texts[key]
    for cell, seed in study.runs():
        if study.finished(cell, seed):
            for other, record in found.items():
                if study.grid[other].config.data == cell.config.data:
                    _check_same_text(study.folder(cell, seed), record)


def begin(study: Study) -> None:
    """Marks the folder."""
    here = environment()
    cells = {cell.name: {"changes": dict(cell.changes), "paths": list(cell.paths),
                         "match": cell.match, "note": cell.note} for cell in study.grid.cells}
    content = {"format": FORMAT, "version": here["packages"].get("hippocampus"),
               "commit": here["commit"], "command": here["command"], "config": study.grid.name,
               "axes": list(study.grid.axes), "seeds": list(study.grid.seeds),
               "baseline": study.grid.baseline, "cells": cells}
    write_atomically(study.record, json.dumps(content, indent=2) + "\n")


def train(study: Study, say: Callable[[str], None],
          stop: StopSignal | None = None) -> dict[tuple[str, int], str]:
    """Trains what is not finished, one run after another.

    Args:
      study: under its lock.
      say: prints a line.
      stop: see `hippocampus.training.loop.fit`.

    Returns:
      Why runs have no result: (cell, seed) -> the reason. Training that does not recover is a
      result of its own, and the other cells go on.

    Raises:
      Stopped: by a signal, with everything saved.
    """
    runs, failed = list(study.runs()), {}
    for i, (cell, seed) in enumerate(runs, start=1):
        if study.finished(cell, seed):
            continue
        say(f"=== {cell.title}, seed {seed} (run {i} of {len(runs)})")
        try:
            fit(study.grid.config(cell, seed), study.folder(cell, seed).path, stop=stop)
        except Diverged as error:
            say(f"warning: {cell.title}, seed {seed}: {error.message}")
            failed[cell.name, seed] = "training did not recover"
        gc.collect()  # the state of a run is part of cycles, and the next one needs the memory
    return failed


@contextlib.contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """A context in which what one run compiled, the same cell's other seeds read from a folder.

    Each process has a folder of its own in it, so that nobody reads what a killed one left half
    written. Whoever has chosen a folder for JAX already keeps it.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    place = "jax_compilation_cache_dir"
    settings = {place: str(folder / str(os.getpid())),
                "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in settings}
    if before[place]:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # JAX holds on to the first folder that it was given
        shutil.rmtree(folder, ignore_errors=True)


def as_trained(config: Config, vocab_size: int, steps: int) -> Config:
    """A config as its run folder keeps it on this device.

    Args:
      config: of a cell.
      vocab_size: of the tokenizer.
      steps: that `train.epochs` came to; they count only if it is set.
    """
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    if config.train.epochs:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    return resolve(config)[0]


def _check_same(folder: RunFolder, config: Config) -> None:
    saved, automatic = read_json(folder.config)
    now = fields(as_trained(config, saved.model.vocab_size, saved.train.steps))
    before = fields(saved)
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name) or _makes_no_difference(name):
            continue
        hint = "choose another --out: what stands in one folder is of one config"
        if name in automatic:
            hint = f"that was another device: --config.{name}={before[name]}, or another --out"
        raise ConfigError(f"{folder.path} was trained with {name} = {before.get(name)!r}, not "
                          f"{now.get(name)!r}", hint)


def _makes_no_difference(name: str) -> bool:
    return any(name.startswith(entry) if entry.endswith(".") else name == entry
               for entry in _MAKES_NO_DIFFERENCE)


def _check_same_text(folder: RunFolder, now: Mapping[str, Any]) -> None:
    saved = read_object(folder.data, "restore it from a copy, or remove that run")
    for key, what in (("sha256", "text"), ("tokenizer", "tokenizer")):
        if saved.get(key) != now.get(key):
            raise ConfigError(
                f"{folder.path} was trained on another {what} ({str(saved.get(key))[:12]}… then, "
                f"{str(now.get(key))[:12]}… now)", "choose another --out (the pydoc corpus follows "
                "the version of Python)")
