"""A run that trains in seconds, shared by the tests of what is done before, in and after one."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "to", "house", "big", "small")

PATHS = ("hopfield", "attention")
"""Of the model of `trained`."""

TINY: dict[str, Any] = {
    "name": "tiny", "data.context": 16, "model.d_model": 16, "model.n_layers": 1,
    "model.n_heads": 2, "model.mixer.width": 8, "model.mlp.width": 16,
    "model.segments.controller_width": 8, "model.paths": ("attention",),
    "model.segments.train": 1, "model.segments.weights": (1.0,), "train.steps": 12,
    "train.batch_size": 8, "optimizer.warmup_steps": 3, "optimizer.learning_rate": 1e-2,
    "ema.decay": 0.9, "eval.batch_size": 8, "eval.max_windows": 4, "eval.every_steps": 0,
    "checkpoint.every_steps": 1000, "log.every_steps": 2, "log.histogram_every_steps": 0,
    "sample.max_new_tokens": 4, "sample.prompt": "the "}
"""Overrides of the default config: attention only, which compiles fastest."""

EQUILIBRIUM: dict[str, Any] = {
    **{name: value for name, value in TINY.items() if not name.startswith("model.")},
    "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "model.ssm.expansion": 1.0,
    "model.ssm.d_state": 2, "model.cell.mlp.width": 16, "model.hopfield.n_slots": 8,
    "model.solver.max_iterations": 6, "model.solver.backward_iterations": 6,
    "model.solver.memory": 2}
"""The same for an equilibrium model: `model__family="equilibrium"` below."""

_BASES = {"hybrid": TINY, "equilibrium": EQUILIBRIUM}

STEPS = 24
LONG: dict[str, Any] = {
    "train__steps": STEPS, "train__grad_accumulation": 2, "model__dropout": 0.1,
    "log__every_steps": 1, "eval__every_steps": 8, "checkpoint__every_steps": 5,
    "checkpoint__keep_latest": 100, "sample__max_new_tokens": 2}
"""Changes of the run that tests stop, kill and damage: random numbers matter in it."""

SLOW = """import os, time
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.train import main
from hippocampus.training import loop
from hippocampus.verbs import run_verb
place, start, finish = loop.Run.place, Checkpoints._start, Checkpoints._finish
begun = {}
def slowly(self, *batch):
    time.sleep(PAUSE)
    return place(self, *batch)
def begins(self, step, *rest):
    begun[step] = time.monotonic()
    os.write(1, b"begins to save %d\\n" % step)
    return start(self, step, *rest)
def ends(self, step, *rest):
    notes = finish(self, step, *rest)
    os.write(1, b"saved %d in %f s\\n" % (step, time.monotonic() - begun[step]))
    return notes
loop.Run.place, Checkpoints._start, Checkpoints._finish = slowly, begins, ends
run_verb(main)
"""
"""The train verb with a pause before every batch, that says when a save begins and is whole."""


@functools.cache
def folder() -> Path:
    """A folder for everything that tests of one process share."""
    kept = tempfile.TemporaryDirectory(prefix="tiny_run_")
    folder.kept = kept  # type: ignore[attr-defined]  # lives until the process ends
    return Path(kept.name)


@functools.cache
def corpus() -> Path:
    """Six thousand characters with some order to learn."""
    draw = random.Random(0)
    path = folder() / "text.txt"
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(1500)))
    return path


def config(**changes: Any) -> Any:
    """The tiny config; `train__steps=3` changes train.steps."""
    from hippocampus.config_files import defaults, load_config

    family, overrides = _asked(changes)
    return load_config(defaults(family), {"data.corpus": str(corpus()), **overrides})


def _asked(changes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family of the model, and what is changed of its default config."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    family = named.pop("model.family", "hybrid")
    return family, {**_BASES[family], **named}


@functools.cache
def trained() -> Path:
    """A finished run that evaluated, sampled and saved on its way."""
    from hippocampus.training.loop import fit

    return fit(config(
        model__paths=PATHS, model__hopfield__depth_schedule=(2,), train__steps=12,
        eval__every_steps=4, checkpoint__every_steps=5, checkpoint__keep_latest=1,
        log__histogram_every_steps=6, sample__every_steps=6), folder() / "trained")


def environment() -> dict[str, str]:
    """For subprocesses: this checkout, on the CPU, sharing what was compiled before."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(folder() / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def command(workdir: Path, verb: str = "train", **changes: Any) -> list[str]:
    """The command line that trains the tiny config in a folder."""
    family, overrides = _asked(changes)
    file = folder() / f"tiny_{family}.py"
    file.write_text("from hippocampus.config_files import defaults\n\n"
                    f"def get_config():\n    return defaults({family!r})\n")
    values = {"data.corpus": corpus(), **overrides}
    return [sys.executable, "-m", f"hippocampus.{verb}", f"--config={file}",
            f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items())]


def slowly(arguments: list[str], pause: float = 0.1) -> list[str]:
    """A train command as `SLOW`."""
    return [arguments[0], "-c", SLOW.replace("PAUSE", str(pause)), *arguments[3:]]


def run(arguments: list[str], timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs a command to its end."""
    return subprocess.run(arguments, capture_output=True, text=True, env=environment(),
                          timeout=timeout)


def digest(tree: Any) -> str:
    """Of every bit of every array of a tree, keys included."""
    import jax
    import numpy as np

    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        sha.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return sha.hexdigest()


# ---------------------------------------------------------------- runs that must end alike

def finish(workdir: Path, **changes: Any) -> str:
    """Trains `LONG` to its end in a process of its own; returns what it printed."""
    done = run(command(workdir, **{**LONG, **changes}))
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def uninterrupted() -> Path:
    """`LONG`, never stopped."""
    finish(folder() / "uninterrupted")
    return folder() / "uninterrupted"


def wait_for(what: Callable[[], bool], process: subprocess.Popen, seconds: float = 90) -> None:
    """Until something holds, which must be before the process ends."""
    give_up = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"it ended with exit code {process.returncode}"
        assert time.monotonic() < give_up, f"not in {seconds} s"
        time.sleep(0.01)


def series(workdir: Path) -> list[tuple]:
    """Every number that must not depend on how often a run was stopped, exactly."""
    from hippocampus.runs.run_folder import read_metrics

    return [(row["step"], sorted((name, float(value).hex()) for name, value in row.items()
                                 if not name.startswith(("train/tokens_per", "time/"))))
            for row in read_metrics(workdir / "metrics.jsonl")]


def digests(workdir: Path, step: int) -> dict[str, str]:
    """Of the parameters, their average, the optimizer's state, the guard, the step and the key."""
    from hippocampus.config import MeshConfig
    from hippocampus.config_files import read_json
    from hippocampus.runs.checkpoints import Checkpoints

    config, _ = read_json(workdir / "config.json")
    with Checkpoints(workdir / "steps") as checkpoints:
        trees = checkpoints.restore(step, _abstract_state(
            dataclasses.replace(config, mesh=MeshConfig())))
    return {name: digest(tree) for name, tree in trees.items()}


@functools.cache
def _abstract_state(config: Any) -> dict[str, Any]:
    import jax

    from hippocampus.models.build_model import build_model
    from hippocampus.training import sharding
    from hippocampus.training.optimizer import build_optimizer
    from hippocampus.training.step import sharded_init

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    return sharded_init(build_model(config), optimizer, config, mesh)[1].trees()


def assert_same_run(workdir: Path, other: Path) -> None:
    """Two finished runs: every number, every bit of the state, the results and the last text."""
    from hippocampus.runs.run_folder import read_metrics

    assert series(workdir) == series(other)
    step = read_metrics(other / "metrics.jsonl")[-1]["step"]
    found, wanted = digests(workdir, step), digests(other, step)
    assert set(found) == {"params", "ema", "optimizer", "guard", "progress"}
    assert found == wanted
    results = [json.loads((place / "results.json").read_text()) for place in (workdir, other)]
    assert results[0] == results[1]
    texts = [(place / "samples" / "best.txt").read_text() for place in (workdir, other)]
    assert texts[0] == texts[1]


def fit_quietly(config: Any, folder: Path) -> Path:
    """Trains in this process; what it prints goes into "printed" beside the run folder."""
    from hippocampus.training.loop import fit

    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "printed").open("w") as printed, contextlib.redirect_stdout(printed):
        return fit(config, folder)
