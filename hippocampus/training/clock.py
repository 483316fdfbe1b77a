"""How fast a run is, without what is not training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from hippocampus.config import Config
from hippocampus.devices import choose, this_device
from hippocampus.models.flops import training_flops_per_token


class Clock:
    """Tokens per second between logged steps, without evaluation, saving and compiling."""

    def __init__(self, config: Config, n_devices: int):
        """Knows what a step costs."""
        self._tokens = config.train.batch_size * config.data.context
        self._steps = config.train.steps
        self._flops = training_flops_per_token(config)
        self._peak = choose(this_device()).peak_flops * n_devices
        self._pause = 0.0
        self._last: tuple[int, float] | None = None
        self._rate: float | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._pause += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        """The series since the last lap; none for the first, which holds the compilation."""
        now, values = time.perf_counter(), {}
        if self._last is not None and step > self._last[0]:
            seconds = max(1e-9, now - self._last[1] - self._pause)
            self._rate = (step - self._last[0]) / seconds
            tokens = self._rate * self._tokens
            values["train/tokens_per_second"] = tokens
            if self._peak:
                values["train/mfu"] = tokens * self._flops / self._peak
        self._last, self._pause = (step, now), 0.0
        return {**values, **_peak_memory()}

    def seconds_left(self, step: int) -> float | None:
        """At the last lap's rate; None before there is one."""
        return (self._steps - step) / self._rate if self._rate else None


def _peak_memory() -> dict[str, float]:
    """The most memory in use so far on this process's first device; nothing where it is unknown."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"train/peak_memory_gib": peak / 2**30}
