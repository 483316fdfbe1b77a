"""Where data parallelism stops: compute against the gradients' all-reduce, slice by slice.

Arithmetic, without a compiler: every device computes its share of the FLOPs at the vendor's peak
and sends a ring's share of the float32 gradients once a step. A real device computes more slowly,
so the links matter less than here; latencies of the collective are not counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hippocampus.config import Config
from hippocampus.devices import choose, resolve
from hippocampus.errors import ConfigError
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.models.flops import training_flops_per_token
from hippocampus.planning.topology import Topology, slices
from hippocampus.planning.traffic import ring_bytes

_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class Scale:
    """A step on one slice; seconds at the vendor's figures.

    Attributes:
      topology: the slice.
      rows: sequences on each device.
      compute: seconds of the model's FLOPs.
      links: seconds of the gradients' all-reduce.
      least_rows: sequences on each device with which the two would be equal.
    """

    topology: Topology
    rows: float
    compute: float
    links: float
    least_rows: float

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values."""
        return {**dataclasses.asdict(self), "topology": self.topology.name,
                "devices": self.topology.n_devices}


def scaling(config: Config, topology: Topology, rows: float = 0) -> tuple[Scale, ...]:
    """The same model on every usual slice of a generation, data-parallel.

    Args:
      config: from `load_config`.
      topology: names the generation.
      rows: sequences on each device; 0 = `train.batch_size` shared out, as long as every device
        gets one.

    Raises:
      ConfigError: the mesh shards more than the batch, or there are no figures for the device.
    """
    if (config.mesh.fsdp, config.mesh.tensor, config.mesh.sequence) != (1, 1, 1):
        raise ConfigError("--scaling is about data parallelism",
                          "leave mesh.fsdp, mesh.tensor and mesh.sequence at 1")
    if not topology.shape:
        raise ConfigError(f"no slices are known for {topology.name}", "name a TPU, such as v5e:2x4")
    config, _ = resolve(config, topology.device)
    per_row = training_flops_per_token(config) * config.data.context
    gradients = _GRADIENT_BYTES * count_parameters(build_model(config, topology.device))
    batch = config.train.batch_size
    return tuple(_scale(of, per_row, gradients, rows or batch / of.n_devices)
                 for of in slices(topology) if rows or of.n_devices <= batch)


def _scale(topology: Topology, flops_per_row: float, gradients: float, rows: float) -> Scale:
    n, chip = topology.n_devices, topology.chip
    row = flops_per_row / choose(topology.device).peak_flops
    bandwidth = chip.link_bandwidth * topology.links
    links = ring_bytes("all-reduce", gradients, n) / bandwidth if bandwidth else 0.0
    return Scale(topology, rows, row * rows, links, links / row)


def describe_scaling(scales: tuple[Scale, ...]) -> str:
    """A line per slice, under a heading."""
    return "".join(line + "\n" for line in _lines(scales))


def _lines(scales: tuple[Scale, ...]) -> Iterator[str]:
    yield (f"{'slice':<12}{'devices':>8}{'rows each':>10}{'compute ms':>11}{'links ms':>9}"
           f"{'links/compute':>14}{'equal at rows':>14}")
    for scale in scales:
        yield (f"{scale.topology.name:<12}{scale.topology.n_devices:>8}{scale.rows:>10.3g}"
               f"{scale.compute * 1e3:>11.2f}{scale.links * 1e3:>9.2f}"
               f"{scale.links / scale.compute:>14.2f}{scale.least_rows:>14.2f}")
