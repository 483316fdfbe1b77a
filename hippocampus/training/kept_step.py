"""The training step is kept as XLA reads it, so that a later start does not trace it again.

JAX's cache (hippocampus.compilation_cache) is asked for a program only after it has been traced and
lowered, which takes 12 s for the main model. Here a file holds the lowered step (jax.export) under
a digest of all that a trace can depend on: the config, this package's code and every other module
that does not lie with the installed ones, the versions of those, JAX's settings, the mesh and the
devices. Reading and compiling it begins beside everything else that a start does, before most of
the framework is imported (hippocampus.training.head_start): this module needs little. What does not
fit, is damaged or cannot be read is as if it were not there: the step is traced, and kept for the
next start.

What lies in the folder is run, so it is used only where it is the user's alone.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import xxhash
from jax import export
from jax.sharding import Mesh

from hippocampus import xla_flags
from hippocampus.compilation_cache import private_folder
from hippocampus.config import Config
from hippocampus.config_files import to_json
from hippocampus.files import write_atomically
from hippocampus.training import sharding

if TYPE_CHECKING:
    from hippocampus.data.batches import Batch
    from hippocampus.training.state import TrainState
    from hippocampus.training.step import Metrics, TrainStep

KEPT = 8
"""Files; those used last."""

_CHECKS = [export.DisabledSafetyCheck.custom_call(name) for name in (
    "mosaic_gpu_v2", "mosaic_gpu", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward",
    "__cudnn$fmhaSoftmaxDropout", "__cudnn$fmhaSoftmaxDropoutBackward")]
"""Kernels that JAX does not promise to keep for later versions: a version is part of the name."""

_PACKAGE = Path(__file__).resolve().parents[1]
_VARIABLES = ("CUDA_", "HIPPOCAMPUS_", "JAX_", "LIBTPU_", "NVIDIA_", "TF_", "TPU_", "XLA_")
_INSTALLED = {"site-packages", "dist-packages"}
_NOT_ABOUT_PROGRAMS = ("HIPPOCAMPUS_CACHE", "HIPPOCAMPUS_COMPILATION_CACHE",
                       "JAX_COMPILATION_CACHE_DIR")


@dataclass(frozen=True)
class Process:
    """What a trace can depend on besides the config and the devices.

    Attributes:
      settings: JAX's.
      variables: of the environment.
      modules: files of the user's code that is imported, besides this package.
    """

    settings: Mapping[str, str]
    variables: Mapping[str, str]
    modules: frozenset[Path]

    @classmethod
    def now(cls) -> Process:
        """This one, as it is."""
        return cls({name: str(value) for name, value in sorted(jax.config.values.items())
                    if "cache" not in name},
                   {name: value for name, value in sorted(os.environ.items())
                    if name.startswith(_VARIABLES) and name not in _NOT_ABOUT_PROGRAMS},
                   frozenset(_modules_of_the_user()))

    @functools.cached_property
    def code(self) -> str | None:
        """A digest of all code that a trace may run; None where some of it lies in no file."""
        return _digest_of_code(self.modules)


def kept_step(config: Config, mesh: Mesh, process: Process | None = None,
              begun: KeptStep | None = None) -> KeptStep | None:
    """The step of an earlier start with the same config, code and devices, or a place for it.

    Args:
      config: resolved; with the rest of the process it says what the step computes.
      mesh: that it runs on.
      process: the rest; default: as it is now.
      begun: one that is being read already; it is taken if it is this step, else left alone.

    Returns:
      None where nothing can be kept: with several processes, without a folder for compiled
      programs, or in a notebook, a test or a shell, where code need not lie in files.
    """
    folder = private_folder()
    process = process or Process.now()
    if folder is None or jax.process_count() > 1 or process.code is None:
        return None
    parts = {"code": process.code, "config": to_json(config, ()), "devices": _about(mesh),
             "settings": process.settings, "variables": process.variables}
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    path = folder / "steps" / name
    return begun if begun is not None and begun.path == path else KeptStep(path, mesh)


class KeptStep:
    """A training step whose lowered form is read from a file, or written there at its first call.

    Attributes:
      path: of the file.
      is_there: whether an earlier start has kept it.
      is_lowered: set when what is left of the reading is XLA's, which needs no Python.
    """

    def __init__(self, path: Path, mesh: Mesh):
        """Begins to read the file, and to compile what is in it.

        Args:
          path: the file.
          mesh: of the devices that the step runs on.
        """
        self.path, self._mesh = path, mesh
        self._program: Any = None
        self._reading: Future = Future()
        self.is_lowered = Event()
        self.is_there = path.is_file()
        # No daemon: Python must not end while a compiler's thread still runs.
        Thread(target=self._read, name="reads the step").start()

    def around(self, step: TrainStep, part: TrainStep) -> KeptStep:
        """Itself, to be called like the step.

        Args:
          step: jitted, as it runs where it cannot be kept.
          part: the same as a part of another program.
        """
        self._step, self._part = step, part
        return self

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs the step."""
        if self._program is None:
            self._program = self._find(state, batch) or self._trace(state, batch)
        result: tuple[TrainState, Metrics] = self._program(state, batch)
        return result

    def _read(self) -> None:
        """Gives the header and the compiled program, or None."""
        found = None
        with contextlib.suppress(Exception):  # whatever it is, the step can be traced
            first, _, payload = self.path.read_bytes().partition(b"\n")
            header = json.loads(first)
            if header["digest"] == xxhash.xxh3_64_hexdigest(payload):
                found = header, self._compile(export.deserialize(bytearray(payload)),
                                              header["donated"])
                os.utime(self.path)
        self.is_lowered.set()
        self._reading.set_result(found)

    def _find(self, state: TrainState, batch: Batch) -> Any:
        found = self._reading.result()
        if found is None or found[0]["arguments"] != _signature(state, batch):
            return None
        header, program = found
        return _with_trees(program, jax.tree.structure(
            (state, dict.fromkeys(header["metrics"], 0))))

    def _trace(self, state: TrainState, batch: Batch) -> Any:
        """Traces, writes what comes out and compiles it; or lets JAX do all, as always."""
        leaves, tree = jax.tree.flatten((state, batch))
        donated = len(jax.tree.leaves(state))
        results: list[Any] = []

        def step(*leaves: Any) -> list[Any]:
            out, structure = jax.tree.flatten(self._part(*jax.tree.unflatten(tree, leaves)))
            results[:] = [structure]
            return out

        try:
            exported = export.export(jax.jit(step, donate_argnums=range(donated)),
                                     disabled_checks=_CHECKS)(*leaves)
            metrics = list(jax.tree.unflatten(results[0], exported.out_avals)[1])
            payload = bytes(exported.serialize())
        except Exception:  # some programs have no such form
            return self._step
        header = {"digest": xxhash.xxh3_64_hexdigest(payload), "donated": donated,
                  "arguments": _signature(state, batch), "metrics": metrics}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(self.path, json.dumps(header).encode() + b"\n" + payload)
            _drop_old(self.path.parent)
        return _with_trees(self._compile(exported, donated), results[0])

    def _compile(self, exported: export.Exported, donated: int) -> Any:
        devices = list(self._mesh.devices.flat)
        options = xla_flags.compiler_options(devices[0].platform, len(devices))
        whole = sharding.replicated(self._mesh)
        arguments = [jax.ShapeDtypeStruct(  # of a key, JAX gives the sharding of its numbers
            aval.shape, aval.dtype, sharding=found if aval.ndim else whole)
            for aval, found in zip(exported.in_avals, exported.in_shardings_jax(self._mesh),
                                   strict=True)]
        lowered = jax.jit(exported.call, donate_argnums=range(donated),
                          compiler_options=options or None).lower(*arguments)
        self.is_lowered.set()
        return lowered.compile()


def waits_for(step: TrainStep) -> str:
    """What a run says before its first step."""
    if isinstance(step, KeptStep) and step.is_there:
        return "reading the training step, which was compiled before …"
    return "compiling the training step (10 to 60 seconds, once) …"


def _with_trees(program: Any, results: Any) -> TrainStep:
    """A program of leaves as a function of trees."""
    def run(state: TrainState, batch: Batch) -> Any:
        return jax.tree.unflatten(results, program(*jax.tree.leaves((state, batch))))

    return run


def _drop_old(folder: Path) -> None:
    files = sorted(folder.glob("[0-9a-f]*"), key=lambda file: file.stat().st_mtime)
    for old in files[:-KEPT]:
        old.unlink(missing_ok=True)


def _signature(state: TrainState, batch: Batch) -> str:
    """A digest of the names, shapes and types of all arguments."""
    leaves, _ = jax.tree_util.tree_flatten_with_path((state, batch))
    text = "\n".join(f"{jax.tree_util.keystr(path)} {leaf.aval}" for path, leaf in leaves)
    return hashlib.sha256(text.encode()).hexdigest()


def _about(mesh: Mesh) -> list[str]:
    """Names of the mesh's axes, its devices in order, and the compiler behind them."""
    devices = list(mesh.devices.flat)
    return [str(mesh.shape), *(f"{device.id} {device.device_kind}" for device in devices),
            devices[0].client.platform_version]


def _digest_of_code(modules: Iterable[Path]) -> str | None:
    """Of this package, imported or not, and modules; None where some code lies in no file."""
    main = sys.modules["__main__"]
    given = sys.orig_argv[:sys.orig_argv.index("-c") + 2] if "-c" in sys.orig_argv else []
    file = _file(main)
    if not given and (file is None or not _is_known(file)):
        return None
    digest = hashlib.sha256("\0".join(given).encode())
    for path in sorted({*_PACKAGE.rglob("*.py"), *modules}):
        digest.update(f"{path}\0".encode() + path.read_bytes())
    for name in sorted(_installed_versions()):
        digest.update(f"{name}\0".encode())
    digest.update(sys.version.encode())
    return digest.hexdigest()


def _installed_versions() -> Iterator[str]:
    """Names of folders such as jax-0.10.2.dist-info; to read what is in them takes long."""
    for place in {*sys.path}:
        with contextlib.suppress(OSError), os.scandir(place or ".") as entries:
            yield from (entry.name for entry in entries
                        if entry.name.endswith((".dist-info", ".egg-info")))


def _modules_of_the_user() -> Iterator[Path]:
    """Files of all modules that came neither with Python, nor a package, nor this one."""
    for module in list(sys.modules.values()):
        path = _file(module)
        if path is not None and not _is_ours(path) and not _is_installed(path) and (
                os.path.isfile(path)):
            yield Path(path)


def _file(module: ModuleType) -> str | None:
    name = getattr(module, "__file__", None)
    if not isinstance(name, str):
        return None
    folder, name = os.path.split(name)
    path = os.path.join(_real(folder), name)
    return os.path.realpath(path) if os.path.islink(path) else path


# There are some 1,600 modules in 200 folders; pathlib is too slow for so many too.
_real = functools.cache(os.path.realpath)


def _is_known(path: str) -> bool:
    """Whether the digest covers a program: a verb of this package, or a script of the user's."""
    return _is_ours(path) or not _is_installed(path)


def _is_ours(path: str) -> bool:
    return path.startswith(os.path.join(_PACKAGE, ""))


def _is_installed(path: str) -> bool:
    """Whether a version number stands for a file: it came with Python or a package."""
    return path.startswith(_installed_places()) or not _INSTALLED.isdisjoint(path.split(os.sep))


@functools.cache
def _installed_places() -> tuple[str, ...]:
    """Folders of the standard library and of packages, each with a separator at its end."""
    return tuple(os.path.join(os.path.realpath(sysconfig.get_path(name)), "")
                 for name in ("stdlib", "platstdlib", "purelib", "platlib"))
