"""Several real processes on this machine, over loopback: started, watched, and always ended."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import quick_xla
import tiny_run

MAX_SECONDS = 150
_FOREIGN = ("SLURM_", "OMPI_", "PMI", "JAX_", "XLA_", "TPU_", "MEGASCALE_", "HIPPOCAMPUS_")


@dataclass
class Process:
    """One of them, with what it printed so far."""

    popen: subprocess.Popen
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        """The lines that a person is meant to see."""
        return [line for line in self.stderr if line.startswith(("error:", "stopped:", "hint:"))]


def clean_environment(n_devices: int, **extra: str) -> dict[str, str]:
    """Ours, without what a cluster or a proxy left in it."""
    env = {name: value for name, value in tiny_run.environment().items()
           if (not name.startswith(_FOREIGN) or name.startswith("JAX_COMPILATION_CACHE")
               or name.startswith("JAX_PERSISTENT")) and "proxy" not in name.lower()}
    return {**env, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(n_devices),
            "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
            "XLA_FLAGS": " ".join(quick_xla.FLAGS), **extra}


def free_port() -> int:
    """A port that was free a moment ago; another program may take it before its user does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]], n_devices: int, **env: str) -> Iterator[
        list[Process]]:
    """Starts one process per command; none outlives the context."""
    processes: list[Process] = []
    try:
        for command in commands:
            popen = subprocess.Popen(
                command, env=clean_environment(n_devices, **env), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            processes.append(Process(popen))
            for pipe, lines in ((popen.stdout, processes[-1].stdout),
                                (popen.stderr, processes[-1].stderr)):
                threading.Thread(target=_read, args=(pipe, lines), daemon=True).start()
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


def _read(pipe: Any, lines: list[str]) -> None:
    lines.extend(line.rstrip("\n") for line in pipe)


def wait(processes: Sequence[Process], seconds: float = MAX_SECONDS) -> list[int]:
    """Exit codes, when all have ended."""
    give_up = time.monotonic() + seconds
    for process in processes:
        try:
            process.popen.wait(max(0.1, give_up - time.monotonic()))
        except subprocess.TimeoutExpired:
            shown = "\n".join(f"--- {i}: {p.popen.poll()}\n" + "\n".join(
                [*p.stdout[-15:], *p.stderr[-15:]]) for i, p in enumerate(processes))
            raise AssertionError(f"still running after {seconds} s\n{shown}") from None
    return [process.popen.returncode for process in processes]


def commands(workdir: Path, n: int, port: int, changes: Any = None,
             of_process: dict[int, dict[str, Any]] | None = None,
             flags: Sequence[str] = ()) -> list[list[str]]:
    """The train command of every process; `of_process` are changes for one of them."""
    found = []
    for i in range(n):
        command = tiny_run.command(workdir, **{**(changes or {}), **(of_process or {}).get(i, {})})
        if n > 1:
            command += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={n}",
                        f"--process_id={i}"]
        found.append([*command, *flags])
    return found


def train(workdir: Path, n: int, n_devices: int, changes: Any = None, *,
          of_process: dict[int, dict[str, Any]] | None = None, flags: Sequence[str] = (),
          **env: str) -> list[Process]:
    """Trains on n processes of n_devices each, to the end; a lost race for the port is repeated."""
    for _ in range(3):
        with started(commands(workdir, n, free_port(), changes, of_process, flags), n_devices,
                     **env) as processes:
            wait(processes)
        if not any("address already in use" in line.lower()
                   for process in processes for line in process.stderr):
            break
    return processes


def evaluate(workdir: Path, n: int) -> list[Process]:
    """Evaluates a run on n processes of one device each."""
    port = free_port()
    commands = [[sys.executable, "-m", "hippocampus.evaluate", f"--workdir={workdir}",
                 f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={n}",
                 f"--process_id={i}", f"--expect_devices={n}"] for i in range(n)]
    with started(commands, 1) as processes:
        wait(processes)
    return processes


def codes(processes: Sequence[Process]) -> list[int]:
    """Exit codes of ended processes."""
    return [process.popen.returncode for process in processes]
