"""A long run in a process of its own, which notes every 25 steps what it holds.

    python tests/training/soak.py WORKDIR STEPS     prints one JSON object a line
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_run

from hippocampus.training import trackers
from hippocampus.training.loop import fit

EVERY = 25
ALL_EVERY = 100
"""After so many steps everything that is not a step is done once: score, save, draw, sample."""
COMPILATION = "/jax/core/compile/backend_compile_duration"

compiled = []
scalars = trackers.JsonLines.scalars


def resident_kib() -> int:
    """Of what this process allocated itself, swapped out or not."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would look like growth
    status = dict(line.split(":", 1) for line in
                  Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap") if name in status)


def sample(workdir: Path, step: int) -> dict[str, Any]:
    """What is held now."""
    return {
        "step": step, "resident_kib": resident_kib(), "blocks": sys.getallocatedblocks(),
        "arrays": len(jax.live_arrays()), "fds": len(os.listdir("/proc/self/fd")),
        "compiled": len(compiled),
        "metrics_bytes": (workdir / "metrics.jsonl").stat().st_size,
        "tensorboard_bytes": sum(p.stat().st_size for p in workdir.glob("events.*"))}


def main(workdir: Path, steps: int) -> None:
    """Trains, evaluates, draws, samples and saves, over and over."""
    samples = []

    def noting(self: trackers.JsonLines, step: int, values: Any) -> None:
        scalars(self, step, values)
        if step % EVERY == 0 and "train/loss" in values:
            samples.append(sample(workdir, step))

    trackers.JsonLines.scalars = noting  # type: ignore[method-assign]
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **about: compiled.append(name) if name == COMPILATION else None)
    fit(tiny_run.config(
        train__steps=steps, log__every_steps=1, eval__every_steps=ALL_EVERY,
        checkpoint__every_steps=ALL_EVERY, log__histogram_every_steps=ALL_EVERY,
        sample__every_steps=ALL_EVERY), workdir)
    print(json.dumps(samples))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
