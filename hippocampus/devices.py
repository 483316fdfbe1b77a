"""What each kind of device does best: the one place where a config's "auto" is decided."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from dataclasses import dataclass

import jax

from hippocampus import xla_flags
from hippocampus.config import Config
from hippocampus.config_files import fields, with_fields
from hippocampus.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A kind of device, as JAX names it.

    `compute_capability` is NVIDIA's (7.5 for a T4, 9.0 for an H100); 0 elsewhere.
    """

    platform: str
    kind: str = ""
    compute_capability: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What "auto" becomes on a device, and its dense peak in that dtype in FLOP/s (0: unknown)."""

    compute_dtype: str
    attention: str
    scan: str
    peak_flops: float = 0.0


# First match counts: (platform, pattern of the kind, least compute capability) -> choice.
# bfloat16 is 2.4-3.2 times slower than float32 on CPUs; a T4 has no fast bfloat16 and no fused
# attention, and float16 would need loss scaling. Compiled for TPUs, the chunked scan with its
# gradient moves 12 (v4) to 54 (v3) array-sizes through the memory, the associative one 43 to 72,
# and takes twice as long to compile; the kernels, compiled for v3 to v6e, move every array once.
# Fused attention moves a twentieth of what XLA's does; its bfloat16 products do not compile for v2
# and v3. On an H100 the kernels of the scans take a quarter (gated, bfloat16), half (plain) and a
# 21st (S6) of the associative scan's time. Peaks are the vendors' dense figures per JAX device (a
# v2/v3 device is half a chip).
_TABLE: tuple[tuple[str, str, float, Choice], ...] = (
    ("tpu", r"v2", 0, Choice("bfloat16", "xla", "chunked", 22.5e12)),
    ("tpu", r"v3", 0, Choice("bfloat16", "xla", "pallas", 61.5e12)),
    ("tpu", r"v4", 0, Choice("bfloat16", "flash", "pallas", 275e12)),
    ("tpu", r"v5 ?lite|v5e", 0, Choice("bfloat16", "flash", "pallas", 197e12)),
    ("tpu", r"v5", 0, Choice("bfloat16", "flash", "pallas", 459e12)),
    ("tpu", r"v6", 0, Choice("bfloat16", "flash", "pallas", 918e12)),
    ("tpu", r"", 0, Choice("bfloat16", "flash", "chunked")),
    ("gpu", r"H100|H200|H800|GH200", 9.0, Choice("bfloat16", "cudnn", "pallas", 989e12)),
    ("gpu", r"A100|A800", 8.0, Choice("bfloat16", "cudnn", "associative", 312e12)),
    ("gpu", r"L4\b", 8.0, Choice("bfloat16", "cudnn", "associative", 121e12)),
    ("gpu", r"", 8.0, Choice("bfloat16", "cudnn", "associative")),
    ("gpu", r"T4", 0, Choice("float32", "xla", "associative", 8.1e12)),
    ("gpu", r"", 0, Choice("float32", "xla", "associative")),
    ("cpu", r"", 0, Choice("float32", "xla", "chunked")),
)

_FUSED_ATTENTION = {"cudnn": "cuDNN attention needs an NVIDIA GPU from Ampere on",
                    "flash": "flash attention needs a TPU v4 or later"}


@dataclass(frozen=True)
class Chip:
    """What the vendor states of one JAX device.

    Attributes:
      memory_bytes: of the main memory (HBM); the runtime keeps a few per cent of it.
      memory_bandwidth: of the main memory, bytes/s.
      link_bandwidth: of one link to a neighbour, in one direction, bytes/s.
      links: links of the whole chip.
    """

    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    links: int


_GIB = 2**30

# (platform, pattern of the kind) -> facts; first match counts. A v2/v3 device is one of two cores
# of a chip and has half its memory; a v4/v5p device is a chip whose two cores work as one.
# TPU memory: cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e}. Links: v2 496 Gbit/s (Norrie et al.
# 2021, The design process for Google's training chips, table 1); v3 4 x 70 and v4 6 x 50 GB/s
# (Jouppi et al. 2023, arXiv:2304.01433, table 4); v5e 400, v5p 1200 and v6e 800 GB/s per chip in
# both directions together (the same pages). GPUs: NVIDIA's datasheets; NVLink, or PCIe for L4, T4.
_CHIPS: tuple[tuple[str, str, Chip], ...] = (
    ("tpu", r"v2", Chip(8 * _GIB, 350e9, 62e9, 4)),
    ("tpu", r"v3", Chip(16 * _GIB, 450e9, 70e9, 4)),
    ("tpu", r"v4", Chip(32 * _GIB, 1228e9, 50e9, 6)),
    ("tpu", r"v5 ?lite|v5e", Chip(16 * _GIB, 819e9, 50e9, 4)),
    ("tpu", r"v5", Chip(95 * _GIB, 2765e9, 100e9, 6)),
    ("tpu", r"v6", Chip(32 * _GIB, 1640e9, 100e9, 4)),
    ("gpu", r"H200", Chip(141 * 10**9, 4.8e12, 450e9, 1)),
    ("gpu", r"H100|H800", Chip(80 * 10**9, 3.35e12, 450e9, 1)),
    ("gpu", r"A100.*40", Chip(40 * 10**9, 1.555e12, 300e9, 1)),
    ("gpu", r"A100|A800", Chip(80 * 10**9, 2.039e12, 300e9, 1)),
    ("gpu", r"L4\b", Chip(24 * 10**9, 300e9, 32e9, 1)),
    ("gpu", r"T4", Chip(16 * 10**9, 320e9, 16e9, 1)),
)


def chip(device: Device) -> Chip | None:
    """The vendor's figures for a device, or None where the table has none."""
    for platform, kind, facts in _CHIPS:
        if platform == device.platform and re.search(kind, device.kind, re.IGNORECASE):
            return facts
    return None


_AUTOMATIC: dict[str, dict[str, str]] = {
    "hybrid": {"model.attention.backend": "attention", "model.ssm.backend": "scan"},
    "equilibrium": {"model.hopfield.backend": "attention", "model.ssm.backend": "scan",
                    "model.cell.ssm.backend": "scan"},
    "chopt": {"model.backend": "attention"},
    "buu": {"model.backend": "attention", "model.adapters.ssm.backend": "scan"},
}
"""Of each model family: fields that can be "auto" -> what of a `Choice` decides them."""


def choose(device: Device) -> Choice:
    """The row of the table for a device; an unknown platform gets the CPU's portable choices."""
    for platform, kind, capability, choice in _TABLE:
        if (platform == device.platform and device.compute_capability >= capability
                and re.search(kind, device.kind, re.IGNORECASE)):
            return choice
    return _TABLE[-1][-1]


def this_device() -> Device:
    """The kind of the first device that JAX sees."""
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    capability = float(getattr(device, "compute_capability", 0) or 0) if platform == "gpu" else 0.0
    return Device(platform, device.device_kind, capability)


def resolve(config: Config, device: Device | None = None,
            automatic: tuple[str, ...] = ()) -> tuple[Config, tuple[str, ...]]:
    """Replaces every "auto" by what suits the device.

    Args:
      config: a checked config.
      device: default: `this_device()`.
      automatic: fields that a saved config had resolved elsewhere; they are decided anew.

    Returns:
      The resolved config, and the dotted names of the fields that were decided.

    Raises:
      ConfigError: a backend was asked for that the device does not have.
    """
    device = device or this_device()
    choice = choose(device)
    known, kinds = fields(config), _AUTOMATIC[config.model.family]
    if config.train.deterministic and device.platform == "gpu":
        for name, kind in kinds.items():
            if kind == "attention" and known[name] == "cudnn":
                raise ConfigError(f"{name} is cudnn with train.deterministic",
                                  "cuDNN adds gradients in any order; use auto or xla")
        choice = dataclasses.replace(choice, attention="xla")
    scans = {name: scan_backend(known[name.removesuffix("backend") + "kind"], device, choice)
             for name, kind in kinds.items() if kind == "scan"}
    best = {"model.compute_dtype": choice.compute_dtype,
            **{name: choice.attention for name in kinds if name not in scans}, **scans,
            **({"model.backbone.dtype": choice.compute_dtype} if "model.backbone.dtype" in known
               else {}),
            "loss.backend": _loss_backend(config.model.vocab_size, device)}
    decided = tuple(name for name in best if known[name] == "auto" or name in automatic)
    config = with_fields(config, {name: best[name] for name in decided})
    _check_backends(config, device, choice.attention)
    if device.platform != "cpu" or "pallas" in (fields(config)[name] for name in scans):
        import_kernels()
    if "model.max_length" in known:
        length = known["model.max_length"] or config.data.context
        config = with_fields(config, {"model.max_length": length})
    return config, decided


def import_kernels() -> None:
    """Imports what kernels are written in, before anything that calls them is traced.

    It brings settings of its own to JAX. Imported in the middle of a trace it would make the
    second call of that program another program, which is traced and compiled again.
    """
    for name in ("pallas", "pallas.tpu", "pallas.mosaic_gpu", "pallas.fuser"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"jax.experimental.{name}")


def scan_backend(kind: str, device: Device, choice: Choice) -> str:
    """The scan of a kind of state space on a device.

    SSD has products of chunks for every device; S6 has no kernel for TPUs.
    """
    if kind == "ssd" or (kind == "s6" and device.platform == "tpu"):
        return "chunked"
    return choice.scan


def portable(config: Config) -> Config:
    """The config with attention that can be traced without the device that it is for."""
    kinds = _AUTOMATIC[config.model.family]
    return with_fields(config, {name: "xla" for name, kind in kinds.items() if kind == "attention"})


def _check_backends(config: Config, device: Device, fused: str) -> None:
    """Refuses kernels that a device does not have; `fused`: the attention that suits it."""
    where = device.kind or device.platform
    for name, kind in _AUTOMATIC[config.model.family].items():
        asked = fields(config)[name]
        if kind == "attention" and asked in _FUSED_ATTENTION and asked != fused:
            raise ConfigError(f"{name} is {asked} on {where}",
                              f"{_FUSED_ATTENTION[asked]}; use auto or xla")
    if config.loss.backend == "fused" and not _is_hopper(device):
        raise ConfigError(f"loss.backend is fused on {where}",
                          "its kernel is for NVIDIA Hopper; use auto or chunked")


def prepare_deterministic() -> None:
    """Asks XLA for GPU kernels that give the same bits every time; before JAX sees a device.

    It takes no atomic additions then, and chooses no kernel by timing.
    """
    xla_flags.prepare(xla_flags.DETERMINISTIC)


def check_deterministic(config: Config) -> None:
    """Refuses to train with `train.deterministic` where XLA was not asked in time.

    Raises:
      ConfigError: on a GPU, without the flag of `prepare_deterministic`.
    """
    wanted = config.train.deterministic and this_device().platform == "gpu"
    if wanted and not xla_flags.asked(xla_flags.DETERMINISTIC):
        raise ConfigError(f"train.deterministic needs XLA_FLAGS={xla_flags.DETERMINISTIC}",
                          "set it before JAX is imported; python -m hippocampus.train does")


def _loss_backend(vocab_size: int, device: Device) -> str:
    """Whole logits are the fastest while they are small; a word vocabulary would not fit.

    With 50,257 ids on an H100 the kernel takes 12.5 ms, chunks 16.6 (docs/performance.md).
    """
    if vocab_size <= 8192:
        return "full"
    return "fused" if _is_hopper(device) else "chunked"


def _is_hopper(device: Device) -> bool:
    """Later NVIDIA GPUs do not run Hopper's kernels."""
    return device.platform == "gpu" and 9.0 <= device.compute_capability < 10.0
