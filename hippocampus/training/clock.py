"""Where a run's time goes, and how fast it is without what is not training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from hippocampus.config import Config
from hippocampus.devices import choose, this_device
from hippocampus.models.flops import training_flops_per_token

KINDS = ("training", "start", "compile", "data", "checkpoint", "evaluation", "samples", "profile",
         "lost")
"""What a run's seconds are spent on. Training is all that is none of the others: start (reading
data, restoring), compile (of the training step), data (waiting for a batch), checkpoint (what a
save holds up), evaluation, samples (and histograms), profile (what a trace holds up), lost
(training that had to be done again)."""

_NOT_PAUSED = ("data",)  # a run that waits for its data is a slow run


class Clock:
    """Tokens per second between logged steps, and the account of time of the whole run."""

    def __init__(self, config: Config, n_devices: int, started: float | None = None):
        """Knows what a step costs.

        Args:
          config: of the run.
          n_devices: over all processes.
          started: `time.perf_counter()` at the start of the run; default: now.
        """
        self._tokens = config.train.batch_size * config.data.context
        self._steps = config.train.steps
        self._flops = training_flops_per_token(config)
        self._peak = choose(this_device()).peak_flops * n_devices
        self._pause = 0.0
        self._last: tuple[int, float] | None = None
        self._rate: float | None = None
        self._started = time.perf_counter() if started is None else started
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._before = dict.fromkeys(KINDS, 0.0)

    def carry_on(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Goes on with the account of earlier starts.

        Args:
          rows: of metrics.jsonl, those behind `step` too: training after it was lost.
          step: where the run goes on.
        """
        timed = [row for row in rows if row.get("time/training") is not None]
        if not timed:
            return
        kept = [row for row in timed if row["step"] <= step]
        self._before = {kind: timed[-1].get(f"time/{kind}") or 0.0 for kind in KINDS}
        done_again = self._before["training"] - (kept[-1]["time/training"] if kept else 0.0)
        self._before["training"] -= done_again
        self._before["lost"] += done_again

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """A context whose time is put down as one of `KINDS`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[kind] += seconds
            if kind not in _NOT_PAUSED:
                self._pause += seconds

    def begins(self) -> None:
        """The loop begins: what was before it is the start."""
        self._seconds["start"] = time.perf_counter() - self._started

    def account(self) -> dict[str, float]:
        """Seconds of every kind, over all starts of the run."""
        others = sum(self._seconds.values())
        now = {**self._seconds, "training": time.perf_counter() - self._started - others}
        return {kind: self._before[kind] + now[kind] for kind in KINDS}

    def lap(self, step: int) -> dict[str, float]:
        """The series since the last lap; no speed for the first, which holds the compilation."""
        now, values = time.perf_counter(), {}
        if self._last is not None and step > self._last[0]:
            seconds = max(1e-9, now - self._last[1] - self._pause)
            self._rate = (step - self._last[0]) / seconds
            tokens = self._rate * self._tokens
            values["train/tokens_per_second"] = tokens
            if self._peak:
                values["train/mfu"] = tokens * self._flops / self._peak
        self._last, self._pause = (step, now), 0.0
        times = {f"time/{kind}": seconds for kind, seconds in self.account().items()}
        return {**values, **times, **_peak_memory()}

    def seconds_left(self, step: int) -> float | None:
        """At the last lap's rate; None before there is one."""
        return (self._steps - step) / self._rate if self._rate else None


def summary(account: Mapping[str, float]) -> str:
    """One line for a person: how much of the time was training, and what the rest was."""
    total = max(1e-9, sum(account.values()))
    rest = sorted(((seconds, kind) for kind, seconds in account.items()
                   if kind != "training" and seconds >= 0.001 * total), reverse=True)
    parts = [f"{account['training'] / total:.1%} training",
             *(f"{seconds / total:.1%} {kind}" for seconds, kind in rest)]
    return f"time: {clock_face(total)}, {', '.join(parts)}"


def clock_face(seconds: float) -> str:
    """Seconds as 1h02m or 3m04s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def _peak_memory() -> dict[str, float]:
    """The most memory in use so far on this process's first device; nothing where it is unknown."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"train/peak_memory_gib": peak / 2**30}
