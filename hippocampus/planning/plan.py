"""A plan: everything that is known of a training step before there is a machine to run it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax

from hippocampus.config import MESH_AXES, Config
from hippocampus.devices import choose, portable, resolve
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.models.flops import training_flops_per_token
from hippocampus.planning.compile import CompiledStep, compile_step, largest_batch
from hippocampus.planning.roofline import Roofline, mfu, roofline
from hippocampus.planning.topology import Topology, compile_only_devices
from hippocampus.training import sharding
from hippocampus.training.check import device_bytes
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.step import sharded_init

USABLE = 0.96
"""Share of a device's memory that programs get, about: 15.48 of 16 GiB on a v3."""


@dataclass(frozen=True)
class Plan:
    """A training step on a topology; bytes and FLOPs of `step` are per device.

    Attributes:
      config: resolved for the device.
      topology: where.
      mesh: axis -> size.
      parameters: of the model, without padding.
      tokens: per step.
      flops: per step over all devices, counted from the config (hippocampus.models.flops).
      state_bytes: the train state on each device.
      step: what the compiler says; None where there is no compiler for the device.
      bound: the least time of a step.
      batch_limit: about the largest `train.batch_size`; None = not known.
      versions: of what made this plan.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    parameters: int
    tokens: int
    flops: float
    state_bytes: int
    step: CompiledStep | None
    bound: Roofline
    batch_limit: int | None
    versions: dict[str, str]

    @property
    def fits(self) -> bool | None:
        """Whether the step fits a device's memory; None = not known."""
        if self.step is None:
            return False if self.state_bytes > self.topology.chip.memory_bytes else None
        return self.step.memory.total <= self.topology.chip.memory_bytes

    @property
    def mfu_bound(self) -> float | None:
        """Model FLOPs utilisation if a step took no longer than the bound."""
        peak = choose(self.topology.device).peak_flops
        seconds = self.bound.seconds
        if not peak or not seconds:
            return None
        return mfu(self.flops / self.topology.n_devices, seconds, peak)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values: bytes, seconds, FLOPs."""
        step, seconds = self.step, self.bound.seconds
        values: dict[str, Any] = {
            "config": self.config.name, "topology": self.topology.name,
            "device": self.topology.device.kind, "devices": self.topology.n_devices,
            "mesh": self.mesh, "compute_dtype": self.config.model.compute_dtype,
            "remat": self.config.model.remat, "scan_layers": self.config.model.scan_layers,
            "grad_accumulation": self.config.train.grad_accumulation,
            "parameters": self.parameters, "batch_size": self.config.train.batch_size,
            "context": self.config.data.context, "tokens_per_step": self.tokens,
            "flops_per_step": self.flops, "state_bytes": self.state_bytes,
            "memory_bytes_of_device": self.topology.chip.memory_bytes, "fits": self.fits,
            "largest_batch_size": self.batch_limit, "compiled": None,
            "bound": {**dataclasses.asdict(self.bound), "seconds": seconds,
                      "by": self.bound.bound_by, "mfu": self.mfu_bound,
                      "tokens_per_second": self.tokens / seconds if seconds else None},
            "versions": self.versions}
        if step is not None:
            values["compiled"] = {
                **dataclasses.asdict(step),
                "memory": {**dataclasses.asdict(step.memory), "total": step.memory.total}}
        return values


def make_plan(config: Config, topology: Topology, say: Callable[[str], Any] = print) -> Plan:
    """Plans a training step; on a TPU topology it is compiled (minutes for a large model).

    Args:
      config: from `load_config`.
      topology: from `find_topology`.
      say: takes a line on what goes on.

    Raises:
      ConfigError: mesh, batch or backend do not fit the topology, or there is no compiler.
      OutOfMemoryError: the compiler could not make the step fit.
    """
    device = topology.device
    config, _ = resolve(config, device)
    sizes = sharding.mesh_sizes(config.mesh, topology.n_devices)
    compiles = device.platform == "tpu"
    mesh: Any = jax.sharding.AbstractMesh(sizes, MESH_AXES)
    sharding.check_batch(mesh, config.train.batch_size, "train.batch_size",
                         config.train.grad_accumulation)
    if compiles:
        mesh = sharding.make_mesh(config.mesh, compile_only_devices(topology))
    # The shapes of parameters depend on no backend, and cuDNN's cannot even be traced without one.
    model, step = build_model(config if compiles else portable(config), device), None
    if compiles:
        say(f"compiling the training step of {config.name} for {topology.n_devices} x "
            f"{device.kind} (minutes for a large model) …")
        step = compile_step(config, model, mesh, device.platform)
    return _assemble(config, topology, model, mesh, step)


def _assemble(config: Config, topology: Topology, model: Any, mesh: Any,
              step: CompiledStep | None) -> Plan:
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    _, state, _ = sharded_init(model, optimizer, config, mesh)
    tokens = config.train.batch_size * config.data.context
    flops = training_flops_per_token(config) * tokens
    chip, limit = topology.chip, None
    if step is not None:
        gradients = sum(map(device_bytes, jax.tree.leaves(state.params)))
        unit = mesh.shape["data"] * mesh.shape["fsdp"] * config.train.grad_accumulation
        limit = largest_batch(step.memory, gradients, config.train.batch_size, unit,
                              int(USABLE * chip.memory_bytes))
    bound = roofline(
        flops / topology.n_devices, step.traffic.memory if step else None,
        sum(step.traffic.sent.values()) if step else None,
        peak_flops=choose(topology.device).peak_flops, memory_bandwidth=chip.memory_bandwidth,
        link_bandwidth=chip.link_bandwidth * topology.links)
    return Plan(config, topology, dict(mesh.shape), count_parameters(model), tokens, flops,
                sum(map(device_bytes, jax.tree.leaves(state))), step, bound, limit, _versions())


def _versions() -> dict[str, str]:
    found = {}
    for package in ("hippocampus", "jax", "libtpu"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
