"""A profile of training steps: the time of every component beside the least it could take."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from rich import box
from rich.console import RenderableType
from rich.table import Table

from hippocampus.config import Config
from hippocampus.devices import chip, choose, this_device
from hippocampus.errors import DataError
from hippocampus.models.flops import training_flops_by_component
from hippocampus.planning import hlo
from hippocampus.planning.roofline import roofline
from hippocampus.planning.traffic import memory_traffic
from hippocampus.profiling.components import COMPONENTS, Origin, origin_of, origins
from hippocampus.profiling.timeline import Timeline, share_out
from hippocampus.profiling.trace import DeviceTrace, Event

LARGEST = 30
"""Instructions that are kept by name."""


@dataclass(frozen=True)
class Component:
    """One part of a step, per step and device; seconds, or None where it is not known.

    Attributes:
      name: one of `COMPONENTS`.
      forward, backward: time spent.
      flops: of its matrix products, counted from the config.
      bytes: that the compiled program's instructions read and write.
      floor: the least time for both, at the vendor's figures.
    """

    name: str
    forward: float
    backward: float
    flops: float
    bytes: float
    floor: float | None

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def of_roofline(self) -> float | None:
        """Share of the roofline that is reached."""
        return self.floor / self.seconds if self.floor and self.seconds else None


@dataclass(frozen=True)
class Profile:
    """Where the time of a training step goes, on the average of the traced steps and devices.

    Attributes:
      device: as JAX names it.
      devices: in the mesh.
      steps: that were traced.
      seconds: of a step, from the first instruction of one to the first of the next.
      components: in the order of `COMPONENTS`; with `outside` and `idle` they are all of `seconds`.
      outside: other programs and transfers, while nothing of the step ran.
      idle: nothing ran.
      idle_between: the part of `idle` between two steps; None where they cannot be told apart.
      largest: (instruction, component, scopes, seconds) of those that take the most time.
    """

    device: str
    devices: int
    steps: int
    seconds: float
    components: tuple[Component, ...]
    outside: float
    idle: float
    idle_between: float | None
    largest: tuple[tuple[str, str, str, float], ...]

    def to_json(self) -> str:
        """As profile.json has it."""
        content = dataclasses.asdict(self)
        for entry, component in zip(content["components"], self.components, strict=True):
            entry |= {"seconds": component.seconds, "of_step": component.seconds / self.seconds,
                      "of_roofline": component.of_roofline}
        content["largest"] = [dict(zip(("instruction", "component", "scopes", "seconds"), row,
                                       strict=True)) for row in self.largest]
        return json.dumps(content, indent=2) + "\n"

    def render(self) -> RenderableType:
        """The table for a terminal."""
        table = Table(title=f"one step: {self.seconds * 1e3:.2f} ms on "
                      f"{self.devices} x {self.device}, mean of {self.steps}",
                      title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True,
                      pad_edge=False)  # 80 columns hold it
        table.add_column("component", no_wrap=True)
        for column in ("ms", "of step", "forward", "backward", "roofline", "reached"):
            table.add_column(column, justify="right")
        for part in self.components:
            if part.seconds:
                table.add_row(part.name, _ms(part.seconds), f"{part.seconds / self.seconds:.1%}",
                              _ms(part.forward), _ms(part.backward), _ms(part.floor),
                              "" if part.of_roofline is None else f"{part.of_roofline:.0%}")
        inside = None if self.idle_between is None else self.idle - self.idle_between
        for name, seconds in (("outside the step", self.outside),
                              ("idle between steps", self.idle_between),
                              ("idle within steps" if inside is not None else "idle",
                               self.idle if inside is None else inside)):
            if seconds is not None:
                table.add_row(name, _ms(seconds), f"{seconds / self.seconds:.1%}", "", "", "", "")
        return table


def make_profile(devices: Sequence[DeviceTrace], text: str, steps: int, config: Config,
                 n_devices: int) -> Profile:
    """Reads the time of the components out of a trace.

    Args:
      devices: of this process.
      text: of the compiled step (`jax.stages.Compiled.as_text()`).
      steps: that were traced.
      config: of the run, resolved.
      n_devices: in the mesh.

    Raises:
      DataError: the step is not in the trace.
    """
    module = hlo.parse(text)
    program = text.split(None, 2)[1].rstrip(",")  # "HloModule jit_step, …"
    known = origins(module)
    lines = [_timeline(device, program, known, steps) for device in devices]
    found = [line for line in lines if line is not None]
    if not found:
        raise DataError(f"the trace has no instruction of {program}", "train with --profile again")
    scopes = {e.instruction: e.op_name for device in devices for e in device.events if e.op_name}

    def origin(instruction: str) -> Origin:
        return known.get(instruction) or origin_of(scopes.get(instruction, ""))

    scale = 1e-9 / steps / len(found)
    spent: dict[str, float] = {}
    for line in found:
        for instruction, ns in line.by_instruction.items():
            spent[instruction] = spent.get(instruction, 0.0) + ns
    forward, backward = dict.fromkeys(COMPONENTS, 0.0), dict.fromkeys(COMPONENTS, 0.0)
    for instruction, ns in spent.items():
        own = origin(instruction)
        (backward if own.backward else forward)[own.component] += ns * scale
    between = [line.idle_between for line in found if line.idle_between is not None]
    largest = tuple((name, origin(name).component, origin(name).op_name, ns * scale)
                    for name, ns in sorted(spent.items(), key=lambda item: -item[1])[:LARGEST])
    return Profile(
        jax.devices()[0].device_kind, n_devices, steps, sum(line.total for line in found) * scale,
        _components(forward, backward, module, known, config, n_devices),
        sum(line.outside for line in found) * scale, sum(line.idle for line in found) * scale,
        sum(between) * scale if len(between) == len(found) else None, largest)


def _timeline(device: DeviceTrace, program: str, known: Mapping[str, Origin],
              steps: int) -> Timeline | None:
    """None where the device ran nothing of the program."""
    events = [e for e in device.events
              if not (e.instruction in known and known[e.instruction].control_flow)]

    def belongs(event: Event) -> bool:
        return bool(event.instruction) and (
            event.module.partition("(")[0] == program if event.module
            else event.instruction in known)

    return share_out(events, belongs, steps) if any(map(belongs, events)) else None


def _components(forward: Mapping[str, float], backward: Mapping[str, float], module: hlo.Module,
                known: Mapping[str, Origin], config: Config, n_devices: int
                ) -> tuple[Component, ...]:
    tokens = config.train.batch_size * config.data.context / n_devices
    flops = training_flops_by_component(config)
    moved: Counter[str] = Counter()
    for instruction, size in memory_traffic(module):
        moved[known[instruction.name].component] += size
    device = this_device()
    facts, peak = chip(device), choose(device).peak_flops

    def floor(name: str) -> float | None:
        if facts is None:
            return None
        return roofline(flops.get(name, 0.0) * tokens, moved[name], None, peak_flops=peak,
                        memory_bandwidth=facts.memory_bandwidth, link_bandwidth=0.0).seconds

    return tuple(Component(name, forward[name], backward[name],
                           flops.get(name, 0.0) * tokens, moved[name], floor(name))
                 for name in COMPONENTS)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"
