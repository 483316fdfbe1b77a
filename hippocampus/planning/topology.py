"""Names of machines that are not here: "v4:2x2x1" is a TPU slice, "h100x8" a node of GPUs."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from hippocampus.devices import Chip, Device, chip
from hippocampus.errors import ConfigError

# Generation -> (the kind as JAX names it, shapes that people rent).
_TPUS = {
    "v2": ("TPU v2", "2x2 4x4 8x8 16x16"),
    "v3": ("TPU v3", "2x2 4x4 4x8 8x8 8x16 16x16"),
    "v4": ("TPU v4", "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"),
    "v5e": ("TPU v5 lite", "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
    "v5p": ("TPU v5", "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"),
    "v6e": ("TPU v6 lite", "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"),
}
_GPUS = {
    "h100": Device("gpu", "NVIDIA H100 80GB HBM3", 9.0),
    "h200": Device("gpu", "NVIDIA H200", 9.0),
    "a100": Device("gpu", "NVIDIA A100-SXM4-80GB", 8.0),
    "a100-40gb": Device("gpu", "NVIDIA A100-SXM4-40GB", 8.0),
    "l4": Device("gpu", "NVIDIA L4", 8.9),
    "t4": Device("gpu", "Tesla T4", 7.5),
}
# On real v4 and v5p slices the two cores of a chip are one JAX device.
_TWO_CORES_AS_ONE = ("v4", "v5p")
# Accelerator types (v3-8) count cores, except v5litepod-n and v6e-n, which count chips.
_CORES_PER_CHIP = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2, "v5litepod": 1, "v5e": 1, "v6e": 1}


@dataclass(frozen=True)
class Topology:
    """A number of devices of one kind.

    Attributes:
      name: as it was given.
      device: their kind.
      n_devices: as JAX counts them.
      shape: chips along each dimension of the slice; () for GPUs.
      chip: the vendor's figures of a device.
    """

    name: str
    device: Device
    n_devices: int
    shape: tuple[int, ...]
    chip: Chip

    @property
    def links(self) -> int:
        """Links of a chip that lead to another chip: one along a side of 2, two along more."""
        if not self.shape:
            return self.chip.links if self.n_devices > 1 else 0
        return min(self.chip.links, sum(min(2, side - 1) for side in self.shape))


def find_topology(name: str) -> Topology:
    """Reads a name; touches no device and no libtpu.

    Args:
      name: "v4:2x2x1" (generation and chips along each side), an accelerator type ("v3-8",
        "v5litepod-16"), or GPUs of one host ("h100x8").

    Raises:
      ConfigError: unknown, with the nearest names.
    """
    text = _from_accelerator_type(name.strip().lower())
    if found := re.fullmatch(r"(v\d\w?):(\d+(?:x\d+){1,2})", text):
        generation, sides = found[1], tuple(int(side) for side in found[2].split("x"))
        if generation in _TPUS and 1 <= math.prod(sides) <= 10_000:
            device = Device("tpu", _TPUS[generation][0])
            facts = chip(device)
            assert facts is not None
            cores = 2 if generation in ("v2", "v3") else 1
            return Topology(text, device, math.prod(sides) * cores, sides, facts)
    if found := re.fullmatch(r"([a-z]\d+(?:-\d+gb)?)(?:x(\d+))?", text):
        n = int(found[2] or 1)
        if found[1] in _GPUS and 1 <= n <= 16:
            device = _GPUS[found[1]]
            facts = chip(device)
            assert facts is not None
            return Topology(text, device, n, (), facts)
    raise ConfigError(f"no topology {name!r}", nearest(name))


def known_names() -> list[str]:
    """Names to choose from; other shapes of the same generations work too."""
    tpus = [f"{generation}:{shape}" for generation, (_, shapes) in _TPUS.items()
            for shape in shapes.split()]
    return tpus + [f"{gpu}x{n}" for gpu in _GPUS for n in (1, 8)]


def slices(topology: Topology) -> list[Topology]:
    """The usual slices of a TPU's generation, the smallest first."""
    generation = topology.name.partition(":")[0]
    return [find_topology(f"{generation}:{shape}") for shape in _TPUS[generation][1].split()]


def nearest(name: str) -> str:
    """A hint with the names most like one."""
    known = known_names()
    close = difflib.get_close_matches(name.strip().lower(), known, n=3, cutoff=0.5)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"such as {', '.join(f'{generation}:{shapes.split()[0]}' for generation, (_, shapes) in _TPUS.items())}, h100x8"  # noqa: E501


def prepare_environment() -> None:
    """Settings that libtpu reads when it is loaded, so that it looks for no TPU.

    JAX must not have been imported yet for JAX_PLATFORMS to count: on a TPU host the chips are
    then left alone. Values that are set already stay.
    """
    for name, value in {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1",
                        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3",
                        "TPU_MIN_LOG_LEVEL": "3", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}.items():
        os.environ.setdefault(name, value)


def has_compiler() -> bool:
    """Whether libtpu, the compiler for TPUs, is installed."""
    return importlib.util.find_spec("libtpu") is not None


def compile_only_devices(topology: Topology) -> list[Any]:
    """Devices that programs can be compiled for, and not run on.

    Raises:
      ConfigError: no libtpu, another process that has it loaded, or a shape that it refuses.
    """
    if not has_compiler():
        raise ConfigError(f"compiling for {topology.device.kind} needs libtpu, which is not "
                          "installed", "pip install '.[plan]' (about 700 MB; no TPU is needed)")
    from jax.experimental import topologies

    generation, _, sides = topology.name.partition(":")
    options: dict[str, Any] = {}
    if generation in _TWO_CORES_AS_ONE:
        options["chip_config_name"] = "megacore"
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{sides}", **options)
    except Exception as error:  # libtpu's refusals come as JaxRuntimeError and as ValueError
        raise _refusal(topology, str(error)) from error
    return list(described.devices)


def _refusal(topology: Topology, text: str) -> ConfigError:
    if "already in use" in text or "libtpu_lockfile" in text or "MULTIPLE_LIBTPU" in text:
        return ConfigError("another process has libtpu loaded",
                           "wait for it, or set ALLOW_MULTIPLE_LIBTPU_LOAD=1")
    first = (text.strip().splitlines() or ["no reason given"])[0][:160]
    hint = nearest(topology.name)
    if math.prod(topology.shape) == 1:
        hint = f"this libtpu knows whole hosts only; use {topology.name.split(':')[0]}:2x2"
    elif "divisible" in text or "bounds" in text:
        hint = f"a slice is made of hosts of 2x2 chips; {hint}"
    return ConfigError(f"libtpu refuses {topology.name}: {first}", hint)


def _from_accelerator_type(name: str) -> str:
    """"v3-8" as "v3:2x2", where a usual shape has that many chips; else the name as it is."""
    found = re.fullmatch(r"(v\d\w?|v5litepod)-(\d+)", name)
    if not found or found[1] not in _CORES_PER_CHIP:
        return name
    generation = "v5e" if found[1] == "v5litepod" else found[1]
    chips = int(found[2]) / _CORES_PER_CHIP[found[1]]
    for shape in _TPUS[generation][1].split():
        if math.prod(map(int, shape.split("x"))) == chips:
            return f"{generation}:{shape}"
    return name
