"""One run's folder: who may write there, and its small files.

    config.json  env.json  data.json  tokenizer.json  backbone.json
    metrics.jsonl  events.*  steps/<n>/  samples/  results.json  evaluations/
    profile/                                   with --profile
    rollbacks.json  bad_batches/  stacks/      only where something went wrong
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import jax

from hippocampus.config_files import read_json
from hippocampus.errors import ConfigError
from hippocampus.files import check_nameable, write_atomically
from hippocampus.runs.redact import redact, redact_command


@dataclass(frozen=True)
class RunFolder:
    """The places in a run folder."""

    path: Path

    @staticmethod
    def at(place: str | Path) -> RunFolder:
        """The run folder at a place that a person named.

        Raises:
          ConfigError: a URL, such as gs://…: a run needs a file system (docs/distributed.md); or
            what no file system can name.
        """
        if match := re.match(r"([a-z][a-z0-9+.-]+):/", str(place)):
            raise ConfigError(
                f"the run folder {redact(str(place))} is not on a file system ({match[1]}://)",
                "train into a mounted or local folder and copy it; docs/distributed.md says how")
        check_nameable(place)
        return RunFolder(Path(place))

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, devices and the command of the last start."""
        return self.path / "env.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the ids belong to."""
        return self.path / "tokenizer.json"

    @property
    def data(self) -> Path:
        """Which text, and how much of it."""
        return self.path / "data.json"

    @property
    def backbone(self) -> Path:
        """Which pretrained decoder; only of a model that has one."""
        return self.path / "backbone.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a row."""
        return self.path / "metrics.jsonl"

    @property
    def steps(self) -> Path:
        """Checkpoints."""
        return self.path / "steps"

    @property
    def samples(self) -> Path:
        """Text written while training."""
        return self.path / "samples"

    @property
    def results(self) -> Path:
        """The evaluation at the end of the run."""
        return self.path / "results.json"

    @property
    def rollbacks(self) -> Path:
        """Where training went back, and which batches it leaves out since."""
        return self.path / "rollbacks.json"

    @property
    def stopped(self) -> Path:
        """The step that a signal stopped the run after, before it was evaluated as was due."""
        return self.path / "stopped.json"

    @property
    def bad_batches(self) -> Path:
        """Batches that training did not survive."""
        return self.path / "bad_batches"

    @property
    def evaluations(self) -> Path:
        """Tables of evaluations, as JSON and CSV."""
        return self.path / "evaluations"

    @property
    def profile(self) -> Path:
        """Traces of single steps, and the table made from them."""
        return self.path / "profile"

    def is_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    def check_usable(self) -> None:
        """Refuses a folder that training could not or must not write to; writes nothing.

        Raises:
          ConfigError: a file, somebody else's folder, in use by another process, or no permission.
          DataError: a config.json that is not a run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"the run folder {self.path} is a file", "choose another --workdir")
        if (self.path / _LOCK).is_file():  # now rather than when the data has been read
            with contextlib.suppress(OSError), open(self.path / _LOCK, "r+") as file:
                _take(file, self.path)
        if self.is_run():
            read_json(self.config)
        elif self.path.is_dir():
            names = {p.name for p in self.path.iterdir()}
            others = names - {".gitkeep", _LOCK}
            if _LOCK in names:  # a run that was killed before its config.json, written last
                others = {name for name in others - {self.tokenizer.name, self.data.name,
                                                     self.environment.name}
                          if not name.endswith(".partial")}
            if others:
                raise ConfigError(f"{self.path} is not empty and not a run folder "
                                  f"(it holds {sorted(others)[0]})", "choose another --workdir")
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write to {nearest}", "choose another --workdir")


_LOCK = ".lock"


class RunLock:
    """The right to write to a run folder, held until `release` or the end of the process."""

    def __init__(self, folder: RunFolder):
        """Takes the lock, creating the folder.

        Raises:
          ConfigError: another process has it, or the folder cannot be written.
        """
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = open(  # noqa: SIM115 - held open
                folder.path / _LOCK, "a+", opener=_not_through_a_link)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder.path}: {error.strerror}",
                              "choose another --workdir") from None
        try:
            _take(self._file, folder.path)
        except ConfigError:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Gives the lock back."""
        self._file.close()


def _take(file: TextIO, folder: Path) -> None:
    """Locks the file, or says who has it.

    The kernel drops a lock with its process, so a killed run leaves none behind. A file system
    without locks (some network and FUSE mounts) leaves the name in the file: it counts as long as
    that process lives, which can be known on its own host only.
    """
    file.seek(0)
    holder = file.read().strip()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    except OSError:
        match = re.fullmatch(r"process (\d+) on (.*)", holder)
        own = match and (match[2] != socket.gethostname() or int(match[1]) == os.getpid())
        if not match or own or not Path(f"/proc/{match[1]}").exists():
            return
    raise ConfigError(f"{folder} is in use by {holder or 'another process'}",
                      "wait for it, or choose another --workdir")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that a crash tore, or that is no row, is left out."""
    rows = []
    # A crash of the machine can leave bytes of other files behind.
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                rows.append(row)
    return rows


def cut_metrics(path: Path, step: int, evaluated: bool = True) -> None:
    """Removes the rows after `step`, which will be written again.

    Args:
      path: of metrics.jsonl.
      step: the last one to keep.
      evaluated: whether its own evaluation is kept too.
    """
    rows = read_metrics(path)
    kept = [row for row in rows if row.get("step", 0) < step + (
        evaluated or "eval/loss" not in row)]
    if path.exists():
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def environment() -> dict[str, Any]:
    """What a reader needs to reproduce a number: versions, commit, devices, flags, command."""
    packages = ("hippocampus", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy",
                "tokenizers", "datasets", "grain")
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(), "platform": platform.platform(),
        "packages": versions, "commit": _commit(),
        "command": redact_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(), "xla_flags": redact(os.environ.get("XLA_FLAGS", "")),
        "cpu_count": os.cpu_count(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with + if it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = subprocess.run([*git, "describe", "--always", "--dirty=+", "--abbrev=12"],
                             capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def _not_through_a_link(path: str, flags: int) -> int:
    """Opens a file that is emptied: a link in a folder from elsewhere could name any other."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
