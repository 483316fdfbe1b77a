"""What of a start waits for the device or the disk begins before the rest is imported.

The training step of an earlier start (hippocampus.training.kept_step) is read and loaded in
seconds, and so is the driver of a GPU; the framework takes seconds to be imported. Neither needs
the other, so `python -m hippocampus.train` begins with this module, which imports little:

    main thread   config | imports   |               | imports,   data, model, first state | step
    head start           | devices   | read, lowered | loaded and linked ------------------|

Python runs one thread at a time. What the rest waits for longest is the step, so the main thread
leaves Python to it until XLA has it; until the devices are there, it imports what comes next.

It knows the config as it is written. Where the data change it (the size of a vocabulary, steps of
`train.epochs`), the step has another name and is read later, when that is known.
"""

from __future__ import annotations

import importlib
from concurrent.futures import Future
from pathlib import Path
from threading import Event, Thread

import jax
from jax.sharding import Mesh

from hippocampus import distributed
from hippocampus.allocator import expects_accelerator
from hippocampus.config import Config
from hippocampus.config_files import fields
from hippocampus.devices import check_deterministic, import_kernels, resolve
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training import sharding
from hippocampus.training.kept_step import KeptStep, Process, kept_step

_PIECES = ("flax", "optax", "hippocampus.runs.checkpoints", "hippocampus.models.build_model",
           "hippocampus.training.console", "hippocampus.training.data", "hippocampus.training.step")
"""What the rest imports; in pieces, to see between them whether the devices are there."""


def run_folder(config: Config, workdir: str | Path | None) -> RunFolder:
    """The folder of a run; default: checkpoints/<config.name>."""
    return RunFolder.at(workdir or Path("checkpoints") / config.name)


def settle(config: Config) -> tuple[Config, Mesh]:
    """The config as this device reads it, and the mesh.

    Raises:
      ConfigError: what the device lacks, or a batch that does not divide over the mesh.
    """
    resolved, _ = resolve(config)
    check_deterministic(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.train.batch_size, "train.batch_size",
                         config.train.grad_accumulation)
    sharding.check_batch(mesh, config.eval.batch_size, "eval.batch_size")
    return resolved, mesh


def begin(config: Config, workdir: str | Path | None = None) -> HeadStart | None:
    """Begins; to be called when nothing is left to say of JAX's flags and of other processes.

    Args:
      config: checked.
      workdir: the run folder, see `run_folder`.

    Returns:
      None where there are several processes: they agree first that they were started alike.

    Raises:
      ConfigError, DataError: the run folder cannot be used.
    """
    if distributed.is_several():
        return None
    run_folder(config, workdir).check_usable()
    return HeadStart(config)


class HeadStart:
    """Devices, and then the kept step, in a thread; what fails there the run meets and says."""

    def __init__(self, config: Config):
        """Begins, and imports what kernels are written in, if they are likely to be needed.

        Args:
          config: checked.
        """
        self._config = config
        self._process = Process.now()  # before anything changes it beside this
        self._kernels = expects_accelerator() or "pallas" in fields(config).values()
        self._imported = Event()
        self._begun: Future[KeptStep | None] = Future()
        self._devices = Event()
        # No daemon: Python must not end while a device's or a compiler's thread still runs.
        Thread(target=self._begin, name="head start").start()
        try:
            if self._kernels:
                import_kernels()  # before anything is traced or loaded that calls them
        finally:
            self._imported.set()
        for name in _PIECES:
            if self._devices.is_set():
                break
            importlib.import_module(name)
        begun = self._begun.result()
        if begun is not None:
            begun.is_lowered.wait()

    def kept_step(self, config: Config, mesh: Mesh) -> KeptStep | None:
        """The step of the config as it is now, read since long if it was known before.

        Args:
          config: resolved, with what the data say.
          mesh: that it runs on.
        """
        now = Process.now()
        # What was imported since may have set or brought anything, but only code that the digest
        # does not have can do so otherwise than at the last start.
        known = now.modules == self._process.modules
        return kept_step(config, mesh, self._process if known else now, self._begun.result())

    def _begin(self) -> None:
        begun = None
        try:
            platform = jax.devices()[0].platform
            self._devices.set()
            self._imported.wait()
            # A pretrained decoder's files have to be read before its config is known, and what
            # was not expected has to be imported first, which is the main thread's.
            if not hasattr(self._config.model, "backbone") and (
                    self._kernels or platform == "cpu"):
                begun = kept_step(*settle(self._config), self._process)
        except Exception:  # the run does the same, and says what is wrong
            pass
        finally:  # whatever came: the main thread waits for these
            self._devices.set()
            self._begun.set_result(begun)
