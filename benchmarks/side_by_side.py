"""Runs trained side by side on one device, each by a process of its own; a stop saves them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hippocampus.errors import EXIT_TRY_AGAIN, Stopped

_MEMORY = 0.9
"""Share of a GPU's memory that all processes together take."""

Key = tuple[str, int]
"""Of a run: the model's name, and the seed."""

Command = Callable[[Key], list[str]]
"""Arguments of the Python that trains a run."""


def train_all(command: Command, runs: Mapping[Key, Path], *, result: str, parallel: int = 0,
              minutes: float = 0) -> int:
    """Trains what is not finished; returns 0, 75 (the same again goes on) or what failed.

    Args:
      command: what to start for a run.
      runs: their folders.
      result: the file that a finished run has.
      parallel: runs at once; 0 = all.
      minutes: stop and save after; 0 = never.
    """
    todo = [key for key, path in runs.items() if not (path / result).is_file()]
    at_once = max(1, min(parallel or len(todo), len(todo)))
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished; {at_once} at once",
          flush=True)
    stopping, codes = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.append("a signal"))
    begin, going, told = time.monotonic(), {}, False
    while going or (todo and not stopping):
        while todo and not stopping and len(going) < at_once:
            key = todo.pop(0)
            going[key] = _start(command(key), runs[key], at_once)
        time.sleep(0.2)
        if minutes and time.monotonic() - begin > 60 * minutes and not stopping:
            stopping.append(f"--minutes={minutes:g}")
        if stopping and not told:
            print(f"stopping ({stopping[0]}): every run saves", flush=True)
            for process in going.values():
                process.send_signal(signal.SIGTERM)
            told = True
        for key, process in list(going.items()):
            if process.poll() is not None:
                codes[key] = going.pop(key).returncode
                print(f"{key[0]} seed {key[1]}: " + ("done" if not codes[key] else
                      f"exit code {codes[key]}: {_last_line(log_of(runs[key]))}"), flush=True)
    # A run that had not begun when it was to stop knows no signals yet.
    wrong = [code for code in codes.values() if code not in (0, EXIT_TRY_AGAIN, -signal.SIGTERM)]
    return wrong[0] if wrong else EXIT_TRY_AGAIN if todo or any(codes.values()) else 0


def fit_until_stopped(config: str, workdir: Path, overrides: Mapping[str, str]) -> bool:
    """Trains one run to its end, as each process does; False where a signal stopped it."""
    from hippocampus.config_files import load_config
    from hippocampus.training.loop import fit
    from hippocampus.training.signals import StopSignal

    with StopSignal(owns_process=True) as stop:
        try:
            fit(load_config(config, overrides), workdir, stop=stop)
        except Stopped as error:
            sys.stdout.write(f"stopped: {error.message}\n")
            return False
    return True


def log_of(path: Path) -> Path:
    """What a run printed; a run folder to be must be empty."""
    return path.with_suffix(".log")


def _start(arguments: list[str], path: Path, at_once: int) -> subprocess.Popen:
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY / at_once:.4f}",
        "JAX_COMPILATION_CACHE_DIR": str(path.parents[1].resolve() / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ}
    with log_of(path).open("ab") as log:
        return subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT,
                                env=environment, cwd=os.getcwd(), start_new_session=True)


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else ""
