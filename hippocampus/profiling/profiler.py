"""`python -m hippocampus.train --profile`: traces a few steps of a run that goes on behind them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from hippocampus import distributed
from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError, HippocampusError
from hippocampus.files import write_atomically
from hippocampus.profiling.profile import make_profile
from hippocampus.profiling.trace import read_trace
from hippocampus.training.console import RunConsole
from hippocampus.training.state import TrainState
from hippocampus.training.step import Metrics, TrainStep

WARM_UP = 3
"""Steps before the traced ones, where the run has so many: the first ones allocate and tune."""


class Profiler:
    """Traces `steps` steps of a run, once, on its first process."""

    def __init__(self, steps: int):
        """For so many steps.

        Raises:
          ConfigError: fewer than one.
        """
        if steps < 1:
            raise ConfigError(f"--profile={steps} traces nothing", "give at least 1 step")
        self._steps = steps
        self._done = False

    def watch(self, step: TrainStep, config: Config, done: int, folder: Path, console: RunConsole,
              pause: Callable[[], AbstractContextManager]) -> TrainStep:
        """The step function, but traced when it has run a few times.

        Args:
          step: from `jit_train_step`.
          config: of the run.
          done: steps that the run has done.
          folder: where the trace and profile.json go.
          console: where the table goes.
          pause: a context for time that is not training.

        Raises:
          ConfigError: the run ends before the steps are traced.
        """
        if self._done or not distributed.is_first():
            return step
        self._done = True
        left = config.train.steps - done
        if left < self._steps + 1:
            raise ConfigError(f"--profile={self._steps} needs {self._steps + 1} steps (the first "
                              f"one compiles), and this run has {left} left",
                              "raise train.steps, or trace fewer steps")
        begin = 1 + min(WARM_UP, left - self._steps - 1)
        return _Traced(step, config, begin, self._steps, folder, console, pause)


class _Traced:
    """A step function that counts its calls."""

    def __init__(self, step: TrainStep, config: Config, begin: int, steps: int, folder: Path,
                 console: RunConsole, pause: Callable[[], AbstractContextManager]):
        self._step, self._config, self._folder = step, config, folder
        self._console, self._pause = console, pause
        self._first, self._last = begin, begin + steps
        self._calls = 0
        self._compiled: Any = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if self._compiled is None:
            # Ahead of time, because only this gives the text of the program.
            jitted: Any = self._step
            self._compiled = jitted.lower(state, batch).compile()
        if self._calls == self._first:
            with self._pause():
                jax.block_until_ready(state)
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0  # every call of Python would slow the host down
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
        self._calls += 1
        with jax.profiler.StepTraceAnnotation("train", step_num=self._calls):
            state, metrics = self._compiled(state, batch)
        if self._calls == self._last:
            with self._pause():
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                self._conclude()
        return state, metrics

    def _conclude(self) -> None:
        """Prints and keeps the table. A run does not end because its trace cannot be read."""
        try:
            profile = make_profile(read_trace(self._folder), self._compiled.as_text(),
                                   self._last - self._first, self._config, len(jax.devices()))
            write_atomically(self._folder / "profile.json", profile.to_json())
        except (HippocampusError, OSError) as error:
            self._console.say(f"warning: no profile: {error}")
            return
        self._console.show(profile.render())
        self._console.say(f"trace and profile.json in {self._folder}")
