"""What can be said of a machine before anything is trained on it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import uuid
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp

from hippocampus.devices import choose, this_device

LEAST_FREE_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One check: its name, whether it is good, what was found, and what to do about it."""

    name: str
    good: bool
    text: str
    hint: str = ""


def diagnose(workdir: Path) -> list[Finding]:
    """All checks, in the order a person would ask them."""
    return [_python(), _packages(), _plugins(), _devices(), _computes(), _choices(),
            _disk(workdir), _writes(workdir), _hub()]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", good, f"{platform.python_version()} on {platform.platform()}",
                   "" if good else "hippocampus needs Python 3.11 or newer")


def _packages() -> Finding:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "datasets")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return Finding("packages", not missing, ", ".join(found),
                   f"pip install {' '.join(missing)}" if missing else "")


def _plugins() -> Finding:
    """An accelerator plugin of another version than jax is silently left out by JAX."""
    version = metadata.version("jax")
    plugins = {d.name: d.version for d in metadata.distributions()
               if d.name and d.name.startswith(("jax-cuda", "jax_cuda", "jax-metal"))}
    wrong = [f"{name} {v}" for name, v in plugins.items()
             if "metal" in name or v.split(".")[:3] != version.split(".")[:3]]
    text = ", ".join(f"{name} {v}" for name, v in sorted(plugins.items())) or "none"
    return Finding("plugins", not wrong, text,
                   f"{wrong[0]} does not fit jax {version}: install hippocampus with one "
                   "accelerator extra" if wrong else "")


def _devices() -> Finding:
    devices = jax.devices()
    text = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    hint = ""
    if devices[0].platform == "cpu":
        if sys.platform == "darwin" and platform.machine() == "arm64":
            hint = ("on Apple silicon the CPU is used: the Metal plugin of JAX is not maintained "
                    "and does not run these versions")
        elif shutil.which("nvidia-smi"):
            hint = ("there is an NVIDIA driver, but JAX sees no GPU: "
                    "pip install 'hippocampus[cuda13]'")
        elif Path("/dev/accel0").exists():
            hint = "there is a TPU, but JAX does not see it: pip install 'hippocampus[tpu]'"
        text += f", {os.cpu_count()} cores"
    return Finding("devices", True, text, hint)


def _computes() -> Finding:
    """A small product whose result is known."""
    try:
        result = float((jnp.ones((64, 64)) @ jnp.ones((64, 64))).sum())
    except Exception as error:  # whatever a broken driver raises
        return Finding("computes", False, f"{type(error).__name__}: {error}".splitlines()[0],
                       "the device is there but does not work: check its driver")
    return Finding("computes", result == 64.0**3, f"64 x 64 product sums to {result:g}")


def _choices() -> Finding:
    choice = choose(this_device())
    return Finding("auto", True, f"compute_dtype {choice.compute_dtype}, attention "
                   f"{choice.attention}, scan {choice.scan}")


def _disk(workdir: Path) -> Finding:
    nearest = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    free = shutil.disk_usage(nearest).free / 2**30
    good = free >= LEAST_FREE_GIB
    return Finding("disk", good, f"{free:.1f} GiB free at {nearest}",
                   "" if good else f"less than {LEAST_FREE_GIB:g} GiB: checkpoints may not fit")


def _writes(workdir: Path) -> Finding:
    created = not workdir.exists()
    probe = workdir / f".doctor-{uuid.uuid4().hex}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_text("ok")
        probe.unlink()
        if created:
            workdir.rmdir()
    except OSError as error:
        return Finding("write test", False, f"{workdir}: {error.strerror}",
                       "choose another --workdir")
    return Finding("write test", True, f"{workdir} can be written")


def _hub() -> Finding:
    """Offline is fine: the quickstart and local files need no hub."""
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Finding("hub", True, f"{'offline by setting' if offline else 'online allowed'}, "
                   f"cache {cache}")
