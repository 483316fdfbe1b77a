"""Training steps of a config with random tokens, on any devices: what several benchmarks time."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.training import sharding
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.step import jit_train_step, sharded_init, train_step


@dataclass(frozen=True)
class Program:
    """A compiled training step, and what it starts from.

    Attributes:
      config: resolved for the devices.
      tokens: of one step.
      bytes_per_device: state, batch and temporary arrays, as the compiler counts them.
    """

    config: Config
    parameters: int
    step: Callable[[Any, Any], tuple[Any, Any]]
    first: Callable[[], Any]
    batch: Any
    tokens: int
    bytes_per_device: int
    compile_seconds: float


@dataclass(frozen=True)
class Measured:
    """Seconds of a step (median of `n` that were queued one by one), and the loss after each."""

    seconds: float
    losses: tuple[float, ...]


def compile_step(config: Config, devices: list[Any]) -> Program:
    """Compiles the training step of a config for a mesh over these devices."""
    config, _ = resolve(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    begin = time.perf_counter()
    first, like, shardings = sharded_init(model, optimizer, config, mesh)
    # With the step, because programs are compiled side by side and run one after the other.
    first = functools.partial(first.func.lower(*first.args).compile(), *first.args)
    B, T = config.train.batch_size, config.data.context
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1), np.int32)
    documents = np.zeros((B, T), np.int32) if config.data.documents == "packed" else None
    batch = sharding.to_devices(
        Batch(ids[:, :-1], ids[:, 1:], np.ones((B, T), np.float32), documents), mesh)
    function: Any = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    compiled = function.lower(like, batch).compile()
    memory = compiled.memory_analysis()
    return Program(config, count_parameters(model), compiled, first, batch, B * T,
                   memory.argument_size_in_bytes + memory.temp_size_in_bytes
                   + memory.output_size_in_bytes - memory.alias_size_in_bytes,
                   time.perf_counter() - begin)


def measure(program: Program, steps: int = 6) -> Measured:
    """Times steps on one batch; the first one is not counted.

    As in training, the next step is queued before the loss of the last one is fetched.
    """
    state, queued, losses, marks = program.first(), [], [], []
    for step in range(steps + 2):
        state, metrics = program.step(state, program.batch)
        queued.append(metrics["train/loss"])
        if step:
            losses.append(float(jax.device_get(queued[step - 1])))
            marks.append(time.perf_counter())
    return Measured(float(np.median(np.diff(marks))), tuple(losses))


def one_line(error: BaseException) -> str:
    """Why a step could not be compiled or run, short enough for a table."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0][:100]}"
