"""The trace that `jax.profiler` writes, read as what each device ran and when.

    <folder>/plugins/profile/<time>/<host>.xplane.pb

A GPU has a line of events for each stream, a TPU one for its operations, a CPU one for each
thread. The instruction of an event is its "hlo_op", or, on TPUs, its name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hippocampus.errors import DataError


@dataclass(frozen=True)
class Event:
    """What ran from `start` to `end` (nanoseconds) on one line of a device.

    Attributes:
      line: number of the stream or thread.
      instruction: of the compiled program; "" for what is none (a transfer).
      module: the program's name; "" where the trace does not say.
      op_name: its scopes, where the trace has them.
    """

    line: int
    start: float
    end: float
    instruction: str
    module: str = ""
    op_name: str = ""


@dataclass(frozen=True)
class DeviceTrace:
    """The events of one device."""

    name: str
    events: tuple[Event, ...]


def read_trace(folder: Path) -> list[DeviceTrace]:
    """The devices of the newest trace in a folder.

    Raises:
      DataError: there is no trace, it cannot be read, or no device ran anything in it.
    """
    files = sorted(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise DataError(f"no trace (*.xplane.pb) in {folder}", "train with --profile")
    try:
        devices = list(_devices(files[-1]))
    except DataError:
        raise
    except Exception as error:  # whatever its parser raises for bytes that are no trace
        raise DataError(f"{files[-1]} cannot be read as a trace: {error}",
                        "train with --profile again") from None
    if not devices:
        raise DataError(f"no device ran anything in {files[-1]}", "train with --profile again; "
                        "on a GPU tracing needs access to its counters (CUPTI)")
    return devices


def _devices(path: Path) -> Iterator[DeviceTrace]:
    from jax.profiler import ProfileData

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the extension's own types
        data = ProfileData.from_file(str(path))
        planes = list(data.planes)
        accelerators = [plane for plane in planes if re.match(r"/device:(GPU|TPU)", plane.name)]
        for plane in accelerators or [p for p in planes if p.name == "/host:CPU"]:
            by_ordinal: dict[int, list[Event]] = {}
            for ordinal, event in _events(plane):
                by_ordinal.setdefault(ordinal, []).append(event)
            for ordinal, events in sorted(by_ordinal.items()):
                if any(event.instruction for event in events):
                    name = plane.name if accelerators else f"{plane.name} {ordinal}"
                    yield DeviceTrace(name, tuple(events))


def _events(plane: Any) -> Iterator[tuple[int, Event]]:
    """Events with the number of their device within the plane."""
    lines, on_host = list(plane.lines), not plane.name.startswith("/device:")
    if any(line.name == "XLA Ops" for line in lines):  # the other lines sum them up
        chosen = [line for line in lines if line.name == "XLA Ops"]
    elif on_host:
        chosen = lines
    else:
        chosen = [line for line in lines if "Stream" in line.name]
    for number, line in enumerate(chosen):
        named = line.name == "XLA Ops"
        for event in line.events:
            stats = dict(event.stats)
            instruction = str(stats.get("hlo_op", "")).split("::")[-1]
            if not instruction and named:  # "%fusion.3 = bf16[8,128] fusion(…)"
                instruction = event.name.partition(" = ")[0].strip().lstrip("%")
            if not event.duration_ns or (on_host and not instruction):
                continue
            yield int(stats.get("device_ordinal", 0)) if on_host else 0, Event(
                number, event.start_ns, event.start_ns + event.duration_ns, instruction,
                str(stats.get("hlo_module", "")), str(stats.get("tf_op", "")).rstrip(":"))
