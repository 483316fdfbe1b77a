"""What the benchmarks share: how a time is taken, the memory's speed, and the table.

Everything that is compared is measured in one run, after a warm-up, as the median over batches of
queued calls with one wait at the end of each batch: what the host needs for a call then overlaps
with the device, as it does in training.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "torch", "triton")


def median_seconds(run: Callable[[], Any], sync: Callable[[Any], Any] | None = None, *,
                   batches: int = 5, batch_seconds: float = 0.1, warm_up: int = 2) -> float:
    """Seconds of one call.

    Args:
      run: queues the work and gives its result.
      sync: waits for a result; default `jax.block_until_ready`. For torch:
        `lambda _: torch.cuda.synchronize()`.
      batches: batches of calls; the median counts.
      batch_seconds: about so long takes a batch; it has one call at least, and 1,000 at most.
      warm_up: calls before the first that counts (the first compiles).
    """
    if sync is None:
        import jax

        sync = jax.block_until_ready
    for _ in range(max(1, warm_up)):
        sync(run())
    begin = time.perf_counter()
    sync(run())
    once = max(1e-7, time.perf_counter() - begin)
    calls = min(1000, max(1, math.ceil(batch_seconds / once)))
    seconds = []
    for _ in range(batches):
        begin = time.perf_counter()
        for _ in range(calls):
            result = run()
        sync(result)
        seconds.append((time.perf_counter() - begin) / calls)
    return statistics.median(seconds)


def copy_bandwidth(n_bytes: int | None = None) -> float:
    """Bytes/s that the device moves, read and written, in `x + 1` over one large array.

    Args:
      n_bytes: of the array; default 1 GiB on an accelerator, 128 MiB on a CPU.
    """
    import jax
    import jax.numpy as jnp

    if n_bytes is None:
        n_bytes = 2**27 if jax.default_backend() == "cpu" else 2**30
    array = jnp.zeros(n_bytes // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * array.nbytes / median_seconds(lambda: add(array))


def header(hardware: str = "") -> str:
    """One line: hardware (default: of this process), versions, and the command that is running."""
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    script, *arguments = sys.argv
    command = shlex.join(["python", os.path.relpath(script), *arguments])
    return f"{hardware or this_hardware()} | {', '.join(versions)} | {command}"


@dataclass(frozen=True)
class Row:
    """One line of a table; times in seconds, None = there is none.

    Attributes:
      what: was measured.
      seconds: it took.
      peer: what it is compared with took.
      floor: the least it could take.
      note: anything else.
    """

    what: str
    seconds: float
    peer: float | None = None
    floor: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the peer."""
        return None if self.peer is None else self.peer / self.seconds

    @property
    def share(self) -> float | None:
        """Of the roofline that is reached."""
        return None if self.floor is None else self.floor / self.seconds


class Table:
    """Lines with the ratio first, then the time, then the share of the roofline.

    Each is printed as it is added, so that a run that is stopped keeps what it has measured.
    """

    def __init__(self, title: str, peer: str = "peer", *, hardware: str = "", file: Any = None):
        """Prints the hardware, the versions and the command, and the names of the columns.

        Args:
          title: what is compared.
          peer: what the ratio is against.
          hardware: where processes of their own measured; default: what this one uses.
          file: to print to; default: the standard output.
        """
        self.rows: list[Row] = []
        self._file = file
        self._print(header(hardware))
        self._print(f"{title}; ratio = time of {peer} / time")
        self._print(f"{'ratio':>7} {'time':>12} {'roofline':>9}  what")

    def add(self, what: str, seconds: float, *, peer: float | None = None,
            floor: float | None = None, note: str = "") -> Row:
        """Prints a line and keeps it; arguments as the attributes of `Row`."""
        row = Row(what, seconds, peer, floor, note)
        self.rows.append(row)
        self._print(f"{_number(row.ratio, '.2f'):>7} {duration(seconds):>12} "
                    f"{_number(row.share, '.1%'):>9}  {what}{'  ' + note if note else ''}")
        return row

    def fail(self, what: str, error: BaseException) -> None:
        """A line for what could not be measured; the others go on."""
        text = (str(error).strip().splitlines() or [""])[0][:160]
        self._print(f"{'-':>7} {'-':>12} {'-':>9}  {what}  failed: {type(error).__name__}: {text}")

    def markdown(self) -> str:
        """The rows as a table of Markdown."""
        lines = ["| what | ratio | time | roofline | |", "|---|---|---|---|---|"]
        lines += [f"| {row.what} | {_number(row.ratio, '.2f')} | {duration(row.seconds)} | "
                  f"{_number(row.share, '.1%')} | {row.note} |" for row in self.rows]
        return "\n".join(lines)

    def _print(self, line: str) -> None:
        print(line, file=self._file or sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """A time with a unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds * 1e9:.1f} ns"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def this_hardware() -> str:
    """The devices of JAX, if this process uses it, else the processor."""
    if "jax" not in sys.modules:
        return f"{platform.machine()}, {os.cpu_count()} cores"
    import jax

    devices = jax.devices()
    cores = f" ({os.cpu_count()} cores)" if devices[0].platform == "cpu" else ""
    return f"{len(devices)} x {devices[0].device_kind}{cores}"
