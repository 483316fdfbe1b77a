"""A run that trains in seconds, shared by the tests of what is done before, in and after one."""

import functools
import hashlib
import os
import random
import subprocess
import sys
import tempfile
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

    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(defaults(), {**TINY, "data.corpus": str(corpus()), **overrides})


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
    file = folder() / "tiny.py"
    file.write_text("from hippocampus.config_files import defaults\n\n"
                    "def get_config():\n    return defaults()\n")
    overrides = {name.replace("__", "."): value for name, value in changes.items()}
    values = {**TINY, "data.corpus": corpus(), **overrides}
    return [sys.executable, "-m", f"hippocampus.{verb}", f"--config={file}",
            f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in values.items())]


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
