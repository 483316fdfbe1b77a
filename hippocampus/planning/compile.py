"""Compiles the real training step for devices that are not here."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.errors import OutOfMemoryError
from hippocampus.planning.hlo import parse
from hippocampus.planning.traffic import Traffic, traffic
from hippocampus.training import sharding
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.step import jit_train_step, sharded_init, train_step

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device while a step runs.

    Attributes:
      arguments: train state and batch.
      outputs: the new state and the metrics.
      aliased: of the outputs, what takes the place of arguments.
      temporaries: activations, gradients, buffers.
      code: the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """What the step needs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a training step, per device.

    Attributes:
      seconds: that lowering and compiling took here.
      memory: bytes on each device.
      xla_flops: XLA's count: a loop's body once, custom calls not at all.
      traffic: bytes moved, with loops multiplied out.
    """

    seconds: float
    memory: Memory
    xla_flops: float
    traffic: Traffic


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """The shapes of a training batch, laid out on the mesh."""
    shape = (config.train.batch_size, config.data.context)
    rows = sharding.batch_sharding(mesh)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    batch = Batch(array(jnp.int32), array(jnp.int32), array(jnp.float32))
    if config.data.documents == "packed":
        batch = batch.replace(document_ids_BT=array(jnp.int32), positions_BT=array(jnp.int32))
    if config.data.order == "streams":
        rows_B = sharding.batch_sharding(mesh, 1)
        batch = batch.replace(reset_B=jax.ShapeDtypeStruct(shape[:1], jnp.bool_, sharding=rows_B))
    return batch


def compile_step(config: Config, model: Any, mesh: Mesh, platform: str) -> CompiledStep:
    """Lowers and compiles the training step; nothing is computed.

    Args:
      config: resolved for the devices of the mesh.
      model: of that config.
      mesh: over devices that can be compiled for.
      platform: of those devices, "tpu".

    Raises:
      OutOfMemoryError: the compiler could not make it fit.
    """
    start = time.monotonic()
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    _, state, shardings = sharded_init(model, optimizer, config, mesh)
    step: Any = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    lowered = step.trace(state, abstract_batch(config, mesh)).lower(
        lowering_platforms=(platform,))
    try:
        compiled = lowered.compile()
    except Exception as error:
        known = out_of_memory(str(error), config, mesh)
        if known is None:
            raise
        raise known from error
    seconds = time.monotonic() - start
    stats, costs = compiled.memory_analysis(), compiled.cost_analysis()
    memory = Memory(stats.argument_size_in_bytes, stats.output_size_in_bytes,
                    stats.alias_size_in_bytes, stats.temp_size_in_bytes,
                    stats.generated_code_size_in_bytes)
    return CompiledStep(seconds, memory, float(costs.get("flops", 0)),
                        traffic(parse(compiled.as_text())))


def out_of_memory(text: str, config: Config, mesh: Mesh) -> OutOfMemoryError | None:
    """The compiler's refusal as one line with both sizes; None: it is about something else."""
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        return None
    size = r"([\d.]+)([KMGT]?)"
    whole = re.search(rf"Used {size} of {size} hbm", text)
    part = re.search(rf"required for (?:HLO )?([\w ]+) \({size}\) exceeds available HBM "
                     rf"\({size}\)", text)
    sizes = ""
    if whole:
        needs, there = _gib(whole[1], whole[2]), _gib(whole[3], whole[4])
        sizes = f": it needs {needs:.2f} GiB of each device's usable {there:.2f} GiB"
    elif part:
        needs, there = _gib(part[2], part[3]), _gib(part[4], part[5])
        sizes = (f": {part[1]} alone need {needs:.2f} GiB of each device's usable "
                 f"{there:.2f} GiB")
    return OutOfMemoryError(f"{config.name} does not fit{sizes}", advice(config, mesh))


def _gib(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit] / GIB


def advice(config: Config, mesh: Mesh) -> str:
    """What to change to need less memory, the cheapest first."""
    steps = []
    if config.model.remat != "full":
        steps.append("model.remat=" + ("dots" if config.model.remat in ("none", "mlp") else "full"))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    k = 2 * config.train.grad_accumulation
    if config.train.batch_size % (ways * k) == 0:
        steps.append(f"train.grad_accumulation={k}")
    if config.train.batch_size > ways:
        steps.append(f"a smaller train.batch_size (it is {config.train.batch_size})")
    if mesh.shape["fsdp"] == 1 and mesh.shape["data"] > 1:
        steps.append(f"mesh.fsdp={mesh.shape['data']} (spreads parameters and optimizer)")
    return "try " + ", or ".join(steps or ["a smaller data.context", "more devices"])


def largest_batch(memory: Memory, gradients: int, batch_size: int, unit: int,
                  limit: int) -> int:
    """About how many sequences a step could have in a memory of `limit` bytes.

    All temporaries but the gradients are taken to grow with the batch. The compiler can trade
    time for memory, so this is a rough figure.

    Args:
      memory: of a step of `batch_size` sequences.
      gradients: bytes of them on each device.
      batch_size: sequences per step, over all devices.
      unit: what a batch must be a multiple of.
      limit: usable bytes of a device.
    """
    grows = max(1, memory.temporaries - gradients)
    fixed = memory.total - grows
    return max(0, int((limit - fixed) / grows * batch_size) // unit * unit)
